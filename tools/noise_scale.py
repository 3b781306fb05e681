"""How large a batch makes sense at a checkpoint: the gradient noise scale (McCandlish et al. 2018, An Empirical Model of Large-Batch Training).

    python -m tools.noise_scale runs/a/checkpoint-500                                      # a run's folder stands for its newest checkpoint
    python -m tools.noise_scale runs/b --task recipes.text_classification --batches 100 -- --gradient_accumulation_steps 16

A batch of B label items (what the loss sums over, and num_items counts) has a gradient of mean G and covariance Sigma / B; B_simple is
tr(Sigma) / |G|^2. Both are estimated without bias from the gradients of micro-batches and of windows of 8 of them, and averaged over windows
before they are divided (appendix A.1). The intervals, of 95%, are a bootstrap over windows.

It takes the flags of the run, and after -- those that are to be others, computes gradients and updates nothing, in a temporary folder: the
run is left as it is, and may be going on. Samples come in a random order of --data_seed 0, those of a stream in its own. Noise of dropout is
part of Sigma, as in training. That items of different samples do not see each other, as they do in BatchNorm and with in-batch negatives, is
taken for granted. A task that has a train_step of its own cannot be measured.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
from typing import NamedTuple

import torch
from torch import Tensor

from args import HINTS, type_name
from callbacks import show
from checkpoint import load_weights
from evalloop import to_device
from rundir import verify
from state import Batch, LossFn, Run, UsageError, run_main
from storage import read_json, reading
from tools.inspect import newest

RESAMPLES = 2000
# what takes the place of the run's flags: nothing but gradients is wanted, and micro-batches drawn alike, so in no order by length
SETTINGS = {
    "do_train": True, "do_eval": False, "do_predict": False, "resume_from_checkpoint": None, "max_time": None, "train_sampling_strategy": "random",
    "data_seed": 0, "gradient_accumulation_steps": 8, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0,
    "ema_decay": None, "logging_strategy": "no", "logging_first_step": False, "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no",
    "save_only_model": False, "save_on_each_node": False, "load_best_model_at_end": False, "early_stopping_patience": None,
    "early_stopping_threshold": 0, "report_to": "none", "report_histograms": False, "report": False, "sample_prompt": None, "profile": None, "check_replicas": 0,
    "cpu_offload": False, "cp": 1, "tp": 1, "ep": 1, "pp": 1, "pp_schedule": "1f1b"}


class Window(NamedTuple):
    """What a window of micro-batches says."""

    square: float       # estimate of |G|^2, which may be negative
    trace: float        # estimate of tr(Sigma), of one item
    items: int
    samples: int


class Estimate(NamedTuple):
    """Means over windows, and 95% intervals."""

    square: float
    square_interval: tuple[float, float]
    trace: float
    scale: float | None                 # B_simple, in items; None: cannot be told, as |G|^2 or tr(Sigma) may be 0
    interval: tuple[float, float]


def main(argv: list[str] | None = None) -> Estimate:
    """Measures and prints. Raises UsageError: exit code 2 for wrong flags or a task that does not fit, 3 for a damaged checkpoint, 4 if a
    gradient is not finite."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run, for its newest")
    parser.add_argument("--task", default="train", help="module with a function run(argv, **parts), which the run was started by [%(default)s]")
    parser.add_argument("--batches", type=int, default=50, help="windows to measure, at least 10 [%(default)s]")
    end = argv.index("--") if "--" in argv else len(argv)
    flags = parser.parse_args(argv[:end])
    if importlib.util.find_spec(flags.task.partition(".")[0]) is None or importlib.util.find_spec(flags.task) is None:
        raise UsageError(f"--task {flags.task}: there is no such module; give train, or recipes.NAME")
    if flags.batches < 10:
        raise UsageError(f"--batches {flags.batches}: of fewer than 10 windows there is no interval")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("tools.noise_scale measures in one process: start it without torchrun")
    path = newest(flags.checkpoint)
    verify(path)
    with reading(path, "args.json"):
        saved = read_json(path, "args.json")
        shared = math.prod(saved.get(name, 1) for name in ("cp", "tp", "pp"))
        batch = saved["per_device_train_batch_size"] * saved["gradient_accumulation_steps"] * (read_json(path, "state.json")["world_size"] // shared)
    windows: list[Window | None] = []

    def train_step(run: Run, window: list[Batch], loss_fn: LossFn) -> None:
        if not windows:
            load_weights(run, path)
        windows.append(measure(run, window, loss_fn))
        samples = sum(mb["num_samples"] for mb in window)
        run.state.global_step += 1              # what epochs and the end go by
        run.state.samples_seen += samples
        run.state.total_samples += samples
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):     # it would tell of a run
        settings = SETTINGS | {"max_steps": flags.batches, "output_dir": os.path.join(folder, "run")}
        try:
            importlib.import_module(flags.task).run([*words(saved | settings), *argv[end + 1:]], train_step=train_step)
        except TypeError as error:
            if "'train_step'" not in str(error):
                raise
            raise UsageError(f"--task {flags.task} cannot be measured: it has a train_step of its own, or its run takes no **parts") from None
    measured = [window for window in windows if window is not None]
    if len(measured) < 10:
        raise UsageError(f"{len(measured)} of {len(windows)} windows had two micro-batches with label items, and 10 are needed: after -- give a smaller "
                         f"--per_device_train_batch_size, or larger --gradient_accumulation_steps")
    estimate = noise_scale(measured)
    print(f"{path}: {len(measured)} windows\n{describe(measured, estimate, batch)}")
    return estimate


def words(settings: dict) -> list[str]:
    """Settings as words of a command line. That a switch is None, its default, cannot be written."""
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in settings.items()
            if name in HINTS and not (value is None and type_name(HINTS[name]) == "True|False")]


def measure(run: Run, window: list[Batch], loss_fn: LossFn) -> Window | None:
    """None if fewer than two micro-batches have label items.

    With g_i the mean gradient of the n_i items of micro-batch i of K, and g that of all n = sum n_i, E |g_i|^2 = |G|^2 + tr(Sigma) / n_i and
    E |g|^2 = |G|^2 + tr(Sigma) / n. So sum n_i |g_i|^2 - n |g|^2 is (K - 1) tr(Sigma) in expectation, whatever the n_i are; where they are equal,
    this is the formula of appendix A.1 with B_small = n / K and B_big = n."""
    if run.args.fp16:
        raise UsageError("noise_scale has no loss scaling for --fp16: give --fp16 False after --")
    used = [mb for mb in window if mb["num_items"]]
    if len(used) < 2:
        return None
    parameters, total, squares = list(run.parallel.trained.values()), {}, 0.0
    for micro_batch in used:
        with run.precision.autocast():
            loss = loss_fn(run.model, to_device(micro_batch, run.world.device))
        (loss[0] if isinstance(loss, tuple) else loss).backward()       # sums of n_i items: n_i g_i
        squares += square_of([p.grad for p in parameters if p.grad is not None]) / micro_batch["num_items"]
        for p in parameters:
            if p.grad is not None:
                total[p] = total[p] + p.grad if p in total else p.grad
        run.model.zero_grad(set_to_none=True)
    items = sum(mb["num_items"] for mb in used)
    square = square_of(list(total.values())) / items ** 2
    trace = (squares - items * square) / (len(used) - 1)
    if not math.isfinite(trace):
        raise UsageError("the gradient at this checkpoint is not finite on its own training data: take an earlier one", 4)
    return Window(square - trace / items, trace, items, sum(mb["num_samples"] for mb in window))


def square_of(gradients: list[Tensor]) -> float:
    return float(sum(gradient.double().square().sum() for gradient in gradients))


def noise_scale(windows: list[Window]) -> Estimate:
    """B_simple by the means over windows, with percentiles of resampled windows."""
    values = torch.tensor([[window.square, window.trace] for window in windows], dtype=torch.float64)              # (W, 2)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    squares, traces = values[drawn].mean(1).T                                                                       # (RESAMPLES,) each
    scales = torch.where(squares > 0, traces / squares, torch.inf)
    square, trace = values.mean(0).tolist()
    bounds = interval(squares)
    return Estimate(square, bounds, trace, trace / square if bounds[0] > 0 and trace > 0 else None, interval(scales))


def interval(values: Tensor) -> tuple[float, float]:
    return tuple(values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype), interpolation="nearest").tolist())


def describe(windows: list[Window], found: Estimate, batch: int) -> str:
    """The estimate beside the run's own batch, in samples, and what follows: section 2.3 of the paper."""
    items, samples = sum(window.items for window in windows), sum(window.samples for window in windows)
    per_sample, (low, high) = items / samples, found.interval
    text = f"|G|^2      {found.square:.4g} ({found.square_interval[0]:.4g} to {found.square_interval[1]:.4g})\n" \
           f"tr(Sigma)  {found.trace:.4g} of one label item\n"
    if found.scale is None:
        return text + (f"B_simple   cannot be told: {'|G|^2' if found.trace > 0 else 'tr(Sigma)'} may as well be 0. Measure more windows, --batches, or "
                       f"longer ones, --gradient_accumulation_steps after --")
    ratio = batch * per_sample / found.scale
    follows = ("far below it: more data parallelism saves updates, nearly in proportion" if batch * per_sample * 2 < low else
               "far above it: a smaller batch takes hardly more updates, and fewer samples" if batch * per_sample > high * 2 else
               "near it: a larger one saves updates, a smaller one samples")
    return text + (f"B_simple   {show(found.scale)} label items ({show(low)} to {show(high)})\n"
                   f"           {show(found.scale / per_sample)} samples ({show(low / per_sample)} to {show(high / per_sample)}), "
                   f"each of {show(per_sample)} items\n"
                   f"The run's batch of {batch:,} samples is {follows}. By the paper's model it takes {show(1 + 1 / ratio)} times the "
                   f"fewest updates possible and {show(1 + ratio)} times the fewest samples.")


if __name__ == "__main__":
    run_main(main)
