"""Which update is best, which checkpoints stay, and when to stop: for any sequence of metric values, and whatever interrupts the run."""
import contextlib
import math
import signal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from args import check_args
from callbacks import Callback
from loop import train
from rundir import list_checkpoints
from state import UsageError
from tests.toy import arguments, rows, toy_run, weights

UPDATES = 8
POINTS = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([2.0 * i])} for i in range(8)]


def squared_error(model, batch):
    predictions = model(batch["x"])
    return (predictions - batch["labels"]).square().sum(), predictions


class Scripted:
    """A metric whose value after update n is values[n - 1]."""

    def __init__(self, values):
        self.values, self.step = values, 0

    def reset(self): pass
    def update(self, predictions, labels): pass

    def compute(self):
        return {"score": self.values[max(self.step, 1) - 1]}


class Watch(Callback):
    """Tells the metric where the run is, and interrupts it, once at each of (event, update): a kill is an exception, a stop is SIGUSR1."""

    def __init__(self, metric, kills=(), stops=()):
        self.metric, self.kills, self.stops = metric, set(kills), set(stops)

    def on_train_begin(self, args, state, control, **kwargs):
        self.metric.step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        self.metric.step = state.global_step
        if state.global_step in self.stops:
            self.stops.remove(state.global_step)
            signal.raise_signal(signal.SIGUSR1)
        self.kill("on_step_end", state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.kill("on_evaluate", state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.kill("on_save", state.global_step)

    def kill(self, *where):
        if where in self.kills:
            self.kills.remove(where)
            raise ConnectionAbortedError


def expected(values, greater, patience, threshold, every=1):
    """(last update, best update, best value) by the rules of the HF Trainer, written down once more; a NaN is never better."""
    best, best_step, bad = None, 0, 0
    for step, value in enumerate(values, 1):
        if step % every:
            continue
        better = not math.isnan(value) and (best is None or (value > best if greater else value < best))
        bad = 0 if better and (best is None or abs(value - best) > threshold) else bad + 1
        if better:
            best, best_step = value, step
        if patience is not None and bad >= patience:
            break
    return step, best_step, best


def scripted_run(folder, values, watch=None, patience=None, threshold=0.0, data=POINTS, **changes):
    """Trains until it ends, starting again after each interruption; returns (state, weights)."""
    metric = Scripted(values)
    watch = watch or Watch(metric)
    watch.metric = metric
    args = {"max_steps": UPDATES, "per_device_train_batch_size": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
            "metric_for_best_model": "score", "resume_from_checkpoint": "auto", "learning_rate": 1e-3, "optim": "sgd",
            "early_stopping_patience": patience, "early_stopping_threshold": threshold if patience else 0.0}
    for _ in range(len(watch.kills) + len(watch.stops) + 1):
        with contextlib.suppress(ConnectionAbortedError, SystemExit), \
                toy_run(arguments(folder, **{**args, **changes}), torch.nn.Linear(1, 1), data, POINTS[:2], callbacks=[watch]) as (run, loader, eval_loader):
            train(run, loader, eval_loader, squared_error, metric)
            return run.state, weights(run)
    raise AssertionError("it ended nowhere")


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.7, math.nan]), min_size=UPDATES, max_size=UPDATES), greater=st.booleans(),
       patience=st.none() | st.integers(1, 3), threshold=st.sampled_from([0.0, 0.06, 0.2]), limit=st.none() | st.integers(1, 3),
       kills=st.sets(st.tuples(st.sampled_from(["on_step_end", "on_evaluate", "on_save"]), st.integers(2, UPDATES)), max_size=2),
       stops=st.sets(st.integers(1, UPDATES), max_size=2), load_best=st.booleans(), best_only=st.booleans(), epochs=st.booleans())
@example(values=[0.0, 0.5, 0.0, 0.9, 0.0, 0.1, 0.0, 0.1], greater=True, patience=None, threshold=0.0, limit=1, kills=set(), stops={4}, load_best=True,
         best_only=False, epochs=True)       # stopped before the evaluation that finds it best
@example(values=[0.5, 0.4, 0.6, 0.7, 0.1, 0.1, 0.1, 0.1], greater=False, patience=2, threshold=0.0, limit=None, kills={("on_save", 4)}, stops=set(),
         load_best=False, best_only=False, epochs=False)       # killed when early stopping had asked to stop
def test_best_rotation_and_stopping_follow_the_rules_whatever_the_values_kills_and_stops(
        tmp_path_factory, values, greater, patience, threshold, limit, kills, stops, load_best, best_only, epochs):
    folder, every = tmp_path_factory.mktemp("run"), 2 if epochs else 1
    stops = stops - {step for _, step in kills}      # a kill before the stop's save would leave no checkpoint there
    last, best_step, best = expected(values, greater, patience, threshold, every)
    load_best &= best is not None
    watch, strategy = Watch(None, kills, stops), "epoch" if epochs else "steps"
    changes = {"greater_is_better": greater, "save_total_limit": limit, "load_best_model_at_end": load_best, "eval_strategy": strategy,
               "save_strategy": "best" if best_only else strategy, "data": POINTS[:every] if epochs else POINTS}
    state, trained = scripted_run(folder, values, watch, patience, threshold, **changes)
    assert (state.global_step, state.best_global_step, state.best_metric) == (last, best_step, best)
    kept = list_checkpoints(folder)
    assert kept[0] == last and (best is None or best_step in kept)
    improved = [step for step in range(1, last + 1) if expected(values[:step], greater, None, 0, every)[1] == step]
    saved = {*(improved if best_only else range(every, last + 1, every)), last, *(step for step in stops - watch.stops)}
    newest = sorted(saved)[-(limit or UPDATES):]
    if limit is not None and best is not None and best_step not in newest:      # the best one takes a place, beside the newest
        newest = [best_step, *newest[len(newest) > 1:]]
    if epochs and stops:        # what was best when a stop saved, before the evaluation, decides what stays
        assert set(kept) <= saved and len(kept) == min(len(saved), max(limit or UPDATES, len({best_step, last} - {0})))
    else:
        assert sorted(kept) == newest
    if load_best:
        best_weights = load_file(folder / f"checkpoint-{best_step}" / "model.safetensors")
        assert all((trained[name] == best_weights[name].numpy()).all() for name in trained)
    evaluated = [row["eval_score"] for row in rows(folder) if "eval_score" in row]
    assert [str(value) for value in evaluated] == [str(value) for value in values[every - 1:last:every]]
    again, _ = scripted_run(folder, values, None, patience, threshold, **changes)       # the same command once more
    assert (again.global_step, again.best_global_step, list_checkpoints(folder)) == (last, best_step, kept)


def test_early_stopping_counts_as_the_hf_trainer_does(tmp_path):
    state, _ = scripted_run(tmp_path, [0.5, 0.49, 0.495, *[0.0] * 5], patience=2, threshold=0.05, greater_is_better=False)
    assert (state.global_step, state.best_metric) == (3, 0.49)       # better, but not by 0.05, counts as no better


def test_the_early_stopping_callback_of_the_hf_trainer_runs_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    metric = Scripted([0.5, 0.49, 0.495, *[0.0] * 5])
    args = arguments(tmp_path, max_steps=UPDATES, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, metric_for_best_model="score",
                     greater_is_better=False, load_best_model_at_end=True)
    with toy_run(args, torch.nn.Linear(1, 1), POINTS, POINTS[:2], callbacks=[Watch(metric), transformers.EarlyStoppingCallback(2, 0.05)]) as (run, *loaders):
        train(run, *loaders, squared_error, metric)
        assert run.state.global_step == 3


@pytest.mark.parametrize("eval_set, name, said", [
    (POINTS[:2], "f1", "f1: evaluations give eval_loss, eval_runtime, .*eval_score"),
    ({"a": POINTS[:2], "b": POINTS[2:4]}, "loss", "loss: evaluations give eval_a_loss.*eval_b_score")])
def test_a_metric_that_does_not_exist_is_an_error_before_the_first_update(tmp_path, eval_set, name, said):
    metric = Scripted([0.0])
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, metric_for_best_model=name)
    with toy_run(args, torch.nn.Linear(1, 1), POINTS, eval_set) as (run, *loaders), pytest.raises(UsageError, match=said):
        train(run, *loaders, squared_error, metric)
    assert run.state.global_step == 0 and not rows(tmp_path)


def test_the_best_update_can_go_by_one_of_several_sets(tmp_path):
    args = arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="best", metric_for_best_model="b_loss", optim="sgd", learning_rate=1e-3)
    with toy_run(args, torch.nn.Linear(1, 1), POINTS, {"a": POINTS[:2], "b": POINTS[4:6]}) as (run, *loaders):
        train(run, *loaders, squared_error)
    losses = [row["eval_b_loss"] for row in rows(tmp_path) if "eval_b_loss" in row]
    assert run.state.best_metric == min(losses) and len(losses) == 3


@pytest.mark.parametrize("metric, greater", [("loss", False), ("eval_loss", False), ("accuracy", True), ("loss_ratio", True), ("a_loss", False)])
def test_greater_is_better_unless_the_name_ends_in_loss(tmp_path, metric, greater):
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is greater


@pytest.mark.parametrize("flags, said", [
    ({"load_best_model_at_end": True}, "--load_best_model_at_end True needs evaluations"),
    ({"early_stopping_patience": 2}, "--early_stopping_patience 2 needs evaluations"),
    ({"early_stopping_threshold": 0.1}, "needs --early_stopping_patience"),
    ({"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"}, "--save_strategy steps must be epoch"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2}, "save_steps=2 must be a multiple of eval_steps=3"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_strategy": "steps", "save_steps": 2}, "must be a multiple")])
def test_settings_that_cannot_find_the_best_update_are_refused(tmp_path, flags, said):
    with pytest.raises(UsageError, match=said):
        check_args(arguments(tmp_path, **flags))


def test_intervals_in_ratios_may_be_multiples(tmp_path):
    check_args(arguments(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=0.1, save_strategy="steps", save_steps=0.3))
