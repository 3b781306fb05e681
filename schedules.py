"""Learning-rate schedules: functions from the number of finished updates to a multiplier of the peak learning rate.

They are pure, so a resumed run needs nothing but its step. Update 1 uses f(0), which is 0 when there is a warm-up, as in
the HF Trainer. To add one, add a branch to `build_schedule`.
"""
from __future__ import annotations

import math
from collections.abc import Callable

from args import TrainArgs


def constant(step: int, warmup: int, total: int) -> float:
    """1 after the warm-up."""
    return warm(step, warmup)


def linear(step: int, warmup: int, total: int) -> float:
    """Down to 0 at `total`."""
    return warm(step, warmup) if step < warmup else max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, warmup: int, total: int) -> float:
    """Half a cosine down to 0 at `total`. Loshchilov and Hutter 2017, equation 5, without restarts."""
    if step < warmup:
        return warm(step, warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


def warm(step: int, warmup: int) -> float:
    return min(1.0, step / max(1, warmup)) if warmup else 1.0


def warmup_updates(args: TrainArgs, total: int) -> int:
    """--warmup_steps as updates: below 1 it is the ratio of `total`, rounded up."""
    return math.ceil(args.warmup_steps * total) if args.warmup_steps < 1 else int(args.warmup_steps)


def build_schedule(args: TrainArgs, total: int) -> Callable[[int], float]:
    """The multiplier of --learning_rate after `step` finished updates, for a run of `total` updates."""
    warmup = warmup_updates(args, total)
    if args.lr_scheduler_type == "constant":
        warmup = 0   # as in the HF Trainer: constant has no warm-up, constant_with_warmup has
    shape = {"linear": linear, "cosine": cosine, "constant": constant, "constant_with_warmup": constant}[args.lr_scheduler_type]
    return lambda step: shape(step, warmup, total)
