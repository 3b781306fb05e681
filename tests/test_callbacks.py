"""Callbacks are called in the HF Trainer's order, and all ranks obey the same flags."""
import contextlib
import os

import torch

from callbacks import Callback
from distributed import clip_grads
from evalloop import to_device
from loop import train
from loss import compute_loss
from state import UsageError
from tests.test_arithmetic import linear_loss
from tests.toy import Numbers, arguments, flat, gpt, rows, run_training, sequences, toy_run
from train import assemble
from world import open_world

EVENTS = [name for name in vars(Callback) if name.startswith("on_")]


class Recorder(Callback):
    """Writes down every event with its update; runs `act` on one of them."""

    def __init__(self, act=None):
        self.events, self.act = [], act


def record(event):
    def method(self, args, state, control, **kwargs):
        kind = next((k for k in ("train_loss", "eval_loss", "loss") if k in kwargs.get("logs", {})), "")
        self.events.append(event.removeprefix("on_") + (f"({kind})" if kind else "") + f"@{state.global_step}")
        if self.act is not None:
            self.act(event, args, state, control)
    return method


for event in EVENTS:
    setattr(Recorder, event, record(event))


def events_of(tmp_path, act=None, n=10, **changes) -> list[str]:
    recorder = Recorder(act)
    model = torch.nn.Linear(1, 1, bias=False)
    run_training(arguments(tmp_path, **{"num_train_epochs": 2, "gradient_accumulation_steps": 2, **changes}), linear_loss, model=model,
                 train_set=Numbers(n), eval_set=Numbers(4), callbacks=[recorder])
    return recorder.events


def test_the_order_of_events_is_that_of_the_hf_trainer(tmp_path):
    step = "step_begin@{0} substep_end@{0} pre_optimizer_step@{0} optimizer_step@{0} step_end@{1}"
    tail = "step_begin@{0} pre_optimizer_step@{0} optimizer_step@{0} step_end@{1}"
    watch = "log(loss)@{0} prediction_step@{0} prediction_step@{0} log(eval_loss)@{0} evaluate@{0} save@{0}"
    expected = " ".join(["init_end@0 train_begin@0 epoch_begin@0", step.format(0, 1), step.format(1, 2), watch.format(2),
                         tail.format(2, 3), "epoch_end@3 epoch_begin@3", step.format(3, 4), watch.format(4), step.format(4, 5),
                         tail.format(5, 6), watch.format(6), "epoch_end@6 log(train_loss)@6 train_end@6"])
    got = events_of(tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    assert got == expected.split()


def test_epoch_strategies_log_evaluate_and_save_after_epoch_end(tmp_path):
    got = events_of(tmp_path, logging_strategy="epoch", eval_strategy="epoch", save_strategy="epoch", eval_on_start=True)
    assert got[1:6] == ["train_begin@0", "prediction_step@0", "prediction_step@0", "log(eval_loss)@0", "evaluate@0"]
    end = got.index("epoch_end@3")
    assert got[end:end + 7] == ["epoch_end@3", "log(loss)@3", "prediction_step@3", "prediction_step@3", "log(eval_loss)@3",
                                "evaluate@3", "save@3"]


def test_the_last_update_is_evaluated_and_saved_even_off_the_beat(tmp_path):
    got = events_of(tmp_path, logging_steps=4, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4)
    assert [e for e in got if e.startswith(("log(loss", "evaluate", "save"))] == ["log(loss)@4", "evaluate@4", "save@4",
                                                                                "evaluate@6", "save@6"]


def test_evaluation_waits_for_eval_delay(tmp_path):
    got = events_of(tmp_path, eval_strategy="steps", eval_steps=1, eval_delay=4)
    assert [e for e in got if e.startswith("evaluate")] == ["evaluate@4", "evaluate@5", "evaluate@6"]
    assert not [e for e in events_of(tmp_path / "never", eval_strategy="steps", eval_delay=100) if e.startswith("evaluate")]


def test_a_callback_may_ask_for_everything(tmp_path):
    def act(event, args, state, control):
        if event == "on_step_end" and state.global_step == 2:
            control.should_log = control.should_evaluate = control.should_save = control.should_training_stop = True
    got = events_of(tmp_path, act, logging_strategy="no", save_strategy="no")
    after = got[got.index("step_end@2"):]
    assert after == ["step_end@2", "log(loss)@2", "prediction_step@2", "prediction_step@2", "log(eval_loss)@2", "evaluate@2", "save@2",
                     "epoch_end@2", "log(train_loss)@2", "train_end@2"]


def test_an_epoch_stopped_by_a_callback_leaks_no_gradient_into_the_next(tmp_path):
    def act(event, args, state, control):
        if event == "on_substep_end" and state.global_step == 1:
            control.should_epoch_stop = True
    got = events_of(tmp_path, act, per_device_train_batch_size=1, max_grad_norm=0, n=6)
    assert got.count("epoch_begin@2") == 1 and "step_end@5" in got and "step_end@6" not in got
    assert [row["grad_norm"] for row in rows(tmp_path) if "loss" in row] == [1.0] * 5


class StopOn(Callback):
    """Asks to stop on one rank alone."""

    def __init__(self, rank, event, step):
        self.rank, self.step = rank, step
        setattr(self, event, self.ask)

    def ask(self, args, state, control, **kwargs):
        import os
        if int(os.environ["RANK"]) == self.rank and state.global_step == self.step:
            control.should_training_stop = True


def stopped_at(output_dir, rank, event) -> tuple[int, list]:
    args = arguments(output_dir, max_steps=20, per_device_train_batch_size=1, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1)
    run = run_training(args, eval_set=sequences(3), callbacks=[StopOn(rank, event, 3)])
    return run.state.global_step, flat(run).tolist()


def test_a_stop_asked_on_one_rank_stops_all_ranks_after_the_same_update(ranks, tmp_path):
    for rank, event in ((0, "on_step_end"), (1, "on_substep_end"), (1, "on_evaluate"), (0, "on_log")):
        (step, first), (other, second) = ranks.run(2, stopped_at, tmp_path / f"{rank}{event}", rank, event)
        assert step == other == (4 if event == "on_substep_end" else 3)
        assert first == second


def test_a_log_asked_for_again_at_the_same_update_is_not_written_twice(tmp_path):
    def act(event, args, state, control):
        control.should_log |= event in ("on_step_end", "on_epoch_end")
    got = events_of(tmp_path, act)
    assert [e for e in got if e.startswith("log(loss")] == [f"log(loss)@{step}" for step in range(1, 7)]


def test_a_callback_may_keep_anything_under_the_name_state(tmp_path):
    class Keeps:
        def on_train_begin(self, args, state, control, **kwargs):
            self.state = state
    run_training(arguments(tmp_path, max_steps=1, save_strategy="steps"), callbacks=[Keeps()])


def test_callbacks_get_the_model_the_optimizer_and_the_loaders(tmp_path):
    seen = {}

    class Look(Callback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.update(kwargs, args=args, history=state.log_history)
    args = arguments(tmp_path, max_steps=2)
    with toy_run(args, eval_set=sequences(2), callbacks=[Look()]) as (run, loader, eval_loader):
        train(run, loader, eval_loader, compute_loss)
    assert seen["model"] is run.model and seen["optimizer"] is run.optimizer and seen["args"] is args
    assert seen["train_dataloader"] is loader and seen["eval_dataloader"] is eval_loader
    assert seen["history"] == rows(tmp_path)[:1]


def stopped_by_a_loss(output_dir):
    with toy_run(arguments(output_dir, max_steps=20, logging_steps=100)) as (run, loader, _):
        def loss(model, batch):
            run.callbacks.control.should_training_stop |= run.world.rank == 1 and run.state.global_step == 4
            return compute_loss(model, batch)
        train(run, loader, None, loss)
        return run.state.global_step


def test_a_flag_that_no_callback_has_set_is_obeyed_by_all_ranks_an_update_later(ranks, tmp_path):
    assert ranks.run(2, stopped_by_a_loss, tmp_path) == [6, 6]


def unfinished(output_dir):
    def step(run, window, loss_fn):
        num_items, = run.world.count(sum(mb["num_items"] for mb in window))
        with run.parallel.grad_sync(True):
            loss = loss_fn(run.model, to_device(window[0], run.world.device)) / num_items
            loss.backward()
        return clip_grads(run.parallel, 1.0)
    try:
        with toy_run(arguments(output_dir, max_steps=2)) as (run, loader, _):
            train(run, loader, None, compute_loss, train_step=step)
    except UsageError as error:
        return str(error)


def test_an_update_of_ones_own_that_forgets_the_other_ranks_is_an_error(ranks, tmp_path):
    for world_size in (1, 2):
        for message in ranks.run(world_size, unfinished, tmp_path / str(world_size)):
            assert "call loss = run.parallel.end_window" in message


def stopped_once(output_dir):
    steps = []
    with open_world(arguments(output_dir)) as world:
        for name, callbacks in (("a", [Stop()]), ("b", [])):
            args = arguments(os.path.join(output_dir, name), max_steps=4)
            run, loader, _ = assemble(args, world, gpt(), sequences(8), callbacks=callbacks)
            with contextlib.suppress(SystemExit):
                train(run, loader, None, compute_loss)
            steps.append(run.state.global_step)
    return steps


class Stop(Callback):
    def on_step_end(self, args, state, control, run=None, **kwargs):
        run.world.stop["code"] = 128 + 15 if state.global_step == 2 else 0


def test_a_signal_stops_one_run_and_not_the_next_in_the_same_world(tmp_path):
    assert stopped_once(str(tmp_path)) == [2, 4]
