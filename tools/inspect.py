"""What is in a checkpoint, and how two differ.

    python -m tools.inspect runs/a/checkpoint-500                             # a run's folder stands for its newest checkpoint
    python -m tools.inspect runs/a/checkpoint-500 runs/b/checkpoint-500       # tensors are compared over whatever ranks cut them

Exit code: 0; 1 if two differ in weights, optimizer, random generators or progress, while settings may be others; 3 if one is damaged.
"""
from __future__ import annotations

import argparse
import math
import os
import sys

import torch

from args import TrainArgs
from rundir import list_checkpoints, verify
from state import run_main
from storage import PartFiles, read_json, reading, show

STEMS = {"model": "weights", "adapter_model": "adapters", "ema": "averaged weights", "optimizer": "optimizer state"}
CHUNK_ELEMENTS = 2**22      # of each of two tensors that are compared at a time
# beginnings of names: settings, who saved it, how long the rows with speeds were
NOT_STATE = ("--", "world_size", "state.log_bytes", "optimizer.settings", "planned")


def main(argv: list[str] | None = None) -> int:
    """Prints what is in a checkpoint, or how two differ. Returns the exit code; raises UsageError (3) if one is damaged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    parser.add_argument("other", nargs="?", help="another one, to compare it with")
    flags = parser.parse_args(argv)
    if flags.other is None:
        print_contents(newest(flags.checkpoint))
        return 0
    return int(print_differences(newest(flags.checkpoint), newest(flags.other)))


def newest(path: str) -> str:
    steps = list_checkpoints(path)
    return os.path.join(path, f"checkpoint-{steps[0]}") if steps else path


def print_contents(path: str) -> None:
    manifest = verify(path)
    with reading(path, "state.json"):
        stored = read_json(path, "state.json")
        state, ranks = stored["state"], stored["world_size"]
        losses, number = state["recent_losses"], state["num_losses"]
        loss = f", loss {losses[-1]:.6g}" if losses else f", mean loss {state['total_loss'] / number:.6g}" if number else ""
        best = "" if state["best_metric"] is None else f", best metric {state['best_metric']:.6g} at update {state['best_global_step']:,}"
        print(f"{path}: update {state['global_step']:,}, epoch {state['epoch']:.6g}{loss}{best}\n"
              f"saved by {ranks:,} rank{'s' * (ranks != 1)}, {show(stored['optimizer']['class'])}, torch {show(manifest['torch'])}, "
              f"Python {show(manifest['python'])}, format {manifest['format']}{', weights alone' * bool(manifest['only_model'])}")
    sizes = {name: os.path.getsize(os.path.join(path, name)) for name in sorted(os.listdir(path))}
    sizes["in all, and every checksum holds"] = sum(sizes.values())
    for name, size in sizes.items():
        print(f"{size:>{len(f'{max(sizes.values()):,}') + 2},}  {name}")
    for stem, what in STEMS.items():
        with PartFiles(path, stem) as files:
            types = sorted({str(piece.dtype).removeprefix("torch.") for pieces in files.found.values() for piece in pieces})
            if files.names:
                print(f"{what}: {len(files.found):,} tensors of {sum(count(files, name) for name in files.found):,} "
                      f"{'parameters' if stem == 'model' else 'elements'}, {', '.join(types) or 'none'}"
                      + f"; {len(files.numbers):,} numbers" * bool(files.numbers))
    print("settings that are not the defaults, and these:")
    defaults = {f"--{name}": value for name, value in TrainArgs().to_dict().items()}
    for name, (default, value) in differences(defaults, read_values(path, ["args.json"])).items():
        print(f"  {name} {value} ({default})")


def print_differences(one: str, other: str) -> bool:
    """Prints how two checkpoints differ; returns whether they do, apart from settings."""
    for path in (one, other):
        verify(path)
    print(f"a: {one}\nb: {other}")
    generators = [name for name in sorted(os.listdir(one)) if name.startswith("rng-") and name in os.listdir(other)]
    changes = differences(*(read_values(path, ["args.json", "state.json", *generators]) for path in (one, other)))
    for name, values in changes.items():
        print(f"  {name}: {', '.join(values)}")
    differ = not all(name.startswith(NOT_STATE) for name in changes)
    for stem, what in STEMS.items():
        with PartFiles(one, stem) as a, PartFiles(other, stem) as b:
            names = sorted({*a.found, *a.numbers, *b.found, *b.numbers})
            changed = {name: difference for name in names if (difference := compare(a, b, name))}
            for name, difference in changed.items():
                print(f"  {show(name)}: {difference}")
            if names:
                print(f"{what}: {len(names) - len(changed):,} of {len(names):,} are bit-identical")
            differ |= bool(changed)
    print("they differ" if differ else "the states are the same")
    return differ


def count(files: PartFiles, name: str) -> int:
    """The elements of a tensor, over all ranks. A step count, which each of them saved, is one."""
    return max(piece.start + math.prod(piece.shape) for piece in files.found[name])


def compare(a: PartFiles, b: PartFiles, name: str) -> str:
    """How a tensor or number differs between two checkpoints; "" if it does not."""
    cut = any(piece.stop is not None for files in (a, b) for piece in files.found.get(name, ()))     # then nobody knows its shape
    one, other = describe(a, name, cut), describe(b, name, cut)
    if one != other or name not in a.found:
        return f"{one}, {other}" * (one != other)
    total, dtype, unequal, largest = count(a, name), a.found[name][0].dtype, 0, torch.zeros((), dtype=torch.float64)
    for first in range(0, total, CHUNK_ELEMENTS):
        pieces = [torch.empty(min(CHUNK_ELEMENTS, total - first), dtype=dtype) for _ in "ab"]
        for files, piece in zip((a, b), pieces):
            with reading(files.path, files.name):
                files.fill(name, first, piece)
        x, y = (piece.view(torch.uint8).view(-1, dtype.itemsize) for piece in pieces)
        where = (x != y).any(1)
        if where.any():
            unequal += int(where.sum())
            largest = torch.maximum(largest, (pieces[0][where].double() - pieces[1][where].double()).abs().max())
    return f"{unequal:,} of {total:,} elements differ, by up to {largest:.3g}" if unequal else ""


def describe(files: PartFiles, name: str, cut: bool) -> str:
    if name not in files.found:
        return show(files.numbers[name]) if name in files.numbers else "missing"
    piece = files.found[name][0]
    return f"{piece.dtype} of " + (f"{count(files, name):,} elements" if cut else f"shape {show(piece.shape)}")


def read_values(path: str, names: list[str]) -> dict:
    """What JSON files hold, by names with dots."""
    found: dict = {}
    for name in names:
        prefix = {"args.json": "--", "state.json": ""}.get(name, f"{name} ")
        with reading(path, name):
            for key, value in read_json(path, name).items():
                inner = value if isinstance(value, dict) and prefix != "--" else None
                found |= {prefix + key: value} if inner is None else {f"{prefix}{key}.{k}": v for k, v in inner.items()}
    return found


def differences(one: dict, other: dict) -> dict[str, tuple[str, str]]:
    """What two dicts do not have in common, as short texts."""
    return {show(name): tuple(show(values[name])[:60] if name in values else "missing" for values in (one, other))
            for name in sorted(one.keys() | other.keys()) if repr(one.get(name, ...)) != repr(other.get(name, ...))}     # NaN is NaN


if __name__ == "__main__":
    run_main(lambda: sys.exit(main()))
