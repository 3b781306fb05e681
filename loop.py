"""The training loop and the update. Everything that decides training maths is in `train_step`, in order, on one screen."""
from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from args import seconds
from callbacks import improves
from checkpoint import Saver, load_best
from cost import memory
from distributed import clip_grads
from evalloop import evaluate, to_device
from optim import set_lr
from rundir import list_checkpoints, write_status
from schedules import Plateau
from state import Batch, LossFn, Run, TrainState, Update, UsageError


def train_step(run: Run, window: list[Batch], loss_fn: LossFn) -> Update | None:
    """One optimizer update from one window of micro-batches.

    `loss_fn` returns a SUM over label items. Dividing by their count over the window and all ranks makes 1x8, 2x4 and 8x1
    the same update wherever the padding falls (tests/test_update.py). An update that is not finite is not applied. Returns
    None if no rank had a label item; then nothing is updated either."""
    state, world, precision, clock = run.state, run.world, run.precision, run.world.clock
    counts = [(mb["num_items"], mb["num_samples"], mb["input_ids"].numel() if mb["num_samples"] and "input_ids" in mb else 0) for mb in window]
    num_items, num_samples, num_tokens = world.count(*map(sum, zip(*counts)))
    update = None
    if num_items > 0:
        losses: list[Tensor] = []
        if run.args.pp > 1:       # stages take turns at the micro-batches of a window: parallel/pipeline.py
            losses, window = run.parallel.run_window(run, window, loss_fn, num_items), []
        for i, micro_batch in enumerate(window):
            last = i + 1 == len(window)
            weight = world.world_size if micro_batch["num_samples"] else 0   # backward averages over ranks; filler is nothing
            with run.parallel.grad_sync(last):                    # reduce once per window, or every time if gradients are split
                clock.to("forward")
                with precision.autocast():
                    loss_sum = loss_fn(run.model, to_device(micro_batch, world.device))      # ()
                loss_sum = loss_sum[0] if isinstance(loss_sum, tuple) else loss_sum     # the rest is for evaluations
                if not isinstance(loss_sum, Tensor) or loss_sum.numel() != 1:
                    found = f"tensor of shape {tuple(loss_sum.shape)}" if isinstance(loss_sum, Tensor) else type(loss_sum).__name__
                    raise UsageError(f"the loss function returned a {found}; expected one number, summed over the label items")
                clock.to("backward")
                loss = loss_sum / num_items
                precision.backward(loss if weight == 1 else loss * weight)
            if weight:
                losses.append(loss.detach())                   # no .item(): the host stays ahead of the device
            if not last:
                run.callbacks.fire("on_substep_end", run)
        share = sum(losses[1:], losses[0]) if losses else torch.zeros_like(loss_sum)
        loss = run.parallel.end_window(share)                  # gradients are means over ranks now, and the loss is of all of them
        clock.to("optimizer")
        precision.unscale(run.optimizer)
        grad_norm = clip_grads(run.parallel, run.args.max_grad_norm)
        run.callbacks.fire("on_pre_optimizer_step", run)
        state.learning_rate = set_lr(run.optimizer, run.schedule(state.global_step - state.skipped_steps))
        stepped, failed = precision.step(run.optimizer, loss, grad_norm)
        if stepped:
            run.callbacks.fire("on_optimizer_step", run)
            if run.ema is not None:
                run.ema.update()
        else:
            state.skipped_steps += 1
        run.optimizer.zero_grad(set_to_none=True)
        clock.to("other")
        update = Update(loss, share, grad_norm, failed)
    else:
        state.skipped_steps += 1
        state.empty_steps += 1
    state.global_step += 1
    state.samples_seen += num_samples
    state.total_samples += num_samples
    state.num_input_tokens_seen += num_tokens
    return update


def train(run: Run, train_loader, eval_loader, loss_fn: LossFn, compute_metrics=None, predict_fn=None, preprocess_logits_for_metrics=None,
          train_step=train_step) -> dict:
    """Trains until state.max_steps, or until a callback or a signal stops it. Returns the last row of metrics.

    Logs, then evaluates, then saves, so that a checkpoint knows the evaluation of its own update. After a signal, or when --max_time is
    near, the update is finished and saved, and SystemExit(128 + signal, or 75) is raised. eval_loader, compute_metrics, predict_fn,
    preprocess_logits_for_metrics: as for `evaluate`. train_step: what makes an update of a window, as the one above."""
    args, state, clock, callbacks, control, meter = run.args, run.state, run.world.clock, run.callbacks, run.callbacks.control, Meter(run, train_loader)

    def evaluation(trial: bool = False) -> dict:
        with clock.within("evaluate", hold=True):
            return evaluate(run, eval_loader, loss_fn, compute_metrics, predict_fn, preprocess_logits_for_metrics, trial=trial)
    callbacks.dataloaders = {"train_dataloader": train_loader, "eval_dataloader": eval_loader}
    # micro-batches of a rank in an epoch; a stream counts as if it lasted for the whole run
    epoch_length = args.max_steps * args.gradient_accumulation_steps if train_loader.num_samples is None else len(train_loader)
    if state.finished:
        write_status(args.output_dir, run.world, state="finished", step=state.global_step, exit=0, job=None, started=None)
        load_best(run)
        return next(row for row in reversed(state.log_history) if "train_loss" in row)
    if args.eval_strategy != "no":
        check_metric(run, eval_loader, evaluation, compute_metrics)
    run.model.train()
    if hasattr(run.optimizer, "train"):     # schedule-free optimizers evaluate other weights than they train
        run.optimizer.train()
    state.in_training = True
    write_status(args.output_dir, run.world, state="running", step=state.global_step)
    with catching_signals(run):
        callbacks.fire("on_train_begin", run)
        clock.read()      # what came before is no training
        if args.eval_on_start and state.global_step == 0:
            evaluation()
        # an epoch whose end was still to be handled is entered again, even if no window of it is left
        while state.epoch_open or (state.epochs_done < state.num_train_epochs and state.global_step < state.max_steps
                                   and not control.should_training_stop):
            state.epoch_open = True
            callbacks.fire("on_epoch_begin", run)
            began_at, samples_before = state.samples_seen, state.total_samples
            batches = train_loader.epoch(state.epochs_done, start=state.samples_seen)
            while state.global_step < state.max_steps and not control.should_training_stop:
                clock.to("data")
                window = list(islice(batches, args.gradient_accumulation_steps))       # the last one of an epoch may be shorter
                clock.to("other")
                if not window:
                    break
                callbacks.fire("on_step_begin", run)
                try:
                    update = train_step(run, window, loss_fn)
                except RuntimeError as error:
                    explain_out_of_memory(args, error)
                    raise
                run.world.status["step"] = state.global_step       # in case it fails
                state.epoch = state.epochs_done + train_loader.rounds(state.samples_seen) / epoch_length
                if update is not None:
                    meter.updates.append(update)
                    if update.failed is not False:      # it did, or an accelerator has not told yet
                        handle_nonfinite(run, run.precision.find_nonfinite(state.global_step, update), meter)
                ask_at_step_end(run)
                if args.max_time is not None:
                    meter.watch_time()
                callbacks.fire("on_step_end", run)
                obey(run, meter, evaluation)
                if control.should_epoch_stop or control.should_training_stop:
                    break
            if began_at == 0 and state.total_samples == samples_before:
                if state.total_samples == 0:
                    raise UsageError("the training data is empty: its first pass gave no sample")
                print("warning: the training data gave nothing in another pass over it; training stops", file=sys.stderr)
                control.should_training_stop = True
            ended = train_loader.is_end(state.samples_seen) or not control.should_training_stop and state.global_step < state.max_steps
            if ended or control.should_epoch_stop:
                state.epochs_done, state.samples_seen = state.epochs_done + 1, 0
            state.epoch_open = False
            ask_at_epoch_end(run)
            callbacks.fire("on_epoch_end", run)
            obey(run, meter, evaluation)
        if args.save_strategy != "no":
            meter.save(last=True)
        metrics = meter.final_metrics()
        callbacks.log(run, metrics)
        if callbacks.unwritten:
            raise UsageError(f"the last rows could not be written to {state.log_path}: free space there, then resume", 5)
        load_best(run)
        callbacks.fire("on_train_end", run)
    write_status(args.output_dir, run.world, state="finished", exit=0, job=None, started=None)
    state.in_training = False
    return metrics


def obey(run: Run, meter: Meter, evaluation: Callable[[], dict]) -> None:
    """Does what was asked for, in the order log, evaluate, save, stop. What was logged at this update is not logged again."""
    control = run.callbacks.control
    if control.should_log and run.state.last_logged_step < run.state.global_step:
        run.callbacks.log(run, meter.row())
    if control.should_evaluate:
        metrics = evaluation()
        if isinstance(run.schedule, Plateau):
            run.schedule.observe(find_metric(run, metrics))
        note_best(run, metrics)
    if control.should_save:
        meter.save()
    elif meter.saver.step is not None:
        meter.saver.poll()
    if control.stop_code:
        stop_early(run, meter)


def watched_key(run: Run) -> str | None:
    """The metric of evaluations that training itself goes by: which update is best, when to stop, a schedule that waits for a plateau."""
    return run.args.best_key or ("eval_loss" if isinstance(run.schedule, Plateau) else None)


def check_metric(run: Run, eval_loader, evaluation: Callable[..., dict], compute_metrics) -> None:
    """A metric that does not exist, or does not work, is told before training, by evaluating one round of micro-batches; unless a data
    set can be read only once, or one round is too little for the metric."""
    several = isinstance(eval_loader, dict)
    once = any(isinstance(loader.dataset, Iterator) for loader in (eval_loader.values() if several else [eval_loader]))
    asked = compute_metrics is not None or watched_key(run) is not None and (several or watched_key(run) != "eval_loss")
    if asked and not once and (metrics := evaluation(trial=True)) and watched_key(run) is not None:
        find_metric(run, metrics)


def find_metric(run: Run, metrics: dict) -> float:
    if (key := watched_key(run)) not in metrics:
        raise UsageError(f"--metric_for_best_model {key.removeprefix('eval_')}: evaluations give {', '.join(sorted(metrics))}")
    return metrics[key]


def note_best(run: Run, metrics: dict) -> None:
    """Remembers the best evaluation: of equal ones the first, as in the HF Trainer."""
    if run.args.best_key is not None and improves(run.args, value := find_metric(run, metrics), run.state.best_metric):
        run.state.best_metric, run.state.best_global_step = value, run.state.global_step
        run.callbacks.control.should_save |= run.args.save_strategy == "best"


def ask_at_step_end(run: Run) -> None:
    """When to log, evaluate, save and stop by the number of updates. Callbacks may change their mind in on_step_end."""
    run.callbacks.put_off(run.world)
    args, state, control, step = run.args, run.state, run.callbacks.control, run.state.global_step
    last = step >= state.max_steps
    control.should_training_stop |= last
    control.should_log |= args.logging_strategy == "steps" and step % state.logging_steps == 0 or args.logging_first_step and step == 1
    control.should_evaluate |= args.eval_strategy == "steps" and (last or step % state.eval_steps == 0) and step >= args.eval_delay
    control.should_save |= args.save_strategy == "steps" and (last or step % state.save_steps == 0)


def ask_at_epoch_end(run: Run) -> None:
    args, control = run.args, run.callbacks.control
    control.should_log |= args.logging_strategy == "epoch"
    control.should_evaluate |= args.eval_strategy == "epoch" and run.state.epoch >= args.eval_delay
    control.should_save |= args.save_strategy == "epoch"


class Meter:
    """What updates leave on the device until a log, a save or the end wants it on the host; and the training clock."""

    def __init__(self, run: Run, train_loader):
        self.run, self.train_loader = run, train_loader
        self.updates: list[Update] = []         # since the last `collect`
        self.began = time.perf_counter()
        run.world.memory.start("train")
        self.first_step, self.first_sample = run.state.global_step, run.state.total_samples
        self.since_step, self.since_samples, self.since_tokens = self.first_step, self.first_sample, run.state.num_input_tokens_seen   # the last log
        self.saver = Saver(run)
        self.last_end, self.longest_update = time.monotonic(), 0.0       # for --max_time

    def collect(self) -> None:
        """Brings losses and gradient norm to the host and into the state, which keeps each update's loss: then means do not
        depend on where saves fell in between, and resume stays exact."""
        state = self.run.state
        if self.updates:
            for loss in torch.stack([update.loss for update in self.updates]).tolist():
                state.recent_losses.append(loss)
                if math.isfinite(loss):
                    state.total_loss += loss
                    state.num_losses += 1
            state.grad_norm = float(self.updates[-1].grad_norm)
            self.updates.clear()

    def row(self) -> dict:
        """The log of the updates since the last log: their mean loss, the last one's gradient norm and learning rate."""
        self.collect()
        args, state, spent = self.run.args, self.run.state, self.run.world.clock.read()
        losses, tokens, updates = state.recent_losses, state.num_input_tokens_seen - self.since_tokens, state.global_step - self.since_step
        training = sum(seconds for part, seconds in spent.items() if part not in ("evaluate", "save"))
        row = {"loss": math.fsum(losses) / len(losses) if losses else None, "grad_norm": state.grad_norm, "learning_rate": state.learning_rate}
        for name in ("nan_steps", "empty_steps", "skipped_steps"):
            if count := getattr(state, name) - getattr(state, f"recent_{name}"):
                row[name] = count
            setattr(state, f"recent_{name}", getattr(state, name))
        if updates:         # else they were made before this start
            row |= {"tokens_per_second": tokens / training} if tokens else {}
            row |= {"samples_per_second": (state.total_samples - self.since_samples) / training, "steps_per_second": updates / training}
            if args.peak_flops is not None:     # recomputed operations are counted too, so it is the hardware's use then (Chowdhery et al. 2022, appendix B)
                used = state.flops_per_token * tokens / training / (args.peak_flops * self.run.world.world_size)
                row["hfu" if args.activation_checkpointing else "mfu"] = used or None       # of data without input_ids it is not known
            row |= {f"time_{part}": seconds / updates for part, seconds in spent.items()}
            row |= self.run.model.routing(self.run.world) if hasattr(self.run.model, "routing") else {}
        row |= memory(self.run.world.device)
        losses.clear()
        state.last_logged_step = self.since_step = state.global_step
        self.since_samples, self.since_tokens = state.total_samples, state.num_input_tokens_seen
        return row

    def save(self, last: bool = False) -> None:
        """last: nothing trains on afterwards, so the checkpoint has to be complete."""
        self.collect()
        handle_nonfinite(self.run, self.run.precision.find_last_nonfinite(), self)      # before anything is kept
        self.run.callbacks.control.should_save = False
        self.run.state.stream = self.train_loader.position()
        with self.run.world.clock.within("save", hold=True):
            self.saver.save(last)
            if last:
                self.saver.finish(last)

    def watch_time(self) -> None:
        """Asks to stop when another update and a save, of twice the time of the last, could go beyond --max_time."""
        now = time.monotonic()
        self.longest_update, self.last_end = max(self.longest_update, now - self.last_end), now
        if time.time() - self.run.world.status["started"] + self.longest_update + 2 * self.saver.seconds > seconds(self.run.args.max_time):
            self.run.world.stop["code"] = 75

    def final_metrics(self) -> dict:
        self.collect()
        handle_nonfinite(self.run, self.run.precision.find_last_nonfinite(), self)
        state, seconds, model = self.run.state, time.perf_counter() - self.began, self.run.model
        embeddings = {p for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
        # the 6 N D rule for training FLOPs (Kaplan et al. 2020, section 2.1), N without embeddings
        active = sum(p.numel() for p in model.parameters() if p not in embeddings) - getattr(model, "idle_parameters", 0)
        state.total_flos = state.num_input_tokens_seen * 6.0 * active
        return {"train_runtime": seconds, "train_samples_per_second": (state.total_samples - self.first_sample) / seconds,
                "train_steps_per_second": (state.global_step - self.first_step) / seconds,
                "total_flos": state.total_flos, "train_loss": state.total_loss / max(state.num_losses, 1), **self.run.world.memory.read()}


def handle_nonfinite(run: Run, found: tuple[int, Update] | None, meter: Meter) -> None:
    """An update with a NaN or infinite loss or gradient, which was not applied: counts it, and logs it and stops all ranks
    if --on_nonfinite says stop or there were more than --max_nonfinite in a row. Nothing is saved."""
    if found is None:
        return
    args, state, (step, update) = run.args, run.state, found
    state.nan_steps += 1
    state.skipped_steps += run.precision.device_skips(run.optimizer)     # the host had taken it for applied
    state.nonfinite_in_a_row = state.nonfinite_in_a_row + 1 if step == state.last_nonfinite + 1 else 1
    state.last_nonfinite = step
    if args.on_nonfinite == "skip" and state.nonfinite_in_a_row <= args.max_nonfinite:
        return
    ranks = [rank for rank, share in enumerate(run.world.gather(update.share).tolist()) if not math.isfinite(share)]
    where = f"the loss of rank {ranks[0]}" if ranks else "the gradient norm"
    in_a_row = f", {state.nonfinite_in_a_row} times in a row" if state.nonfinite_in_a_row > 1 else ""
    meter.saver.finish()
    newest = [f"checkpoint-{saved}" for saved in list_checkpoints(args.output_dir)] or ["none yet"]
    run.callbacks.log(run, meter.row())
    skip = "" if args.on_nonfinite == "skip" else ", or --on_nonfinite skip to leave such updates out"
    raise UsageError(f"update {step}: {where} is not finite{in_a_row}; it was not applied. Last good checkpoint: {newest[0]}. "
                     f"Try a lower --learning_rate, more --warmup_steps, --max_grad_norm 1{skip}", 4)


def explain_out_of_memory(args, error: RuntimeError) -> None:
    """Raises an out-of-memory error as advice: what the batch was, and what takes less. Other errors it leaves alone."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        same = " (the same update)" if micro % 2 == 0 else ""
        halved = f"--per_device_train_batch_size {micro // 2} --gradient_accumulation_steps {accumulation * 2}{same}, " if micro > 1 else ""
        raise UsageError(f"out of memory with micro-batches of {micro} samples and accumulation {accumulation}: {error}\n"
                         f"try {halved}--activation_checkpointing, --bf16, or a shorter --block_size", 1) from None


def plan(args, state: TrainState, loader) -> None:
    """Sets max_steps, num_train_epochs and the intervals of `state`, by the HF Trainer's arithmetic. A resumed run may have another
    batch geometry: then the updates still to do are counted in the new one, from the sample where the old one stopped."""
    samples_per_update = loader.round_size * args.gradient_accumulation_steps
    if loader.num_samples is None:
        if args.max_steps < 1:
            raise UsageError("--max_steps is needed for a stream: it has no length to count epochs by")
        state.max_steps, state.num_train_epochs = args.max_steps, sys.maxsize
    else:
        steps_per_epoch = windows(args, len(loader))
        left = windows(args, loader.rounds(loader.num_samples - state.samples_seen)) if state.samples_seen else steps_per_epoch
        position = state.global_step
        if state.samples_per_update != samples_per_update:             # updates this geometry would have taken to get here
            position = (state.epochs_done + 1) * steps_per_epoch - left
        end = math.ceil(args.num_train_epochs * steps_per_epoch)
        state.max_steps = args.max_steps if args.max_steps > 0 else state.global_step + max(0, end - position)
        epochs = args.num_train_epochs if args.max_steps <= 0 else (position + state.max_steps - state.global_step) / steps_per_epoch
        state.num_train_epochs = math.ceil(epochs)
    if args.profile is not None and int(args.profile.partition(":")[0]) > state.max_steps:
        raise UsageError(f"--profile {args.profile}: the run ends with update {state.max_steps}, before the trace begins")
    state.samples_per_update, state.train_batch_size = samples_per_update, args.per_device_train_batch_size
    eval_steps = args.logging_steps if args.eval_steps is None else args.eval_steps
    for name, value in (("logging_steps", args.logging_steps), ("eval_steps", eval_steps), ("save_steps", args.save_steps)):
        setattr(state, name, math.ceil(value * state.max_steps) if value < 1 else int(value))
    if args.load_best_model_at_end and args.save_strategy == args.eval_strategy == "steps" and state.save_steps % state.eval_steps:
        raise UsageError(f"--load_best_model_at_end needs a checkpoint of each best evaluation: with {state.max_steps} updates save_steps={args.save_steps} "
                         f"is {state.save_steps} and eval_steps={eval_steps} is {state.eval_steps}, no multiple; give --save_strategy best, or whole numbers")


def windows(args, micro_batches: int) -> int:
    """Updates made of this many micro-batches: the last, incomplete window counts."""
    return -(-micro_batches // args.gradient_accumulation_steps)


@contextlib.contextmanager
def catching_signals(run: Run) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR1 ask the run to stop; a second one stops the process at once."""
    in_main = threading.current_thread() is threading.main_thread()     # Python delivers signals to the main thread alone
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if in_main}
    run.world.stop["code"] = 0      # of an earlier run in this world

    def catch(number, frame):       # print is not safe in a handler
        os.write(2, b"\nstopping after this update (on several ranks perhaps the next), and the evaluation if one is running; once more stops at once, without saving\n")
        run.world.stop["code"] = 128 + number
        for each in previous:
            signal.signal(each, signal.SIG_DFL)      # even where a collective waits for ever
    for number in previous:
        signal.signal(number, catch)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_early(run: Run, meter: Meter) -> None:
    """Saves and leaves with exit code 75 or 128 + signal, telling how to go on. The end of the run is left to its next start."""
    code, step = run.callbacks.control.stop_code, run.state.global_step
    meter.save(last=True)
    run.callbacks.fire("on_train_end", run)
    reason = f"--max_time {run.args.max_time}" if code == 75 else signal.Signals(code - 128).name
    write_status(run.args.output_dir, run.world, state="stopped", step=step, reason=reason, exit=code)
    if run.world.is_main:
        how = "it holds weights alone (--save_only_model): the run cannot go on" if run.args.save_only_model else \
            "to go on: the same command with --resume_from_checkpoint True"
        print(f"stopped by {reason} after update {step} of {run.state.max_steps}, saved in {run.args.output_dir}/checkpoint-{step}\n{how}", file=sys.stderr)
    raise SystemExit(code)
