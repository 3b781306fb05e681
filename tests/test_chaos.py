"""What is killed goes on as if nothing had happened: the short form of `make chaos`, and the crash points of a save one by one."""
import itertools
import os
from functools import partial

import pytest

from tests.ranks import Ranks
from tests.toy import arguments, gpt, run_training
from tools.chaos import BUILT, compare, exit_codes, newest, outcome, show, start

CALLS = ("open", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "rename", "replace", "link", "mkdir", "rmdir", "unlink", "remove")


@pytest.fixture(scope="module")
def fresh():
    """Calls a function in a process that has computed nothing yet, so that it can fork ranks."""
    pool = Ranks()
    yield lambda function, *args: pool.run(1, function, *args)[0]
    pool.close()


@pytest.mark.parametrize("case, kills", [("one", 8), ("ddp", 4), ("fsdp", 4), ("worker", 1)])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(fresh, tmp_path, case, kills):
    assert fresh(show, case, str(tmp_path), kills)


def train_small(output_dir: str, save_async: bool, point: int = 0, torn: bool = False) -> None:
    """2 updates, each of them saved, the first checkpoint removed after the second. Dies at `point`, if it is not 0."""
    if point:
        die_at(point, torn)
    run_training(arguments(output_dir, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1, resume_from_checkpoint="auto",
                           **({"save_async": save_async} if BUILT else {})), model=gpt(dropout=0.1))


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


def crash_everywhere(folder: str, save_async: bool, torn: bool, stride: int = 1) -> int:
    """How many points the saves of a small run have. Raises unless it goes on to the undisturbed outcome after a crash at each (or
    each stride-th)."""
    log = f"{folder}/log"
    assert exit_codes(start(log, 1, train_small, f"{folder}/whole", save_async), log) == [0]
    whole, step = outcome(f"{folder}/whole"), 0
    for point in itertools.count(1, stride):
        run = f"{folder}/{point}"
        died, = exit_codes(start(log, 1, train_small, run, save_async, point, torn), log)
        assert died in (0, 9) and newest(run) >= step, f"{run} {log}"
        step = newest(run)
        assert exit_codes(start(log, 1, train_small, run, save_async), log) == [0], f"{run} {log}"
        compare(run, whole)
        if not died:
            return point - 1


@pytest.mark.parametrize("save_async", [False, True] if BUILT else [False])
def test_every_crash_point_of_a_save(fresh, tmp_path, save_async):
    assert fresh(crash_everywhere, str(tmp_path), save_async, False, 3 if save_async else 1) > 30     # a thread does the same calls


@pytest.mark.skipif(not BUILT, reason="this version writes by libraries, not by os.write")
@pytest.mark.parametrize("save_async", [False, True])
def test_every_torn_write_of_a_save(fresh, tmp_path, save_async):
    assert fresh(crash_everywhere, str(tmp_path), save_async, True) > 10
