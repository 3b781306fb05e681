"""Evaluation is exact for any batch size and number of ranks, and never touches training."""
import math

import numpy as np
import pytest
import torch

from callbacks import Callback
from evalloop import evaluate, predict
from loop import train
from loss import compute_loss
from state import UsageError
from tests.toy import arguments, flat, gpt, rows, run_training, sequences, toy_run

SIZES = (1, 3, 5, 9)


def exact_loss(model, samples) -> float:
    logits = model(torch.stack([s["input_ids"] for s in samples]))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.stack([s["labels"] for s in samples]).flatten()).item()


def accuracy(logits, labels) -> dict:
    kept = labels != -100
    return {"accuracy": (logits.argmax(-1) == labels)[kept].double().mean(), "n": len(labels)}


def evaluated(output_dir, batch_size) -> list[tuple]:
    """(loss, accuracy, n, predictions) for sets of each size."""
    results = []
    for n in SIZES:
        args = arguments(output_dir / str(n), per_device_eval_batch_size=batch_size)
        with toy_run(args, model=gpt(dtype=torch.float64), eval_set=sequences(n)) as (run, _, loader):
            metrics = evaluate(run, loader, compute_loss, accuracy)
            results.append((metrics["eval_loss"], metrics["eval_accuracy"], metrics["eval_n"], predict(run, loader).predictions.numpy()))
    return results


@pytest.mark.parametrize("world_size, batch_size", [(1, 1), (1, 3), (1, 8), (2, 1), (2, 3), (2, 8), (3, 2)])
def test_loss_metrics_and_predictions_do_not_depend_on_batch_and_world_size(ranks, tmp_path, world_size, batch_size):
    model = gpt(dtype=torch.float64)
    for results in ranks.run(world_size, evaluated, tmp_path, batch_size):
        for n, (loss, acc, count, predictions) in zip(SIZES, results):
            samples = sequences(n)
            assert loss == pytest.approx(exact_loss(model, samples), abs=1e-12)
            logits = model(torch.stack([s["input_ids"] for s in samples]))
            np.testing.assert_allclose(predictions, logits.detach().numpy(), rtol=0, atol=1e-12)   # in data order, none twice
            assert count == n
            assert acc == pytest.approx(accuracy(logits, torch.stack([s["labels"] for s in samples]))["accuracy"].item())


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
