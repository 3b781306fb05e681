"""What is watched: where the time goes, and loggers that say what metrics.jsonl says, over kills too."""
import json
import os
import time
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch

from callbacks import Callback, ProgressCallback
from cost import PARTS, Clock, Memory
from evalloop import evaluate, evaluating
from loop import train
from loss import compute_loss
from state import UsageError
from storage import plan_tensors, write_file
from tests.test_resume import cut
from tests.toy import arguments, gpt, rows, run_training, sequences, timeless, toy_run, train_and
from tools.generate import write
from tools.report import main as report


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
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    watched(tmp_path / "whole", report_to="wandb")
    wandb.teardown()        # its service may still be writing
    cut(tmp_path / "whole", tmp_path / "killed", 4)
    watched(tmp_path / "killed", "True", report_to="wandb")
    wandb.teardown()
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
        self.lines = ProgressCallback(bars=False)

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


def test_stages_tell_what_they_did_to_memory():
    memory, megabyte = Memory(on=True), 2**20
    kept = bytearray(b"x") * (64 * megabyte)
    memory.start("train")
    assert len(bytearray(b"x") * (96 * megabyte)) == 96 * megabyte
    found = memory.read()
    assert found["before_init_mem_cpu"] > 0 and 60 * megabyte < found["init_mem_cpu_alloc_delta"] < 70 * megabyte and found["init_mem_cpu_peaked_delta"] < 8 * megabyte
    assert abs(found["train_mem_cpu_alloc_delta"]) < 8 * megabyte and 90 * megabyte < found["train_mem_cpu_peaked_delta"] < 104 * megabyte
    assert len(kept) and memory.read() == {} == Memory().read()


def test_results_tell_the_memory_of_their_stage_once(tmp_path):
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", skip_memory_metrics=False)
    with toy_run(args, eval_set=sequences(3)) as (run, train_loader, eval_loader):
        told = train(run, train_loader, eval_loader, compute_loss)
        later = evaluate(run, eval_loader, compute_loss)
    assert {key.split("_mem_")[0] for key in told if "_mem_" in key} == {"before_init", "init", "train"}
    assert {key.split("_mem_")[0] for key in later if "_mem_" in key} == {"eval"}
    assert not any("_mem_" in key for row in rows(tmp_path)[:-2] for key in row)


@pytest.mark.parametrize(("ranks_wanted", "strategy"), [(1, "ddp"), (2, "fsdp")])
def test_samples_are_rows_and_what_the_model_writes(ranks_wanted, strategy, ranks, tmp_path):
    again, = {*ranks.run(ranks_wanted, sampled, tmp_path, strategy)}
    samples = [(row["step"], row["sample"]) for row in rows(tmp_path) if "sample" in row]
    assert [step for step, _ in samples] == [2, 4] and samples[-1][1] == again and len({text for _, text in samples}) == 2
    report([str(tmp_path)])
    assert "the last 2 of 2" in Path(tmp_path, "report.html").read_text()


def sampled(output_dir, strategy):
    """What the model writes after training: as after its last evaluation, which is of the same update."""
    args = arguments(output_dir, strategy=strategy, max_steps=4, eval_strategy="steps", eval_steps=2, sample_prompt="\3\4")

    def look(run):
        with evaluating(run) as model:
            return write(model, "\3\4", 200)
    return train_and(args, look, model=gpt(), train_set=sequences(11), eval_set={"a": sequences(3, seed=1), "b": sequences(2)})


def test_a_prompt_that_the_model_does_not_know_is_told_before_training(tmp_path):
    with pytest.raises(UsageError, match="the prompt 'é' has byte 195; the model knows 0..16"):
        run_training(arguments(tmp_path, max_steps=1, eval_strategy="steps", sample_prompt="é"), eval_set=sequences(3))
    assert not rows(tmp_path)


def test_the_bar_of_a_save_ends_with_the_bytes_of_its_files(tmp_path):
    told = []
    plan = plan_tensors({"a": torch.zeros(3 * 2**22), "b": torch.zeros(5, dtype=torch.int8)})
    write_file(str(tmp_path / "file"), plan, told.append)
    assert sum(told) == plan.size == os.path.getsize(tmp_path / "file") and len(told) >= 4


def test_a_notebook_shows_the_bar_and_the_error_of_a_wrong_flag(tmp_path):
    flags = ["--output_dir", str(tmp_path / "run"), "--dataset", __file__, "--max_steps", "4", "--logging_steps", "2", "--n_layer", "1", "--n_embd", "32", "--block_size", "32"]
    cells = [f"import sys; sys.path.insert(0, {os.getcwd()!r})\nfrom train import run\nrun({flags})", f"run({[*flags, '--max_stepz', '4']})"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=100, allow_errors=True, kernel_name="python3").execute()
    trained, refused = ("".join(output.get("text", output.get("evalue", "")) for output in cell.outputs) for cell in book.cells)
    assert "train: 100%" in trained and "4/4" in trained and "train_loss" in trained
    assert refused == "--max_stepz is not a flag: did you mean --max_steps?" and len(rows(tmp_path / "run")) == 3


@pytest.mark.parametrize(("changes", "said"), [({"report_to": "tensorbord"}, "report_to=tensorbord: expected tensorboard, wandb, mlflow"),
                                               ({"report_histograms": True}, "needs --report_to tensorboard"), ({"profile": "3"}, "as 10:12"), ({"profile": "4:3"}, "as 10:12"),
                                               ({"sample_prompt": "", "eval_strategy": "no"}, "--sample_prompt  needs evaluations")])
def test_mistakes_are_one_message(changes, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        watched(tmp_path, **changes)
    assert not os.listdir(tmp_path)
