"""Data: files to tokens, tokens to blocks, blocks to the micro-batches of one rank.

Each rank works out alone the order of an epoch (`Loader.order`) and its own part, every N-th micro-batch on N ranks, so the number
of samples seen is the whole position: a resumed run slices.
To train on something else, change `build_data`; anything with `__len__` and `__getitem__` (or `__iter__`) goes through `Loader`.
"""
from __future__ import annotations

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from args import TrainArgs
from collators import IGNORE
from state import Batch, UsageError

# ---------------------------------------------------------------------------------------------------- micro-batches

class Loader:
    """The micro-batches of one rank, in an order that depends only on (seed, epoch), with group_by_length on the round size too.

    dataset: map-style (`__len__` and `__getitem__`, or torch's batched `__getitems__`), or iterable, read in its own order.
    collate: list of samples -> batch of tensors with `num_items`. seed: of the epoch orders; None reads in sequence.
    vocab_size: if given, token ids in `input_ids` and same-shaped `labels` are checked against it. group_by_length: each sample
    is read once at the start, for the length of its `input_ids`.

    All ranks get equally many micro-batches. A rank without samples in the last round gets one filler sample, marked by
    num_samples = 0, that the training and evaluation loops give no weight."""

    def __init__(self, dataset, collate: Callable[[Any], Batch], batch_size: int, rank: int = 0, world_size: int = 1,
                 seed: int | None = None, drop_last: bool = False, vocab_size: int | None = None, group_by_length: bool = False):
        self.dataset, self.collate, self.batch_size = dataset, collate, batch_size
        self.rank, self.world_size, self.seed, self.drop_last = rank, world_size, seed, drop_last
        self.vocab_size = None if isinstance(dataset, Blocks) else vocab_size   # blocks are checked when they are cut
        self.round_size = batch_size * world_size       # samples of all ranks in one round of micro-batches
        stream = isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__")
        self.num_samples = None if stream else len(dataset)     # None: unknown
        if self.num_samples == 0:
            raise UsageError("the data set is empty: it has 0 samples")
        if drop_last and self.num_samples is not None and self.num_samples < self.round_size:
            raise UsageError(f"--dataloader_drop_last leaves nothing of {self.num_samples} samples: one round of micro-batches "
                             f"takes {batch_size} samples x {world_size} ranks; use a smaller batch or keep the last round")
        self.lengths = read_lengths(dataset, self.num_samples) if group_by_length and not isinstance(dataset, Blocks) else None
        # by which a resumed run knows its data again, and an order that depends on more than the seed
        self.identity = ("a stream" if stream else f"{self.num_samples} samples") + f" {getattr(dataset, 'digest', '')}".rstrip() \
            + (f" grouped by length in rounds of {self.round_size}" if self.lengths is not None else "")

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
        if self.num_samples is None:
            samples = islice(iter(self.dataset), start, None)
            rounds = iter(lambda: list(islice(samples, self.round_size)), [])       # until there is nothing left
        else:
            rounds = (part for part in self.order(epoch)[start:].split(self.round_size) if len(part))
        for at, round_ in enumerate(rounds):
            if self.drop_last and len(round_) < self.round_size:
                return
            mine = round_[self.rank * self.batch_size:(self.rank + 1) * self.batch_size]
            first = start + at * self.round_size + self.rank * self.batch_size
            yield self.batch(mine if len(mine) else round_[:1], num_samples=len(mine), position=first)

    def order(self, epoch: int) -> Tensor:
        """Sample numbers (n,) of a pass. group_by_length is the HF Trainer's, where its batch is a round: shuffled, sorted inside
        megabatches of up to 50 rounds, and the longest sample of all first, so that memory runs out early or never."""
        if self.seed is None:
            return torch.arange(self.num_samples)
        order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(self.seed + epoch))
        if self.lengths is not None:
            megabatch = self.round_size * max(1, min(self.num_samples // (4 * self.round_size), 50))
            order = torch.cat([part[self.lengths[part].argsort(descending=True, stable=True)] for part in order.split(megabatch)])
            longest = int(self.lengths[order].argmax())
            order[[0, longest]] = order[[longest, 0]]
        return order

    def batch(self, mine: Tensor | list, num_samples: int, position: int) -> Batch:
        """The micro-batch of samples `mine`: of a stream the samples themselves, from `position` on, else their indices."""
        if isinstance(mine, list):
            samples, names = mine, range(position, position + len(mine))
        else:
            names = mine.tolist()
            fetch = getattr(self.dataset, "__getitems__", None)
            samples = fetch(names) if fetch else [self.dataset[i] for i in names]
        batch = self.collate(samples)
        num_items = batch.get("num_items")
        if num_items is None or int(num_items) != num_items:
            raise UsageError(f"the collator must return num_items, the whole number of label items its loss sums over, not {num_items}: "
                             f"add \"num_items\": int((labels != -100).sum()), or the number of samples")
        if self.vocab_size is not None:
            check_ids(batch, names, self.vocab_size)
        return {**batch, "num_items": int(num_items) if num_samples else 0, "num_samples": num_samples}


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


def check_ids(batch: Batch, names, vocab_size: int) -> None:
    """Token ids (B, T) in [0, vocab_size), labels of the same shape too or -100; else an error that names the sample."""
    for key, fine, also in (("input_ids", 0, ""), ("labels", IGNORE, " (-100 marks what is ignored)")):
        values = batch.get(key)
        if values is None or "input_ids" not in batch or values.shape != batch["input_ids"].shape:
            continue
        bad = ((values < 0) | (values >= vocab_size)) & (values != fine)
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise UsageError(f"sample {names[row]}: {key}[{column}] is {values[row, column]}, outside the vocabulary 0..{vocab_size - 1}{also}")


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
    """The same blocks read lazily, one document after the other, in memory of one document and one block. documents: called for
    each pass, gives an iterator of bytes. part: "train" skips held-out blocks, "eval" keeps only them, None keeps all."""

    def __init__(self, documents: Callable[[], Iterable[bytes]], block_size: int, vocab_size: int, part: str | None, what: str, digest: str = ""):
        self.documents, self.block_size, self.vocab_size = documents, block_size, vocab_size
        self.part, self.what, self.digest = part, what, digest

    def __iter__(self) -> Iterator[Batch]:
        T, buffer, seen = self.block_size, b"", 0
        for number, document in enumerate(self.documents()):
            if document and max(document) >= self.vocab_size:
                raise UsageError(f"{self.what}: document {number} has token {max(document)}; raise --vocab_size {self.vocab_size} above it")
            buffer += document
            seen += len(document)
            whole = max(len(buffer) - 1, 0) // T * T
            for at in range(0, whole, T):
                yield from self.sample(buffer[at:at + T + 1])
            buffer = buffer[whole:]
        if seen <= T:
            raise UsageError(f"{self.what}: {seen} tokens are not one block of --block_size {T} and its next token")
        if len(buffer) > 1:
            yield from self.sample(buffer)

    def sample(self, block: bytes) -> Iterator[Batch]:
        if self.part is None or held_out(block[:self.block_size]) == (self.part == "eval"):
            yield Blocks(to_tokens(block), torch.tensor([0]), self.block_size)[0]


# ---------------------------------------------------------------------------------------------------- where tokens come from
class Data(NamedTuple):
    """Training and held-out samples, and one line that says what they are, with a digest of the training tokens."""

    train: Any
    eval: Any
    about: str


def build_data(args: TrainArgs) -> Data:
    """The data of --dataset and --eval_dataset as blocks of bytes; by default Python's own source code."""
    cut = args.block_size, args.vocab_size
    by_hash, eval_name = args.eval_dataset is None, args.eval_dataset or args.dataset     # by_hash: blocks of --dataset are held out

    def texts(name: str) -> Callable[[], Iterator[bytes]]:
        rows = read_rows(name, args)
        return lambda: documents(rows, args.text_column)
    if args.streaming:
        sizes = [os.path.getsize(file) for file in find_files(args.dataset) or []]
        digest = hashlib.sha256(repr((args.dataset, args.dataset_config_name, args.text_column, sizes)).encode()).hexdigest()[:16]
        data = Data(BlockStream(texts(args.dataset), *cut, "train" if by_hash else None, args.dataset, digest),
                    BlockStream(texts(eval_name), *cut, "eval" if by_hash else None, eval_name),
                    f"{args.dataset}, streamed in its own order")
    else:
        if args.dataset is None:
            tokens, evals, about = stdlib_tokens()
        else:
            tokens = to_tokens(b"".join(texts(args.dataset)()))
            evals, about = tokens if by_hash else to_tokens(b"".join(texts(args.eval_dataset)())), f"{args.dataset}, {len(tokens):,} bytes"
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
                    f"{about}, sha256 {digest}")
    if data.eval is None and (args.eval_strategy != "no" or args.eval_on_start):
        raise UsageError(f"{args.dataset}: no block fell to the held-out 5%: give --eval_dataset, or more data, or --eval_strategy no")
    return data


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


def documents(rows, column: str) -> Iterator[bytes]:
    """Bytes of each row. Rows of text files are lines and keep their breaks; other rows end with a zero byte."""
    lines = rows.column_names == ["text"] and rows.info.builder_name == "text"
    number = -1
    try:
        for number, row in enumerate(rows):
            text = row["text" if lines else column]
            if not isinstance(text, str):
                raise UsageError(f"row {number}: column {column!r} holds {text!r}, expected text")
            yield text.encode() if lines else text.encode() + b"\0"
    except ValueError as error:     # of a stream, whose files are parsed as they are read
        raise error if isinstance(error, UsageError) else UsageError(f"the data cannot be read after row {number}: {error}") from None
