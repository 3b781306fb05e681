"""Learning-rate range test: a short run whose learning rate grows exponentially until the loss diverges (Smith 2017, "Cyclical Learning Rates",
section 3.3; exponential growth and the steepest slope are of Gugger, for fastai).

    python -m tools.find_lr --task recipes.image_classification -- --per_device_train_batch_size 64

An ordinary run of the task, with the flags after --, in a folder that is removed at the end; with torchrun give --folder, which is kept. It has no
warm-up. Of its two suggestions take the lower one, or try both.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import math
import os
import sys
import tempfile
from statistics import fmean, median
from typing import NamedTuple

from callbacks import Callback
from state import UsageError, run_main

# whatever else the task or its flags ask for; a learning rate that gives NaN ends the run, but not the program
ONLY_TRAIN = ["--do_train", "True", "--do_eval", "False", "--do_predict", "False", "--eval_strategy", "no", "--eval_on_start", "False",
              "--load_best_model_at_end", "False", "--early_stopping_patience", "none", "--early_stopping_threshold", "0", "--save_strategy", "no",
              "--resume_from_checkpoint", "none", "--report_to", "none", "--sample_prompt", "none", "--report_histograms", "False", "--report", "False",
              "--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "none", "--warmup_steps", "0", "--on_nonfinite", "skip"]
EACH_UPDATE = ["--logging_strategy", "steps", "--logging_steps", "1"]


class Found(NamedTuple):
    """Learning rates: where the loss fell fastest; the last one before it was lowest; and the next one of the test, from which on it rose."""

    steepest: float
    lowest: float
    rising: float


def main(argv: list[str] | None = None) -> Found:
    """Trains, prints the curve and what it says. Raises UsageError, with exit code 1 if the curve gives no answer; every rank finds the same."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--task", default="train", help="module with a function run(argv, **parts), as recipes.image_classification [%(default)s]")
    parser.add_argument("--low", type=float, default=1e-7, help="learning rate of the first update [%(default)s]")
    parser.add_argument("--high", type=float, default=10.0, help="of the last one [%(default)s]")
    parser.add_argument("--updates", type=int, default=100, help="from the one to the other [%(default)s]")
    parser.add_argument("--smoothing", type=int, default=5, help="a loss stands for the median of it and so many on each side [%(default)s]")
    parser.add_argument("--folder", help="of the run, which is kept (default: one that is removed)")
    end = argv.index("--") if "--" in argv else len(argv)
    flags, given = parser.parse_args(argv[:end]), argv[end + 1:]
    check(flags, given)

    def exponential(args, total: int):
        return lambda step: flags.low * (flags.high / flags.low) ** (step / (flags.updates - 1))
    curve, run = Curve(flags.smoothing), importlib.import_module(flags.task).run
    with contextlib.nullcontext(flags.folder) if flags.folder else tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run([*given, *ONLY_TRAIN, *EACH_UPDATE, "--max_steps", str(flags.updates), "--output_dir", folder], callbacks=[curve], make_schedule=exponential)
    if curve.is_main:
        print(curve.table())
    found = curve.find()
    if curve.is_main:
        print(f"--learning_rate {found.steepest:.2g}   where the loss fell fastest\n"
              f"--learning_rate {found.lowest / 10:.2g}   a tenth of {found.lowest:.2g}, after which it was lowest; it rose from {found.rising:.2g} on")
    return found


def check(flags: argparse.Namespace, given: list[str]) -> None:
    if not 0 < flags.low < flags.high < math.inf or flags.smoothing < 0 or flags.updates < max(10, 4 * flags.smoothing):
        raise UsageError(f"--low {flags.low} --high {flags.high} --updates {flags.updates} --smoothing {flags.smoothing}: expected 0 < low < high, "
                         f"a smoothing of 0 or more, and at least 10 updates and 4 times the smoothing")
    own = {"--output_dir", "--learning_rate", "--max_steps", *ONLY_TRAIN[::2], *EACH_UPDATE[::2]}
    if taken := sorted({word.partition("=")[0] for word in given} & own):
        raise UsageError(f"{', '.join(taken)} cannot be given: the test sets the learning rate of each of its --updates, which it logs, and does nothing "
                         f"but train, in a folder of its own (--folder)")
    if flags.folder is None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("several ranks have to train into the same folder: give --folder")
    try:
        inspect.signature(importlib.import_module(flags.task).run).bind(given, callbacks=[], make_schedule=None)
    except (ModuleNotFoundError, AttributeError, TypeError) as error:
        raise UsageError(f"--task {flags.task} has to be a module with a function run(argv, **parts): {error}") from None


class Curve(Callback):
    """The loss before each update, and its learning rate. Asks to stop when the smoothed loss has risen from its lowest by as much as it was at first."""

    def __init__(self, smoothing: int = 0):
        self.smoothing, self.rates, self.losses, self.diverged, self.is_main = smoothing, [], [], False, True

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.is_main = state.is_world_process_zero
        if logs.get("loss") is None:       # the row of the whole training, or a batch with no label
            return
        if math.isfinite(logs["loss"]) and "nan_steps" not in logs:
            self.rates.append(logs["learning_rate"])
            self.losses.append(logs["loss"])
            smooth = self.smooth()
            self.diverged = smooth[-1] - min(smooth) > abs(smooth[0])
        else:
            self.diverged = True
        control.should_training_stop |= self.diverged

    def smooth(self) -> list[float]:
        k = self.smoothing
        return [median(self.losses[max(0, i - k):i + k + 1]) for i in range(len(self.losses))]

    def table(self) -> str:
        """About 25 rows, with a bar that is full where the loss counts as diverged."""
        smooth, lines = self.smooth(), ["learning rate        loss"]
        for i in range(0, len(smooth), max(1, len(smooth) // 25)):
            height = (smooth[i] - min(smooth)) / (abs(smooth[0]) or 1)
            lines.append(f"{self.rates[i]:13.2e}  {smooth[i]:10.4g}  {'#' * round(40 * height) if height <= 1 else '#' * 40 + '>'}".rstrip())
        return "\n".join(lines)

    def find(self) -> Found:
        """What a learning rate did is the difference between the losses before and after its update. Raises UsageError if the loss has not diverged,
        or does not fall by more than its noise, which is twice the mean difference of neighbours on its way down."""
        smooth, k = self.smooth(), self.smoothing
        lowest = min(range(len(smooth)), key=smooth.__getitem__, default=0)
        if not lowest or smooth[0] - smooth[lowest] <= 2 * fmean(abs(b - a) for a, b in zip(self.losses, self.losses[1:lowest + 1])):
            raise UsageError(f"no answer: the loss never falls by more than its noise{', and then diverges' * self.diverged}. If it rises at once, give a "
                             f"lower --low; if it stays where it is, a higher --high; if it is too noisy to tell, more --updates or larger batches", 1)
        if not self.diverged:
            raise UsageError(f"no answer: the loss falls to {smooth[lowest]:.4g} at {self.rates[lowest]:.2g} and has not diverged at "
                             f"{self.rates[-1]:.2g}: give a higher --high", 1)

        def slope(i: int) -> float:
            before, after = max(0, i - k), min(len(smooth) - 1, i + 1 + k)
            return (smooth[after] - smooth[before]) / (after - before)
        return Found(self.rates[min(range(lowest), key=slope)], self.rates[lowest - 1], self.rates[lowest])


if __name__ == "__main__":
    run_main(main)
