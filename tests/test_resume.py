"""A run that is cut and resumed ends with the bits of a run that was not."""
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from callbacks import Callback
from evalloop import evaluate
from loop import train
from loss import compute_loss
from rundir import list_checkpoints
from state import UsageError
from tests.toy import Numbers, arguments, as_program, files_of_at_most, flat, gpt, rows, run_training, sequences, timeless, toy_run, weights
from world import rng_state

ROOT = Path(__file__).parent.parent
# 11 samples in windows of 2 x 2 on one process: 3 updates per epoch, the last one short; dropout on
SETTINGS = {"num_train_epochs": 3, "gradient_accumulation_steps": 2, "warmup_steps": 3, "weight_decay": 0.1, "logging_steps": 2,
            "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 1}


def finish(output_dir, resume=None, **changes):
    """Trains to the end; everything that has to be equal, in plain values."""
    args = arguments(output_dir, **{**SETTINGS, "resume_from_checkpoint": resume, **changes})
    run = run_training(args, model=gpt(dropout=0.2), train_set=sequences(11), eval_set=sequences(3, seed=1))
    moments = [state[key].tolist() for state in run.optimizer.state.values() for key in sorted(state)]
    return {"weights": flat(run).tobytes(), "moments": moments, "rng": rng_state(), "state": run.state.to_dict() | {"log_bytes": 0},
            "rows": [timeless(row) for row in rows(output_dir)] if run.world.is_main else None}


def cut(whole, output_dir, step) -> None:
    """The folder as a kill after update `step` would have left it, with rows of later updates and a torn one at the end."""
    shutil.copytree(whole, output_dir)
    log = Path(output_dir) / "metrics.jsonl"
    log.write_bytes(log.read_bytes().rpartition(b'{"train_runtime"')[0] + b'{"loss": 1.')
    for later in list_checkpoints(output_dir):
        if later > step:
            shutil.rmtree(Path(output_dir) / f"checkpoint-{later}")


def test_resuming_after_any_update_is_bit_identical(tmp_path):
    whole = finish(tmp_path / "whole")
    assert len(list_checkpoints(tmp_path / "whole")) == 9
    for step in range(1, 10):
        cut(tmp_path / "whole", tmp_path / f"{step}", step)
        assert finish(tmp_path / f"{step}", "True") == whole, f"cut after update {step}"


@pytest.mark.parametrize("strategy", [{"logging_strategy": "epoch", "eval_strategy": "epoch"}, {"save_strategy": "epoch"}])
def test_rows_of_an_epochs_end_are_neither_lost_nor_repeated(tmp_path, strategy):
    whole = finish(tmp_path / "whole", **strategy)
    for step in list_checkpoints(tmp_path / "whole"):
        cut(tmp_path / "whole", tmp_path / f"{step}", step)
        assert finish(tmp_path / f"{step}", "auto", **strategy) == whole, f"cut after update {step}"


def test_resuming_on_two_ranks_is_bit_identical(ranks, tmp_path):
    whole = ranks.run(2, finish, tmp_path / "whole")
    assert whole[0]["weights"] == whole[1]["weights"] and whole[0]["rng"] != whole[1]["rng"]
    for step in (1, 3, 4):
        cut(tmp_path / "whole", tmp_path / f"{step}", step)
        assert ranks.run(2, finish, tmp_path / f"{step}", "True") == whole, f"cut after update {step}"


def sample_ids(output_dir, resume=None, stop_at=None, train_set=None, **changes) -> tuple[int, list[int], int]:
    """(max_steps, sample numbers in order over this process's rank, updates done)."""
    seen = []

    def loss(model, batch):
        seen.extend(batch["x"].flatten().int().tolist())
        return model(batch["x"]).sum() * 0.0

    class Stop(Callback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == stop_at
            control.should_save |= state.global_step == stop_at
    args = arguments(output_dir, num_train_epochs=3, resume_from_checkpoint=resume, **changes)
    run = run_training(args, loss, model=torch.nn.Linear(1, 1, bias=False), train_set=train_set or Numbers(10), callbacks=[Stop()])
    return run.state.max_steps, seen, run.state.global_step


class Texts(list):
    """11 samples of 1 to 8 tokens."""

    def __init__(self):
        super().__init__({key: value[:1 + 5 * i % 8] for key, value in sample.items()} for i, sample in enumerate(sequences(11)))


def pad(samples) -> dict:
    batch = {key: torch.nn.utils.rnn.pad_sequence([sample[key] for sample in samples], True, value)
             for key, value in (("input_ids", 0), ("labels", -100))}
    return {**batch, "num_items": int((batch["labels"] != -100).sum())}


def grouped(output_dir, resume=None, **changes):
    settings = {**SETTINGS, "eval_strategy": "no", "train_sampling_strategy": "group_by_length", "resume_from_checkpoint": resume}
    args = arguments(output_dir, **{**settings, **changes})
    run = run_training(args, model=gpt(dropout=0.2), train_set=Texts(), collate=pad)
    return flat(run).tobytes(), rng_state(), run.state.to_dict() | {"log_bytes": 0}, [timeless(row) for row in rows(output_dir)]


def test_group_by_length_resumes_after_any_update_bit_for_bit(tmp_path):
    whole = grouped(tmp_path / "whole")
    assert whole[0] != grouped(tmp_path / "random", train_sampling_strategy="random")[0]
    for step in (1, 2, 3, 5, 9):
        cut(tmp_path / "whole", tmp_path / f"{step}", step)
        assert grouped(tmp_path / f"{step}", "True") == whole, f"cut after update {step}"


def refusal(output_dir, **changes) -> str:
    with pytest.raises(UsageError) as error:
        grouped(output_dir, "True", **changes)
    return str(error.value)


def test_another_order_is_refused_unless_it_is_asked_for(ranks, tmp_path):
    grouped(tmp_path / "whole")
    for step in (3, 4):     # the end of the first epoch, and the first update of the second
        cut(tmp_path / "whole", tmp_path / f"{step}", step)
    assert "the training data 11 samples grouped by length in rounds of 2, not 11 samples grouped by length in rounds of 3" in \
        refusal(tmp_path / "4", per_device_train_batch_size=3)
    assert "--train_sampling_strategy group_by_length, not random" in refusal(tmp_path / "4", train_sampling_strategy="random")
    assert all("in rounds of 2, not" in message for message in ranks.run(2, refusal, tmp_path / "4"))
    assert ranks.run(2, regrouped, tmp_path / "4", 1) == [9, 9]              # 2 ranks x 1 are the same samples as 1 rank x 2
    assert regrouped(tmp_path / "3", 3, allow_change="data") == 3 + 2 + 2    # between epochs it does no harm


def regrouped(output_dir, batch_size: int, **changes) -> int:
    return grouped(output_dir, "True", per_device_train_batch_size=batch_size, **changes)[2]["global_step"]


def test_a_sequential_order_is_that_of_the_data_and_goes_on_with_the_next_sample(tmp_path):
    settings = {"train_sampling_strategy": "sequential"}
    _, before, _ = sample_ids(tmp_path, stop_at=7, **settings)
    _, after, _ = sample_ids(tmp_path, "True", per_device_train_batch_size=5, **settings)
    assert before + after == list(range(10)) * 3


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter({"x": torch.tensor([float(i)])} for i in range(64))


@pytest.mark.parametrize("step", [7, 8, 9, 13])
def test_a_stream_goes_on_in_its_second_pass_with_the_next_sample(tmp_path, step):
    """64 samples in windows of 10: 7 updates make a pass, the last of them of 4 samples."""
    settings = {"train_set": Stream(), "max_steps": 18, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
    _, whole, _ = sample_ids(tmp_path / "whole", **settings)
    assert whole == [*range(64), *range(64), *range(40)]
    _, before, _ = sample_ids(tmp_path / "part", stop_at=step, **settings)
    _, after, done = sample_ids(tmp_path / "part", "True", **settings)
    assert before + after == whole and done == 18


def test_another_batch_size_or_accumulation_goes_on_with_the_next_sample(tmp_path):
    _, whole, _ = sample_ids(tmp_path / "whole")
    assert len(whole) == 30
    for name, changes, steps in (("batch", {"per_device_train_batch_size": 5}, 7 + 2 + 2), ("same", {}, 15),
                                 ("window", {"gradient_accumulation_steps": 2}, 7 + 2 + 3)):
        _, before, _ = sample_ids(tmp_path / name, stop_at=7)
        max_steps, after, done = sample_ids(tmp_path / name, "True", **changes)
        assert before + after == whole, name
        assert max_steps == done == steps, name


def test_another_world_size_goes_on_with_the_next_sample(ranks, tmp_path):
    _, whole, _ = sample_ids(tmp_path / "whole")
    _, before, _ = sample_ids(tmp_path / "run", stop_at=7)
    (max_steps, first, done), (_, second, _) = ranks.run(2, sample_ids, tmp_path / "run", "True")
    assert max_steps == done == 7 + 2 + 3
    # the ranks take turns of 2 samples; the 6 left of the second pass are 3 turns, so rank 1's next is filler, its 6th sample
    turns = [first[0:2], second[0:2], first[2:4], first[4:6], second[3:5], first[6:8], second[5:7], first[8:10]]
    assert before + [i for turn in turns for i in turn] == whole
    assert second[2] in whole[14:20] and second[7] in whole[20:]


def test_a_longer_run_goes_on_where_the_shorter_one_ended(tmp_path):
    finish(tmp_path / "run", max_steps=5)
    longer = finish(tmp_path / "run", "True", max_steps=7)
    assert longer["state"]["global_step"] == 7
    assert [row["step"] for row in rows(tmp_path / "run") if "train_loss" in row] == [7]


def test_a_run_may_go_on_with_a_schedule_that_has_a_state_of_its_own(tmp_path):
    finish(tmp_path, max_steps=3)
    assert finish(tmp_path, "True", max_steps=4, lr_scheduler_type="reduce_lr_on_plateau")["state"]["learning_rate"] == 1e-2


def test_a_finished_run_is_left_as_it_is(tmp_path):
    whole = finish(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = finish(tmp_path, "True")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert again["weights"] == whole["weights"] and again["rows"] == whole["rows"]


def test_a_run_killed_before_its_last_row_gets_it(tmp_path):
    whole = finish(tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert finish(tmp_path, "True")["rows"] == whole["rows"]


def test_an_output_dir_with_a_run_is_refused_without_a_resume_flag(tmp_path):
    finish(tmp_path)
    with pytest.raises(UsageError, match="(?s)already holds a run.*--resume_from_checkpoint True.*new --output_dir") as error:
        finish(tmp_path)
    assert error.value.exit_code == 2


def test_true_needs_a_checkpoint_auto_does_not(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint") as error:
        finish(tmp_path / "none", "True")
    assert error.value.exit_code == 3
    assert finish(tmp_path / "none", "auto")["state"]["global_step"] == 9


@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "extra", "manifest"])
def test_a_damaged_checkpoint_is_skipped_and_named_and_an_explicit_one_refused(tmp_path, damage, capsys):
    whole = finish(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-9"
    weights_file = newest / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    if damage == "missing":
        weights_file.unlink()
    elif damage == "short":
        weights_file.write_bytes(data[:-1])
    elif damage == "flipped":
        data[-5] ^= 1
        weights_file.write_bytes(data)
    elif damage == "extra":
        (newest / "more.txt").write_text("x")
    else:
        (newest / "manifest.json").write_text("{")
    with pytest.raises(UsageError) as error:
        finish(tmp_path / "other", str(newest))
    assert error.value.exit_code == 3
    assert finish(tmp_path / "run", "auto") == whole
    assert f"{newest} is skipped" in capsys.readouterr().err


def test_only_damaged_checkpoints_are_an_error_and_never_a_new_start(tmp_path):
    finish(tmp_path, max_steps=1)
    (tmp_path / "checkpoint-1" / "state.json").unlink()
    with pytest.raises(UsageError) as error:
        finish(tmp_path, "auto")
    assert error.value.exit_code == 3


def test_the_explicit_path_of_another_run_is_continued_in_a_new_folder(tmp_path):
    whole = finish(tmp_path / "whole")
    other = finish(tmp_path / "other", str(tmp_path / "whole" / "checkpoint-4"))
    assert other["weights"] == whole["weights"]
    assert other["rows"] == whole["rows"]
    with pytest.raises(UsageError, match="already holds another run"):
        finish(tmp_path / "other", str(tmp_path / "whole" / "checkpoint-4"))


def test_an_older_checkpoint_is_not_continued_among_newer_ones(tmp_path):
    finish(tmp_path)
    with pytest.raises(UsageError, match="goes on to checkpoint-9, which would be mixed with the new run"):
        finish(tmp_path, str(tmp_path / "checkpoint-4"))
    assert list_checkpoints(tmp_path)[0] == 9


def test_a_crash_while_replacing_a_checkpoint_leaves_one_of_the_two(tmp_path):
    whole = finish(tmp_path, save_total_limit=1)
    (tmp_path / "checkpoint-9").rename(tmp_path / "replaced-checkpoint-9")
    (tmp_path / "tmp-checkpoint-9").mkdir()
    (tmp_path / "tmp-deleted-checkpoint-8").mkdir()
    again = finish(tmp_path, "True", save_total_limit=1)
    assert again["weights"] == whole["weights"] and again["rows"] == whole["rows"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-9", "metrics.jsonl", "status.json"]


def test_a_failing_write_is_exit_code_5_and_keeps_the_older_checkpoint(tmp_path):
    """A limit on file sizes stands for a full disk."""
    flags = ["--n_layer", "1", "--n_embd", "16", "--block_size", "16", "--max_steps", "3", "--save_steps", "1", "--output_dir", tmp_path]
    with files_of_at_most(60_000):
        code, told = as_program("train", *flags)
    assert code == 5 and "cannot write" in told and "Traceback" not in told, told
    assert list_checkpoints(tmp_path) == []


def test_evaluating_a_resumed_run_before_training_repeats_no_row(tmp_path):
    whole = finish(tmp_path / "whole")
    cut(tmp_path / "whole", tmp_path / "part", 4)
    args = arguments(tmp_path / "part", **{**SETTINGS, "resume_from_checkpoint": "True"})
    with toy_run(args, model=gpt(dropout=0.2), train_set=sequences(11), eval_set=sequences(3, seed=1)) as (run, loader, eval_loader):
        evaluate(run, eval_loader, compute_loss)
        train(run, loader, eval_loader, compute_loss)
    steps = [row["step"] for row in rows(tmp_path / "part")]
    assert steps == sorted(steps) and len(steps) == len(whole["rows"]) + 1


class StopEpoch(Callback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop |= state.global_step == 2


def test_a_short_epoch_does_not_change_the_plan_of_a_resumed_run(tmp_path):
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
    whole = run_training(arguments(tmp_path / "whole", **settings), callbacks=[StopEpoch()])
    cut(tmp_path / "whole", tmp_path / "part", 4)
    part = run_training(arguments(tmp_path / "part", resume_from_checkpoint="True", **settings), callbacks=[StopEpoch()])
    assert (flat(part) == flat(whole)).all() and part.state.global_step == whole.state.global_step


def test_another_model_is_refused_with_its_differences(tmp_path):
    finish(tmp_path, max_steps=1)
    args = arguments(tmp_path, **{**SETTINGS, "resume_from_checkpoint": "True"})
    with pytest.raises(UsageError, match=r"bias: missing in the file, \(2,\) in the model") as error, toy_run(args, model=torch.nn.Linear(2, 2), train_set=sequences(11), eval_set=sequences(2)):
        pass
    assert error.value.exit_code == 3


def test_tied_weights_are_saved_once_and_still_tied_after_resume(tmp_path):
    def tied():
        model = gpt()
        model.head.weight = model.embed.weight
        return model
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = run_training(arguments(tmp_path / "whole", **settings), model=tied())
    cut(tmp_path / "whole", tmp_path / "part", 1)
    run = run_training(arguments(tmp_path / "part", resume_from_checkpoint="True", **settings), model=tied())
    assert run.model.head.weight is run.model.embed.weight
    assert (flat(run) == flat(whole)).all()


def test_rotation_keeps_the_newest_checkpoints(tmp_path):
    finish(tmp_path, save_total_limit=2)
    assert list_checkpoints(tmp_path) == [9, 8]
    assert not list(tmp_path.glob("tmp-*"))


def test_save_strategy_no_saves_nothing_and_the_last_update_is_saved_otherwise(tmp_path):
    finish(tmp_path / "no", save_strategy="no")
    assert list_checkpoints(tmp_path / "no") == []
    finish(tmp_path / "steps", save_steps=4)
    assert list_checkpoints(tmp_path / "steps") == [9, 8, 4]
    finish(tmp_path / "epoch", save_strategy="epoch", max_steps=5)
    assert list_checkpoints(tmp_path / "epoch") == [5, 3]


class SendSignal(Callback):
    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            os.kill(os.getpid(), self.number)


def interrupted(output_dir, step, number=signal.SIGINT) -> int:
    args = arguments(output_dir, **SETTINGS, resume_from_checkpoint=None)
    with toy_run(args, model=gpt(dropout=0.2), train_set=sequences(11), eval_set=sequences(3, seed=1),
                 callbacks=[SendSignal(step, number)]) as (run, loader, eval_loader):
        try:
            train(run, loader, eval_loader, compute_loss)
        except SystemExit as stop:
            assert run.state.global_step == step + 1
            return stop.code
    return 0


def test_ctrl_c_finishes_the_update_saves_and_resumes_exactly(tmp_path, capsys):
    whole = finish(tmp_path / "whole", save_strategy="no")
    for step in (0, 4):
        part = tmp_path / f"{step}"
        assert interrupted(part, step) == 130
        assert "--resume_from_checkpoint True" in capsys.readouterr().err
        assert finish(part, "True", save_strategy="no")["rows"] == whole["rows"]


def test_a_signal_to_one_rank_stops_all_after_the_same_update(ranks, tmp_path):
    assert ranks.run(2, interrupted, tmp_path / "part", 2, signal.SIGTERM) == [143, 143]
    whole = ranks.run(2, finish, tmp_path / "whole")
    assert ranks.run(2, finish, tmp_path / "part", "True") == whole


def test_no_file_of_a_checkpoint_needs_unpickling(tmp_path):
    finish(tmp_path, max_steps=1)
    names = sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir())
    assert names == ["args.json", "manifest.json", "model.safetensors", "optimizer-0.safetensors", "rng-0.json", "state.json"]
    assert json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())["state"]["global_step"] == 1


class Patience(Callback):
    """A callback with a counter of its own, kept as the HF Trainer's are."""

    def __init__(self):
        self.counter = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.counter += 1

    def state(self):
        return {"args": {}, "attributes": {"counter": self.counter}}


def test_callbacks_remember_over_a_resume(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run_training(arguments(tmp_path / "whole", **settings), callbacks=[Patience()])
    cut(tmp_path / "whole", tmp_path / "part", 2)
    again = Patience()
    run_training(arguments(tmp_path / "part", resume_from_checkpoint="True", **settings), callbacks=[again])
    assert again.counter == 4


def test_weights_load_with_safetensors_alone(tmp_path):
    from safetensors.numpy import load_file
    args = arguments(tmp_path, max_steps=1, save_strategy="steps")
    run = run_training(args)
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert saved.keys() == weights(run).keys()
    assert all(np.array_equal(saved[name], value) for name, value in weights(run).items())
