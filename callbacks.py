"""Callbacks: what is watched, and who may ask to log, evaluate, save or stop. What decides training maths is never here.

Event names, order, signatures and control flags are those of the HF Trainer, so a callback written for it runs here as it is,
if the arguments it reads exist here.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass
from types import NoneType

import torch
from tqdm.auto import tqdm

from distributed import local_part
from state import Run, UsageError
from world import World
from zero import plain


@dataclass
class Control:
    """What callbacks ask for. The loop clears a flag when it obeys it (semantics of transformers' TrainerControl)."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False
    stop_code: int = 0        # save, then leave with this exit code: some rank caught a signal (128 + n), or time is up (75)


FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
CLEARED_BEFORE = {"on_train_begin": ("should_training_stop",), "on_epoch_begin": ("should_epoch_stop",),
                  "on_step_begin": ("should_log", "should_evaluate", "should_save"),
                  "on_log": ("should_log",), "on_evaluate": ("should_evaluate",), "on_save": ("should_save",)}
IN_UPDATES = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
AGREED_AFTER = ("on_train_begin", "on_epoch_begin", "on_step_end", "on_epoch_end", "on_log", "on_evaluate", "on_save")


class Callback:
    """Override the events you want. Every event gets (args, state, control, **kwargs), with kwargs model, optimizer,
    lr_scheduler (the schedule function), processing_class, train_dataloader, eval_dataloader, run, and logs or metrics where there are some. `state`
    gives what a checkpoint should keep of this callback, JSON values under "attributes"; they are set on resume."""

    def on_init_end(self, args, state, control, **kwargs): pass
    on_train_begin = on_epoch_begin = on_step_begin = on_substep_end = on_pre_optimizer_step = on_optimizer_step = on_step_end = on_init_end
    on_log = on_prediction_step = on_evaluate = on_predict = on_save = on_epoch_end = on_train_end = on_init_end

    def state(self) -> dict:
        return {"args": {}, "attributes": {}}


class Callbacks:
    """The callbacks of a run, the flags they share, and the history file they are told about."""

    def __init__(self, callbacks: list):
        self.callbacks, self.control = list(callbacks), Control()
        self.dataloaders: dict = {"train_dataloader": None, "eval_dataloader": None}
        self.late: set[str] = set()     # flags that this rank wants and that no callback has set
        self.unwritten: list[str] = []      # rows that did not get onto a full disk (--save_errors continue)

    def fire(self, event: str, run: Run, **kwargs) -> None:
        """Calls `event` on every callback, then agrees on the flags over ranks: a flag set on any rank is set on all. After an update that is
        left out if no rank has asked for it when samples were counted: none wants anything, or has a callback that may come to."""
        if event == "on_step_begin" and run.world.world_size > 1:
            wishes = self.late or run.args.max_time is not None or any(self.listeners(event) for event in IN_UPDATES)
            run.world.stop.update(wish=bool(wishes), asked=True)        # asked: an update of one's own may count nothing
        for flag in CLEARED_BEFORE.get(event, ()):
            setattr(self.control, flag, False)
        for method in self.listeners(event):
            changed = method(run.args, run.state, self.control, model=run.model, optimizer=run.optimizer,
                             lr_scheduler=run.schedule, processing_class=run.processing_class, run=run, **{**self.dataloaders, **kwargs})
            vars(self.control).update(vars(changed) if isinstance(changed, Control) else {})
        if event in AGREED_AFTER and run.world.world_size == 1:
            self.control.stop_code = run.world.stop["code"]
        elif event in AGREED_AFTER and (event != "on_step_end" or run.world.stop["asked"]):
            wanted = [getattr(self.control, flag) or flag in self.late for flag in FLAGS]
            *flags, self.control.stop_code = run.world.max(*map(int, wanted), run.world.stop["code"])
            for flag, value in zip(FLAGS, flags):
                setattr(self.control, flag, bool(value))
            self.late.clear()

    def put_off(self, world: World) -> None:
        """Flags that something else than a callback has set on this rank, such as a loss function, wait until all ranks know of them."""
        if world.world_size > 1 and not world.stop["asked"]:
            self.late |= {flag for flag in FLAGS if getattr(self.control, flag)}
            for flag in self.late:
                setattr(self.control, flag, False)

    def listeners(self, event: str) -> list:
        """What callbacks do at an event; the methods of Callback do nothing."""
        methods = [getattr(callback, event, None) for callback in self.callbacks]
        return [method for method in methods if method is not None and getattr(method, "__func__", method) is not Callback.on_init_end]

    def log(self, run: Run, logs: dict) -> None:
        """Appends one row to metrics.jsonl (rank 0) and fires on_log. Called with the same logs on every rank. Rows are whole, or not
        there; NaN and Infinity are written as Python's json does."""
        with run.world.clock.within("log", hold=True):
            self.keep(run, logs)
            self.fire("on_log", run, logs=dict(logs))      # some take out what they show

    def keep(self, run: Run, logs: dict) -> None:
        logs["epoch"] = run.state.epoch
        if run.world.is_main and run.state.log_path:        # evaluation without training leaves the history as it is
            self.unwritten.append(json.dumps({**logs, "step": run.state.global_step}) + "\n")
        try:
            with run.world.writing(run.state.log_path):
                self.write_rows(run)
        except UsageError as error:
            if error.exit_code != 5 or run.args.save_errors == "stop":
                raise
            if run.world.is_main:
                print(f"warning: {error}; the row waits for the next one (--save_errors continue)", file=sys.stderr)

    def write_rows(self, run: Run) -> None:
        """Appends the rows that wait, and takes back what a full disk took only in part."""
        if self.unwritten:
            try:
                with open(run.state.log_path, "r+b") as file:
                    file.seek(run.state.log_bytes)
                    file.write("".join(self.unwritten).encode())
                    file.flush()
                    run.state.log_bytes = file.tell()
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(run.state.log_path, run.state.log_bytes)
                raise
            self.unwritten.clear()

    def open_log(self, run: Run) -> None:
        """Cuts metrics.jsonl to the length it had at the checkpoint: rows logged after it will be logged again. A run that
        had ended with its last row is left as it is and marked finished."""
        state, finished = run.state, False
        with run.world.writing(state.log_path):
            if run.world.is_main:
                with open(state.log_path, "ab+") as file:
                    length = file.tell()
                    if length < state.log_bytes:
                        print(f"warning: {state.log_path} has lost rows logged before update {state.global_step}", file=sys.stderr)
                        state.log_bytes = length
                    file.seek(state.log_bytes)
                    later = [json.loads(line) for line in file if line.endswith(b"\n")]
                    stopped = any(getattr(callback, "has_stopped", False) for callback in self.callbacks)
                    finished = (stopped or state.global_step >= state.max_steps) and any("train_loss" in row for row in later)
                    if finished:
                        state.log_bytes = length        # later evaluations go behind its rows
                    else:
                        file.truncate(state.log_bytes)
        state.finished = bool(run.world.max(int(finished))[0])

    def states(self) -> list[list]:
        """[class name, state] of each callback that has something to keep, for the checkpoint."""
        found = [[type(c).__name__, c.state()] for c in self.callbacks if callable(getattr(c, "state", None))]
        return [[name, state] for name, state in found if state.get("attributes")]

    def load_states(self, saved: list[list], is_main: bool) -> None:
        waiting = list(self.callbacks)
        for name, state in saved:
            match = next((c for c in waiting if type(c).__name__ == name), None)
            if match is None:
                if is_main:
                    print(f"warning: the checkpoint holds the state of a callback {name!r:.100} that this run does not have", file=sys.stderr)
                continue
            waiting.remove(match)
            current, kept = match.state()["attributes"], state["attributes"]
            for key in current.keys() & kept.keys():
                if isinstance(current[key], (int, float)) and not isinstance(kept[key], (int, float, NoneType)):
                    raise TypeError(f"{name}.{key} is a {type(kept[key]).__name__}, not a number")
                setattr(match, key, kept[key])


def improves(args, value: float, best: float | None) -> bool:
    """Whether a value of --metric_for_best_model is better than the best before; NaN is not."""
    if best is None:
        return not math.isnan(value)
    return value > best if args.greater_is_better else value < best


class EarlyStoppingCallback(Callback):
    """Asks to stop when `early_stopping_patience` evaluations in a row were not better than the best before them by more than
    `early_stopping_threshold` (semantics of transformers' callback of this name; the counter is kept in checkpoints)."""

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0):
        self.early_stopping_patience, self.early_stopping_threshold = early_stopping_patience, early_stopping_threshold
        self.early_stopping_patience_counter = 0

    @property
    def has_stopped(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, args, state, control, **kwargs):
        if args.best_key is None or args.eval_strategy == "no":
            raise UsageError("early stopping needs evaluations to compare: give --eval_strategy steps or epoch, and --metric_for_best_model")
        control.should_training_stop |= self.has_stopped        # before it was started again

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        value, best = metrics.get(args.best_key), state.best_metric
        if value is None or not state.in_training:      # another of several data sets; that some set has it, the loop sees to
            return
        better = improves(args, value, best) and (best is None or abs(value - best) > self.early_stopping_threshold)
        self.early_stopping_patience_counter = 0 if better else self.early_stopping_patience_counter + 1
        control.should_training_stop |= self.has_stopped

    def state(self) -> dict:
        return {"args": {"early_stopping_patience": self.early_stopping_patience, "early_stopping_threshold": self.early_stopping_threshold},
                "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter}}


class CheckReplicas(Callback):
    """Every `steps` updates: that ranks which should hold the same parts of weights do, by a checksum of their bits. A rank that differs, by
    a fault of its memory or by code that only some ranks run, ends the run on all of them (UsageError, exit code 4)."""

    def __init__(self, world: World, steps: int):
        self.world, self.steps = world, steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.steps:
            return
        parts = {name: local_part(p) for name, p in model.named_parameters()}
        found = self.world.gather(torch.tensor([[start, checksum(local)] for local, start in parts.values()])).tolist()
        for name, held in zip(parts, zip(*found)):      # (start, checksum) on each rank
            usual: dict[int, int] = {}
            for (start, value), _ in Counter(map(tuple, held)).most_common():
                usual.setdefault(start, value)
            for rank, (start, value) in enumerate(held):
                if value != usual[start]:
                    raise UsageError(f"update {state.global_step}: rank {rank} holds other weights than the ranks it should equal ({name}); resume from a "
                                     f"checkpoint before, and look for code that only some ranks run, or for a faulty machine", 4)


def checksum(weight: torch.Tensor) -> int:
    total = torch.zeros((), dtype=torch.int64)
    for part in plain(weight):
        bits = part.contiguous().view(-1).view(torch.uint8 if part.element_size() % 4 else torch.int32)
        total = total * 31 + bits.sum().cpu()      # overflows as it likes
    return total.item()


class ProfileCallback(Callback):
    """A trace of the updates `first` to `last`, by torch.profiler: output_dir/profile/rank-R.json."""

    def __init__(self, first: int, last: int, rank: int):
        self.first, self.last, self.rank, self.profiler = first, last, rank, None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.profiler is None and self.first <= state.global_step + 1 <= self.last:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.profiler is not None and state.global_step >= self.last:
            self.on_train_end(args, state, control)

    def on_train_end(self, args, state, control, **kwargs):
        if self.profiler is not None:
            self.profiler.stop()
            folder = os.path.join(args.output_dir, "profile")
            os.makedirs(folder, exist_ok=True)
            self.profiler.export_chrome_trace(os.path.join(folder, f"rank-{self.rank}.json"))
            self.profiler = None


class PrinterCallback(Callback):
    """One line per log, and a word if the data is slow. Rank 0 only."""

    warned = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.watch_data(logs)
        shown = [(k, v) for k, v in logs.items() if k == speed_of(logs) or not k.startswith(("time_", "memory_", "tokens_per", "samples_per", "steps_per"))]
        shown.sort(key=lambda item: isinstance(item[1], str))      # text last
        # above the bars, if there are any
        tqdm.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(f"{k}: {printable(v)}" if isinstance(v, str) else f"{k} {show(v)}" for k, v in shown))
        sys.stdout.flush()

    def watch_data(self, logs: dict) -> None:
        step_s = sum(value for key, value in logs.items() if key.startswith("time_") and key not in ("time_evaluate", "time_save"))
        if not self.warned and logs.get("time_data", 0) > max(0.2 * step_s, 1e-3):
            self.warned = True
            tqdm.write(f"note: the training data takes {logs['time_data'] / step_s:.0%} of the time of an update: raise --dataloader_num_workers, or make samples faster")


class ProgressCallback(PrinterCallback):
    """Bars with loss, learning rate and speed; on a terminal or in a notebook they take the place of the lines of training. Rank 0 only."""

    def __init__(self):
        self.bar = self.eval_bar = tqdm(disable=True)       # as a bar is after close(): calling it does nothing

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        on_bar, speed = "loss" in logs and not self.bar.disable, speed_of(logs)
        if on_bar:
            self.bar.set_postfix_str(f"loss {show(logs['loss'])} norm {show(logs['grad_norm'])} lr {show(logs['learning_rate'])} "
                                     f"{show(logs.get(speed))} {speed.partition('_')[0]}/s")
        if not on_bar or not (sys.stdout.isatty() or "ipykernel" in sys.modules):       # a file has all of them
            super().on_log(args, state, control, logs=logs)
        else:
            self.watch_data(logs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.eval_bar.disable:
            length = len(eval_dataloader) if eval_dataloader.num_samples is not None else None
            self.eval_bar = tqdm(total=length, desc="evaluate", unit="batch", leave=False, dynamic_ncols=True)
        self.eval_bar.update()

    def on_evaluate(self, args, state, control, **kwargs):
        self.eval_bar.close()
    on_predict = on_evaluate

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def speed_of(logs: dict) -> str:
    return "tokens_per_second" if "tokens_per_second" in logs else "samples_per_second"


def printable(text: str) -> str:
    """Without what a terminal would obey: a model may write anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def show(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "none" if value is None else str(value)
