"""How files of a checkpoint are written and read: JSON, and tensors in the safetensors format.

Tensors are written to their places from where they are, whole or the part that a rank holds, and any range of elements is read by
itself, so nobody needs memory for more than its part; safetensors' own functions read and write whole tensors. Nothing is ever
unpickled, and what a file says about itself is checked before it is believed.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from state import UsageError
from zero import Part

MAX_JSON_BYTES = 2**26          # of a text, or the header of a file of tensors, that will be parsed
CHUNK_BYTES = 2**24             # that are written, hashed or read at a time
RANGE = re.compile(r"(.*?)(?:\[(\d{1,15}):(\d{1,15})\])?", re.DOTALL)
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
          "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool}     # safetensors' names
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FilePlan(NamedTuple):
    """A file that is to be written: a header, or a whole text, and tensors behind it."""

    header: bytes
    size: int                                   # of the whole file
    tensors: list[tuple[str, int, Tensor]]      # this rank's: key, position in the file, elements; in the order of positions
    shared: bool = False                        # other ranks write into it too; the header is written by one, before


def plan_json(content: dict) -> FilePlan:
    text = json.dumps(content, indent=1).encode()
    return FilePlan(text, len(text), [])


def plan_tensors(tensors: dict[str, Tensor], mine: dict[str, tuple[Tensor, int]] | None = None, shared: bool = False, **metadata: str) -> FilePlan:
    """A file of tensors in the safetensors format. mine: what this rank writes of them, and from which element on (default: all)."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **metadata}}
    mine = {key: (tensor, 0) for key, tensor in tensors.items()} if mine is None else mine
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):    # keeps each one aligned
        if tensor.dtype not in DTYPE_NAMES:
            raise UsageError(f"{key} is a tensor of {tensor.dtype}, which the safetensors format does not have: "
                             f"use --save_strategy no, or another type")
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    places = [(key, data + header[key]["data_offsets"][0] + first * tensor.dtype.itemsize, tensor.detach()) for key, (tensor, first) in mine.items()]
    return FilePlan(len(text).to_bytes(8, "little") + text, data + end, sorted(places, key=lambda place: place[1]), shared)


def write_file(path: str, plan: FilePlan, wrote: Callable[[int], object] = lambda size: None) -> dict:
    """Writes a file, or this rank's tensors into a shared one that is there, and forces it to the disk. Returns its size and SHA-256, which
    is worked out beside the writing; of a shared one it means nothing. wrote: is told of each piece how many bytes it has."""
    digest = hashlib.sha256()
    with open(path, "r+b" if plan.shared else "xb") as file, ThreadPoolExecutor(1) as beside, ThreadPoolExecutor(1) as behind:
        forcing: Future | None = None
        if not plan.shared:
            file.truncate(plan.size)
        header = [] if plan.shared else [(0, memoryview(plan.header))]
        for position, data in chain(header, ((at, as_bytes(tensor)) for _, at, tensor in plan.tensors)):
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start:start + CHUNK_BYTES]
                hashing = None if plan.shared else beside.submit(digest.update, chunk)      # lets go of the interpreter lock
                while len(chunk):
                    count = os.pwrite(file.fileno(), chunk, position)
                    wrote(count)
                    position, chunk = position + count, chunk[count:]
                if hashing is not None:
                    hashing.result()
                if forcing is None or forcing.done():       # the disk works while the next pieces are hashed and written
                    forcing = behind.submit(os.fdatasync, file.fileno())
        os.fsync(file.fileno())
    return {"bytes": plan.size, "sha256": digest.hexdigest()}


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor, which is copied only if it is not on the CPU or not contiguous."""
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def sync(path: str) -> None:
    """Forces a file or folder to the disk: a rename must not become durable before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_file(path: str) -> dict:
    with open(path, "rb") as file:
        return {"bytes": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextlib.contextmanager
def reading(path: str, name: str) -> Iterator[None]:
    """Whatever a file that is not what it should be can raise, as one error that names it (exit code 3)."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        what = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        shown = name if PLAIN_NAME.fullmatch(name) else ascii(name)[:100]     # it may hold anything, for a terminal too
        raise UsageError(f"{path}{os.sep}{shown} cannot be used: {what:.1000}", 3) from error


def read_json(folder: str, name: str) -> dict:
    path = os.path.join(folder, name)
    info = os.lstat(path)
    if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_JSON_BYTES:
        raise ValueError(f"it is no plain file of at most {MAX_JSON_BYTES:,} bytes")
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not an object")
    return content


def replace_json(path: str, content: dict, **options) -> None:
    """Who reads the file finds the old content or the new, and never a half."""
    with open(path + ".tmp", "w") as file:
        json.dump(content, file, **options)
    os.replace(path + ".tmp", path)


def show(value) -> str:
    """A value out of a file for a message: it may be of any length, and not printable."""
    return ascii(str(value)[:200])[1:-1]


def alike(value, ours) -> bool:
    """Whether a value out of a file can be in the place of this run's: numbers for numbers, a number or nothing for nothing."""
    if isinstance(ours, dict):
        return isinstance(value, dict) and value.keys() == ours.keys() and all(alike(value[key], ours[key]) for key in ours)
    if isinstance(ours, (list, str, bool)):
        return type(value) is type(ours) and (not isinstance(ours, list) or all(alike(number, 0.0) for number in value))
    if type(ours) is int:
        return type(value) is int and min(ours, 0) <= value < 2**53
    return ours is value is None or type(value) is float or type(value) is int and abs(value) < 2**53


class Stored(NamedTuple):
    """A tensor in a file: elements `start` to `stop` of a flattened parameter, or (stop None) a whole one."""

    start: int
    stop: int | None
    file: BinaryIO
    position: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class PartFiles(contextlib.ExitStack):
    """The tensors in `stem*.safetensors` of a checkpoint, of which any range of elements can be read by itself, wherever the
    ranks that wrote it had cut. A context: the files are open inside it."""

    def __init__(self, path: str, stem: str):
        super().__init__()
        self.path = path
        self.found: dict[str, list[Stored]] = {}
        self.numbers: dict = {}
        self.names = [name for name in sorted(os.listdir(path)) if re.fullmatch(rf"{stem}(-.*)?\.safetensors", name)]
        self.name = self.names[0] if len(self.names) == 1 else f"{stem}-R.safetensors"      # in messages
        for name in self.names:
            with reading(path, name):
                self.add(os.path.join(path, name))

    def add(self, path: str) -> None:
        file = self.enter_context(open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW)))    # noqa: SIM115
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if 8 + length > min(size, MAX_JSON_BYTES):
            raise ValueError(f"its header should have {length:,} bytes")
        header = json.loads(file.read(length))
        numbers = json.loads(header.pop("__metadata__", {}).get("numbers", "{}"))
        if not all(type(value) is bool or alike(value, None) for value in numbers.values()):
            raise ValueError("its metadata holds other things than numbers")
        self.numbers |= numbers
        for key, entry in header.items():
            base, first, stop = RANGE.fullmatch(key).groups()
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or end > size - 8 - length \
                    or end - begin != math.prod(shape) * dtype.itemsize or stop and int(stop) - int(first) != math.prod(shape):
                raise ValueError(f"{show(key)} should have shape {show(shape)} in bytes {begin} to {end}")
            stored = Stored(int(first or 0), int(stop) if stop else None, file, 8 + length + begin, dtype, shape)
            self.found.setdefault(base, []).append(stored)
        places = sorted(entry["data_offsets"] for entry in header.values())
        if [*(begin for begin, _ in places), size - 8 - length] != [0, *(end for _, end in places)]:
            raise ValueError("its tensors overlap or leave gaps")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that was saved whole."""
        return self.found[name][0].shape

    def fill(self, name: str, first: int, target: Tensor) -> None:
        """Reads the elements of the flattened tensor `name` from `first` on into `target`, as many as it has."""
        pieces = sorted(self.found[name], key=lambda stored: stored.start)
        direct = target.device.type == "cpu" and target.is_contiguous() and target.dtype == pieces[0].dtype
        buffer = target if direct else torch.empty(target.shape, dtype=pieces[0].dtype)
        view, at, last = as_bytes(buffer.detach()), first, first + target.numel()
        for start, _, file, position, dtype, shape in pieces:
            upto = min(last, start + math.prod(shape))
            if start <= at < upto and dtype == buffer.dtype:
                part = view[(at - first) * dtype.itemsize:(upto - first) * dtype.itemsize]
                file.seek(position + (at - start) * dtype.itemsize)
                if file.readinto(part) != len(part):
                    raise OSError("a file ends too early")
                at = upto
        if at != last:
            raise ValueError(f"elements {at} to {last} of {name} are missing")
        if not direct:
            target.detach().copy_(buffer)

    def read(self, name: str, part: Part) -> Tensor:
        """The state `name` of what a rank holds of a parameter, on the CPU. What was saved whole in another shape than the
        parameter's belongs to it as one, such as a step count."""
        stored = self.found[name][0]
        alone = stored.stop is None and stored.shape != tuple(part.shape)
        tensor = torch.empty(stored.shape if alone else part.piece.shape, dtype=stored.dtype)
        self.fill(name, 0 if alone else part.start, tensor)
        return tensor
