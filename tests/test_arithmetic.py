"""Steps, epochs and the numbers in the log: the HF Trainer's arithmetic, from its own runs."""

import pytest
import torch

from collators import default_collator
from state import UsageError
from tests.toy import Numbers, arguments, rows, run_training, sequences


def linear_loss(model, batch):
    """Gradient 1 per sample with respect to the weight."""
    return (model.weight * torch.ones(len(batch["x"]), 1)).sum()


def count(tmp_path, n=10, **changes):
    """(updates, epoch of the last log row) of a run over n samples in micro-batches of 2."""
    model = torch.nn.Linear(1, 1, bias=False)
    run = run_training(arguments(tmp_path, **changes), linear_loss, model=model, train_set=Numbers(n))
    return run.state.global_step, rows(tmp_path)[-1]["epoch"]


@pytest.mark.parametrize("epochs, accumulation, steps, epoch", [(0.5, 1, 3, 0.6), (1.5, 1, 8, 1.6), (2.3, 1, 12, 2.4), (1, 2, 3, 1.0),
                                                                 (2, 2, 6, 2.0), (3, 8, 3, 3.0)])
def test_epochs_become_updates(tmp_path, epochs, accumulation, steps, epoch):
    got = count(tmp_path, num_train_epochs=epochs, gradient_accumulation_steps=accumulation)
    assert got == (steps, pytest.approx(epoch))


@pytest.mark.parametrize("max_steps, epoch", [(3, 1.0), (5, 1.8), (7, 2.4)])
def test_max_steps_overrides_epochs(tmp_path, max_steps, epoch):
    assert count(tmp_path, max_steps=max_steps, gradient_accumulation_steps=2, num_train_epochs=1) == (max_steps, pytest.approx(epoch))


def test_the_last_incomplete_window_is_stepped_and_scaled_by_its_own_size(tmp_path):
    """dL/dw is 1 for every sample, so each update has gradient 1, also the one made of a single micro-batch."""
    model = torch.nn.Linear(1, 1, bias=False)
    run_training(arguments(tmp_path, num_train_epochs=2, per_device_train_batch_size=1, gradient_accumulation_steps=2), linear_loss,
                 model=model, train_set=Numbers(5))
    assert [row["grad_norm"] for row in rows(tmp_path) if "loss" in row] == pytest.approx([1.0] * 6)


class Stream:
    def __iter__(self):
        return iter({"x": torch.tensor([float(i)])} for i in range(5))


def test_a_stream_needs_max_steps_and_samples(tmp_path):
    with pytest.raises(UsageError, match="--max_steps is needed for a stream"):
        run_training(arguments(tmp_path), linear_loss, model=torch.nn.Linear(1, 1), train_set=Stream())
    with pytest.raises(UsageError, match="its first pass gave no sample"):
        run_training(arguments(tmp_path, max_steps=3), linear_loss, model=torch.nn.Linear(1, 1), train_set=filter(None, []))


def test_a_stream_that_cannot_be_read_again_ends_the_training(tmp_path, capsys):
    once = iter([{"x": torch.tensor([float(i)])} for i in range(4)])
    run = run_training(arguments(tmp_path, max_steps=9), linear_loss, model=torch.nn.Linear(1, 1, bias=False), train_set=once)
    assert run.state.global_step == 2 and "gave nothing in another pass" in capsys.readouterr().err


def test_the_tail_of_a_finite_stream_is_a_window_of_its_own(tmp_path):
    """No gradient leaks into the next pass: 1, 1, 1, 1, 1 and not 1, 1, 2, 1, 2."""
    model = torch.nn.Linear(1, 1, bias=False)
    run = run_training(arguments(tmp_path, max_steps=5, per_device_train_batch_size=1, gradient_accumulation_steps=2), linear_loss,
                       model=model, train_set=Stream())
    assert [row["grad_norm"] for row in rows(tmp_path) if "loss" in row] == pytest.approx([1.0] * 5)
    assert run.state.total_samples == 5 + 4


def test_logged_losses_average_to_train_loss_and_the_tail_counts(tmp_path):
    run_training(arguments(tmp_path / "each", max_steps=11), train_set=sequences(9))
    losses = [row["loss"] for row in rows(tmp_path / "each") if "loss" in row]
    run_training(arguments(tmp_path / "some", max_steps=11, logging_steps=4), train_set=sequences(9))
    logged = rows(tmp_path / "some")
    assert [row["step"] for row in logged if "loss" in row] == [4, 8]       # nothing is logged for the tail
    assert [row["loss"] for row in logged if "loss" in row] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:8]) / 4])
    assert logged[-1]["train_loss"] == pytest.approx(sum(losses) / 11)


def test_log_rows_have_the_promised_keys_and_the_learning_rate_that_was_used(tmp_path):
    run = run_training(arguments(tmp_path, max_steps=6, logging_steps=2, learning_rate=5e-5))
    *logged, last = rows(tmp_path)
    assert all({"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= row.keys() for row in logged)
    assert [row["learning_rate"] for row in logged] == pytest.approx([4.1666666e-5, 2.5e-5, 8.333333e-6])
    assert last.keys() == {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss", "epoch", "step"}
    outside = sum(p.numel() for name, p in run.model.named_parameters() if name != "embed.weight")
    assert last["total_flos"] == 6 * outside * 6 * 2 * 8      # 6 N D with D = 6 updates x 2 samples x 8 tokens


def test_a_warm_up_starts_at_zero_and_ratios_round_up(tmp_path):
    run_training(arguments(tmp_path, max_steps=10, warmup_steps=0.2, learning_rate=10.0))
    rates = [row["learning_rate"] for row in rows(tmp_path) if "loss" in row]
    assert rates == pytest.approx([0, 5, 10, 8.75, 7.5, 6.25, 5, 3.75, 2.5, 1.25])


def test_intervals_below_one_are_ratios_of_all_updates(tmp_path):
    run_training(arguments(tmp_path, max_steps=10, logging_steps=0.25, logging_first_step=True))
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 3, 6, 9]


def logged_losses_on_ranks(output_dir, batch_size):
    run_training(arguments(output_dir, max_steps=7, logging_steps=2, per_device_train_batch_size=batch_size, learning_rate=1e-3,
                           resume_from_checkpoint="auto"), train_set=sequences(9))
    return [(row["step"], row["loss"], row["epoch"]) for row in rows(output_dir) if "loss" in row]


def test_logged_losses_cover_all_ranks_exactly(ranks, tmp_path):
    expected = logged_losses_on_ranks(tmp_path / "one", 4)
    for got in ranks.run(2, logged_losses_on_ranks, tmp_path / "two", 2):
        assert [row[0] for row in got] == [row[0] for row in expected]
        assert [x for row in got for x in row] == pytest.approx([x for row in expected for x in row], abs=1e-6)


def test_collators_count_what_the_loss_sums_over():
    tokens = default_collator(sequences(4))
    assert tokens["num_items"] == int((tokens["labels"] != -100).sum())
    classes = default_collator([{"x": torch.zeros(2), "labels": label} for label in (1, 0, -100)])
    assert classes["num_items"] == 2
    assert default_collator([{"x": torch.zeros(2), "labels": 0.5}] * 3)["num_items"] == 3
    assert default_collator([{"x": torch.zeros(2)}] * 3)["num_items"] == 3
