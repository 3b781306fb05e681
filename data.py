"""Data: files to tokens, tokens to blocks. To train on something else, change `build_data`; loader.py makes micro-batches of anything
with `__len__` and `__getitem__`, or `__iter__`.
"""
from __future__ import annotations

import glob
import hashlib
import inspect
import os
import platform
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from args import TrainArgs
from collators import IGNORE
from state import Batch, UsageError


# ---------------------------------------------------------------------------------------------------- blocks of tokens
class Blocks:
    """Tokens cut into training samples of block_size tokens; each token but the first is a label exactly once. tokens: (N,)
    integers. starts: (n,) first positions of the blocks that belong to this set. A sample is input_ids (T,) = tokens[s:s+T]
    and labels (T,) = the next token of each; past the end, labels are -100."""

    uniform = True

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

    def read(name: str) -> Tensor:
        rows = read_rows(name, args)
        return to_tokens(b"".join(tqdm(documents(rows, args.text_column), f"read {name}", len(rows), unit="row", leave=False, delay=1,
                                       disable=not args.shows_bars)))

    def blocks(tokens: Tensor, what: str) -> Blocks:
        return Blocks(tokens, block_starts(tokens, *cut, what), args.block_size)
    test = None if args.test_dataset is None else blocks(read(args.test_dataset), args.test_dataset)
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
            tokens = read(args.dataset)
            evals, about = None if by_hash else read(args.eval_dataset), f"{args.dataset}, {len(tokens):,} bytes"
        train = blocks(tokens, args.dataset or "training data")
        train.digest = hashlib.sha256(tokens.numpy()).hexdigest()[:16]
        if evals is None:
            array, starts = tokens.numpy(), train.starts
            out = torch.tensor([held_out(array[s:s + args.block_size].tobytes()) for s in starts.tolist()])
            train.starts, held = starts[~out], Blocks(tokens, starts[out], args.block_size) if out.any() else None
            if out.all():
                raise UsageError(f"{args.dataset}: every block fell to the held-out 5%; give more data, or --eval_dataset")
        else:
            held = blocks(evals, args.eval_dataset or "held-out data")
        data = Data(train, held, f"{about}, sha256 {train.digest}, in blocks of {args.block_size} tokens", test)
    if data.eval is None and args.needs_held_out:
        raise UsageError(f"{args.dataset}: no block fell to the held-out 5%: give --eval_dataset, or more data, or do not evaluate")
    return data


def keep_columns(dataset, model: torch.nn.Module, collate, label_columns: list[str]):
    """A data set of the package datasets without the columns that neither model.forward takes nor the collator, by its attribute
    `columns`, uses (--remove_unused_columns), and a note of them. Raises UsageError if nothing is left for the model. Other data sets are
    left as they are."""
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
    return torch.from_numpy(np.frombuffer(bytearray(text), np.uint8))


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
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", str(int(not args.shows_bars)))
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
