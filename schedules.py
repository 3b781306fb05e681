"""Learning-rate schedules: pure functions of the number of finished updates, so a resumed run needs nothing but its step.

Update 1 uses step 0, whose learning rate is 0 when there is a warm-up, as in the HF Trainer. Each function returns a
multiplier of the peak learning rate after the warm-up. To add one, write it below and name it in `SHAPES`.
Only `Plateau` looks at evaluations and therefore has a state.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from args import TrainArgs
from state import UsageError


def progress(step: int, warmup: int, total: int) -> float:
    """0 at the end of the warm-up, 1 at `total` and after."""
    return min(1.0, (step - warmup) / max(1, total - warmup))


def wave(cycles: float, done: float) -> float:
    """A cosine between 1 and 0: 1 at the start, after `done` of `cycles` cycles. Half a cycle ends at 0."""
    return 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * done))


def constant(step: int, warmup: int, total: int) -> float:
    return 1.0


def linear(step: int, warmup: int, total: int) -> float:
    """Down to 0 at `total`."""
    return max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, warmup: int, total: int, num_cycles: float = 0.5) -> float:
    """Along a cosine, half a cycle by default: down to 0 at `total`. Loshchilov and Hutter 2017, equation 5."""
    return wave(num_cycles, progress(step, warmup, total))


def cosine_with_restarts(step: int, warmup: int, total: int, num_cycles: int = 1) -> float:
    """`num_cycles` times down half a cosine, each from 1. Loshchilov and Hutter 2017, section 3."""
    done = progress(step, warmup, total)
    return 0.0 if done >= 1.0 else wave(0.5, num_cycles * done % 1.0)


def cosine_with_min_lr(step: int, warmup: int, total: int, peak: float, min_lr: float | None = None, min_lr_rate: float | None = None,
                       num_cycles: float = 0.5) -> float:
    """A cosine down to the learning rate `min_lr`, or to `min_lr_rate` of the peak, where it stays (the HF Trainer's rises again)."""
    if (min_lr is None) == (min_lr_rate is None):
        raise ValueError('it needs one of "min_lr" and "min_lr_rate"')
    rate = min_lr / peak if min_lr_rate is None else min_lr_rate
    return cosine(step, warmup, total, num_cycles) * (1 - rate) + rate


def cosine_warmup_with_min_lr(step: int, warmup: int, total: int, peak: float, min_lr: float | None = None,
                              min_lr_rate: float | None = None, num_cycles: float = 0.5, warmup_lr_rate: float | None = None) -> float:
    """The same one update ahead: the warm-up starts above 0 (at `warmup_lr_rate` if given) and the minimum is used."""
    if step < warmup:
        return (step + 1) / warmup if warmup_lr_rate is None else warmup_lr_rate + (1 - warmup_lr_rate) * step / max(1, warmup - 1)
    return cosine_with_min_lr(step + 1, warmup, total, peak, min_lr, min_lr_rate, num_cycles)


def polynomial(step: int, warmup: int, total: int, peak: float, power: float = 1.0, lr_end: float = 1e-7) -> float:
    """From the peak to the learning rate `lr_end` at `total`, along (1 - x) ** power."""
    if lr_end >= peak:
        raise ValueError(f"it ends at lr_end={lr_end}, which must be below --learning_rate {peak}")
    return ((peak - lr_end) * (1 - progress(step, warmup, total)) ** power + lr_end) / peak


def inverse_sqrt(step: int, warmup: int, total: int, timescale: int | None = None) -> float:
    """1 / sqrt of the updates since the warm-up, counted in `timescale` (default: the warm-up, or 10,000 without one). Vaswani
    et al. 2017, section 5.3."""
    timescale = timescale or warmup or 10_000
    return 1.0 / math.sqrt((step + timescale - warmup) / timescale)


def warmup_stable_decay(step: int, warmup: int, total: int, num_decay_steps: int, num_stable_steps: int | None = None,
                        warmup_type: str = "linear", decay_type: str = "cosine", min_lr_ratio: float = 0.0,
                        num_cycles: float = 0.5) -> float:
    """Up from `min_lr_ratio`, flat, and down to it over the last `num_decay_steps`. Hu et al. 2024 (MiniCPM), section 4.
    warmup_type, decay_type: linear, cosine or 1-sqrt (Haegele et al. 2024, section 3)."""
    down = {"linear": lambda x: 1 - x, "cosine": lambda x: wave(num_cycles, x), "1-sqrt": lambda x: 1 - math.sqrt(x)}
    up = {"linear": lambda x: x, "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)), "1-sqrt": lambda x: 1 - math.sqrt(1 - x)}
    if not all(kind in list(up) for kind in (warmup_type, decay_type)):
        raise ValueError(f"warmup_type={warmup_type!r} and decay_type={decay_type!r} must be linear, cosine or 1-sqrt")
    if num_stable_steps is None and warmup + num_decay_steps > total:
        raise ValueError(f"warm-up {warmup} + num_decay_steps {num_decay_steps} are more than the run's {total} updates")
    stable_end = warmup + (total - warmup - num_decay_steps if num_stable_steps is None else num_stable_steps)
    if warmup <= step < stable_end:
        return 1.0
    if step < warmup:
        factor = up[warmup_type](step / warmup)
    else:
        factor = down[decay_type]((step - stable_end) / max(1, num_decay_steps)) if step < stable_end + num_decay_steps else 0.0
    return max(0.0, factor * (1 - min_lr_ratio) + min_lr_ratio)


SHAPES = {f.__name__: f for f in (constant, linear, cosine, cosine_with_restarts, polynomial, inverse_sqrt, warmup_stable_decay,
                                  cosine_with_min_lr, cosine_warmup_with_min_lr)} | {"constant_with_warmup": constant}
OWN_WARMUP = ("constant", "warmup_stable_decay", "cosine_warmup_with_min_lr")      # the others go up from 0 in a line


class Plateau:
    """torch's ReduceLROnPlateau as a schedule: multiplies the learning rate by `factor` when the evaluation loss has not improved
    for more than `patience` evaluations."""

    def __init__(self, peak: float, mode: str = "min", factor: float = 0.1, patience: int = 10, threshold: float = 1e-4,
                 threshold_mode: str = "rel", cooldown: int = 0, min_lr: float = 0.0, eps: float = 1e-8):
        if mode not in ("min", "max") or threshold_mode not in ("rel", "abs") or not 0 <= factor < 1:
            raise ValueError(f"mode={mode!r} must be min or max, threshold_mode={threshold_mode!r} rel or abs, factor={factor} below 1")
        optimizer = torch.optim.SGD([torch.zeros(())], lr=peak)     # torch's rule works on the learning rate of one; this is never stepped
        self.group = optimizer.param_groups[0]
        self.rule = ReduceLROnPlateau(optimizer, mode, factor, patience, threshold, threshold_mode, cooldown, min_lr, eps)

    def __call__(self, step: int) -> float:
        return self.group["lr"]

    def observe(self, metric: float) -> None:
        """Called with the metric of each evaluation during training."""
        self.rule.step(metric)

    def state_dict(self) -> dict:
        best = None if self.rule.best == self.rule.mode_worse else self.rule.best       # None: no evaluation yet
        return {"lr": self.group["lr"], "best": best, "bad_evaluations": self.rule.num_bad_epochs, "cooling": self.rule.cooldown_counter}

    def load_state_dict(self, state: dict) -> None:
        self.group["lr"], self.rule.best = state["lr"], self.rule.best if state["best"] is None else state["best"]
        self.rule.num_bad_epochs, self.rule.cooldown_counter = state["bad_evaluations"], state["cooling"]


def build_schedule(args: TrainArgs, total: int) -> Callable[[int], float]:
    """The learning rate after `step` finished updates of a run of `total`. Raises UsageError for wrong --lr_scheduler_kwargs."""
    kind, kwargs, peak = args.lr_scheduler_type, dict(args.lr_scheduler_kwargs or {}), args.learning_rate
    warmup = math.ceil(args.warmup_steps * total) if args.warmup_steps < 1 else int(args.warmup_steps)
    target = Plateau if kind == "reduce_lr_on_plateau" else SHAPES[kind]
    parameters = inspect.signature(target).parameters
    settings = {name: p for name, p in parameters.items() if name not in ("step", "warmup", "total", "peak")}
    try:
        for name, value in kwargs.items():
            if name not in settings:
                raise ValueError(f"it has no {name!r}; {kind} knows {', '.join(sorted(settings)) or 'none'}")
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if settings[name].annotation != "str" and not number:
                raise ValueError(f"{name} is {value!r}, expected a number")
        if missing := [name for name, p in settings.items() if p.default is p.empty and name not in kwargs]:
            raise ValueError(f"{kind} needs {missing[0]!r}, as in '{{\"{missing[0]}\": 100}}'")
        if "peak" in parameters:
            kwargs["peak"] = peak

        def schedule(step: int) -> float:
            return peak * (step / warmup if step < warmup and kind not in OWN_WARMUP else target(step, warmup, total, **kwargs))
        if target is Plateau:
            schedule = Plateau(**kwargs)
        for step in (0, warmup, total // 2, total):     # wrong values show here and not in the middle of a run
            schedule(step)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise UsageError(f"--lr_scheduler_type {kind} --lr_scheduler_kwargs {args.lr_scheduler_kwargs}: {error}") from None
    return schedule


def notice(args: TrainArgs) -> str:
    """What is given and not used, to be said once; "" for nothing."""
    if args.lr_scheduler_type in ("constant", "reduce_lr_on_plateau") and args.warmup_steps:
        return f"note: --lr_scheduler_type {args.lr_scheduler_type} has no warm-up; --warmup_steps {args.warmup_steps:g} is not used"
    return ""
