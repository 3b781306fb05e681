"""What is watched: where the time goes, and loggers that say what metrics.jsonl says, over kills too."""
import json
import os
import time
from pathlib import Path

import pytest
import torch

from callbacks import Callback, ProgressCallback
from cost import PARTS, Clock
from state import UsageError
from tests.test_resume import cut
from tests.toy import arguments, gpt, rows, run_training, sequences, timeless, train_and


def test_the_parts_of_a_clock_add_up_to_all_of_the_time():
    clock, began = Clock(), time.perf_counter()
    clock.to("forward")
    list(clock.timing("data", iter(range(1000))))
    with clock.within("communication"):
        clock.to("backward")
    with pytest.raises(KeyError), clock.within("evaluate", hold=True):
        clock.to("forward")
        with clock.within("communication"), clock.within("save", hold=True):
            raise KeyError
    assert clock.part == "forward"
    seconds = clock.read()
    assert {part for part, spent in seconds.items() if spent} == {"other", "forward", "data", "communication", "backward", "evaluate"}
    assert sum(seconds.values()) == pytest.approx(clock.at - began, abs=1e-3)
    assert not any(spent for part, spent in clock.read().items() if part != "forward")


def watched(output_dir, resume=None, **changes):
    """11 samples, 6 updates, evaluations and saves in between; rows without what differs from time to time."""
    args = arguments(output_dir, **{"max_steps": 6, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
                                    "logging_steps": 2, "resume_from_checkpoint": resume, **changes})
    run_training(args, model=gpt(dropout=0.1), train_set=sequences(11), eval_set=sequences(3, seed=1))
    return rows(output_dir) if Path(output_dir, "metrics.jsonl").exists() else None


@pytest.mark.parametrize(("ranks_wanted", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "zero2"), (2, "fsdp")])
def test_every_log_says_where_the_time_went(ranks_wanted, strategy, ranks, tmp_path):
    found = ranks.run(ranks_wanted, watched, tmp_path, None) if strategy == "ddp" else ranks.run(ranks_wanted, watched_with, tmp_path, strategy)
    for row in [row for row in found[0] if "loss" in row]:
        assert {key for key in row if key.startswith("time_")} == {f"time_{part}" for part in PARTS} and row["memory_peak_mb"] > 10
        assert all(row[f"time_{part}"] > 0 for part in ("data", "forward", "backward", "optimizer", "other"))
        assert (row["time_communication"] > 0) == (ranks_wanted > 1)
    assert any(row["time_evaluate"] > 0 and row["time_save"] > 0 for row in found[0] if "loss" in row)


def watched_with(output_dir, strategy):
    return watched(output_dir, strategy=strategy)


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(folder))
    reading.Reload()
    return {tag: [(event.step, event.value) for event in reading.Scalars(tag)] for tag in reading.Tags()["scalars"]}


def test_tensorboard_shows_the_rows_once_after_a_kill_too(tmp_path):
    whole = watched(tmp_path / "whole", report_to="tensorboard", report_histograms=True)
    cut(tmp_path / "whole", tmp_path / "killed", 2)
    resumed = watched(tmp_path / "killed", "True", report_to="tensorboard", report_histograms=True)
    assert [timeless(row) for row in whole] == [timeless(row) for row in resumed]
    for name, logged in (("whole", whole), ("killed", resumed)):
        shown = scalars(tmp_path / name / "tensorboard")
        for key, tag in (("loss", "train/loss"), ("grad_norm", "train/grad_norm"), ("eval_loss", "eval/loss")):
            assert shown[tag] == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in logged if key in row]


def test_weights_and_biases_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    watched(tmp_path / "whole", report_to="wandb")
    cut(tmp_path / "whole", tmp_path / "killed", 4)
    watched(tmp_path / "killed", "True", report_to="wandb")
    runs = sorted(path.name.rpartition("-")[2] for path in (tmp_path / "killed/wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len(set(runs)) == 1
    assert all(path.stat().st_size > 500 for path in (tmp_path / "killed/wandb").glob("offline-run-*/*.wandb"))


def test_mlflow_holds_the_rows_in_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    logged = watched(tmp_path / "whole", report_to="mlflow")
    cut(tmp_path / "whole", tmp_path / "killed", 4)
    watched(tmp_path / "killed", "True", report_to="mlflow")
    found = mlflow.MlflowClient().search_runs(["0"])
    assert len(found) == 1 and found[0].data.params["max_steps"] == "6" and found[0].info.status == "FINISHED"
    history = mlflow.MlflowClient().get_metric_history(found[0].info.run_id, "loss")
    assert {(metric.step, metric.value) for metric in history} == {(row["step"], row["loss"]) for row in logged if "loss" in row}


def test_a_trace_is_written_for_the_updates_asked_for(ranks, tmp_path):
    ranks.run(2, profiled, tmp_path)
    for rank in (0, 1):
        events = json.loads((tmp_path / f"profile/rank-{rank}.json").read_text())["traceEvents"]
        names = [event.get("name") for event in events]
        assert names.count("Optimizer.step#AdamW.step") == 2 and any("scaled_dot_product" in str(name) for name in names)


def profiled(output_dir):
    watched(output_dir, profile="3:4")


def test_data_that_is_slow_is_told_once(tmp_path, capsys):
    class Slow(list):
        def __getitem__(self, i):
            torch.linalg.inv(torch.eye(400).double())
            return super().__getitem__(i)
    args = arguments(tmp_path, max_steps=6, logging_steps=2)
    train_and(args, lambda run: None, model=gpt(), train_set=Slow(sequences(11)), callbacks=[Lines()])
    assert capsys.readouterr().out.count("the training data takes") == 1


class Lines(Callback):
    """The progress lines, which runs of tests are without."""

    def __init__(self):
        self.lines = ProgressCallback(disable_tqdm=True)

    def on_log(self, *args, **kwargs):
        self.lines.on_log(*args, **kwargs)


@pytest.mark.parametrize("name", ["TensorBoardCallback", "MLflowCallback"])
def test_loggers_of_transformers_run_here_as_they_are(name, tmp_path, monkeypatch):
    integrations = pytest.importorskip("transformers.integrations")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    args = arguments(tmp_path / "run", max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    run_training(args, model=gpt(), train_set=sequences(8), eval_set=sequences(3, seed=1), callbacks=[getattr(integrations, name)()])
    logged = [row for row in rows(tmp_path / "run") if "loss" in row]
    if name == "TensorBoardCallback":
        assert scalars(tmp_path / "runs")["train/loss"] == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in logged]
    else:
        assert any(str(logged[0]["loss"]) in path.read_text() for path in (tmp_path / "mlruns").rglob("metrics/*loss"))


@pytest.mark.parametrize(("changes", "said"), [({"report_to": "tensorbord"}, "report_to=tensorbord: expected tensorboard, wandb, mlflow"),
                                               ({"report_histograms": True}, "needs --report_to tensorboard"), ({"profile": "3"}, "as 10:12"), ({"profile": "4:3"}, "as 10:12")])
def test_mistakes_are_one_message(changes, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        watched(tmp_path, **changes)
    assert not os.listdir(tmp_path)
