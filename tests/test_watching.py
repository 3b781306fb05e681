"""What is watched: where the time goes, and loggers that say what metrics.jsonl says, over kills too."""
import json
import os
import shutil
import time
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch

from callbacks import Callback, PrinterCallback, ProgressCallback
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
    clock.to("data")
    clock.to("forward")
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


def test_the_parts_of_a_real_run_add_up_to_its_time(tmp_path):
    """From the beginning of training, whose time the clock still has when the first epoch begins, to a last reading of it."""
    class Stopwatch(Callback):
        began = None

        def on_epoch_begin(self, args, state, control, run=None, **kwargs):
            self.began = self.began or run.world.clock.at
    stopwatch = Stopwatch()
    args = arguments(tmp_path, max_steps=50, logging_steps=10, eval_strategy="steps", save_strategy="steps", save_steps=20)
    rest, ended = train_and(args, lambda run: (sum(run.world.clock.read().values()), run.world.clock.at), eval_set=sequences(3), callbacks=[stopwatch])
    spent = [10 * sum(value for key, value in row.items() if key.startswith("time_")) for row in rows(tmp_path) if "loss" in row]
    assert len(spent) == 5 and sum(spent) + rest == pytest.approx(ended - stopwatch.began, rel=1e-6)


def watched_with(output_dir, strategy):
    return watched(output_dir, strategy=strategy)


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(folder))
    reading.Reload()
    return {tag: [(event.step, event.value) for event in reading.Scalars(tag)] for tag in reading.Tags()["scalars"]}


@pytest.mark.parametrize("changes", [{}, {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_steps": 3, "num_train_epochs": 2, "max_steps": -1}])
def test_tensorboard_shows_the_rows_once_after_a_kill_too(changes, tmp_path):
    """Also where rows of an update come after its checkpoint: at the end of an epoch."""
    changes = {**changes, "report_to": "tensorboard", "report_histograms": not changes}
    whole = watched(tmp_path / "whole", **changes)
    cut(tmp_path / "whole", tmp_path / "killed", 3 if "max_steps" in changes else 2)
    resumed = watched(tmp_path / "killed", "True", **changes)
    assert [timeless(row) for row in whole] == [timeless(row) for row in resumed]
    for name, logged in (("whole", whole), ("killed", resumed)):
        shown = scalars(tmp_path / name / "tensorboard")
        for key, tag in (("loss", "train/loss"), ("grad_norm", "train/grad_norm"), ("eval_loss", "eval/loss")):
            assert shown[tag] == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in logged if key in row]
    if not changes.get("max_steps"):
        assert histograms(tmp_path / "killed/tensorboard") == histograms(tmp_path / "whole/tensorboard")


def histograms(folder) -> dict[str, list]:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(folder))
    reading.Reload()
    return {tag: [(event.step, event.histogram_value.sum) for event in reading.Histograms(tag)] for tag in reading.Tags()["histograms"]}


def test_each_start_of_weights_and_biases_has_the_whole_history(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    watched(tmp_path / "whole", report_to="wandb")
    cut(tmp_path / "whole", tmp_path / "killed", 2)
    shutil.rmtree(tmp_path / "killed/wandb", ignore_errors=True)
    logged = watched(tmp_path / "killed", "True", report_to="wandb")
    wandb.teardown()        # its service may still be writing
    path, = (tmp_path / "killed/wandb").glob("offline-run-*/*.wandb")
    told = [row for row in wandb_rows(path.read_bytes()) if "update" in row]
    assert [row["update"] for row in told] == [row["step"] for row in logged]
    assert [row["loss"] for row in told if "loss" in row] == [row["loss"] for row in logged if "loss" in row]


def wandb_rows(data: bytes) -> list[dict]:
    """The history records of a .wandb file: LevelDB's log format, with protocol buffers in it."""
    from wandb.proto.wandb_internal_pb2 import Record
    at, found, part = 7, [], b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += -at % 32768
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        part, at = (part if kind in (3, 4) else b"") + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):
            record = Record.FromString(part)
            found += [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}] if record.HasField("history") else []
    return found


def test_each_start_of_mlflow_has_the_whole_history(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    watched(tmp_path / "whole", report_to="mlflow", run_name="first")
    cut(tmp_path / "whole", tmp_path / "killed", 2)
    logged = watched(tmp_path / "killed", "True", report_to="mlflow", run_name="second")
    client = mlflow.MlflowClient()
    found, = (run for run in client.search_runs(["0"]) if run.info.run_name == "second")
    assert found.data.params["max_steps"] == "6" and found.info.status == "FINISHED"
    for key in ("loss", "eval_loss", "train_loss"):
        assert [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, key)] == [(row["step"], row[key]) for row in logged if key in row]


def test_a_trace_is_written_for_the_updates_asked_for(ranks, tmp_path):
    ranks.run(2, profiled, tmp_path)
    for rank in (0, 1):
        events = json.loads((tmp_path / f"profile/rank-{rank}.json").read_text())["traceEvents"]
        names = [event.get("name") for event in events]
        assert names.count("Optimizer.step#AdamW.step") == 2 and any("scaled_dot_product" in str(name) for name in names)


def profiled(output_dir):
    watched(output_dir, profile="3:4")


def test_a_trace_ends_with_the_run_and_one_that_never_begins_is_an_error(tmp_path):
    class Stop(Callback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == 2
    run_training(arguments(tmp_path, max_steps=5, profile="2:4"), callbacks=[Stop()])
    assert (tmp_path / "profile/rank-0.json").exists()
    with pytest.raises(UsageError, match="--profile 50:60: the run ends with update 4, before the trace begins"):
        run_training(arguments(tmp_path / "late", num_train_epochs=1, profile="50:60"))


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
        self.lines = PrinterCallback()

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


class OnTerminal(Callback):
    """The bars, drawn by hand since stderr is no terminal here; runs of tests are without."""

    def __init__(self):
        self.bars = ProgressCallback()

    def __getattribute__(self, name):
        return getattr(object.__getattribute__(self, "bars"), name) if name.startswith("on_") else object.__getattribute__(self, name)


def test_bars_of_several_data_sets_count_their_own_batches(tmp_path, capsys):
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    train_and(args, lambda run: None, model=gpt(), train_set=sequences(8), eval_set={"a": sequences(6), "b": sequences(3)}, callbacks=[OnTerminal()])
    shown = capsys.readouterr()
    assert "train: 100%" in shown.err and "evaluate:   0%|          | 0/3" in shown.err and "evaluate:   0%|          | 0/2" in shown.err
    assert [line.split("  ")[1].split()[0] for line in shown.out.splitlines() if line.startswith("step")] == ["loss", "loss", "eval_a_loss", "eval_b_loss", "train_runtime"]


def test_a_notebook_shows_the_bar_and_the_error_of_a_wrong_flag(tmp_path):
    flags = ["--output_dir", str(tmp_path / "run"), "--dataset", __file__, "--max_steps", "4", "--logging_steps", "2", "--n_layer", "1", "--n_embd", "32", "--block_size", "32"]
    cells = [f"import sys; sys.path.insert(0, {os.getcwd()!r})\nfrom train import run\nrun({flags})", f"run({[*flags, '--max_stepz', '4']})"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=100, allow_errors=True, kernel_name="python3").execute()
    trained, refused = ("".join(output.get("text", output.get("evalue", "")) for output in cell.outputs) for cell in book.cells)
    assert "train: 100%" in trained and "4/4" in trained and "train_loss" in trained
    assert refused == "--max_stepz is not a flag: did you mean --max_steps?" and len(rows(tmp_path / "run")) == 3


@pytest.mark.parametrize(("changes", "said"), [({"report_to": "tensorbord"}, "report_to=tensorbord: expected tensorboard, wandb, mlflow"),
                                               ({"report_histograms": True}, "needs --report_to tensorboard"),
                                               ({"report_histograms": True, "report_to": "tensorboard", "logging_strategy": "epoch"}, "and --logging_strategy steps"),
                                               ({"profile": "3"}, "as 10:12"), ({"profile": "4:3"}, "as 10:12"),
                                               ({"sample_prompt": "", "eval_strategy": "no"}, "--sample_prompt  needs evaluations")])
def test_mistakes_are_one_message(changes, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        watched(tmp_path, **changes)
    assert not os.listdir(tmp_path)
