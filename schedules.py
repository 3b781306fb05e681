"""Learning-rate schedules: pure functions of the number of finished updates, so a resumed run needs nothing but its step.

Update 1 uses step 0, whose learning rate is 0 when there is a warm-up, as in the HF Trainer. Each function returns a
multiplier of the peak learning rate. To add one, write it below and name it in `SHAPES`.
Only `Plateau` looks at evaluations and therefore has a state.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable

from args import TrainArgs
from state import UsageError


def warm(step: int, warmup: int) -> float:
    """0 to 1 over the first `warmup` updates."""
    return step / max(1, warmup)


def progress(step: int, warmup: int, total: int) -> float:
    """0 at the end of the warm-up, 1 at `total` and after."""
    return min(1.0, (step - warmup) / max(1, total - warmup))


def constant_with_warmup(step: int, warmup: int, total: int) -> float:
    """1 after the warm-up."""
    return warm(step, warmup) if step < warmup else 1.0


def linear(step: int, warmup: int, total: int) -> float:
    """Down to 0 at `total`."""
    return warm(step, warmup) if step < warmup else max(0.0, (total - step) / max(1, total - warmup))


def wave(cycles: float, done: float) -> float:
    """A cosine between 1 and 0: 1 at the start, after `done` of `cycles` cycles. Half a cycle ends at 0."""
    return 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * done))


def cosine(step: int, warmup: int, total: int, num_cycles: float = 0.5) -> float:
    """Along a cosine, half a cycle by default: down to 0 at `total`. Loshchilov and Hutter 2017, equation 5."""
    return warm(step, warmup) if step < warmup else wave(num_cycles, progress(step, warmup, total))


def cosine_with_restarts(step: int, warmup: int, total: int, num_cycles: int = 1) -> float:
    """`num_cycles` times down half a cosine, each from 1. Loshchilov and Hutter 2017, section 3."""
    if step < warmup:
        return warm(step, warmup)
    done = progress(step, warmup, total)
    return 0.0 if done >= 1.0 else wave(0.5, num_cycles * done % 1.0)


def cosine_with_min_lr(step: int, warmup: int, total: int, min_lr_rate: float, num_cycles: float = 0.5) -> float:
    """A cosine down to `min_lr_rate`, where it stays (the HF Trainer's rises again after `total`)."""
    if step < warmup:
        return warm(step, warmup)
    return wave(num_cycles, progress(step, warmup, total)) * (1 - min_lr_rate) + min_lr_rate


def cosine_warmup_with_min_lr(step: int, warmup: int, total: int, min_lr_rate: float, num_cycles: float = 0.5,
                              warmup_lr_rate: float | None = None) -> float:
    """The same one update ahead: the warm-up starts above 0 (at `warmup_lr_rate` if given) and the minimum is used."""
    if step < warmup:
        return (step + 1) / warmup if warmup_lr_rate is None else warmup_lr_rate + (1 - warmup_lr_rate) * step / max(1, warmup - 1)
    done = min(1.0, (step - warmup + 1) / max(1, total - warmup))
    return wave(num_cycles, done) * (1 - min_lr_rate) + min_lr_rate


def polynomial(step: int, warmup: int, total: int, peak: float, power: float = 1.0, lr_end: float = 1e-7) -> float:
    """From the peak to the learning rate `lr_end` at `total`, along (1 - x) ** power."""
    if step < warmup:
        return warm(step, warmup)
    return ((peak - lr_end) * (1 - progress(step, warmup, total)) ** power + lr_end) / peak


def inverse_sqrt(step: int, warmup: int, total: int, timescale: int | None = None) -> float:
    """1 / sqrt of the updates since the warm-up, counted in `timescale` (default: the warm-up, or 10,000 without one).

    Vaswani et al. 2017, section 5.3.
    """
    if step < warmup:
        return warm(step, warmup)
    timescale = timescale or warmup or 10_000
    return 1.0 / math.sqrt((step + timescale - warmup) / timescale)


def warmup_stable_decay(step: int, warmup: int, total: int, num_decay_steps: int, num_stable_steps: int | None = None,
                        warmup_type: str = "linear", decay_type: str = "cosine", min_lr_ratio: float = 0.0,
                        num_cycles: float = 0.5) -> float:
    """Up from `min_lr_ratio`, flat, and down to it over the last `num_decay_steps`. Hu et al. 2024 (MiniCPM), section 4.

    warmup_type, decay_type: linear, cosine or 1-sqrt (Haegele et al. 2024, section 3).
    """
    stable = total - warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    down = {"linear": lambda x: 1 - x, "cosine": lambda x: wave(num_cycles, x), "1-sqrt": lambda x: 1 - math.sqrt(x)}
    up = {"linear": lambda x: x, "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)), "1-sqrt": lambda x: 1 - math.sqrt(1 - x)}
    if step < warmup:
        factor = up[warmup_type](warm(step, warmup))
    elif step < warmup + stable:
        return 1.0
    elif step < warmup + stable + num_decay_steps:
        factor = down[decay_type]((step - warmup - stable) / max(1, num_decay_steps))
    else:
        factor = 0.0
    return max(0.0, factor * (1 - min_lr_ratio) + min_lr_ratio)


SHAPES = {f.__name__: f for f in (linear, cosine, cosine_with_restarts, polynomial, constant_with_warmup, inverse_sqrt,
                                  warmup_stable_decay, cosine_with_min_lr, cosine_warmup_with_min_lr)}


class Plateau:
    """Multiplies the learning rate by `factor` when the evaluation loss has not improved for more than `patience` evaluations.

    The rules of torch.optim.lr_scheduler.ReduceLROnPlateau, for one learning rate and as a schedule.
    """

    def __init__(self, peak: float, mode: str = "min", factor: float = 0.1, patience: int = 10, threshold: float = 1e-4,
                 threshold_mode: str = "rel", cooldown: int = 0, min_lr: float = 0.0, eps: float = 1e-8):
        if mode not in ("min", "max") or threshold_mode not in ("rel", "abs") or not 0 <= factor < 1:
            raise ValueError(f"mode={mode!r} must be min or max, threshold_mode={threshold_mode!r} rel or abs, factor={factor} below 1")
        self.lr, self.mode, self.factor, self.patience, self.threshold = peak, mode, factor, patience, threshold
        self.threshold_mode, self.cooldown, self.min_lr, self.eps = threshold_mode, cooldown, min_lr, eps
        self.best: float | None = None
        self.bad_evaluations = self.cooling = 0

    def __call__(self, step: int) -> float:
        return self.lr

    def observe(self, metric: float) -> None:
        """Called with the metric of each evaluation during training."""
        if self.is_better(metric):
            self.best, self.bad_evaluations = metric, 0
        else:
            self.bad_evaluations += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.bad_evaluations = 0
        if self.bad_evaluations > self.patience:
            lower = max(self.lr * self.factor, self.min_lr)
            self.lr = lower if self.lr - lower > self.eps else self.lr
            self.cooling, self.bad_evaluations = self.cooldown, 0

    def is_better(self, metric: float) -> bool:
        best = self.best if self.best is not None else math.inf if self.mode == "min" else -math.inf
        if self.threshold_mode == "rel":
            return metric < best * (1 - self.threshold) if self.mode == "min" else metric > best * (1 + self.threshold)
        return metric < best - self.threshold if self.mode == "min" else metric > best + self.threshold

    def state_dict(self) -> dict:
        return {"lr": self.lr, "best": self.best, "bad_evaluations": self.bad_evaluations, "cooling": self.cooling}

    def load_state_dict(self, state: dict) -> None:
        for key, value in state.items():
            setattr(self, key, value)


def warmup_updates(args: TrainArgs, total: int) -> int:
    """--warmup_steps as updates: below 1 it is the ratio of `total`, rounded up."""
    return math.ceil(args.warmup_steps * total) if args.warmup_steps < 1 else int(args.warmup_steps)


def build_schedule(args: TrainArgs, total: int) -> Callable[[int], float]:
    """The learning rate after `step` finished updates of a run of `total`. Raises UsageError for wrong --lr_scheduler_kwargs."""
    kind, kwargs, peak = args.lr_scheduler_type, dict(args.lr_scheduler_kwargs or {}), args.learning_rate
    if kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        if ("min_lr" in kwargs) == ("min_lr_rate" in kwargs):
            raise UsageError(f'--lr_scheduler_type {kind} needs --lr_scheduler_kwargs with one of "min_lr" and "min_lr_rate", got {kwargs}')
        known = {"min_lr"}
    else:
        known = set()
    target = {"reduce_lr_on_plateau": Plateau, "constant": lambda step, warmup, total: 1.0}.get(kind) or SHAPES[kind]
    parameters = [p for p in list(inspect.signature(target).parameters.values())[1 if target is Plateau else 3:] if p.name != "peak"]
    check_kwargs(kind, kwargs, known | {p.name for p in parameters}, {p.name for p in parameters if p.default is p.empty} - {"min_lr_rate"})
    warmup = warmup_updates(args, total)
    try:
        if "min_lr" in kwargs and target is not Plateau:
            kwargs["min_lr_rate"] = kwargs.pop("min_lr") / peak
        if kind == "polynomial":
            kwargs["peak"] = peak
            if kwargs.get("lr_end", 1e-7) >= peak:
                raise ValueError(f"it ends at lr_end={kwargs.get('lr_end', 1e-7)}, which must be below --learning_rate {peak}")
        if kind == "warmup_stable_decay":
            check_wsd(kwargs, warmup, total)
        schedule = Plateau(peak, **kwargs) if target is Plateau else lambda step: peak * target(step, warmup, total, **kwargs)
        for step in (0, warmup, total // 2, total):     # wrong values show here and not in the middle of a run
            schedule(step)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise UsageError(f"--lr_scheduler_type {kind} --lr_scheduler_kwargs {args.lr_scheduler_kwargs}: {error}") from None
    return schedule


WORDS = {"warmup_type", "decay_type", "mode", "threshold_mode"}      # settings that are not numbers


def check_kwargs(kind: str, given: dict, known: set[str], needed: set[str]) -> None:
    if wrong := sorted(given.keys() - known):
        raise UsageError(f"--lr_scheduler_kwargs has {wrong[0]!r}; --lr_scheduler_type {kind} knows {', '.join(sorted(known)) or 'none'}")
    if missing := sorted(needed - given.keys()):
        raise UsageError(f"--lr_scheduler_type {kind} needs {missing[0]!r} in --lr_scheduler_kwargs, as in '{{\"{missing[0]}\": 100}}'")
    for name, value in given.items():
        if name not in WORDS and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
            raise UsageError(f"--lr_scheduler_kwargs: {name} is {value!r}, expected a number")


def check_wsd(kwargs: dict, warmup: int, total: int) -> None:
    for name in ("warmup_type", "decay_type"):
        if kwargs.get(name, "linear") not in ("linear", "cosine", "1-sqrt"):
            raise ValueError(f"{name}={kwargs[name]!r} must be linear, cosine or 1-sqrt")
    if warmup + kwargs["num_decay_steps"] > total and "num_stable_steps" not in kwargs:
        raise ValueError(f"warm-up {warmup} + num_decay_steps {kwargs['num_decay_steps']} are more than the run's {total} updates")


def notice(args: TrainArgs) -> str:
    """What is given and not used, to be said once; "" for nothing."""
    if args.lr_scheduler_type in ("constant", "reduce_lr_on_plateau") and args.warmup_steps:
        return f"note: --lr_scheduler_type {args.lr_scheduler_type} has no warm-up; --warmup_steps {args.warmup_steps:g} is not used"
    return ""
