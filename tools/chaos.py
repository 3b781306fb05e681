"""Kills training runs at random instants, starts them again, and shows that they end with the bits of a run that was left alone:

    python -m tools.chaos [--kills 100] [--seed 0] [--dir DIR] [--only one,ddp,fsdp,term,worker,launcher,stopped]

one, ddp, fsdp   SIGKILL: of one process; of all or of one of 2 ranks. Half of the kills inside a save, the others at any time
term             SIGTERM to one of 2 ranks, 10 times: all save the update they have done and leave with 143
worker           under torchrun, SIGKILL of a worker, 3 times in one launch, which goes on by itself
launcher         SIGKILL of torchrun: 2 s later no worker is alive
stopped          under torchrun, SIGSTOP of a worker, until the other one loses patience (--ddp_timeout)

A run is started again by --resume_from_checkpoint auto until it ends; then another one begins, until enough kills have landed. At each
end the weights, optimizer states, random generators and log rows must be those of the undisturbed run. Prints a line per case;
exits with 1 if one goes wrong, and keeps its files. (The crash points of one save, one by one: tests/test_chaos.py.)
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import os
import random
import re
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

# ranks are forked from this process and need not import anything: a start takes a tenth of a second. It computes nothing itself, as
# threads do not survive a fork
import datasets
import torch
import torch._dynamo
import torch.distributed.fsdp
from torch.distributed.run import main as launch

from rundir import list_checkpoints
from tests.toy import rows, timeless
from train import main as train_main
from train import run_main

ROOT = str(Path(__file__).parent.parent)
DEADLINE_S, POLL_S = 180, 0.0005        # of every wait: only a hang takes as long
# dropout, windows of 2 micro-batches, several epochs of uneven length, losses logged later than saved; half of the time is saving
JOB = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --dropout 0.1 --per_device_train_batch_size 2 --learning_rate 1e-2 " \
      "--gradient_accumulation_steps 2 --logging_steps 3 --eval_strategy steps --eval_steps 5 --save_steps 2 --save_total_limit 2"
STEPS = 40
TEXT = "".join(f"{i} times {i} is {i * i}\n" for i in range(70))
AUTO = ("--resume_from_checkpoint", "auto")


class Miss(Exception):
    """A run has not done what it must."""


@dataclass
class Tally:
    kills: int = 0
    inside: int = 0     # of them, while a save was under way
    rounds: int = 0     # runs from their start to their end, however many times killed


# ---------------------------------------------------------------------------------------------------- processes

started: dict[int, int | None] = {}     # by process id: exit code, None while it runs


def start(log: str, ranks: int, function, *args) -> list[int]:
    """Forks a process per rank that calls function(*args) as a program would, its messages appended to `log`. Returns their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": probe.getsockname()[1], "OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
    sys.stdout.flush()
    pids = [os.fork() or be_rank(log, {**env, "RANK": rank, "LOCAL_RANK": rank}, function, args) for rank in range(ranks)]
    started.update(dict.fromkeys(pids))
    return pids


def be_rank(log: str, env: dict, function, args) -> NoReturn:
    """What a forked process does from its start to its end."""
    code = 1
    try:
        os.setsid()     # Ctrl-C is for the parent, which then ends its children
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG, for when it cannot
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
        faulthandler.dump_traceback_later(DEADLINE_S - 5)      # where it hangs
        os.environ.update({key: str(value) for key, value in env.items()})
        torch.set_num_threads(1)
        run_main(function, *args)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:   # noqa: BLE001  as the interpreter does with what nobody catches
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(pid: int) -> int | None:
    """Of a process that `start` gave: None while it runs, minus the signal's number if one ended it."""
    if started[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        started[pid] = os.waitstatus_to_exitcode(status) if ended else None
    return started[pid]


def exit_codes(pids: list[int], log: str) -> list[int]:
    """Waits for all of them."""
    until(lambda: all(exit_code(pid) is not None for pid in pids), f"the end of processes {pids} of {log}")
    return [started[pid] for pid in pids]


def any_ended(pids: list[int]) -> bool:
    return any(exit_code(pid) is not None for pid in pids)


def until(condition, what: str) -> None:
    """Waits until condition() holds. Raises TimeoutError, which says what did not come."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"hangs: {DEADLINE_S} s have not brought {what}")
        time.sleep(POLL_S)


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        if exit_code(pid) is None:
            os.kill(pid, number)


def workers(folder: str) -> list[int]:
    """Process ids of torchrun's workers that train into this folder or one below it, whoever is their parent by now."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):      # it has ended meanwhile
            command = Path("/proc", name, "cmdline").read_bytes()       # empty: dead already
            if b"--output_dir\0" + os.fsencode(folder) in command and b"torch.distributed.run" not in command:
                found.append(int(name))
    return found


def end_all(folder: str) -> None:
    """Kills whatever still runs of the runs in a folder."""
    send(list(started), signal.SIGKILL)
    for pid in workers(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    exit_codes(list(started), folder)


# ---------------------------------------------------------------------------------------------------- what runs leave

def newest(output_dir: str) -> int:
    return next(iter(list_checkpoints(output_dir)), 0)


def saving(output_dir: str) -> str:
    """The folder of a save under way, or left by one that was killed; or ""."""
    with contextlib.suppress(FileNotFoundError):
        return next((name for name in os.listdir(output_dir) if name.startswith("tmp-checkpoint-")), "")
    return ""


def outcome(output_dir: str) -> dict:
    """What must be the same after every run, by name: files of the last checkpoint, log rows without clocks, and no remains of saves."""
    last = Path(output_dir, f"checkpoint-{newest(output_dir)}")
    files = {path.name: path.read_bytes() for path in last.glob("*") if path.name.startswith(("model", "optimizer", "ema", "rng"))}
    return {"last checkpoint": last.name, **files, "metrics.jsonl": [timeless(row) for row in rows(output_dir)],
            "remains of saves": sorted(name for name in os.listdir(output_dir) if name.startswith(("tmp-", "replaced-")))}


def compare(output_dir: str, whole: dict) -> None:
    """Removes a run that has ended with the outcome `whole`. Raises Miss if it has not."""
    found = outcome(output_dir)
    if differs := sorted(name for name in whole.keys() | found.keys() if name not in whole or found.get(name) != whole[name]):
        raise Miss(f"{output_dir} differs from the undisturbed run in {', '.join(differs)}")
    shutil.rmtree(output_dir)


def said(log: str, since: int = 0) -> str:
    return Path(log).read_bytes()[since:].decode(errors="replace") if os.path.exists(log) else ""


def check_start(words: str, step: int) -> bool:
    """Whether a start has come to its training, by its messages. Raises Miss if it did not go on from the newest checkpoint."""
    resumed = re.search(r"resuming from \S*checkpoint-(\d+)", words)
    if "\nsamples: " in words and (int(resumed[1]) if resumed else 0) != step:
        raise Miss(f"a start began {resumed[0] if resumed else 'from scratch'}, and checkpoint-{step} was there")
    return "\nsamples: " in words


# ---------------------------------------------------------------------------------------------------- one, ddp, fsdp, term

class Case:
    """A job in a new folder, what it leaves undisturbed, and the seconds that it and one of its saves take: without (0) and with (1) --save_async."""

    def __init__(self, folder: str, ranks: int, flags: tuple[str, ...], turns: tuple[int, ...] = (0, 1)):
        os.makedirs(folder)
        Path(folder, "text.txt").write_text(TEXT)
        os.environ["HF_DATASETS_CACHE"] = datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"     # no kill shall touch the user's
        self.folder, self.ranks, self.flags = folder, ranks, flags
        self.clocks = []
        for turn in turns:
            out = f"{folder}/whole{turn}"
            begin, spans, name, since = time.monotonic(), [], "", 0.0
            pids = start(out + ".log", ranks, train_main, self.argv(out, turn))
            while not any_ended(pids):
                now, before, name = time.monotonic(), name, saving(out)
                if name != before:
                    spans += [now - since] if before else []
                    since = now
                time.sleep(POLL_S)
            if any(codes := exit_codes(pids, out + ".log")):
                raise Miss(f"the undisturbed run ended with {codes}, see {out}.log")
            if not spans:
                raise Miss(f"no save was seen in {folder}: no folder tmp-checkpoint-N")
            self.clocks.append((time.monotonic() - begin, statistics.median(spans)))
            self.whole = outcome(out) if turn == 0 else self.whole
            compare(out, self.whole)

    def argv(self, output_dir: str, turn: int, *more: str) -> list[str]:
        """The command line of a run; every other one saves asynchronously."""
        return [*JOB.split(), "--max_steps", str(STEPS), "--dataset", f"{self.folder}/text.txt", *self.flags, "--save_async", str(turn % 2 == 1), *more, "--output_dir", output_dir]


def strike(number: int, case: Case, kills: int, rng: random.Random, run: str, words, pids: list[int], turn: int) -> tuple[list[int], bool]:
    """Sends SIGKILL at a random instant, by turns inside a save and at any time, by turns to all ranks and to one; or SIGTERM
    to one rank after its first update. Returns who got it (nobody: the run ended before), and whether a save was under way."""
    def wait_for(condition) -> None:
        until(lambda: any_ended(pids) or condition(), f"the instant to strike {run}")
    seconds, save_seconds = case.clocks[turn % 2]
    if number == signal.SIGTERM:
        wait_for(lambda: "\nstep " in words())
    if number == signal.SIGKILL and kills % 2 == 0:
        wait_for(lambda: not saving(run))       # what the save killed last has left is cleaned away
        last, passing = "", rng.randrange(5)    # saves that go by
        while not any_ended(pids):
            wait_for(lambda: saving(run) not in ("", last))     # noqa: B023
            last, passing = saving(run), passing - 1
            if passing < 0:
                time.sleep(rng.random() * save_seconds)
                if saving(run) == last:     # it was not a shorter one
                    break
    else:
        end = time.monotonic() + rng.random() * seconds * (1 - newest(run) / STEPS * 0.9)        # of what is left, and a start
        wait_for(lambda: time.monotonic() > end)
    victims = [] if any_ended(pids) else pids if number == signal.SIGKILL and kills // 2 % 2 == 0 else [rng.choice(pids)]
    send(victims, number)
    return victims, saving(run) != ""


def disturb(number: int, ranks: int, flags: tuple[str, ...], folder: str, tally: Tally, kills: int, rng: random.Random) -> None:
    """Trains again and again, with strikes until `kills` of them have landed. Raises Miss if something is not as it must be."""
    case = Case(folder, ranks, flags)
    while tally.kills < kills:
        turn, done = tally.rounds, False
        run, log = f"{folder}/run{turn}", f"{folder}/run{turn}.log"
        while not done:
            words, step, victims = partial(said, log, len(said(log).encode())), newest(run), []
            pids = start(log, ranks, train_main, case.argv(run, turn, *AUTO))
            if tally.kills < kills:
                victims, inside = strike(number, case, tally.kills, rng, run, words, pids, turn)
            if victims and number == signal.SIGKILL:
                exit_codes(victims, log)
                if not check_start(words(), step):     # ranks that have not met yet wait for each other for minutes
                    send(pids, signal.SIGKILL)
            codes = exit_codes(pids, log)
            check_start(words(), step)
            if newest(run) < step:
                raise Miss(f"checkpoint-{step} of {run} is gone, and there is no newer one")
            done, landed = not any(codes), False
            if victims and number == signal.SIGKILL:
                landed = any(started[pid] == -number for pid in victims)
                fine = all(code in (0, 6, -number) for code in codes)
            elif victims and codes == [128 + number] * ranks:
                landed, fine = True, newest(run) == rows(run)[-1]["step"]      # what is saved is the last update that was logged
            else:       # SIGTERM after the end of the training is not caught
                fine = done or victims and "train_loss" in rows(run)[-1] and set(codes) <= {0, -number}
            if not fine:
                raise Miss(f"ranks ended with {codes} at checkpoint-{newest(run)}, see {log}")
            tally.kills, tally.inside = tally.kills + landed, tally.inside + (landed and inside)
        compare(run, case.whole)
        os.remove(log)
        tally.rounds += 1


# ---------------------------------------------------------------------------------------------------- worker, launcher, stopped

def torchrun(argv: list[str], log: str) -> list[int]:
    """Launches 2 workers; [the process id of the launcher]."""
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=5", "--monitor-interval=0.1"]
    return start(log, 1, launch, [*options, f"{ROOT}/train.py", *argv])


def disturb_launch(what: str, folder: str, tally: Tally, kills: int, rng: random.Random) -> None:
    """Strikes, each after some progress. The launch goes on by itself if a worker dies; otherwise it may be launched again."""
    case = Case(folder, 2, ("--max_steps", str(24 + 24 * kills), *(("--ddp_timeout", "6") if what == "stopped" else ())), turns=(0,))
    run, log, step = f"{folder}/run", f"{folder}/run.log", 0
    launcher = torchrun(case.argv(run, 0), log)      # without a flag
    while tally.kills < kills:
        until(lambda: any_ended(launcher) or newest(run) > step and len(workers(run)) == 2, f"progress of {run}")    # noqa: B023
        time.sleep(rng.random() / 4)
        if any_ended(launcher):
            raise Miss(f"the launch ended by itself with {exit_codes(launcher, log)}, see {log}")
        os.kill(launcher[0] if what == "launcher" else rng.choice(workers(run)), signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
        tally.kills, tally.inside, step = tally.kills + 1, tally.inside + (saving(run) != ""), newest(run)
    codes = exit_codes(launcher, log)
    if what == "launcher":
        time.sleep(2)
        if orphans := workers(run):
            raise Miss(f"2 s after their launcher {len(orphans)} workers are alive")
        end_all(run)
    if codes != [0] and what != "worker":
        codes = exit_codes(torchrun(case.argv(run, 0, *AUTO), log), log)
    if codes != [0] or said(log).count("resuming from") < kills:
        raise Miss(f"the launch ended with {codes}, see {log}")
    compare(run, case.whole)
    tally.rounds += 1


# ---------------------------------------------------------------------------------------------------- main

CASES = {"one": partial(disturb, signal.SIGKILL, 1, ()), "ddp": partial(disturb, signal.SIGKILL, 2, ()),
         "fsdp": partial(disturb, signal.SIGKILL, 2, ("--strategy", "fsdp")), "term": partial(disturb, signal.SIGTERM, 2, ("--logging_steps", "1")),
         **{what: partial(disturb_launch, what) for what in ("worker", "launcher", "stopped")}}
KILLS = {"term": 10, "worker": 3, "launcher": 1, "stopped": 1}     # the others: --kills


def show(name: str, folder: str, kills: int, seed: int = 0) -> bool:
    """Runs a case, ends what is left of it and prints its line; whether all went well."""
    tally, begin, verdict = Tally(), time.monotonic(), "identical"
    try:
        CASES[name](f"{folder}/{name}", tally, kills, random.Random(f"{seed} {name}"))
    except (Miss, TimeoutError) as error:
        verdict = f"MISSED: {error}"
    finally:
        end_all(f"{folder}/{name}")
    print(f"{name:<10}{tally.kills:>6}{tally.inside:>15}{tally.rounds:>8}{time.monotonic() - begin:>9.1f}  {verdict}", flush=True)
    return verdict == "identical"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100, help="of each of one, ddp and fsdp [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the random instants [%(default)s]")
    parser.add_argument("--dir", help="where to make a folder for the runs (default: where temporary files are)")
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas (default: all)")
    flags = parser.parse_args(argv)
    if unknown := set(flags.only.split(",")) - CASES.keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))      # as after Ctrl-C, what runs is ended first
    folder = tempfile.mkdtemp(prefix="chaos-", dir=flags.dir and os.path.abspath(flags.dir))
    print(f"{'case':<10}{'kills':>6}{'inside a save':>15}{'rounds':>8}{'seconds':>9}", flush=True)
    bad = [name for name in flags.only.split(",") if not show(name, folder, KILLS.get(name, flags.kills), flags.seed)]
    if not bad:
        shutil.rmtree(folder)
    print(f"not as it must be: {', '.join(bad)}; their files are in {folder}" if bad else "every run has ended as if nothing had happened")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
