"""From a data set to the micro-batches of one rank.

Each rank works out alone the order of an epoch (`Loader.order`) and its own part, every N-th micro-batch on N ranks, so the number
of samples seen is the whole position: a resumed run slices. Anything with `__len__` and `__getitem__` (or `__iter__`) is a data set.
"""
from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from collators import IGNORE
from state import Batch, SampleError, UsageError
from world import set_seed


class Request(NamedTuple):
    """What a micro-batch is to be made of: sample numbers, or of a stream the samples. Picklable, for worker processes."""

    samples: list | None            # None: they are to be fetched from the data set
    numbers: range | list[int]      # of the samples, in the data set or in the pass over a stream: what seeds and messages go by
    num_samples: int                # 0: filler
    epoch: int


class Reader:
    """Requests to micro-batches, in the training process or a worker. What collators (and in workers data sets) draw at random for a sample
    depends on seed, epoch and its number alone, so it is the same for any batch size, number of ranks and workers, and after a resume."""

    def __init__(self, dataset, collate: Callable[..., Batch], seed: int, vocab_size: int | None, num_labels: int | None):
        self.dataset, self.collate, self.seed, self.vocab_size, self.num_labels = dataset, collate, seed, vocab_size, num_labels

    def __len__(self) -> int:       # torch asks for one, and then does not use it
        return 0

    def __getitem__(self, request: Request) -> Batch | UsageError:
        in_worker = torch.utils.data.get_worker_info() is not None
        try:
            return self.read(request, in_worker)
        except UsageError as error:
            if in_worker:
                return error        # raised there, torch would wrap it into a traceback
            raise

    def fetch(self, numbers: list[int], seeds: list[int]) -> list | Batch:
        """seeds: for the global generators, where these are a worker's own; none in the training process, whose ones checkpoints keep."""
        if hasattr(self.dataset, "__getitems__"):
            if seeds:
                set_seed(seeds[0])
            return self.dataset.__getitems__(numbers)
        samples = []
        for number, seed in zip_longest(numbers, seeds):
            if seeds:
                set_seed(seed)
            samples.append(self.dataset[number])
        return samples

    def read(self, request: Request, in_worker: bool) -> Batch:
        samples, numbers, draws = request.samples, request.numbers, getattr(self.collate, "random", False)
        seeds = [mix(self.seed, request.epoch, number) for number in numbers] if draws or in_worker else []
        if samples is None:
            samples = self.fetch(numbers, [seed % 2**32 for seed in seeds] if in_worker else [])
        try:
            batch = self.collate(samples, seeds) if draws else self.collate(samples)
        except SampleError as error:
            raise UsageError(f"sample {numbers[error.row]}: {error}") from None
        num_items = batch.get("num_items")
        if num_items is None or int(num_items) != num_items:
            raise UsageError(f"the collator must return num_items, the whole number of label items its loss sums over, not {num_items}: "
                             f"add \"num_items\": int((labels != -100).sum()), or the number of samples")
        if self.vocab_size is not None or self.num_labels is not None:
            check_ids(batch, numbers, self.vocab_size, self.num_labels)
        return {**batch, "num_items": int(num_items) if request.num_samples else 0, "num_samples": request.num_samples}


def mix(*numbers: int) -> int:
    """A seed of 63 bits, other for any other numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


def check_ids(batch: Batch, numbers, vocab_size: int | None, num_labels: int | None) -> None:
    """Token ids in [0, vocab_size), labels in [0, num_labels) or -100; else an error that names the sample. Without num_labels, labels of
    the shape of input_ids are token ids."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if num_labels is None and isinstance(ids, Tensor) and isinstance(labels, Tensor) and labels.shape == ids.shape:
        num_labels = vocab_size
    for key, values, limit, also in (("input_ids", ids, vocab_size, ""), ("labels", labels, num_labels, " (-100 marks what is ignored)")):
        if not isinstance(values, Tensor) or limit is None or values.is_floating_point():
            continue
        bad = ((values < 0) | (values >= limit)) & ((values != IGNORE) | (key == "input_ids"))
        if bad.any():
            row, *place = bad.nonzero()[0].tolist()
            sample = f"sample {numbers[row]}" if len(values) == len(numbers) else f"one of the samples {list(numbers)}"      # packed
            raise UsageError(f"{sample}: {key}{place or ''} is {values[(row, *place)]}, outside 0..{limit - 1}{also}")


class Loader:
    """The micro-batches of one rank, in an order that depends only on (seed, epoch), with group_by_length on the round size too.

    dataset: map-style (`__len__` and `__getitem__`, or torch's batched `__getitems__`), or iterable, read in its own order; one with
    state_dict and load_state_dict, as those of the package datasets, can `seek`; shuffled ones cannot.
    collate: list of samples -> batch of tensors with `num_items`; one with the attribute `random` set is called with a seed for each
    sample too. shuffle: else in sequence. seed: of the order of each epoch, and of what is drawn. vocab_size, num_labels: if given, what
    `input_ids` and `labels` are checked against. group_by_length: each sample is read once at the start, for the length of its
    `input_ids`. num_workers: processes that fetch and collate; a stream is read in this one, and collated there.

    All ranks get equally many micro-batches. A rank without samples in the last round gets one filler sample, marked by
    num_samples = 0, that the training and evaluation loops give no weight."""

    def __init__(self, dataset, collate: Callable[..., Batch], batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0,
                 shuffle: bool = False, group_by_length: bool = False, drop_last: bool = False, vocab_size: int | None = None,
                 num_labels: int | None = None, num_workers: int = 0, prefetch_factor: int | None = None, persistent_workers: bool = False,
                 pin_memory: bool = False):
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size
        self.seed, self.shuffle, self.drop_last, self.pin_memory = seed, shuffle, drop_last, pin_memory
        self.round_size = batch_size * world_size       # samples of all ranks in one round of micro-batches
        stream = isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__")
        self.num_samples = None if stream else len(dataset)     # None: unknown
        if self.num_samples == 0:
            raise UsageError("the data set is empty: it has 0 samples")
        if drop_last and self.num_samples is not None and self.num_samples < self.round_size:
            raise UsageError(f"--dataloader_drop_last leaves nothing of {self.num_samples} samples: one round of micro-batches "
                             f"takes {batch_size} samples x {world_size} ranks; use a smaller batch or keep the last round")
        uniform = getattr(dataset, "uniform", False)      # in length, and ids in range: Blocks were checked when they were cut
        if uniform:
            vocab_size = num_labels = None
        self.reader = Reader(None if stream else dataset, collate, seed, vocab_size, num_labels)
        self.lengths = read_lengths(dataset, self.num_samples) if group_by_length and not uniform else None
        # by which a resumed run knows its data again, and an order that depends on more than the seed
        self.identity = ("a stream" if stream else f"{self.num_samples} samples") + f" {getattr(dataset, 'digest', '')}".rstrip() \
            + (f" grouped by length in rounds of {self.round_size}" if self.lengths is not None else "")
        self.seeks = stream and hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict") and not is_shuffled(dataset)
        self.sought, self.beginning = False, None       # the next pass goes on in the middle; and where the one after it starts
        self.states: deque[dict] = deque()              # where a stream stood when it was read for the micro-batches that workers prepare,
        self.here: dict | None = None                   # and for the last one they gave
        self.requests, self.workers = Given(), None
        if num_workers:
            self.workers = torch.utils.data.DataLoader(
                self.reader, batch_size=None, sampler=self.requests, num_workers=num_workers, collate_fn=unchanged, prefetch_factor=prefetch_factor,
                persistent_workers=persistent_workers, pin_memory=pin_memory, generator=torch.Generator())   # its own: or it draws from the global one

    def __len__(self) -> int:
        """Micro-batches per epoch, the same on every rank."""
        return self.rounds(self.num_samples)

    def rounds(self, samples: int) -> int:
        return samples // self.round_size if self.drop_last else -(-samples // self.round_size)

    def is_end(self, samples_seen: int) -> bool:
        """Whether a pass is over; of a stream that is only known when it ends."""
        return self.num_samples is not None and self.rounds(self.num_samples - samples_seen) == 0

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Micro-batches of one pass, from the sample at position `start` of its order on."""
        self.requests.iterator = self.plan(epoch, start)
        self.states.clear()
        for batch in map(self.reader.__getitem__, self.requests) if self.workers is None else self.workers:
            if isinstance(batch, UsageError):
                raise batch
            if self.states:
                self.here = self.states.popleft()
            if self.pin_memory and self.workers is None:
                batch = {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
            yield batch

    def position(self) -> dict | None:
        """Where a stream that can seek stands after the last micro-batch, for the checkpoint; all ranks read the same of it."""
        return self.dataset.state_dict() if self.seeks and self.workers is None else self.here

    def seek(self, position: dict | None) -> bool:
        """Has the next pass, which does not start at 0, go on at a `position`. False: it is read again up to there."""
        if self.seeks and position is not None:
            self.beginning, self.sought = self.dataset.state_dict(), True
            self.dataset.load_state_dict(position)
        return self.sought

    def plan(self, epoch: int, start: int) -> Iterator[Request]:
        """What this rank reads in one pass."""
        for at, round_ in enumerate(self.read_stream(epoch, start) if self.num_samples is None else self.order(epoch)[start:].split(self.round_size)):
            if not len(round_) or self.drop_last and len(round_) < self.round_size:
                return
            mine = round_[self.rank * self.batch_size:(self.rank + 1) * self.batch_size]
            num_samples, mine = len(mine), mine if len(mine) else round_[:1]
            if isinstance(mine, Tensor):
                yield Request(None, mine.tolist(), num_samples, epoch)
            else:
                first = start + at * self.round_size + self.rank * self.batch_size * (num_samples > 0)
                yield Request(mine, range(first, first + len(mine)), num_samples, epoch)

    def read_stream(self, epoch: int, start: int) -> Iterator[list]:
        """Rounds of samples."""
        if self.sought:
            self.sought, start = False, 0
        elif self.beginning is not None:        # datasets starts every pass where it was told to once
            self.dataset.load_state_dict(self.beginning)
            self.beginning = None
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)       # of one that shuffles
        samples = islice(iter(self.dataset), start, None)
        while round_ := list(islice(samples, self.round_size)):
            if self.workers is not None and self.seeks:
                self.states.append(self.dataset.state_dict())       # workers read ahead of what is trained on
            yield round_

    def order(self, epoch: int) -> Tensor:
        """Sample numbers (n,) of a pass. group_by_length is the HF Trainer's, where its batch is a round: shuffled, sorted inside
        megabatches of up to 50 rounds, and the longest sample of all first, so that memory runs out early or never."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(self.seed + epoch))
        if self.lengths is not None:
            megabatch = self.round_size * max(1, min(self.num_samples // (4 * self.round_size), 50))
            order = torch.cat([part[self.lengths[part].argsort(descending=True, stable=True)] for part in order.split(megabatch)])
            longest = int(self.lengths[order].argmax())
            order[[0, longest]] = order[[longest, 0]]
        return order


def is_shuffled(stream) -> bool:
    """Whether a stream of the package datasets has a shuffle buffer, which its state leaves out. There is no public way to ask; if the
    private one is gone, all of that package count as shuffled, and are read again on a resume."""
    if type(stream).__module__.partition(".")[0] != "datasets":
        return False
    parts = [getattr(stream, "_ex_iterable", None)]
    for part in parts:
        parts += [getattr(part, "ex_iterable", None)] if hasattr(part, "ex_iterable") else list(getattr(part, "ex_iterables", []))
    return parts == [None] or any(type(part).__name__.startswith("BufferShuffled") for part in parts)


class Given:
    """What to read, for torch's DataLoader, which asks a sampler: given to it for each pass."""

    iterator: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.iterator


def unchanged(batch: Batch) -> Batch:
    return batch


def read_lengths(dataset, num_samples: int | None) -> Tensor:
    """The number of tokens of each sample, (n,)."""
    wanted = "--train_sampling_strategy group_by_length needs samples that can be counted and have input_ids"
    if num_samples is None:
        raise UsageError(f"{wanted}, and the training data is a stream: give data with __len__ and __getitem__, or leave the flag away")
    lengths = []
    for i in range(num_samples):
        sample = dataset[i]
        if not isinstance(sample, Mapping) or "input_ids" not in sample:
            found = f"has {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else f"is a {type(sample).__name__}"
            raise UsageError(f"{wanted}, and sample {i} {found}: give dicts with input_ids, or leave the flag away")
        lengths.append(len(sample["input_ids"]))
    return torch.tensor(lengths)
