"""Data: files to tokens, tokens to blocks, blocks to the micro-batches of one rank.

Each rank works out alone the order of an epoch (`Loader.order`) and its own part, every N-th micro-batch on N ranks, so the number
of samples seen is the whole position: a resumed run slices.
To train on something else, change `build_data`; anything with `__len__` and `__getitem__` (or `__iter__`) goes through `Loader`.
"""
from __future__ import annotations

import glob
import hashlib
import inspect
import os
import platform
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from args import TrainArgs
from collators import IGNORE
from distributed import set_seed
from state import Batch, SampleError, UsageError

# ---------------------------------------------------------------------------------------------------- micro-batches

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
        if isinstance(dataset, Blocks):
            vocab_size = num_labels = None      # they were checked when they were cut
        self.reader = Reader(None if stream else dataset, collate, seed, vocab_size, num_labels)
        self.lengths = read_lengths(dataset, self.num_samples) if group_by_length and not isinstance(dataset, Blocks) else None
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


# ---------------------------------------------------------------------------------------------------- blocks of tokens
class Blocks:
    """Tokens cut into training samples of block_size tokens; each token but the first is a label exactly once. tokens: (N,)
    integers. starts: (n,) first positions of the blocks that belong to this set. A sample is input_ids (T,) = tokens[s:s+T]
    and labels (T,) = the next token of each; past the end, labels are -100."""

    def __init__(self, tokens: Tensor, starts: Tensor, block_size: int, digest: str = ""):
        self.num_tokens, self.starts, self.digest = len(tokens), starts, digest
        self.tokens = torch.cat([tokens, tokens.new_zeros(block_size)])
        self.window = torch.arange(block_size + 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Batch:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        """One gather for the whole batch: no work per sample in Python."""
        positions = self.starts[indices][:, None] + self.window                      # (B, T + 1)
        tokens = self.tokens[positions].long()
        labels = tokens[:, 1:].masked_fill(positions[:, 1:] >= self.num_tokens, IGNORE)
        return {"input_ids": tokens[:, :-1], "labels": labels}


def block_starts(tokens: Tensor, block_size: int, vocab_size: int, what: str) -> Tensor:
    """First positions of consecutive blocks; the last one may be shorter. Checks that there is data, and in range."""
    if len(tokens) <= block_size:
        raise UsageError(f"{what}: {len(tokens)} tokens are not one block of --block_size {block_size} and its next token; "
                         f"give more data or a smaller --block_size")
    if (top := int(tokens.max())) >= vocab_size:
        position = int((tokens >= vocab_size).nonzero()[0, 0])
        raise UsageError(f"{what}: sample {position // block_size} has token {int(tokens[position])} at position "
                         f"{position % block_size}, and the largest is {top}; raise --vocab_size {vocab_size} above it")
    return torch.arange(0, len(tokens) - 1, block_size)


def held_out(block: bytes) -> bool:
    """Whether a block (or a file, by its name) is held-out data: one in twenty, by hash, wherever it stands."""
    return hashlib.sha256(block).digest()[0] < 13


class BlockStream:
    """The same blocks read lazily, one document after the other, in memory of one document and one block. rows: a stream of the package
    datasets, whose place and the bytes not cut yet are the state. part: "train" skips held-out blocks, "eval" keeps only them, None
    keeps all."""

    def __init__(self, rows, column: str, block_size: int, vocab_size: int, part: str | None, what: str, digest: str = ""):
        self.rows, self.column, self.block_size, self.vocab_size = rows, column, block_size, vocab_size
        self.part, self.what, self.digest = part, what, digest
        self.number, self.seen, self.tail, self.at = 0, 0, b"", 0       # documents and bytes read, the last of them, and how many of these are cut
        self.start: tuple[int, int, bytes] | None = None                # where the next pass begins, if not at the beginning

    def state_dict(self) -> dict:
        return {"rows": self.rows.state_dict(), "number": self.number, "seen": self.seen, "tail": self.tail[self.at:].decode("latin-1")}

    def load_state_dict(self, state: dict) -> None:
        self.rows.load_state_dict(state["rows"])
        self.start = state["number"], state["seen"], state["tail"].encode("latin-1")

    def __iter__(self) -> Iterator[Batch]:
        T = self.block_size
        (self.number, self.seen, self.tail), self.at, self.start = self.start or (0, 0, b""), 0, None
        for document in chain([b""], documents(self.rows, self.column, self.number)):       # first what is left of the last one
            if document and max(document) >= self.vocab_size:
                raise UsageError(f"{self.what}: document {self.number} has token {max(document)}; raise --vocab_size {self.vocab_size} above it")
            self.number, self.seen, self.tail, self.at = self.number + bool(document), self.seen + len(document), self.tail[self.at:] + document, 0
            while len(self.tail) - self.at > T:
                self.at += T
                yield from self.sample(self.tail[self.at - T:self.at + 1])
        if self.seen <= T:
            raise UsageError(f"{self.what}: {self.seen} tokens are not one block of --block_size {T} and its next token")
        last, self.tail, self.at = self.tail[self.at:], b"", 0
        if len(last) > 1:
            yield from self.sample(last)

    def sample(self, block: bytes) -> Iterator[Batch]:
        if self.part is None or held_out(block[:self.block_size]) == (self.part == "eval"):
            yield Blocks(to_tokens(block), torch.tensor([0]), self.block_size)[0]


# ---------------------------------------------------------------------------------------------------- where tokens come from
class Data(NamedTuple):
    """Training and held-out samples (or a dict of several named held-out sets), and one line that says what they are, with a digest of
    the training tokens."""

    train: Any
    eval: Any
    about: str
    test: Any = None        # for --do_predict; None: the held-out ones


def build_data(args: TrainArgs) -> Data:
    """The data of --dataset and --eval_dataset as blocks of bytes; by default Python's own source code."""
    cut = args.block_size, args.vocab_size
    by_hash, eval_name = args.eval_dataset is None, args.eval_dataset or args.dataset     # by_hash: blocks of --dataset are held out

    def text(name: str) -> bytes:
        return b"".join(documents(read_rows(name, args), args.text_column))
    test = None
    if args.test_dataset is not None:
        tokens = to_tokens(text(args.test_dataset))
        test = Blocks(tokens, block_starts(tokens, *cut, args.test_dataset), args.block_size)
    if args.streaming:
        sizes = [os.path.getsize(file) for file in find_files(args.dataset) or []]
        digest = hashlib.sha256(repr((args.dataset, args.dataset_config_name, args.text_column, sizes)).encode()).hexdigest()[:16]
        data = Data(BlockStream(read_rows(args.dataset, args), args.text_column, *cut, "train" if by_hash else None, args.dataset, digest),
                    BlockStream(read_rows(eval_name, args), args.text_column, *cut, "eval" if by_hash else None, eval_name),
                    f"{args.dataset}, streamed in its own order", test)
    else:
        if args.dataset is None:
            tokens, evals, about = stdlib_tokens()
        else:
            tokens = to_tokens(text(args.dataset))
            evals, about = tokens if by_hash else to_tokens(text(args.eval_dataset)), f"{args.dataset}, {len(tokens):,} bytes"
        starts = block_starts(tokens, *cut, args.dataset or "training data")
        if evals is tokens:
            array = tokens.numpy()
            out = torch.tensor([held_out(array[s:s + args.block_size].tobytes()) for s in starts.tolist()])
            starts, out_starts = starts[~out], starts[out]
            if not len(starts):
                raise UsageError(f"{args.dataset}: every block fell to the held-out 5%; give more data, or --eval_dataset")
        else:
            out_starts = block_starts(evals, *cut, args.eval_dataset or "held-out data")
        digest = hashlib.sha256(tokens.numpy()).hexdigest()[:16]
        data = Data(Blocks(tokens, starts, args.block_size, digest), Blocks(evals, out_starts, args.block_size) if len(out_starts) else None,
                    f"{about}, sha256 {digest}, in blocks of {args.block_size} tokens", test)
    if data.eval is None and args.needs_held_out:
        raise UsageError(f"{args.dataset}: no block fell to the held-out 5%: give --eval_dataset, or more data, or do not evaluate")
    return data


def keep_columns(dataset, model: torch.nn.Module, collate, label_columns: list[str]):
    """A data set of the package datasets without the columns that neither model.forward takes nor the collator, by its attribute
    `columns`, uses (--remove_unused_columns), and a note of them. Raises UsageError if nothing is left for the model. Other data sets are left as they are."""
    columns = getattr(dataset, "column_names", None)
    parameters = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if not isinstance(columns, list) or not parameters:
        return dataset, ""
    labels = {"labels", "label", "label_ids", *label_columns}
    kept = [name for name in columns if name in parameters or name in labels or name in getattr(collate, "columns", ())]
    if not set(kept) - labels:
        raise UsageError(f"no column of the data ({', '.join(columns)}) is an argument of {type(model).__name__}.forward ({', '.join(parameters)}): "
                         f"rename the columns, or give --remove_unused_columns False if the collator or loss uses them")
    unused = [name for name in columns if name not in kept]
    return (dataset.select_columns(kept), f"columns left out, as the model does not take them: {', '.join(unused)}") if unused else (dataset, "")


def to_tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def stdlib_tokens() -> tuple[Tensor, Tensor, str]:
    """Training and held-out bytes of Python's standard library, split by file name, test folders left out. Files are joined by
    a zero byte, which no source file contains: a model learns to start and end a file."""
    root = sysconfig.get_path("stdlib")
    files, about = source_files(root), f"source of Python {platform.python_version()}'s standard library"
    if sum(os.path.getsize(f) for f in files) < 1_000_000:      # a Python that comes without its source
        roots = [os.path.dirname(module.__file__) for module in (torch, np)]
        root, files = os.path.commonpath(roots), [f for r in roots for f in source_files(r)]
        about = f"source of torch {torch.__version__} and numpy {np.__version__}"
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name in files:
        parts[held_out(os.path.relpath(name, root).replace(os.sep, "/").encode())].append(Path(name).read_bytes())
    train, evals = (to_tokens(b"\0" + b"\0".join(part) + b"\0") for part in parts.values())
    return train, evals, f"{about}: {len(files)} files, {len(train) + len(evals):,} bytes, split by file"


def source_files(root: str) -> list[str]:
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip)
        found += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")]
    return found


FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}   # else text


def read_rows(name: str, args: TrainArgs):
    """Rows of files or of a named data set, through `datasets.load_dataset`. With --dataset_config_name a folder is a data set."""
    files = None if args.dataset_config_name is not None and os.path.isdir(name) else find_files(name)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets  # 0.6 s and 250 MB, so only where it is asked for
    if files is None:
        path, options = name, {"name": args.dataset_config_name}
    else:
        kinds = {FORMATS.get(os.path.splitext(f)[1].lower(), "text") for f in files}
        if len(kinds) > 1:
            raise UsageError(f"{name}: files of different kinds ({', '.join(sorted(kinds))}); give files of one kind")
        path, options = kinds.pop(), {"data_files": files}
        if path == "text":
            options["keep_linebreaks"] = True
        elif files[0].lower().endswith(".tsv"):
            options["delimiter"] = "\t"
    try:
        rows = datasets.load_dataset(path, split="train", streaming=args.streaming, **options)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise UsageError(f"{name}: no such file, and no data set of that name could be reached ({error})") from None
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise UsageError(f"{name}: cannot be read as {path}: {error.__cause__ or error}") from None
    column = "text" if path == "text" else args.text_column
    if rows.column_names is not None and column not in rows.column_names:
        raise UsageError(f"{name}: no column {column!r}; give --text_column, one of {', '.join(rows.column_names)}")
    return rows


def find_files(name: str) -> list[str] | None:
    """The files that a comma-separated list of paths, folders and globs names; None if it is the name of a data set."""
    files = []
    for part in name.split(","):
        path = os.path.expanduser(part)
        part = os.path.join(glob.escape(path), "**") if os.path.isdir(path) else path
        found = [f for f in sorted(glob.glob(part, recursive=True)) if os.path.isfile(f)] if glob.has_magic(part) else [part]
        files += found
        if not found:
            raise UsageError(f"{part}: no file matches")
    missing = [f for f in files if not os.path.isfile(f)]
    if len(missing) == len(files) == 1 and not os.path.splitext(name)[1] and name.count("/") <= 1:
        return None
    if missing:
        raise UsageError(f"no such file: {', '.join(missing[:10])}")
    if empty := [f for f in files if os.path.getsize(f) == 0]:
        raise UsageError(f"empty file: {', '.join(empty[:10])}")
    return files


def documents(rows, column: str, first: int = 0) -> Iterator[bytes]:
    """Bytes of each row, of which the first has the number `first`. Rows of text files are lines and keep their breaks; other rows end with a
    zero byte."""
    lines = rows.column_names == ["text"] and rows.info.builder_name == "text"
    number = first - 1
    try:
        for number, row in enumerate(rows, first):
            text = row["text" if lines else column]
            if not isinstance(text, str):
                raise UsageError(f"row {number}: column {column!r} holds {text!r}, expected text")
            yield text.encode() if lines else text.encode() + b"\0"
    except ValueError as error:     # of a stream, whose files are parsed as they are read
        raise error if isinstance(error, UsageError) else UsageError(f"the data cannot be read after row {number}: {error}") from None
