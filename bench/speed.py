"""This trainer beside a bare loop, the HF Trainer, Accelerate, Lightning Fabric and the Lightning Trainer, in one run.

    python -m bench.speed [cpu watch tokens start resume ranks memory growth] [--rounds 10] [--out FILE]

    cpu      CPU time per update of a tiny GPT (one block, width 32, 2 x 16 tokens) with one thread: what remains is overhead
    tokens   tokens per second of the default job's GPT, of one with 10 million parameters, and of one layer with a vocabulary of 32,000, two threads.
             There the peers take the loss from all logits, as the models of transformers do, and ours and the bare loop from pieces
    start    seconds from the start of a process to the end of its first update
    resume   the same of a run that goes on from update 100,000 of a set of 200,000 samples, and from update 10
    ranks    updates per second on two gloo ranks, one thread each, of the default job's GPT
    memory   peak resident memory of a process that trains the default job's GPT, and one layer with a vocabulary of 32,000 and of 128,000, as
             above; the bare loop has both losses
    watch    CPU time per update of the default job's GPT, one thread, with the bar, metrics.jsonl and a log every 10 updates, over none of them
    growth   this trainer alone over 5,000 updates: CPU time per update of 4,501 to 5,000 over that of 101 to 600; and how fast resident memory
             grows after 1,000, without checkpoints and with one every 100 updates. The allocator takes memory in steps of up to 0.3 MB, so this
             is never quite 0; a scalar tensor kept of each update would be 600 kB per 1,000

In each round all contestants take their turn in the same order, so that what else the machine does meets all alike; a first round is left out.
The clock is read at the end of optimizer steps (bench/contestants.py), so a turn is so many whole updates, data included, and no set-up. Each
round gives a ratio; the table has their median and its 95% bootstrap interval. A limit holds if it lies inside of the interval or the interval
keeps it. In every round all contestants must come to the same loss, to 1e-5, or the work was not the same and the program stops. Exits with 1 if
a limit is missed.
"""
from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

from args import TrainArgs
from bench.contestants import BARE, LONG, ONE_PROCESS, OURS, PEERS, RANKS, RESUMED_EARLY, RESUMED_LATE, UNWATCHED, WATCHED, Job, run
from tests import ranks as pool

DEFAULT = {"batch": 16, "layers": TrainArgs.n_layer, "heads": TrainArgs.n_head, "width": TrainArgs.n_embd, "length": TrainArgs.block_size}
TEN_MILLION = {"batch": 8, "layers": 8, "heads": 5, "width": 320, "length": 256}
LOGITS = {"batch": 32, "layers": 1, "heads": 2, "width": 128, "length": 128}
TOLERANCE, UPDATES = 1e-5, 5000
ALL_LOGITS, EARLY, LATE, SLOPE = ", all logits", "updates 101 to 600", "updates 4,501 to 5,000", "ours"
Values = dict[str, list[float]]     # of each contestant, by round


class Limit(NamedTuple):
    """The ratio of `mine` to `other` keeps `relation` to `bound`; or, if slack is given, is no more than that over it in the row's unit."""

    mine: str
    other: str
    relation: str
    bound: float
    slack: float | None = None

    def holds(self, low: float, high: float, difference: float) -> bool:
        inside = {"<=": low <= self.bound, "<": low < self.bound, ">=": high >= self.bound}[self.relation]
        return inside or self.slack is not None and difference <= self.slack

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}" + (f" or +{self.slack:.0f} MB" if self.slack is not None else "")


class Row(NamedTuple):
    title: str
    unit: str
    limits: list[Limit]
    measure: Callable[[int], Values]        # of so many rounds


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median, and the 95% percentile bootstrap interval of it (Efron and Tibshirani 1993, section 13.3)."""
    draws = np.random.default_rng(0).choice(np.asarray(ratios), (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def in_turns(names: Iterable[str], rounds: int, turn: Callable[[str], tuple[float, float]]) -> Values:
    """What `turn` measures for each contestant, in rounds. It gives the loss of the last update too, which must be the same for all."""
    found: Values = {name: [] for name in names}
    for number in range(rounds + 1):
        losses = {}
        for name in found:
            value, losses[name] = turn(name)
            found[name] += [value] * (number > 0)
        check_losses(losses)
        tell(f"  round {number} of {rounds}: " + "  ".join(f"{name} {values[-1]:.5g}" for name, values in found.items() if values))
    return found


def tell(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def check_losses(losses: dict[str, float]) -> None:
    name, loss = next(iter(losses.items()))
    if other := [f"{each} {value:.7f}" for each, value in losses.items() if not math.isclose(value, loss, rel_tol=TOLERANCE)]:
        sys.exit(f"not the same work: the loss of {name} is {loss:.7f}, and of {', '.join(other)}")


def per_update(job: Job, skip: int) -> float:
    """Of the clock, leaving out the first updates."""
    return (job.ticks[-1] - job.ticks[skip - 1]) / (len(job.ticks) - skip)


def cpu(rounds: int) -> Values:
    def turn(name: str) -> tuple[float, float]:
        job = run(name, updates=120, clock=time.process_time)
        return 1e6 * per_update(job, 20), job.last_loss
    return in_turns(ONE_PROCESS, rounds, turn)


def watch(rounds: int) -> Values:
    def turn(name: str) -> tuple[float, float]:
        job = run(name, updates=25, clock=time.process_time, **DEFAULT)
        return 1e6 * per_update(job, 5), job.last_loss
    return in_turns((WATCHED, UNWATCHED), 2 * rounds, turn)


def tokens(rounds: int, updates: int, **model) -> Values:
    def turn(name: str) -> tuple[float, float]:
        job = run(name, updates=updates, threads=2, **model, all_logits="vocab" in model and name not in (OURS, BARE))
        return job.batch * job.length / per_update(job, 2), job.last_loss
    return in_turns(ONE_PROCESS, rounds, turn)


def in_process(name: str, clock: str = "time", **settings) -> dict:
    """What a contestant in a process of its own tells."""
    command = [sys.executable, "-m", "bench.contestants", name, clock, json.dumps(settings)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def start(rounds: int) -> Values:
    def turn(name: str) -> tuple[float, float]:
        began = time.monotonic()
        told = in_process(name, updates=1)
        return told["ticks"][0] - began, told["loss"]
    return in_turns(ONE_PROCESS, rounds, turn)


def resume(rounds: int) -> Values:
    with tempfile.TemporaryDirectory() as folder:
        run("ours, long", folder, updates=LONG + 1)
        os.environ["BENCH_RUN"] = folder

        def turn(name: str) -> tuple[float, float]:
            began = time.monotonic()
            return in_process(name, updates=LONG + 1)["ticks"][0] - began, 1.0
        return in_turns((RESUMED_LATE, RESUMED_EARLY), 2 * rounds, turn)


def memory(rounds: int, **model) -> Values:
    """It hardly varies, so three rounds are enough."""
    def turn(name: str) -> tuple[float, float]:
        told = in_process(name.removesuffix(ALL_LOGITS), updates=3, **model, all_logits="vocab" in model and name not in (OURS, BARE))
        return told["peak"], told["loss"]
    return in_turns([*ONE_PROCESS, *[BARE + ALL_LOGITS] * ("vocab" in model)], min(rounds, 3), turn)


def ranks(rounds: int) -> Values:
    """Of the slowest rank."""
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pool.DEADLINE_S = 3600.0
    processes = pool.Ranks()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = processes.run(2, on_rank, rounds, folder)
    finally:
        processes.close()
    return {name: [min(values) for values in zip(*(each[name] for each in found))] for name in RANKS}


def on_rank(rounds: int, folder: str) -> Values:
    number = itertools.count()

    def turn(name: str) -> tuple[float, float]:
        job = run(name, os.path.join(folder, str(next(number))), updates=12, **{**DEFAULT, "batch": 8})
        return 1 / per_update(job, 2), job.last_loss
    return in_turns(RANKS, rounds, turn)


def time_growth(rounds: int) -> Values:
    found: Values = {EARLY: [], LATE: []}
    for number in range(rounds + 1):
        ticks = run(OURS, updates=UPDATES, clock=time.process_time).ticks
        if number > 0:
            found[EARLY].append(1e6 * (ticks[599] - ticks[99]) / 500)
            found[LATE].append(1e6 * (ticks[-1] - ticks[-501]) / 500)
            tell(f"  round {number} of {rounds}: {found[EARLY][-1]:.5g} {found[LATE][-1]:.5g}")
    return found


def memory_growth(rounds: int, name: str) -> Values:
    """By least squares from update 1,001 on, in processes of their own: memory that an earlier run has left would hide what is lost."""
    slopes = []
    for _ in range(min(rounds, 5)):
        megabytes = in_process(name, "memory", updates=UPDATES)["ticks"][1000:]
        slopes.append(1024e3 * float(np.polyfit(np.arange(len(megabytes)), megabytes, 1)[0]))
        tell(f"  {slopes[-1]:.1f}")
    return {SLOPE: slopes}


def row_limits(relation: str, bare: float, peers: float, **slack) -> list[Limit]:
    return [Limit(OURS, BARE, relation, bare, **slack), *(Limit(OURS, peer, relation, peers) for peer in PEERS)]


LOGITS_LIMITS = [Limit(OURS, BARE, "<=", 1.02, 30), *(Limit(OURS, other, "<=", 0.5) for other in [BARE + ALL_LOGITS, *PEERS])]
MICROSECONDS, TOKENS, MB, KB = "microseconds per update", "tokens per second", "MB", "kB per 1,000 updates"
ROWS = {
    "cpu": [Row("CPU time, tiny model", MICROSECONDS, [Limit(OURS, BARE, "<=", 1.03), *(Limit(OURS, peer, "<", 1.0) for peer in PEERS)], cpu)],
    "watch": [Row("CPU time of watching, default job's model", MICROSECONDS, [Limit(WATCHED, UNWATCHED, "<=", 1.01)], watch)],
    "tokens": [Row("default job's model", TOKENS, row_limits(">=", 0.99, 1.0), partial(tokens, updates=10, **DEFAULT)),
               Row("10 million parameters", TOKENS, row_limits(">=", 0.99, 1.0), partial(tokens, updates=5, **TEN_MILLION)),
               Row("vocabulary 32,000", TOKENS, row_limits(">=", 0.99, 1.0), partial(tokens, updates=5, **{**LOGITS, "batch": 8}, vocab=32_000))],
    "start": [Row("start of a process to the end of its first update", "seconds", [Limit(OURS, BARE, "<=", 1.15), Limit(OURS, "HF Trainer", "<=", 0.6)], start)],
    "resume": [Row("start of a process to the end of its first update", "seconds", [Limit(RESUMED_LATE, RESUMED_EARLY, "<=", 1.05)], resume)],
    "ranks": [Row("two ranks", "updates per second", [Limit("ours, ddp", "DDP", ">=", 0.97), *(Limit("ours, ddp", peer, ">=", 1.0) for peer in PEERS),
                                                      *(Limit(f"ours, {name}", "FSDP2", ">=", 0.95) for name in ("zero1", "zero2", "fsdp"))], ranks)],
    "memory": [Row("peak memory, default job's model", MB, [Limit(OURS, BARE, "<=", 1.02, 30)], partial(memory, **DEFAULT)),
               Row("peak memory, vocabulary 32,000", MB, LOGITS_LIMITS, partial(memory, **LOGITS, vocab=32_000)),
               Row("peak memory, vocabulary 128,000", MB, LOGITS_LIMITS, partial(memory, **{**LOGITS, "batch": 16}, vocab=128_000))],
    "growth": [Row("CPU time over 5,000 updates", MICROSECONDS, [Limit(LATE, EARLY, "<=", 1.03), Limit(LATE, EARLY, ">=", 0.97)], time_growth),
               Row("resident memory", KB, [Limit(SLOPE, "", "<=", 100)], partial(memory_growth, name=OURS)),
               Row("resident memory, a checkpoint every 100 updates", KB, [Limit(SLOPE, "", "<=", 100)], partial(memory_growth, name="ours, saving"))]}


def judge(row: Row, values: Values) -> list[tuple[str, bool]]:
    """A line of the table for each limit, and whether it holds."""
    lines = []
    for limit in row.limits:
        mine, other = values[limit.mine], values.get(limit.other, [1.0] * len(values[limit.mine]))
        middle, low, high = interval([a / b for a, b in zip(mine, other)])
        holds = limit.holds(low, high, statistics.median(a - b for a, b in zip(mine, other)))
        amounts = " against ".join(f"{statistics.median(each):,.4g}" for each in (mine, other)[:1 + bool(limit.other)])
        cells = [row.title, limit.mine, limit.other, limit, f"{middle:.3f} [{low:.3f}, {high:.3f}]", f"{amounts} {row.unit}", "holds" if holds else "MISSED"]
        lines.append((f"| {' | '.join(map(str, cells))} |", holds))
    return lines


def versions() -> str:
    names = ("torch", "numpy", "transformers", "accelerate", "lightning")
    return f"Python {platform.python_version()}, {', '.join(f'{name} {importlib.metadata.version(name)}' for name in names)}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", help="a file in Markdown, to whose end the table goes as a section with date and command")
    flags = parser.parse_args()
    if unknown := [name for name in flags.rows if name not in ROWS]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    table = [f"{versions()}, {flags.rounds} rounds", "", "| row | contestant | against | limit | ratio, median [95%] | medians | |", "|---|---|---|---|---|---|---|"]
    lines = []
    for name in flags.rows or ROWS:
        for row in ROWS[name]:
            tell(f"{row.title}, {row.unit}")
            lines += judge(row, row.measure(flags.rounds))
    text = "\n".join([*table, *(line for line, _ in lines)])
    print(text)
    if flags.out is not None:
        with open(flags.out, "a") as file:
            file.write(f"\n## {datetime.date.today()}: speed beside others, `python -m bench.speed {' '.join([*flags.rows, '--rounds', str(flags.rounds)])}`\n\n{text}\n")
    if not all(holds for _, holds in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
