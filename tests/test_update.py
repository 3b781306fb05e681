"""One update is the same however its samples are spread over micro-batches and ranks."""
import numpy as np
import pytest
import torch

from loader import Request
from loop import train_step
from loss import compute_loss
from tests.toy import arguments, gpt, rows, run_training, sequences, toy_run, weights

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def one_update(output_dir, batch_size: int, accumulation: int, dtype: torch.dtype, lr: float = 0.1):
    """Loss, gradient norm and weights after one SGD update on the same 8 sequences."""
    args = arguments(output_dir, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
                     max_steps=1, optim="sgd", learning_rate=lr, max_grad_norm=0.0, lr_scheduler_type="constant")
    run = run_training(args, model=gpt(dtype=dtype))
    return weights(run), run.state.total_loss, run.state.grad_norm


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_batch_and_accumulation_do_not_change_the_update(tmp_path, dtype):
    results = [one_update(tmp_path / f"{b}", b, 8 // b, dtype) for b in (8, 4, 2, 1)]
    for got in results[1:]:
        compare(got, results[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_do_not_change_the_update(ranks, tmp_path, world_size, dtype):
    expected = one_update(tmp_path / "one", 8, 1, dtype)
    for batch_size in (1, 2):     # on 3 ranks the tail is uneven, and one rank may have nothing left
        accumulation = -(-8 // (world_size * batch_size))
        for got in ranks.run(world_size, one_update, tmp_path / f"{batch_size}", batch_size, accumulation, dtype):
            compare(got, expected, TOLERANCE[dtype])


def compare(got, expected, tolerance):
    for name, value in expected[0].items():
        np.testing.assert_allclose(got[0][name], value, rtol=0, atol=tolerance, err_msg=name)
    assert got[1] == pytest.approx(expected[1], abs=tolerance)
    assert got[2] == pytest.approx(expected[2], abs=tolerance)


def test_the_gradient_is_that_of_the_mean_over_label_items(tmp_path):
    """Against autograd on the whole batch, written out."""
    samples = sequences(8)
    model = gpt(dtype=torch.float64)
    logits = model(torch.stack([s["input_ids"] for s in samples]))
    labels = torch.stack([s["labels"] for s in samples])
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    mean.backward()
    got, loss, _ = one_update(tmp_path, 2, 4, torch.float64, lr=1.0)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(got[name], (p - p.grad).detach().numpy(), rtol=0, atol=1e-12, err_msg=name)
    assert loss == pytest.approx(mean.item(), abs=1e-12)


def test_clipping_scales_the_gradient_to_the_norm_and_reports_the_norm_before(tmp_path):
    free, clipped = {}, {}
    for out, max_norm in ((free, 0.0), (clipped, 0.01)):
        args = arguments(tmp_path / str(max_norm), optim="sgd", max_steps=1, max_grad_norm=max_norm, per_device_train_batch_size=8,
                         lr_scheduler_type="constant")
        before = {n: p.detach().numpy().copy() for n, p in gpt(dtype=torch.float64).named_parameters()}
        run = run_training(args, model=gpt(dtype=torch.float64))
        out["norm"] = run.state.grad_norm
        out["step"] = np.sqrt(sum(((weights(run)[n] - w) ** 2).sum() for n, w in before.items()))
    assert free["norm"] == pytest.approx(clipped["norm"], abs=1e-12)
    assert free["step"] == pytest.approx(1e-2 * free["norm"], rel=1e-9)
    assert clipped["step"] == pytest.approx(1e-2 * 0.01, rel=1e-3)


def no_labels(n: int) -> list[dict]:
    return [{**s, "labels": torch.full_like(s["labels"], -100)} for s in sequences(n)]


def test_a_window_without_labels_does_not_step_and_is_counted(tmp_path):
    """Momentum and weight decay would move the weights if the optimizer were stepped with zero gradients."""
    args = arguments(tmp_path, max_steps=2, weight_decay=0.5)
    with toy_run(args, train_set=sequences(2) + no_labels(2)) as (run, loader, _):
        empty = loader.reader[Request(None, [2, 3], 2, 0)]
        train_step(run, [loader.reader[Request(None, [0, 1], 2, 0)]], compute_loss)
        before, schedule_step = weights(run), run.state.global_step - run.state.skipped_steps
        assert train_step(run, [empty], compute_loss) is None
        assert all((weights(run)[n] == w).all() for n, w in before.items())
        assert (run.state.global_step, run.state.skipped_steps, run.state.empty_steps) == (2, 1, 1)
        assert run.state.global_step - run.state.skipped_steps == schedule_step


def test_empty_windows_are_counted_in_the_log_and_have_no_loss(tmp_path):
    run = run_training(arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=1), train_set=sequences(2) + no_labels(1))
    logged = [row for row in rows(tmp_path) if "loss" in row]
    assert sorted(row.get("empty_steps", 0) for row in logged) == [0, 0, 1]
    assert [row["loss"] is None for row in logged] == ["empty_steps" in row for row in logged]
    assert run.state.total_loss == pytest.approx(sum(row["loss"] or 0 for row in logged))
    assert rows(tmp_path)[-1]["train_loss"] == pytest.approx(run.state.total_loss / 2)


def update_on_3_and_5_labels(output_dir, batch_size: int):
    samples = sequences(2)
    for sample, items in zip(samples, (3, 5)):
        sample["labels"] = torch.where(torch.arange(8) < items, sample["labels"].clamp(min=1), -100)
    args = arguments(output_dir, per_device_train_batch_size=batch_size, optim="sgd", max_steps=1, lr_scheduler_type="constant")
    return weights(run_training(args, model=gpt(dtype=torch.float64), train_set=samples))


def test_every_label_weighs_the_same_on_whatever_rank_it_is(ranks, tmp_path):
    one = update_on_3_and_5_labels(tmp_path / "one", 2)
    for got in ranks.run(2, update_on_3_and_5_labels, tmp_path / "two", 1):
        for name, value in one.items():
            np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-12)


def test_a_loss_of_ones_own_sums_over_its_items(tmp_path):
    """A plain module, w * x with squared error, against the closed form; micro-batches of 4 and 2 make one update."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    samples = [{"x": torch.tensor([float(i)]), "y": torch.tensor([2.0 * i])} for i in range(6)]

    def squared_error(model, batch):
        return ((model(batch["x"]) - batch["y"]) ** 2).sum()
    args = arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1, optim="sgd",
                     learning_rate=0.1, max_grad_norm=0.0, lr_scheduler_type="constant")
    run = run_training(args, squared_error, model=model, train_set=samples)
    x2 = sum(i * i for i in range(6)) / 6
    assert run.state.total_loss == pytest.approx(4 * x2)
    assert run.model.weight.item() == pytest.approx(0.1 * 2 * 2 * x2)
