"""The default training, watched for spikes of its loss and for divergence:

    python -m recipes.spikes warn --output_dir runs/a --max_steps 2000 --logging_steps 10 ...      tells them
    python -m recipes.spikes stop ...                                                             ends the run, too, when it diverges

Every flag of train.py follows. Any other task takes the callback as well: recipes.image_classification.run(argv, callbacks=[SpikeCallback()]).
It looks at what is logged, and so never waits for a device: with --logging_steps 1 at the loss of each update, else at their means, in
which the spike of one update among ten is a tenth as high. metrics.jsonl has no mark of a spike, since a row is written before callbacks see it.
"""
from __future__ import annotations

import math
import sys
from statistics import median

import train
from callbacks import Callback
from rundir import list_checkpoints
from state import TrainState, UsageError, run_main

FIRST = 20      # logs whose deviations tell a spread; before, it is taken for as large as the median
LEAST = 0.01    # of the median: a loss that hardly moves would make a spike of its last digits


class SpikeCallback(Callback):
    """Warns, on rank 0, once of each spike and each divergence, names the last checkpoint before it, and with stop=True ends a run that
    diverges. What it remembers is in checkpoints: a resumed run warns as the one that was never stopped.

    window: logs that are remembered. A spike is a loss of more than `threshold` spreads above their median; it lasts while the next ones
    are too. A spread is 1.4826 times the median absolute deviation, the standard deviation of normal noise; while the loss still falls
    fast it is that of the fall, and only high spikes are told. A run diverges when for `patience` logs in a row this median is above the
    lowest limit so far: `factor` times a median, and 2 spreads above it. Losses of 0 or less, of which a factor means nothing, are told no
    divergence of, and those that are not finite are left to --on_nonfinite. Raises UsageError if the run logs too seldom."""

    def __init__(self, window: int = 30, threshold: float = 8.0, factor: float = 1.5, patience: int = 10, stop: bool = False):
        if window < FIRST or threshold <= 0 or factor <= 1 or patience < 1:
            raise UsageError(f"SpikeCallback was given window={window}, threshold={threshold}, factor={factor}, patience={patience}; it needs "
                             f"window >= {FIRST}, threshold > 0, factor > 1 and patience >= 1")
        self.window, self.threshold, self.factor, self.patience, self.stop = window, threshold, factor, patience, stop
        self.losses: list[float] = []       # of the last logs, and the update of the last one
        self.last_step = 0
        self.spikes: list[int] = []         # the updates at whose log one began
        self.in_spike = False
        self.best_median, self.limit, self.best_step = None, None, 0
        self.logs_above = 0                 # in a row

    @property
    def has_stopped(self) -> bool:
        return self.stop and self.logs_above >= self.patience

    def on_train_begin(self, args, state, control, **kwargs):
        logs = {"no": 0, "epoch": state.num_train_epochs, "steps": state.max_steps // state.logging_steps}[args.logging_strategy]
        if logs <= FIRST:
            raise UsageError(f"spikes are told from the {FIRST} logs before them, and this run of {state.max_steps} updates has {logs}: "
                             f"give --logging_strategy steps and smaller --logging_steps")
        control.should_training_stop |= self.has_stopped        # before it was started again

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:      # an evaluation, or the end
            return
        before, self.last_step, loss = self.last_step, state.global_step, logs["loss"]
        if loss is None or not math.isfinite(loss):
            return
        self.find_spike(args, state, loss, logs["grad_norm"], before)
        self.losses = [*self.losses, loss][-self.window:]
        self.find_divergence(args, state)
        control.should_training_stop |= self.has_stopped

    def find_spike(self, args, state: TrainState, loss: float, grad_norm: float, before: int) -> None:
        """before: the update of the log before this one."""
        was, (usual, spread) = self.in_spike, middle(self.losses or [loss])
        self.in_spike = loss > usual + self.threshold * spread
        if self.in_spike and not was:
            self.spikes.append(state.global_step)
            where = f"at update {state.global_step}" if before + 1 == state.global_step else f"in updates {before + 1} to {state.global_step}"
            tell(state, f"loss spike {where}: {loss:.4g}, where {usual:.4g} was expected, and less than {usual + self.threshold * spread:.4g}; "
                        f"grad_norm {grad_norm:.4g}; last checkpoint before it: {last_checkpoint(args, before) or 'none'}")

    def find_divergence(self, args, state: TrainState) -> None:
        usual, spread = middle(self.losses)
        limit = usual + max((self.factor - 1) * abs(usual), 2 * spread)
        if self.limit is None or limit < self.limit:
            self.best_median, self.limit, self.best_step = usual, limit, state.global_step
        self.logs_above = self.logs_above + 1 if usual > self.limit and min(self.losses) > 0 else 0
        if self.logs_above == self.patience:
            good = last_checkpoint(args, self.best_step)
            advice = "there is no checkpoint of before: start anew with" if not good else \
                f"to go on from before: --resume_from_checkpoint {good}, a new --output_dir and"
            tell(state, f"the loss diverges: at update {state.global_step} the median of the last logs is {usual:.4g}, at update {self.best_step} it was "
                        f"{self.best_median:.4g}{'; training stops' * self.stop}; {advice} a lower --learning_rate")

    def state(self) -> dict:
        settings = ("window", "threshold", "factor", "patience", "stop")
        return {"args": {name: getattr(self, name) for name in settings}, "attributes": {k: v for k, v in vars(self).items() if k not in settings}}


def middle(losses: list[float]) -> tuple[float, float]:
    """Median and spread of numbers, of which outliers, if they are fewer than half, move neither far."""
    usual = median(losses)
    return usual, max(1.4826 * median(abs(loss - usual) for loss in losses), (1 if len(losses) < FIRST else LEAST) * abs(usual))


def last_checkpoint(args, step: int) -> str:
    """The newest one in output_dir of update `step` or before; "" if there is none."""
    return next((f"{args.output_dir}/checkpoint-{saved}" for saved in list_checkpoints(args.output_dir) if saved <= step), "")


def tell(state: TrainState, text: str) -> None:
    if state.is_world_process_zero:
        print(f"warning: {text}", file=sys.stderr)


def run(argv: list[str], **parts):
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return None
    if argv[0] not in ("warn", "stop"):
        raise UsageError(f"{argv[0]!r}: expected warn or stop, then the flags of train.py")
    # the first update's loss is what a run that diverges at once is measured by
    return train.run(argv[1:], callbacks=[SpikeCallback(stop=argv[0] == "stop"), *parts.pop("callbacks", ())], flags="--logging_first_step", **parts)


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
