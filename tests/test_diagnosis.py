"""What is told about a run: spikes of its loss and divergence, and how large a batch makes sense. This file is the task of some runs."""
import fcntl
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from args import TrainArgs, parse_args
from callbacks import Control
from checkpoint import load_weights
from collators import default_collator
from data import Data
from recipes import spikes, text_classification
from recipes.spikes import FIRST, SpikeCallback
from state import TrainState, UsageError
from tests.test_resume import cut
from tests.toy import LENGTH, VOCAB, arguments, gpt, rows, run_training, toy_run
from tools.noise_scale import Window, main, noise_scale, words
from tools.noise_scale import measure as measure_window
from train import main as train_main


def look_at(losses, **settings) -> SpikeCallback:
    """The callback after it has seen these losses, one log each."""
    callback, state, control = SpikeCallback(**settings), TrainState(), Control()
    for step, loss in enumerate(losses, 1):
        state.global_step = step
        callback.on_log(TrainArgs(output_dir="none"), state, control, logs={"loss": loss, "grad_norm": 1.0})
        assert control.should_training_stop == callback.has_stopped
    return callback


def noisy(curve, seed: int, deviation: float = 0.03) -> list[float]:
    return (curve * np.exp(deviation * np.random.default_rng(seed).standard_normal(len(curve)))).tolist()


STEPS = np.arange(300)
FALLING = 2.5 + 2.3 * np.exp(-STEPS / 100)
HUMP = 4 + 1.5 * np.exp(-((STEPS - 60) / 40) ** 2) - STEPS / 150      # rises for 60 updates of warm-up, then falls


@settings(deadline=None, max_examples=25, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), at=st.integers(FIRST, 299), factor=st.floats(3, 100), deviation=st.floats(0, 0.1))
def test_a_planted_spike_is_found_at_its_update_and_nothing_else_is(seed, at, factor, deviation):
    losses = noisy(FALLING, seed, deviation)
    losses[at] *= factor
    found = look_at(losses, stop=True)
    assert found.spikes == [at + 1] and not found.has_stopped


@pytest.mark.parametrize("curve", [FALLING, HUMP, np.full(300, 2.5), np.full(300, -2.5), 5 * np.exp(-STEPS / 20)])
def test_healthy_curves_give_no_alarm(curve, capsys):
    for seed in range(20):
        found = look_at(noisy(curve, seed, 0.01 * (seed % 5)), stop=True)
        assert not found.spikes and not found.has_stopped
    assert not capsys.readouterr().err


def test_a_rise_that_stays_is_one_spike_and_then_divergence_and_recovery_ends_it(capsys):
    curve = np.concatenate([np.full(60, 2.0), np.full(60, 5.0), np.full(60, 2.0), np.full(60, 5.0)])
    found = look_at(noisy(curve, 0))
    said = capsys.readouterr().err.splitlines()
    assert found.spikes == [61, 181] and len(said) == 4
    assert "loss spike at update 61: 4.9" in said[0] and "the loss diverges: at update 8" in said[1] and "diverges: at update 20" in said[3]
    assert not look_at(noisy(curve[:74], 0), stop=True).has_stopped and look_at(noisy(curve[:100], 0), stop=True).has_stopped


def test_losses_that_are_not_numbers_are_left_to_the_loop():
    losses = noisy(FALLING, 0)
    losses[50], losses[51], losses[60] = math.nan, None, 90.0
    assert look_at(losses).spikes == [61]


def test_before_it_knows_the_spread_it_tells_explosions_only():
    assert look_at([3.3, 3.3, 4.3, 550.0, 4e5, 8e8, *[2.8] * 100]).spikes == [4]
    assert look_at([3.3, 9.9, 4.3, 1.0, 8.0] * 3).spikes == []


def spiked(output_dir, resume=None, poison=41, stop=False, updates=70, seed=0, **changes):
    """(callback, run) after an epoch of updates over the same sequence, but for one micro-batch of others."""
    ids = torch.arange(LENGTH + 1) % VOCAB
    other = torch.randint(VOCAB, (LENGTH + 1,), generator=torch.Generator().manual_seed(3))
    train_set = [{"input_ids": row[:-1], "labels": row[1:]} for at in range(2 * updates) for row in [other if at // 2 + 1 == poison else ids]]
    args = arguments(output_dir, **{"num_train_epochs": 1, "train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 10,
                                    "learning_rate": 3e-3, "lr_scheduler_type": "constant", "resume_from_checkpoint": resume, **changes})
    callback = SpikeCallback(stop=stop)
    return callback, run_training(args, model=gpt(seed=seed), train_set=train_set, callbacks=[callback])


def test_a_poisoned_batch_is_told_with_the_checkpoint_before_it(tmp_path, capsys):
    callback, _ = spiked(tmp_path)
    said = capsys.readouterr().err
    assert callback.spikes == [41] and said.count("warning") == 1
    assert "loss spike at update 41" in said and f"last checkpoint before it: {tmp_path}/checkpoint-40\n" in said
    assert rows(tmp_path)[40]["loss"] == max(row["loss"] for row in rows(tmp_path)[20:70])


def test_of_means_the_updates_are_told(tmp_path, capsys):
    callback, _ = spiked(tmp_path, poison=122, updates=140, logging_steps=2)
    assert callback.spikes == [122] and "loss spike in updates 121 to 122" in capsys.readouterr().err
    shutil.rmtree(tmp_path)
    with pytest.raises(UsageError, match="this run of 70 updates has 14"):
        spiked(tmp_path, logging_steps=5)


def test_a_resumed_run_warns_as_the_one_that_was_never_stopped(tmp_path, capsys):
    whole, _ = spiked(tmp_path / "whole")
    said = capsys.readouterr().err.replace("/whole/", "/x/")
    for step in (10, 30, 40, 50):
        cut(tmp_path / "whole", tmp_path / f"{step}", step)
        resumed, _ = spiked(tmp_path / f"{step}", "True")
        assert resumed.state() == whole.state()
        assert capsys.readouterr().err.replace(f"/{step}/", "/x/") == (said if step < 41 else "")


def diverging(output_dir, resume=None, save_steps=5):
    """Its rate rises until the loss does, for good (from other weights it stays just below twice the best, or is not finite). What the callback knows at the end, and at which update that came."""
    callback, run = spiked(output_dir, resume, poison=0, stop=True, updates=300, seed=4, learning_rate=30.0, lr_scheduler_type="linear",
                           warmup_steps=300, optim="sgd", max_grad_norm=0, save_steps=save_steps)
    return callback.state()["attributes"], run.state.global_step


def test_a_rate_far_too_high_is_told_and_ends_the_run_which_goes_on_from_before_with_a_lower_one(tmp_path, capsys):
    found, step = diverging(tmp_path / "run")
    said = capsys.readouterr().err
    good = said.rpartition("--resume_from_checkpoint ")[2].partition(",")[0]
    assert step < 300 and found["logs_above"] == 10 and said.count("the loss diverges") == 1 and "; training stops" in said
    assert found["best_step"] - 5 < int(good.rpartition("-")[2]) <= found["best_step"]
    callback, run = spiked(tmp_path / "again", good, poison=0, stop=True, updates=300, max_steps=70, learning_rate=0.1, optim="sgd")
    assert run.state.global_step == 70 and not callback.has_stopped
    assert rows(tmp_path / "again")[69]["loss"] < found["best_median"]


def test_ranks_stop_together_and_a_stopped_run_stays_so(ranks, tmp_path):
    one, other = ranks.run(2, diverging, tmp_path, None, 300)      # it saves where it stops
    assert one == other and one[1] < 300
    cut(tmp_path, tmp_path / "killed", one[1])
    assert ranks.run(2, diverging, tmp_path / "killed", "True") == [one, other]


@pytest.mark.parametrize(("name", "value"), [("window", 5), ("threshold", 0), ("factor", 1), ("patience", 0)])
def test_settings_that_make_no_sense_are_refused(name, value):
    with pytest.raises(UsageError, match=f"{name}={value}"):
        SpikeCallback(**{name: value})


def test_the_program_trains_the_default_task(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question. " * 60)
    flags = ["--dataset", str(tmp_path / "a.txt"), "--output_dir", str(tmp_path / "run"), "--n_layer", "1", "--n_embd", "16", "--n_head", "2",
             "--block_size", "16", "--max_steps", "30", "--logging_steps", "1", "--save_strategy", "no"]
    watching = spikes.run(["stop", *flags]).callbacks.callbacks[-1]
    assert isinstance(watching, SpikeCallback) and watching.stop and watching.last_step == 30
    with pytest.raises(UsageError, match="'halt': expected warn or stop"):
        spikes.run(["halt", *flags])
    spikes.run([])
    assert spikes.__doc__ in capsys.readouterr().out


# ---- the noise scale, where G and Sigma are known: each label item is a point x = MEAN + DEVIATION * noise, and its loss is |w - x|^2 / 2

SIZE, MEAN, DEVIATION = 6, 1.0, 2.0
TRACE = SIZE * DEVIATION ** 2


class Point(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(SIZE))


def points(args: TrainArgs) -> Data:
    """8192 samples of 1 to 4 points, the others of 4 being no label items."""
    generator = torch.Generator().manual_seed(11)
    x = MEAN + DEVIATION * torch.randn(8192, 4, SIZE, generator=generator)
    used = torch.arange(4) < torch.randint(1, 5, (8192, 1), generator=generator)
    return Data([{"x": row, "used": mask} for row, mask in zip(x, used)], None, "points")


def collate(samples) -> dict:
    batch = default_collator(samples)
    return {**batch, "num_items": int(batch["used"].sum())}


def half_square(model, batch):
    return ((model.w - batch["x"]).square().sum(-1) / 2 * batch["used"]).sum()


def run(argv, **parts):
    return train_main(argv, points, lambda args: Point(), collate, half_square, flags="--optim sgd --lr_scheduler_type constant --max_grad_norm 0", **parts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on two micro-batches of 4 samples, whose w has come a part of the way to MEAN."""
    folder = tmp_path_factory.mktemp("noise") / "run"
    run(["--output_dir", str(folder), "--max_steps", "8", "--learning_rate", "0.05", "--save_steps", "4", "--per_device_train_batch_size", "4",
         "--gradient_accumulation_steps", "2", "--ema_decay", "0.9"])
    return folder


def truth(folder) -> float:
    w = load_file(folder / "checkpoint-8/model.safetensors")["w"]
    return TRACE / float((w - MEAN).square().sum())


def estimated(folder, *flags, batches=200):
    return main([str(folder), "--task", "tests.test_diagnosis", "--batches", str(batches), "--", *flags])


def test_what_has_no_noise_is_told_so():
    assert noise_scale([Window(1.0, 0.0, 8, 8)] * 20).scale is None


@pytest.mark.parametrize(("micro", "accumulation"), [(1, 16), (4, 4), (8, 2)])
def test_the_estimate_is_the_truth_for_any_split_into_micro_batches(trained, micro, accumulation, capsys):
    found = estimated(trained, "--per_device_train_batch_size", str(micro), "--gradient_accumulation_steps", str(accumulation))
    assert found.trace == pytest.approx(TRACE, rel=0.1)
    assert found.scale == pytest.approx(truth(trained), rel=0.15) and found.interval[0] < found.scale < found.interval[1]
    said = capsys.readouterr().out
    assert "The run's batch of 8 samples is" in said and "checkpoint-8: 200 windows" in said


def test_the_split_of_a_window_moves_only_the_noise(trained):
    """The gradient of a window is the same, and so is the sum of what it is made of."""
    found = []
    for micro in (1, 2, 8):
        with toy_run(arguments(trained.parent / f"{micro}", per_device_train_batch_size=micro, gradient_accumulation_steps=16 // micro),
                     model=Point(), train_set=points(None).train, collate=collate) as (run, loader, _):
            load_weights(run, str(trained / "checkpoint-8"))
            batches = loader.epoch()
            found.append([measure_window(run, [next(batches) for _ in range(16 // micro)], half_square) for _ in range(5)])
    for one, two, eight in zip(*found):
        assert one.items == two.items == eight.items and one.samples == eight.samples == 16
        squares = [window.square + window.trace / window.items for window in (one, two, eight)]
        assert squares == pytest.approx([squares[0]] * 3, rel=1e-5) and one.trace != eight.trace


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator, held = np.random.default_rng(0), 0
    for _ in range(100):
        g = 1 + 3 * generator.standard_normal((60, 4, 2))       # windows of micro-batches of one item: |G|^2 = 2, tr(Sigma) = 18
        traces = g.var(1, ddof=1).sum(-1)
        squares = np.square(g.mean(1)).sum(-1) - traces / 4
        low, high = noise_scale([Window(square, trace, 4, 4) for square, trace in zip(squares, traces)]).interval
        held += low < 9 < high
    assert 88 <= held <= 100


def test_at_the_minimum_it_cannot_be_told(tmp_path, capsys):
    run(["--output_dir", str(tmp_path), "--max_steps", "60", "--learning_rate", "0.3", "--per_device_train_batch_size", "64"])
    assert estimated(tmp_path, "--per_device_train_batch_size", "1", batches=40).scale is None
    assert "cannot be told" in capsys.readouterr().out


def snapshot(folder: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes() if path.is_file() else sorted(os.listdir(path)))
            for path in [folder, *folder.rglob("*")]}


def test_the_run_is_left_as_it_is_and_may_be_alive(trained):
    before = snapshot(trained)
    with open(trained / ".lock", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        estimated(trained, batches=10)
    assert snapshot(trained) == before and trained / "metrics.jsonl" in before


@pytest.mark.parametrize("argv", [[], ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--max_steps", "5", "--tf32", "False"], text_classification.FLAGS.split(),
                                  ["--lora_rank", "4", "--lora_target_modules", "a,b", "--dataset", "mine/*.txt", "--learning_rate", "1e-5"]])
def test_the_flags_of_a_run_are_those_of_its_words(argv):
    args = parse_args(argv)
    assert parse_args(words(json.loads(args.to_json_string()))) == args
    assert parse_args(words(args.to_dict()), flags="--max_steps 9 --lora_rank 8 --logging_steps 7").to_dict() == args.to_dict()


@pytest.mark.parametrize(("flags", "said"), [(["--batches", "9"], "--batches 9"), (["--task", "recipes.nothing"], "no such module"),
                                             (["--task", "recipes.own_training_step"], "train_step of its own"),
                                             (["--", "--gradient_accumulation_steps", "1"], "0 of 50 windows"), (["--", "--fp16"], "no loss scaling"),
                                             (["--", "--lerning_rate", "1"], "--learning_rate")])
def test_mistakes_are_one_message(trained, flags, said):
    with pytest.raises(UsageError, match=said):
        main([str(trained), *(["--task", "tests.test_diagnosis"] if "--task" not in flags else []), *flags])


def test_several_ranks_are_refused(trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without torchrun"):
        estimated(trained)
