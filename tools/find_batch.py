"""The largest micro-batch that fits into memory, for the same training. Each try is a process of its own, so nothing is left of one that failed.

    python -m tools.find_batch --task recipes.text_classification --ranks 2 --run -- --per_device_train_batch_size 512 --output_dir runs/a

It starts with the sizes that the flags after -- give, and trains for a few --updates in a folder that is removed. If memory runs out (an error that says
so, or SIGKILL, which is how the kernel ends a process then), the micro-batch is halved, or if it is odd divided by its smallest divisor, and the
accumulation multiplied by the same: the samples of an update stay the same, and so does the update. (auto_find_batch_size of the HF Trainer 5 takes 0.9 of
the micro-batch, within the process, and leaves the accumulation as it is, so updates get smaller.) Only what goes by micro-batches changes: BatchNorm,
the draws of dropout, the order of group_by_length, and what --dataloader_drop_last leaves out.

A longer batch after these updates may still not fit; with --train_sampling_strategy group_by_length the longest sample is in the first one. Evaluation
is not tried: its batch size is another.
"""
from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile

from args import parse_args
from rundir import read_status
from state import UsageError, run_main
from tools.find_lr import ONLY_TRAIN

SIZES = ("--per_device_train_batch_size", "--gradient_accumulation_steps")
LIMITED = ["sh", "-c", 'ulimit -d "$0" && exec "$@"']       # RLIMIT_DATA, in units of 1024 bytes


def main(argv: list[str] | None = None) -> tuple[int, int]:
    """(micro-batch, accumulation) of the first try that fits, after printing the command to train with; --run goes on as that command. Raises UsageError
    for mistakes and if no micro-batch fits; any other failure of a try ends the search, with its message and exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--task", default="train", help="module that is started to train, as recipes.image_classification [%(default)s]")
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine; torchrun starts several [%(default)s]")
    parser.add_argument("--updates", type=int, default=3, help="of each try [%(default)s]")
    parser.add_argument("--memory_mb", type=int, help="megabytes that a process may allocate, those of accelerators not counted (default: no limit)")
    parser.add_argument("--run", action="store_true", help="train with what was found")
    end = argv.index("--") if "--" in argv else len(argv)
    flags, given = parser.parse_args(argv[:end]), argv[end + 1:]
    micro, accumulation = check(flags, given)
    while failure := attempt(flags, words := with_sizes(given, micro, accumulation)):
        print(f"micro-batch {micro} x accumulation {accumulation}: {failure}", flush=True)
        if micro == 1:
            raise UsageError("not even micro-batches of 1 sample fit into memory: try --activation_checkpointing, --bf16, or shorter samples", 1)
        part = largest_divisor(micro)
        if micro % 2:
            print(f"{micro} cannot be halved; its largest divisor is {part}", flush=True)
        micro, accumulation = part, accumulation * (micro // part)
    print(f"micro-batch {micro} x accumulation {accumulation}: fits. To train with it:\n\n    {shlex.join(launch(flags, words, 'python'))}\n", flush=True)
    if flags.run:
        command = [*limit(flags), *launch(flags, words)]
        os.execvp(command[0], command)
    return micro, accumulation


def check(flags: argparse.Namespace, given: list[str]) -> tuple[int, int]:
    """(micro-batch, accumulation) to begin with."""
    if min(flags.ranks, flags.updates, flags.memory_mb or 1) < 1 or flags.memory_mb == 0:
        raise UsageError(f"--ranks {flags.ranks} --updates {flags.updates} --memory_mb {flags.memory_mb}: expected at least 1 of each")
    if "WORLD_SIZE" in os.environ:
        raise UsageError("the search starts torchrun itself: start it without, and give --ranks")
    try:
        task = vars(importlib.import_module(flags.task))
    except ModuleNotFoundError as error:
        raise UsageError(f"--task {flags.task} has to be there: {error}") from None
    args = parse_args(given, task.get("FLAGS", ""))
    if not args.trains:
        raise UsageError("these flags train nothing: give --do_train too, or leave --do_eval and --do_predict away")
    return args.per_device_train_batch_size, args.gradient_accumulation_steps


def attempt(flags: argparse.Namespace, words: list[str]) -> str:
    """How memory ran out in a few updates of a process of its own, or "" if it did not."""
    with tempfile.TemporaryDirectory() as folder:
        command = launch(flags, [*words, *ONLY_TRAIN, "--max_steps", str(flags.updates), "--output_dir", folder])
        done = subprocess.run([*limit(flags), *command], capture_output=True, text=True, check=False)
        trained = read_status(folder).get("state") == "finished"
    rank = re.search(r"Root Cause.*?exitcode\s*: (-?\d+)", done.stderr, re.DOTALL)       # what torchrun tells of the first rank that failed
    code = int(rank[1]) if rank else done.returncode
    if code == 0 and not trained:
        raise UsageError(f"--task {flags.task}: python -m {flags.task} did not train")
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, for its memory as it seems"
    said = re.search("out of memory with micro-batches.*", done.stderr)
    if code == 0 or code == 1 and said:
        return said[0] if code else ""
    print(done.stderr, end="", file=sys.stderr)
    raise SystemExit(code if code > 0 else 128 - code)


def launch(flags: argparse.Namespace, words: list[str], python: str = sys.executable) -> list[str]:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(flags.ranks), "-m"] if flags.ranks > 1 else []
    return [python, "-m", *torchrun, flags.task, *words]


def limit(flags: argparse.Namespace) -> list[str]:
    return [*LIMITED, str(flags.memory_mb * 10**6 // 1024)] if flags.memory_mb else []


def with_sizes(words: list[str], *sizes: int) -> list[str]:
    """The flags with these sizes in the place of their own."""
    kept, leave = [], False
    for word in words:
        leave = word.partition("=")[0] in SIZES if word.startswith("--") else leave
        kept += [] if leave else [word]
    return [*kept, *(word for name, size in zip(SIZES, sizes) for word in (name, str(size)))]


def largest_divisor(n: int) -> int:
    """Of n > 1, other than n: half of it if it is even."""
    return next(n // d for d in range(2, n + 1) if n % d == 0)


if __name__ == "__main__":
    run_main(main)
