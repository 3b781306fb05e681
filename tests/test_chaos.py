"""What is killed goes on as if nothing had happened: the short form of `make chaos`, and the crash points of a save one by one."""
import itertools
import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.toy import Numbers, arguments, run_training
from tools.chaos import compare, exit_codes, newest, outcome, show, start

# without fdatasync, whose number depends on how fast the disk is: a point must be the same one in every run
CALLS = ("open", "write", "pwrite", "fsync", "truncate", "rename", "replace", "link", "mkdir", "rmdir", "unlink", "remove")


@pytest.fixture
def memory_disk(tmp_path):
    """A folder in memory, if there is one: here no write has to be durable, and there are many."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as folder:
        yield folder


@pytest.mark.parametrize("case, kills", [("one", 4), ("ddp", 3), ("fsdp", 3), ("worker", 1)])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(fresh, tmp_path, case, kills):
    assert fresh(show, case, str(tmp_path), kills)


def train_small(output_dir: str, point: int = 0, torn: bool = False) -> None:
    """2 updates, each of them saved, the first checkpoint removed after the second. Dies at `point`, if it is not 0."""
    if point:
        die_at(point, torn)
    model = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1, bias=False))
    run_training(arguments(output_dir, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1, resume_from_checkpoint="auto"),
                 loss, model=model, train_set=Numbers(10))


def loss(model, batch):
    return model(batch["x"]).square().sum()


def die_at(point: int, torn: bool) -> None:
    """Ends this process before its point-th call to the file system from the first save on, or (torn) after half of its point-th
    write. The functions of `os` are replaced, so it does not matter who calls them."""
    calls, saves = itertools.count(1), False

    def call_or_die(name, call, *args, **kwargs):
        nonlocal saves
        saves = saves or "tmp-checkpoint-" in str(args[0])
        if saves and (not torn or name in ("write", "pwrite")) and next(calls) == point:
            if torn:
                data = memoryview(args[1]).cast("B")
                call(args[0], data[:len(data) // 2], *args[2:])
            os._exit(9)
        return call(*args, **kwargs)
    for name in CALLS:
        setattr(os, name, partial(call_or_die, name, getattr(os, name)))


def crash_everywhere(folder: str, torn: bool) -> int:
    """How many points the saves of a small run have. Raises unless it goes on to the undisturbed outcome after a crash at each;
    crashes that leave the same files are gone on from once."""
    log = f"{folder}/log"
    assert exit_codes(start(log, 1, train_small, f"{folder}/whole"), log) == [0]
    whole, step, seen = outcome(f"{folder}/whole"), 0, set()
    for point in itertools.count(1):
        run = f"{folder}/{point}"
        died, = exit_codes(start(log, 1, train_small, run, point, torn), log)
        assert died in (0, 9) and newest(run) >= step, f"{run} {log}"
        step = newest(run)
        left = tuple(sorted((str(path.relative_to(run)), path.is_file() and path.stat().st_size) for path in Path(run).rglob("*")
                            if not path.parent.name.startswith("tmp-")))
        if left not in seen:
            seen.add(left)
            assert exit_codes(start(log, 1, train_small, run), log) == [0], f"{run} {log}"
            compare(run, whole)
        if not died:
            return point - 1


@pytest.mark.parametrize("torn", [False, True])
def test_every_crash_point_and_every_torn_write_of_a_save(fresh, memory_disk, torn):
    assert fresh(crash_everywhere, memory_disk, torn) > (10 if torn else 30)
