"""Evaluation is exact for any batch size and number of ranks, and never touches training."""
import json
import math

import numpy as np
import pytest
import torch

from callbacks import Callback
from evalloop import evaluate, likeliest, predict, save_results
from loop import train
from loss import compute_loss, logits_loss
from state import UsageError
from tests.toy import arguments, files_of_at_most, flat, gpt, rows, run_training, sequences, toy_run

SIZES = (1, 3, 5, 9)


def exact_loss(model, samples) -> float:
    logits = model(torch.stack([s["input_ids"] for s in samples]))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.stack([s["labels"] for s in samples]).flatten()).item()


def accuracy(logits, labels) -> dict:
    kept = labels != -100
    return {"accuracy": (logits.argmax(-1) == labels)[kept].double().mean(), "n": len(labels)}


class Streaming:
    """The same accuracy, from what arrives bit by bit."""

    def reset(self):
        self.hits = self.total = self.rows = 0

    def update(self, predictions, labels):
        kept = labels != -100
        self.hits += int((predictions == labels)[kept].sum())
        self.total += int(kept.sum())
        self.rows += len(labels)

    def compute(self):
        return {"accuracy": self.hits / self.total, "n": self.rows}


def evaluated(output_dir, batch_size, strategy="ddp", dtype=torch.float64) -> list[tuple]:
    """(loss, accuracy, n, the same streamed, predictions, labels) for sets of each size."""
    results = []
    for n in SIZES:
        args = arguments(output_dir / str(n), per_device_eval_batch_size=batch_size, strategy=strategy, eval_accumulation_steps=1 + n % 2)
        with toy_run(args, model=gpt(dtype=dtype), eval_set=sequences(n)) as (run, _, loader):
            whole = evaluate(run, loader, compute_loss, accuracy)
            streamed = evaluate(run, loader, compute_loss, Streaming(), preprocess_logits_for_metrics=likeliest)
            found = predict(run, loader, loss_fn=compute_loss)
            assert found.metrics["test_loss"] == whole["eval_loss"] == streamed["eval_loss"]
            results.append((whole["eval_loss"], whole["eval_accuracy"], whole["eval_n"], (streamed["eval_accuracy"], streamed["eval_n"]),
                            found.predictions.numpy().copy(), found.label_ids.numpy().copy()))
    return results


@pytest.mark.parametrize("world_size, batch_size, strategy", [
    *((1, batch_size, "ddp") for batch_size in (1, 3, 8)), (2, 1, "fsdp"), (2, 3, "ddp"), (2, 8, "zero2"), (3, 1, "zero1"), (3, 3, "fsdp"), (3, 8, "ddp")])
def test_loss_metrics_and_predictions_do_not_depend_on_batch_size_ranks_and_strategy(ranks, tmp_path, world_size, batch_size, strategy):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6))[:1 + (batch_size == 3)]:
        model = gpt(dtype=dtype)
        for results in ranks.run(world_size, evaluated, tmp_path / str(dtype), batch_size, strategy, dtype):
            for n, (loss, acc, count, streamed, predictions, label_ids) in zip(SIZES, results, strict=True):
                samples = sequences(n)
                labels = torch.stack([s["labels"] for s in samples])
                assert loss == pytest.approx(exact_loss(model, samples), abs=tolerance)
                logits = model(torch.stack([s["input_ids"] for s in samples])).detach()
                np.testing.assert_allclose(predictions, logits.numpy(), rtol=0, atol=10 * tolerance)        # in data order, none twice
                assert (label_ids == labels.numpy()).all()
                assert count == n and streamed == (pytest.approx(acc), n)
                if dtype == torch.float64:
                    assert acc == pytest.approx(accuracy(logits, labels)["accuracy"].item())


def refused_empty(output_dir) -> str:
    with pytest.raises(UsageError) as error, toy_run(arguments(output_dir), eval_set=[]):
        pass
    return str(error.value)


def test_a_set_of_size_0_is_refused(ranks, tmp_path):
    assert all("empty" in said for said in [refused_empty(tmp_path), *ranks.run(2, refused_empty, tmp_path)])


def trained(output_dir, evaluate_first=False, **changes):
    args = arguments(output_dir, max_steps=5, **changes)
    with toy_run(args, model=gpt(dropout=0.3), eval_set=sequences(5, seed=3)) as (run, loader, eval_loader):
        if evaluate_first:
            evaluate(run, eval_loader, randomly)
            predict(run, eval_loader)
        train(run, loader, eval_loader, randomly)
    return flat(run).tolist()


def randomly(model, batch):
    """A loss that draws from every global generator, in evaluation too."""
    import random
    noise = random.random() + np.random.rand() + torch.rand(()).item()
    return compute_loss(model, batch) * (1 + 0.1 * noise)


EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}


def test_training_is_bit_identical_with_and_without_evaluation(ranks, tmp_path):
    plain = trained(tmp_path / "plain")
    assert trained(tmp_path / "evaluated", **EVALUATING) == plain
    assert trained(tmp_path / "first", evaluate_first=True) == plain
    plain = ranks.run(2, trained, tmp_path / "plain2")
    assert plain[0] == plain[1]
    assert ranks.run(2, trained, tmp_path / "first2", True) == plain
    assert ranks.run(2, trained_evaluating, tmp_path / "evaluated2") == plain


def test_metrics_and_modes_of_submodules_do_not_touch_training_either(tmp_path):
    class Freeze(Callback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.blocks[0].eval()

    def weights_of(name, **changes):
        args = arguments(tmp_path / name, max_steps=4, **changes)
        with toy_run(args, model=gpt(dropout=0.3), eval_set=sequences(5), callbacks=[Freeze()]) as (run, loader, eval_loader):
            train(run, loader, eval_loader, compute_loss, lambda predictions, labels: {"noise": torch.rand(()).item()})
        return flat(run).tolist()
    assert weights_of("plain") == weights_of("evaluated", **EVALUATING)


class Output:
    def __init__(self, logits):
        self.logits = logits


class Wrapped(torch.nn.Module):
    """A model in the style of transformers: named inputs, an object with .logits."""

    def __init__(self):
        super().__init__()
        self.gpt = gpt()

    def forward(self, input_ids):
        return Output(self.gpt(input_ids))


def test_a_model_that_returns_an_object_with_logits_is_evaluated_and_predicted_with(tmp_path):
    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    args = arguments(tmp_path, max_steps=1, eval_strategy="steps")
    with toy_run(args, model=Wrapped(), eval_set=sequences(3)) as (run, loader, eval_loader):
        train(run, loader, eval_loader, loss, accuracy)
        assert predict(run, eval_loader).predictions.shape == (3, 8, 17)
    assert "eval_accuracy" in next(row for row in rows(tmp_path) if "eval_loss" in row)


def test_evaluating_an_empty_stream_is_an_error(tmp_path):
    with toy_run(arguments(tmp_path), eval_set=filter(None, [])) as (run, _, loader):
        for call in (lambda: evaluate(run, loader, compute_loss), lambda: predict(run, loader)):
            with pytest.raises(UsageError, match="is empty"):
                call()


def trained_evaluating(output_dir):
    return trained(output_dir, **EVALUATING)


def test_evaluation_uses_no_dropout_and_puts_the_mode_back(tmp_path):
    modes = []

    class Mode(Callback):
        def on_prediction_step(self, args, state, control, model=None, **kwargs):
            modes.append((model.training, torch.is_grad_enabled()))

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            modes.append((model.training, torch.is_grad_enabled()))
    run_training(arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1), model=gpt(dropout=0.5), eval_set=sequences(2),
                 callbacks=[Mode()])
    assert modes == [(True, True), (False, False)] * 2


def test_evaluation_rows_are_logged_with_their_speed(tmp_path):
    run_training(arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1), eval_set=sequences(5))
    logged = [row for row in rows(tmp_path) if "eval_loss" in row]
    assert [row["step"] for row in logged] == [1, 2]
    assert {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch"} <= logged[0].keys()
    assert logged[0]["eval_samples_per_second"] == pytest.approx(5 / logged[0]["eval_runtime"])
    assert logged[0]["eval_steps_per_second"] == pytest.approx(3 / logged[0]["eval_runtime"])


def test_a_set_without_labels_to_count_has_no_loss_but_predictions(tmp_path):
    samples = [{**s, "labels": torch.full_like(s["labels"], -100)} for s in sequences(3)]
    with toy_run(arguments(tmp_path), eval_set=samples) as (run, _, loader):
        assert math.isnan(evaluate(run, loader, compute_loss)["eval_loss"])
        assert predict(run, loader).predictions.shape == (3, 8, 17)


def ragged(output_dir):
    """Predictions of unequal length over batches and ranks."""
    samples = [{"x": torch.arange(float(i + 1))} for i in range(5)]

    def pad(batch):
        return {"x": torch.nn.utils.rnn.pad_sequence([s["x"] for s in batch], batch_first=True), "num_items": len(batch)}
    with toy_run(arguments(output_dir), model=torch.nn.Linear(1, 1), train_set=samples, eval_set=samples, collate=pad) as (run, _, loader):
        return predict(run, loader, lambda model, batch: batch["x"]).predictions.tolist()


def test_ragged_predictions_are_filled_with_the_ignored_label(ranks, tmp_path):
    for result in ranks.run(2, ragged, tmp_path):
        assert [row[:i + 1] for i, row in enumerate(result)] == [[float(k) for k in range(i + 1)] for i in range(5)]
        assert len({len(row) for row in result}) == 1 and result[0][-1] == -100


class Pair(torch.nn.Module):
    """Gives a dict as models of transformers do: a loss, logits, a cache that is no tensor, and hidden states."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 2)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"loss": logits.sum(), "logits": logits, "past_key_values": object(), "hidden_states": (x, [x + 1])}


def two_outputs(output_dir):
    samples = [{"x": torch.tensor([float(i)]), "start_positions": i, "end_positions": i + 1} for i in range(5)]
    seen = []

    def metric(predictions, labels):
        seen.append((predictions, labels))
        return {"n": len(labels[0])}
    with toy_run(arguments(output_dir), model=Pair(), train_set=samples, eval_set=samples) as (run, _, loader):
        evaluate(run, loader, lambda model, batch: model(batch["x"])["logits"].sum(), metric)
        found = predict(run, loader)
    (logits, hidden, more), (starts, ends) = seen[0]
    assert logits.shape == (5, 2) and (more == hidden + 1).all() and (ends == starts + 1).all()
    assert all((a == b).all() for a, b in zip(found.predictions, (logits, hidden, more), strict=True))
    assert found.label_ids[1].tolist() == [1, 2, 3, 4, 5] and min(p.name for p in output_dir.glob("*.npy")) == "test_labels_0.npy"
    return hidden.flatten().tolist()


def test_several_outputs_and_labels_come_as_tuples_and_in_files_of_their_own(ranks, tmp_path):
    assert two_outputs(tmp_path / "one") == [0, 1, 2, 3, 4]
    assert ranks.run(2, two_outputs, tmp_path / "two") == [[0, 1, 2, 3, 4]] * 2


def test_without_labels_there_are_predictions_and_none_where_one_of_them_is_missing(tmp_path):
    samples = [{"x": torch.tensor([float(i)])} for i in range(3)]
    with toy_run(arguments(tmp_path), model=torch.nn.Linear(1, 1), train_set=samples, eval_set=samples) as (run, _, loader):
        assert predict(run, loader, lambda model, batch: model(batch["x"])).label_ids is None
    named = [{**s, "targets": 1} for s in samples]
    with toy_run(arguments(tmp_path, label_names="targets"), model=torch.nn.Linear(1, 1), train_set=named, eval_set=named) as (run, _, loader):
        assert predict(run, loader, lambda model, batch: model(batch["x"])).label_ids.tolist() == [1, 1, 1]


def test_a_missing_label_column_says_what_there_is(tmp_path):
    samples = [{"input_ids": s["input_ids"]} for s in sequences(3)]
    with toy_run(arguments(tmp_path), train_set=samples) as (run, *loaders), pytest.raises(UsageError, match="has no labels: it has input_ids"):
        train(run, *loaders, compute_loss)
    assert run.state.global_step == 0


def test_a_label_outside_the_classes_names_its_sample_before_the_first_update(tmp_path):
    class Classifier(torch.nn.Linear):
        num_labels = 2
    samples = [{"input": torch.tensor([1.0]), "label": i} for i in (0, 1, -1, -100)]
    args = arguments(tmp_path, per_device_train_batch_size=4, train_sampling_strategy="sequential")
    with toy_run(args, model=Classifier(1, 2), train_set=samples) as (run, *loaders), pytest.raises(UsageError, match=r"sample 2: labels is -1, outside 0..1"):
        train(run, *loaders, logits_loss)


def test_predictions_that_are_no_rows_of_samples_are_refused(tmp_path):
    with toy_run(arguments(tmp_path), eval_set=sequences(3)) as (run, _, loader):
        with pytest.raises(UsageError, match="one row per sample"):
            predict(run, loader, lambda model, batch: batch["input_ids"].sum())
        with pytest.raises(UsageError, match="expected tensors"):
            predict(run, loader, lambda model, batch: "text")


def test_several_sets_have_their_names_in_front_of_their_metrics(tmp_path):
    sets = {"short": sequences(2), "long": sequences(5, seed=1)}
    state = run_training(arguments(tmp_path, max_steps=1, eval_strategy="epoch"), eval_set=sets, train_set=sequences(2)).state
    logged = [row for row in rows(tmp_path) if "eval_short_loss" in row or "eval_long_loss" in row]
    assert len(logged) == 2 and state.best_metric is None


def test_a_loss_that_returns_its_predictions_spares_a_second_forward(tmp_path):
    calls = []
    args = arguments(tmp_path, max_steps=1, eval_strategy="epoch")
    model = torch.nn.Linear(8, 17)
    model.register_forward_hook(lambda *_: calls.append(1))
    samples = [{"input": s["input_ids"].float(), "labels": i} for i, s in enumerate(sequences(4))]
    with toy_run(args, model=model, train_set=samples, eval_set=samples) as (run, *loaders):
        metrics = evaluate(run, loaders[1], logits_loss, lambda predictions, labels: {"size": predictions.numel()})
    assert len(calls) == 2 and metrics["eval_size"] == 4 * 17


def test_results_of_each_split_are_in_a_file_and_all_in_one(tmp_path):
    with toy_run(arguments(tmp_path), eval_set=sequences(3)) as (run, *_):
        save_results(run, "eval", {"eval_loss": 1.0})
        save_results(run, "test", {"test_loss": 2.0})
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"eval_loss": 1.0}
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"eval_loss": 1.0, "test_loss": 2.0}


def test_predictions_in_16_bits_come_as_float32(tmp_path):
    with toy_run(arguments(tmp_path, bf16=True), eval_set=sequences(3)) as (run, _, loader):
        assert predict(run, loader).predictions.dtype == torch.float32


def test_what_an_older_prediction_shows_stays_when_there_is_a_newer_one(tmp_path):
    with toy_run(arguments(tmp_path), eval_set=sequences(3)) as (run, _, loader):
        first = predict(run, loader, lambda model, batch: batch["input_ids"]).predictions
        kept = first.clone()
        predict(run, loader, lambda model, batch: batch["input_ids"] * 0)
    assert (first == kept).all() and not list(tmp_path.glob("*.tmp"))


def of_rank(output_dir):
    """Metrics that ranks would not agree on, and rows of whole numbers, bools and unequal lengths."""
    samples = [{"x": torch.arange(i + 1)} for i in range(5)]

    def pad(batch):
        return {"x": torch.nn.utils.rnn.pad_sequence([s["x"] for s in batch], batch_first=True).to(torch.uint8), "num_items": len(batch)}
    with toy_run(arguments(output_dir, label_names="x"), model=torch.nn.Linear(1, 1), train_set=samples, eval_set=samples, collate=pad) as (run, _, loader):
        torch.manual_seed(run.world.rank)
        metrics = evaluate(run, loader, lambda model, batch: torch.zeros(()), lambda predictions, labels: {"noise": torch.rand(()).item()},
                           predict_fn=lambda model, batch: batch["x"] > 0)
        found = predict(run, loader, lambda model, batch: (batch["x"] > 0, batch["x"]))
    return metrics, [rows.tolist() for rows in found.predictions]


def test_ranks_agree_on_metrics_and_bools_and_bytes_can_be_filled(ranks, tmp_path):
    _, (bools, numbers) = of_rank(tmp_path / "one")
    assert bools[1] == [0, 1, -100, -100, -100] and numbers[3] == [0, 1, 2, 3, -100]
    (first, rows), (second, more) = ranks.run(2, of_rank, tmp_path / "two")
    assert first == second and rows == more


def test_predictions_that_change_their_type_or_that_some_batches_lack_are_refused(tmp_path):
    with toy_run(arguments(tmp_path, per_device_eval_batch_size=1), eval_set=sequences(2)) as (run, _, loader):
        turns = iter([torch.long, torch.float32])
        with pytest.raises(UsageError, match="came after torch.int64"):
            predict(run, loader, lambda model, batch: batch["input_ids"].to(next(turns)))
        sizes = iter([1, 2])
        with pytest.raises(UsageError, match="others lack"):
            predict(run, loader, lambda model, batch: (batch["input_ids"],) * next(sizes))
    assert not list(tmp_path.glob("test_*"))


@pytest.mark.parametrize("metric, said", [
    (lambda predictions, labels: 0.5, "gave a float; expected a dict"), (lambda predictions, labels: None, "gave a NoneType"),
    (lambda predictions, labels: {"all": [1, 2]}, r"gave \[1, 2\] as all; expected a number"), (lambda evaluation: {}, "expected a function of .predictions, labels."),
    (Streaming, "is the class Streaming, not an object of it"), (type("Half", (), {"update": None})(), "no attribute 'reset'")])
def test_a_metric_that_is_not_one_is_told(tmp_path, metric, said):
    with toy_run(arguments(tmp_path), eval_set=sequences(3)) as (run, _, loader), pytest.raises(UsageError, match=said):
        evaluate(run, loader, compute_loss, metric)


def test_metrics_need_labels(tmp_path):
    samples = [{"input": torch.tensor([1.0])} for _ in range(2)]
    with toy_run(arguments(tmp_path), model=torch.nn.Linear(1, 1), train_set=samples, eval_set=samples) as (run, _, loader), \
            pytest.raises(UsageError, match="has none: it has input. Name their columns by --label_names"):
        evaluate(run, loader, lambda model, batch: model(batch["input"]).sum(), accuracy)


def test_a_label_outside_of_what_a_model_gives_is_told_without_a_traceback(tmp_path):
    samples = [{"input": torch.tensor([1.0]), "labels": 7 * (i == 1)} for i in range(4)]
    args = arguments(tmp_path, train_sampling_strategy="sequential")
    with toy_run(args, model=torch.nn.Linear(1, 2), train_set=samples) as (run, *loaders), pytest.raises(UsageError, match="labels of sample 1 .* is 7, and .* 0..1"):
        train(run, *loaders, logits_loss)


def test_metrics_that_one_round_is_too_little_for_do_not_stop_a_run(tmp_path):
    def auc(predictions, labels):
        if len(labels) < 5:
            raise ValueError("only one class")
        return {"auc": 1.0}
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, metric_for_best_model="auc")
    assert run_training(args, eval_set=sequences(5), compute_metrics=auc).state.best_metric == 1.0


def test_a_disk_that_fills_up_is_told_and_leaves_the_predictions_that_were_there(tmp_path):
    with toy_run(arguments(tmp_path), eval_set=sequences(200)) as (run, _, loader):
        predict(run, loader, lambda model, batch: batch["input_ids"])
        with files_of_at_most(5000), pytest.raises(UsageError, match="^cannot write") as error:
            predict(run, loader, lambda model, batch: batch["input_ids"] * 0)
    assert error.value.exit_code == 5 and np.load(tmp_path / "test_predictions.npy").any()
