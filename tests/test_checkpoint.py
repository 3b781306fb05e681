"""Saving survives what can go wrong, such as full disks, second runs, signals and time limits, and can go on beside training."""
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from callbacks import Callback, CheckReplicas
from checkpoint import Saver
from distributed import local_part
from loop import train
from loss import compute_loss
from rundir import checksum, list_checkpoints, verify
from state import UsageError
from tests.test_resume import SETTINGS, cut, finish, interrupted
from tests.toy import Numbers, arguments, flat, gpt, rows, run_training, sequences, timeless, toy_run
from tools.chaos import exit_codes, start

ROOT = Path(__file__).parent.parent
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def status(folder) -> dict:
    found = json.loads((Path(folder) / "status.json").read_text())
    return {name: found[name] for name in ("state", "step", "reason", "exit")}


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


class At(Callback):
    """Calls act(state, control) after update `step`."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(state, control)


# ---------------------------------------------------------------------------------------------------- beside training

def finish_with(output_dir, resume, changes):
    return finish(output_dir, resume, **changes)


@pytest.mark.parametrize("world_size, strategy", [(1, "ddp"), (2, "zero1"), (2, "fsdp")])
def test_saving_beside_training_changes_neither_training_nor_checkpoints(ranks, tmp_path, world_size, strategy):
    whole = ranks.run(world_size, finish_strategy, tmp_path / "whole", {"strategy": strategy})
    assert ranks.run(world_size, finish_strategy, tmp_path / "beside", {"strategy": strategy, "save_async": True}) == whole
    assert list_checkpoints(tmp_path / "beside") == list_checkpoints(tmp_path / "whole")
    for step in list_checkpoints(tmp_path / "whole"):
        one, other = ({name: entry for name, entry in verify(str(tmp_path / folder / f"checkpoint-{step}"))["files"].items()
                       if name not in ("args.json", "state.json")} for folder in ("whole", "beside"))
        assert one == other, step


def finish_strategy(output_dir, changes):
    args = arguments(output_dir, **{**SETTINGS, "save_steps": 2, **changes})
    run = run_training(args, model=gpt(dropout=0.2), train_set=sequences(11), eval_set=sequences(3, seed=1))
    return [timeless(row) for row in rows(output_dir)] if run.world.is_main else None


def test_two_saves_beside_training_never_overlap_and_use_the_same_copies(tmp_path):
    with toy_run(arguments(tmp_path, save_async=True)) as (run, *_):
        saver, first = Saver(run), None
        for step in (1, 2, 3):
            run.state.global_step = step
            saver.save()
            assert list_checkpoints(tmp_path)[:1] == ([step - 1] if step > 1 else [])      # the one before is complete by now
            where = {key: copy.data_ptr() for key, copy in saver.copies.items()}
            first = first or where
            assert where == first
        saver.finish()
        assert sum(copy.nbytes for copy in saver.copies.values()) == sum(p.nbytes for p in run.model.parameters())   # no update, no moments
    assert list_checkpoints(tmp_path) == [3, 2, 1]


def test_on_save_is_called_when_the_checkpoint_is_there(tmp_path):
    seen = []

    class Look(Callback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(list_checkpoints(args.output_dir)[0])
    for name, changes in (("a", {}), ("b", {"save_async": True})):
        run_training(arguments(tmp_path / name, **SAVING, **changes), callbacks=[Look()])
    assert seen == [2, 4, 6] * 2


# ---------------------------------------------------------------------------------------------------- what goes wrong

@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 KB, room for two checkpoints of the toy model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounts are not allowed here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("save_async", [False, True])
def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoint(small_disk, save_async, capsys):
    (small_disk / "filler").write_bytes(b"x" * 120_000)      # there is room for one
    with pytest.raises(UsageError, match=r"No space left on device.*this rank writes [\d,]+ bytes.*[\d,]+ bytes are free.*older checkpoints") as error:
        run_training(arguments(small_disk, save_async=save_async, **SAVING))
    assert error.value.exit_code == 5 and names(small_disk) == [".lock", "checkpoint-2", "filler", "metrics.jsonl", "status.json"]
    verify(str(small_disk / "checkpoint-2"))
    assert status(small_disk)["exit"] == 5 and status(small_disk)["state"] == "failed"
    whole = run_training(arguments(small_disk.parent / "whole", max_steps=6))
    run = run_training(arguments(small_disk, max_steps=6, resume_from_checkpoint="True"))      # saves nothing, so there is room
    assert (flat(run) == flat(whole)).all()


@pytest.mark.parametrize("save_async", [False, True])
def test_after_a_failed_save_training_can_go_on_to_the_next(small_disk, save_async, capsys):
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 200_000)
    free = At(5, lambda state, control: filler.unlink())
    run = run_training(arguments(small_disk, save_errors="continue", save_async=save_async, save_total_limit=1, max_steps=6, save_strategy="steps",
                                 save_steps=2), callbacks=[free])
    assert "training goes on" in capsys.readouterr().err
    assert run.state.global_step == 6 and list_checkpoints(small_disk) == [6]
    assert not [name for name in names(small_disk) if name.startswith("tmp")]


def test_after_a_failed_save_in_the_background_the_last_one_is_still_made(small_disk, capsys):
    (small_disk / "filler").write_bytes(b"x" * 270_000)
    with toy_run(arguments(small_disk, save_errors="continue", save_async=True)) as (run, *_):
        saver = Saver(run)
        run.state.global_step = 2
        saver.save()
        assert "No space left" in str(saver.stage.exception())
        (small_disk / "filler").unlink()
        run.state.global_step = 3
        saver.save(last=True)
        saver.finish(last=True)
    assert list_checkpoints(small_disk) == [3] and "training goes on" in capsys.readouterr().err


def test_a_failed_last_save_is_exit_code_5_all_the_same(small_disk):
    (small_disk / "filler").write_bytes(b"x" * 200_000)
    with pytest.raises(UsageError, match="No space left") as error:
        run_training(arguments(small_disk, save_errors="continue", **SAVING))
    assert error.value.exit_code == 5 and list_checkpoints(small_disk) == []


def test_rows_wait_for_room_on_a_full_disk_and_none_is_lost_or_torn(small_disk):
    def fill(state, control):
        with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
            while file.write(b"x" * 4096): pass
    whole = run_training(arguments(small_disk.parent / "whole", max_steps=200))
    run_training(arguments(small_disk, max_steps=200, save_errors="continue"),
                 callbacks=[At(3, fill), At(150, lambda state, control: (small_disk / "filler").unlink())])
    assert [timeless(row) for row in rows(small_disk)] == [timeless(row) for row in rows(small_disk.parent / "whole")] and whole.state.global_step == 200


def failing_on_rank_1(output_dir, save_async):
    """Rank 1 cannot write its file: something with its name is there."""
    args = arguments(output_dir, strategy="zero1", save_async=save_async, save_errors="continue", max_steps=6, save_strategy="steps", save_steps=2)

    class Block(Callback):
        def on_step_begin(self, args, state, control, **kwargs):
            # until the save of update 4 has waited for the one of update 2, which a thread may write at any time before
            limit = 2000 if state.global_step < 4 and os.environ["RANK"] == "1" else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    import resource
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        run = run_training(args, callbacks=[Block()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, previous)
    return run.state.global_step


@pytest.mark.parametrize("save_async", [False, True])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_no_rank_waits(ranks, tmp_path, save_async):
    assert ranks.run(2, failing_on_rank_1, tmp_path, save_async) == [6, 6]
    assert list_checkpoints(tmp_path) in ([6], [6, 4]) and not [name for name in names(tmp_path) if name.startswith("tmp")]


def test_a_removed_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UsageError, match=f"{tmp_path}/run") as error:
        run_training(arguments(tmp_path / "run", **SAVING), callbacks=[At(3, lambda state, control: shutil.rmtree(tmp_path / "run"))])
    assert error.value.exit_code == 5


# ---------------------------------------------------------------------------------------------------- who may write

def test_a_second_run_in_the_same_folder_is_refused_and_told_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("rundir.LOCK_WAIT_S", 0)
    with toy_run(arguments(tmp_path)), pytest.raises(UsageError, match=f"in use by another run, process {os.getpid()} on ") as error, \
            toy_run(arguments(tmp_path)):
        pass
    assert error.value.exit_code == 2
    run_training(arguments(tmp_path, max_steps=1))      # the lock went with its world


def test_files_can_be_read_by_whom_the_umask_says(tmp_path):
    previous = os.umask(0o027)
    try:
        run_training(arguments(tmp_path, **SAVING))
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "checkpoint-6").iterdir()} == {0o640}


def test_everything_is_on_the_disk_before_a_checkpoint_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("pwrite", "fsync", "rename"):
        def noting(real, name, target, *rest):
            calls.append((name, os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)))
            return real(target, *rest)
        monkeypatch.setattr(os, name, partial(noting, getattr(os, name), name))
    run_training(arguments(tmp_path, max_steps=1, save_strategy="steps"))
    renamed = calls.index(("rename", str(tmp_path / "tmp-checkpoint-1")))
    written = {path for name, path in calls[:renamed] if name == "pwrite"}
    assert len(written) == 6 and ("fsync", str(tmp_path / "tmp-checkpoint-1")) in calls[:renamed] and ("fsync", str(tmp_path)) in calls[renamed:]
    for path in written:
        last = max(i for i, call in enumerate(calls) if call == ("pwrite", path))
        assert ("fsync", path) in calls[last:renamed], path
    assert ("fsync", str(tmp_path / "metrics.jsonl")) in calls[:renamed]


# ---------------------------------------------------------------------------------------------------- stopping

def test_sigusr1_saves_and_leaves_and_status_tells_why(tmp_path):
    assert interrupted(tmp_path / "part", 4, signal.SIGUSR1) == 128 + signal.SIGUSR1
    assert status(tmp_path / "part") == {"state": "stopped", "step": 5, "reason": "SIGUSR1", "exit": 138}
    whole = finish(tmp_path / "whole", save_strategy="no")
    assert finish(tmp_path / "part", "True", save_strategy="no")["rows"] == whole["rows"]
    assert status(tmp_path / "part") == {"state": "finished", "step": 9, "reason": "", "exit": 0}


def evaluate_for_ever(output_dir: str) -> None:
    def loss(model, batch):
        while not model.training:
            print("evaluating", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(model, batch)
    run_training(arguments(output_dir, eval_strategy="steps", eval_steps=2, max_steps=4), loss, eval_set=sequences(2))


def code_of(function, folder: str) -> int:
    """The exit code of a process of its own that calls function(folder/run)."""
    return exit_codes(start(f"{folder}/log", 1, function, f"{folder}/run"), folder)[0]


def test_a_second_signal_leaves_at_once(fresh, tmp_path):
    """In the middle of an evaluation that would not end."""
    assert fresh(code_of, evaluate_for_ever, str(tmp_path)) == -signal.SIGTERM
    assert (tmp_path / "log").read_text().count("evaluating") == 2 and list_checkpoints(tmp_path / "run") == []


def timed(output_dir, max_time, steps):
    """Updates of a twentieth of a second; the exit code, and the updates done."""
    def slow(model, batch):
        end = time.monotonic() + 0.05
        while time.monotonic() < end: pass
        return compute_loss(model, batch)
    args = arguments(output_dir, max_steps=steps, max_time=max_time, save_strategy="steps", save_steps=5, resume_from_checkpoint="auto")
    with toy_run(args, model=gpt(dropout=0.2)) as (run, loader, _):
        try:
            train(run, loader, None, slow)
        except SystemExit as stop:
            return stop.code, run.state.global_step
        return 0, run.state.global_step


def test_max_time_saves_in_time_and_the_next_start_goes_on(ranks, tmp_path):
    (code, first), other = ranks.run(2, timed, tmp_path / "part", "00:00:01", 20)
    assert (code, first) == other == (75, first) and 0 < first < 20
    assert list_checkpoints(tmp_path / "part")[0] == first and status(tmp_path / "part")["reason"] == "--max_time 00:00:01"
    while code == 75:
        (code, done), _ = ranks.run(2, timed, tmp_path / "part", "00:00:01", 20)
    assert (code, done) == (0, 20)
    assert ranks.run(2, timed, tmp_path / "whole", None, 20)[0] == (0, 20)
    assert [timeless(row) for row in rows(tmp_path / "part")] == [timeless(row) for row in rows(tmp_path / "whole")]


def test_a_start_by_torchrun_after_a_failure_goes_on_by_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")

    def started(folder, step, *resume):
        """The folder of a job whose first start was accepted, and cut after an update."""
        cut(tmp_path / "whole", tmp_path / folder, step)
        (tmp_path / folder / "status.json").write_text(json.dumps({"job": "job", "started": time.time()}))
        return finish(tmp_path / folder, *resume)
    whole = finish(tmp_path / "whole")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert started("part", 4) == whole       # without any flag
    assert started("none", 0) == whole       # it had not got to its first checkpoint
    assert started("other", 0, str(tmp_path / "whole" / "checkpoint-2")) == whole
    cut(tmp_path / "whole", tmp_path / "late", 4)
    (tmp_path / "late" / "status.json").write_text(json.dumps({"job": "job", "started": 0, "exit": 75}))
    with pytest.raises(SystemExit) as stop:
        finish(tmp_path / "late")
    assert stop.value.code == 75        # time is up for the job, not for this start of it


def test_what_was_refused_is_refused_again_when_torchrun_starts_it_once_more(tmp_path, monkeypatch):
    finish(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "hurt")
    (tmp_path / "hurt" / "checkpoint-9" / "rng-0.json").unlink()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    for attempt in "012":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        for resume, said in ((None, "already holds a run"), (str(tmp_path / "whole" / "checkpoint-4"), "goes on to checkpoint-9")):
            with pytest.raises(UsageError, match=said):
                finish(tmp_path / "whole", resume)
        with pytest.raises(UsageError, match="rng-0.json cannot be used: it is missing"):
            finish(tmp_path / "hurt", str(tmp_path / "hurt" / "checkpoint-9"))


# ---------------------------------------------------------------------------------------------------- which are kept

@pytest.mark.parametrize("changes, limit, kept", [({}, 2, [9, 8]), ({}, 1, [9]), ({"metric_for_best_model": "loss"}, 2, [9, 4]),
                                                  ({"metric_for_best_model": "eval_loss", "greater_is_better": True}, 1, [9, 6])])
def test_rotation_spares_the_newest_and_the_best(tmp_path, changes, limit, kept):
    values = iter([3.0, 3.5, 2.9, 1.0, 1.0, 4.0, 3.9, 4.0, 2.0])

    class Pretend(Callback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = next(values)
    args = arguments(tmp_path, save_total_limit=limit, **{**SETTINGS, "eval_steps": 1, **changes})
    run = run_training(args, train_set=sequences(11), eval_set=sequences(3), callbacks=[Pretend()])
    assert list_checkpoints(tmp_path) == kept
    assert run.state.best_model_checkpoint == (f"{tmp_path}/checkpoint-{kept[-1]}" if changes else None)


@pytest.mark.parametrize("save_async", [False, True])
def test_the_best_that_was_saved_stays_when_a_better_one_was_not(tmp_path, save_async):
    values = iter([3.0, 1.0, 0.5, 2.0, 2.0, 2.0])

    class Pretend(Callback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = next(values)
    run = run_training(arguments(tmp_path, save_total_limit=1, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss", save_async=save_async,
                                 **SAVING), eval_set=sequences(3), callbacks=[Pretend()])
    assert list_checkpoints(tmp_path) == [6, 2] and run.state.best_global_step == 3
    assert run.state.best_model_checkpoint == f"{tmp_path}/checkpoint-2"


def test_what_is_not_complete_does_not_count_among_those_to_keep(tmp_path):
    run_training(arguments(tmp_path, **{**SAVING, "max_steps": 8}))
    (tmp_path / "checkpoint-4" / "state.json").unlink()
    run_training(arguments(tmp_path, **{**SAVING, "max_steps": 10}, save_total_limit=3, resume_from_checkpoint="True"))
    assert list_checkpoints(tmp_path) == [10, 8, 6, 4]


def test_a_run_that_ends_where_it_is_resumed_has_its_checkpoint_in_its_own_folder(tmp_path):
    run_training(arguments(tmp_path / "a", **SAVING))
    run_training(arguments(tmp_path / "b", **SAVING, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6")))
    assert list_checkpoints(tmp_path / "b") == [6]


def test_a_checkpoint_of_another_version_is_neither_skipped_nor_replaced(tmp_path):
    run_training(arguments(tmp_path, **SAVING))
    manifest = json.loads((tmp_path / "checkpoint-6" / "manifest.json").read_text())
    manifest["format"] += 1
    (tmp_path / "checkpoint-6" / "manifest.json").write_text(json.dumps({**manifest, "sha256": checksum(manifest)}))
    with pytest.raises(UsageError, match="checkpoint-6: its format is 7, and this program knows 6") as error:
        run_training(arguments(tmp_path, **SAVING, resume_from_checkpoint="auto"))
    assert error.value.exit_code == 3 and list_checkpoints(tmp_path) == [6, 4, 2]


def test_save_strategy_best_saves_when_an_evaluation_is_better_and_at_the_end(tmp_path):
    values = iter([.5, .6, float("nan"), .4, .45, .4])

    class Pretend(Callback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = next(values)
    settings = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    run = run_training(arguments(tmp_path, **settings), eval_set=sequences(2), callbacks=[Pretend()])
    assert list_checkpoints(tmp_path) == [6, 4, 1] and (run.state.best_metric, run.state.best_global_step) == (.4, 4)
    with pytest.raises(UsageError, match="--metric_for_best_model accuracy: evaluations give .*eval_loss"):
        run_training(arguments(tmp_path / "other", **settings, metric_for_best_model="accuracy"), eval_set=sequences(2))


def test_damaged_checkpoints_do_not_count_when_the_oldest_are_removed(tmp_path):
    whole = finish(tmp_path / "whole")
    cut(tmp_path / "whole", tmp_path / "part", 6)
    for step in (5, 6):
        (tmp_path / "part" / f"checkpoint-{step}" / "manifest.json").unlink()
    assert finish(tmp_path / "part", "auto", save_total_limit=3)["weights"] == whole["weights"]
    assert list_checkpoints(tmp_path / "part") == [9, 8, 7]
    assert [name for name in names(tmp_path / "part") if "damaged" in name] == ["damaged-checkpoint-5", "damaged-checkpoint-6"]


def test_weights_alone_can_be_saved_and_are_not_resumed_from(tmp_path, capsys):
    run_training(arguments(tmp_path, **SAVING))
    run_training(arguments(tmp_path, **{**SAVING, "max_steps": 8}, save_only_model=True, resume_from_checkpoint="True"))
    assert names(tmp_path / "checkpoint-8") == ["args.json", "manifest.json", "model.safetensors", "state.json"]
    with pytest.raises(UsageError, match="weights alone") as error:
        run_training(arguments(tmp_path / "new", resume_from_checkpoint=str(tmp_path / "checkpoint-8")))
    assert error.value.exit_code == 3
    run_training(arguments(tmp_path, **{**SAVING, "max_steps": 10}, resume_from_checkpoint="auto"))
    said = capsys.readouterr()
    assert "checkpoint-8 is skipped: it holds weights alone (--save_only_model)" in said.err and "checkpoint-6: update 6 of 10" in said.out
    assert "optimizer-0.safetensors" in names(tmp_path / "checkpoint-8") and "optimizer-0.safetensors" in names(tmp_path / "checkpoint-10")


# ---------------------------------------------------------------------------------------------------- what may change

@pytest.mark.parametrize("changes, said", [({"seed": 7}, "--seed 42, not 7"), ({"n_head": 2}, "--n_head 4, not 2"),
                                           ({"train_set": 12}, "the training data 11 samples, not 12 samples")])
def test_what_would_make_another_run_of_it_is_refused_unless_it_is_named(tmp_path, changes, said):
    finish(tmp_path, max_steps=2, save_total_limit=1)
    name = {"train_set": "data"}.get(*changes, *changes)

    def go_on(**more):
        changed = {key: value for key, value in changes.items() if key != "train_set"}
        args = arguments(tmp_path, **{**SETTINGS, "max_steps": 3, "resume_from_checkpoint": "True", **changed, **more})
        run_training(args, train_set=sequences(changes.get("train_set", 11)), eval_set=sequences(3, seed=1))
    with pytest.raises(UsageError, match=f"{said}.*--allow_change {name}$") as error:
        go_on()
    assert error.value.exit_code == 2
    go_on(allow_change=f"{name},vocab_size")
    assert list_checkpoints(tmp_path)[0] == 3
    with pytest.raises(UsageError, match="allow_change=sed: expected names out of seed"):
        go_on(allow_change="sed")


def test_what_may_change_takes_effect_and_is_listed(tmp_path, capsys):
    finish(tmp_path, max_steps=2)
    capsys.readouterr()
    finish(tmp_path, "True", max_steps=4, learning_rate=0.5, save_steps=3, save_async=True)
    out = capsys.readouterr().out
    for line in ("--max_steps: 2 -> 4", "--learning_rate: 0.01 -> 0.5", "--save_steps: 1 -> 3", "--save_async: False -> True"):
        assert line in out
    assert max(row.get("learning_rate", 0) for row in rows(tmp_path)) > 0.1
    assert list_checkpoints(tmp_path) == [4, 3, 2, 1]


# ---------------------------------------------------------------------------------------------------- ranks

def started_with(output_dir, rates):
    try:
        run_training(arguments(output_dir, learning_rate=rates[int(os.environ["RANK"])]))
    except UsageError as error:
        return error.exit_code, str(error)


def test_ranks_that_were_started_with_other_flags_are_told_which(ranks, tmp_path):
    said = "rank 1 was started with another learning_rate: 0.5, and rank 0 with 0.1: start all alike"
    assert ranks.run(2, started_with, tmp_path, [0.1, 0.5]) == [(2, said)] * 2


def on_own_disk(root, changes, resume=None):
    """Two hosts of one rank each with the same output_dir on disks of their own: here, relative to folders of their own."""
    rank, here = os.environ["RANK"], os.getcwd()
    (Path(root) / rank).mkdir(exist_ok=True, parents=True)
    os.environ.update({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": rank})
    os.chdir(Path(root) / rank)
    try:
        run = run_training(arguments("run", resume_from_checkpoint=resume, **{**SAVING, **changes}), model=gpt(dropout=0.1))
        return flat(run).tobytes()
    except UsageError as error:
        return error.exit_code, str(error)
    finally:
        os.chdir(here)
        for name in ("LOCAL_WORLD_SIZE", "GROUP_RANK"):
            del os.environ[name]


def test_every_host_can_have_whole_checkpoints_on_a_disk_of_its_own(ranks, tmp_path):
    each = {"save_on_each_node": True, "lr_scheduler_type": "constant"}
    whole = ranks.run(2, on_own_disk, tmp_path / "whole", each)
    ranks.run(2, on_own_disk, tmp_path / "part", {**each, "max_steps": 4})
    assert [names(tmp_path / "part" / rank / "run" / "checkpoint-4") for rank in "01"] == \
        [["args.json", "manifest.json", "model.safetensors", f"optimizer-{rank}.safetensors", f"rng-{rank}.json", "state.json"] for rank in "01"]
    shutil.copytree(tmp_path / "part", tmp_path / "lost")
    (tmp_path / "part" / "1" / "run" / "checkpoint-4" / "state.json").unlink()      # then both go back to 2
    shutil.rmtree(tmp_path / "lost" / "1" / "run" / "checkpoint-4")
    for folder in ("part", "lost"):
        assert ranks.run(2, on_own_disk, tmp_path / folder, each, "auto") == whole
    (code, said), _ = ranks.run(2, on_own_disk, tmp_path / "fsdp", {**each, "strategy": "fsdp"})
    assert code == 2 and "--save_on_each_node needs all of the run on each host, and --strategy fsdp splits it" in said


def test_disks_that_are_not_shared_are_an_error_and_never_a_mix(ranks, tmp_path):
    (code, said), _ = ranks.run(2, on_own_disk, tmp_path / "a", {"strategy": "fsdp"})
    assert code == 5 and "No such file" in said
    each = {"save_on_each_node": True, "max_steps": 2}
    ranks.run(2, on_own_disk, tmp_path / "b", each)
    said = "--resume_from_checkpoint run/checkpoint-2: rank 1 sees another checkpoint under that name than rank 0: all need the same folder"
    assert ranks.run(2, on_own_disk, tmp_path / "b", {}, "run/checkpoint-2") == [(3, said + ", or --save_on_each_node")] * 2


def diverging(output_dir, strategy):
    """Rank 2 of 3 has one bit of one weight wrong after update 3."""
    with toy_run(arguments(output_dir, strategy=strategy, max_steps=9, check_replicas=2), model=gpt()) as (run, loader, _):
        assert [type(c) for c in run.callbacks.callbacks] == [CheckReplicas]
        run.callbacks.callbacks.insert(0, At(3, lambda state, control: flip(run.model) if run.world.rank == 2 else None))
        try:
            train(run, loader, None, compute_loss)
        except UsageError as error:
            return error.exit_code, str(error).partition(" than")[0], run.state.global_step
    return None


def flip(model):
    local_part(next(model.parameters()))[0].view(-1).view(torch.int32)[5] ^= 1


def test_a_flipped_bit_in_one_replica_is_found_and_its_rank_named(ranks, tmp_path):
    assert ranks.run(3, diverging, tmp_path, "ddp") == [(4, "update 4: rank 2 holds other weights", 4)] * 3
    assert ranks.run(3, diverging, tmp_path / "fsdp", "fsdp") == [None] * 3     # there is only one of each


class Tokenizer:
    def save_pretrained(self, folder):
        raise OSError(28, "No space left on device")


def save_with_tokenizer(output_dir) -> tuple[str, int]:
    try:
        with toy_run(arguments(output_dir, max_steps=2, save_strategy="steps", save_steps=1), processing_class=Tokenizer()) as (run, loader, _):
            train(run, loader, None, compute_loss)
    except UsageError as error:
        return str(error), error.exit_code
    return "", 0


def test_a_tokenizer_that_one_rank_cannot_write_ends_all_of_them(ranks, tmp_path):
    for message, code in ranks.run(2, save_with_tokenizer, tmp_path):
        assert "No space left on device" in message and code == 5
    assert not list_checkpoints(tmp_path)


class Plain(torch.nn.Module):
    """A model whose layers can be named, shaped and left away as a test wants."""

    def __init__(self, **sizes: int):
        super().__init__()
        torch.manual_seed(0)
        for name, size in sizes.items():
            setattr(self, name, torch.nn.Linear(1, size, dtype=torch.float64))

    def forward(self, x):
        return sum(layer(x).sum() for layer in self.children())


def plain_run(output_dir, sizes: dict, resume=None, **changes):
    args = arguments(output_dir, max_steps=4, save_strategy="steps", save_steps=2, ema_decay=0.9, resume_from_checkpoint=resume, **changes)
    return run_training(args, lambda model, batch: model(batch["x"].double()).square(), model=Plain(**sizes), train_set=Numbers(10))


@pytest.mark.parametrize("sizes, said", [({"a": 2, "b": 3, "c": 1}, ["c.weight: missing in the file, (1, 1) in the model", "c.bias"]),      # missing in the file
                                         ({"a": 2, "z": 3}, ["z.weight: missing", "b.weight: (3, 1) in the file, nothing in the model"]),      # renamed
                                         ({"a": 2, "b": 4}, ["b.weight: (3, 1) in the file, (4, 1) in the model", "b.bias: (3,)"])])      # of another shape
def test_weights_that_do_not_fit_are_refused_by_name_unless_the_flag_says_to_go_on(sizes, said, tmp_path, capsys):
    plain_run(tmp_path / "run", {"a": 2, "b": 3})
    checkpoint = str(tmp_path / "run/checkpoint-2")
    with pytest.raises(UsageError) as error:
        plain_run(tmp_path / "refused", sizes, checkpoint)
    assert error.value.exit_code == 3 and all(part in str(error.value) for part in [*said, "--allow_change weights"])
    run = plain_run(tmp_path / "taken", sizes, checkpoint, allow_change="weights", learning_rate=0.0)
    assert all(part in capsys.readouterr().err for part in said[:1])
    fits = load_file(f"{checkpoint}/model.safetensors")
    for name, p in run.model.named_parameters():
        start = fits[name] if name in fits and fits[name].shape == p.shape else Plain(**sizes).get_parameter(name)
        assert torch.equal(p, start.detach()), name
    moments = {part.name: run.optimizer.state[part.piece]["step"].item() for part in run.parallel.parts}
    assert moments["a.weight"] == 4 and moments[said[0].partition(":")[0]] == 2      # the one that is new has none of before
