"""Operations are counted as by hand."""
import pytest
import torch

from loss import compute_loss
from tests.toy import LENGTH, VOCAB, arguments, gpt, rows, run_training, sequences
from tools.flops import count_flops, main


def by_hand(layers: int, C: int, T: int, V: int) -> float:
    """Per token: forward 2 operations for each weight of a matrix, backward twice that; attention 2 products of T x C forward, 4 backward."""
    return 3 * 2 * (layers * 12 * C * C + V * C) + layers * 2 * T * C * (2 + 4)


@pytest.mark.parametrize(("layers", "width", "block"), [(4, 128, 128), (2, 64, 32), (1, 32, 256)])
def test_the_count_of_the_built_in_model_is_that_of_a_hand(layers, width, block, capsys):
    flops = main(["--n_layer", str(layers), "--n_embd", str(width), "--block_size", str(block), "--per_device_train_batch_size", "2"])
    assert flops == by_hand(layers, width, block, 256)
    assert "n/a" in capsys.readouterr().out


def test_counting_leaves_nothing_behind():
    model, samples = gpt(dropout=0.5), sequences(3)
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert count_flops(model, compute_loss, {**batch, "num_items": 1, "num_samples": 3}) == 3 * LENGTH * by_hand(2, 16, LENGTH, VOCAB)
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())


def test_frozen_weights_have_no_gradient_to_count():
    flags = ["--n_layer", "1", "--n_embd", "32", "--block_size", "16", "--per_device_train_batch_size", "2"]
    assert main([*flags, "--lora_rank", "2"]) < main(flags)


@pytest.mark.parametrize(("ranks_wanted", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "zero2"), (2, "fsdp")])
def test_logs_tell_the_share_of_a_stated_peak(ranks_wanted, strategy, ranks, tmp_path):
    found = ranks.run(ranks_wanted, used, tmp_path, strategy)
    assert found == [by_hand(2, 16, LENGTH, VOCAB)] * ranks_wanted
    for row in [row for row in rows(tmp_path) if "loss" in row]:
        assert row["mfu"] == pytest.approx(found[0] * row["tokens_per_second"] / (1e9 * ranks_wanted))


def used(output_dir, strategy):
    args = arguments(output_dir, strategy=strategy, optim="muon", max_steps=4, gradient_accumulation_steps=2, logging_steps=2, peak_flops=1e9)
    return run_training(args, model=gpt(), train_set=sequences(11)).state.flops_per_token


def test_what_is_computed_again_is_not_taken_for_the_models_use(tmp_path):
    args = arguments(tmp_path, max_steps=2, peak_flops=1e9, activation_checkpointing=True)
    done = run_training(args, model=gpt())
    assert done.state.flops_per_token > by_hand(2, 16, LENGTH, VOCAB) and all("hfu" in row and "mfu" not in row for row in rows(tmp_path) if "loss" in row)


def test_where_no_tokens_are_counted_the_share_is_not_guessed(tmp_path):
    points = [{"x": torch.randn(3), "labels": torch.randn(())} for _ in range(4)]
    args = arguments(tmp_path, max_steps=1, peak_flops=1e9)
    run_training(args, lambda model, batch: (model(batch["x"])[:, 0] - batch["labels"]).square().sum(), model=torch.nn.Linear(3, 1), train_set=points)
    assert rows(tmp_path)[0]["mfu"] is None


def test_a_model_that_is_compiled_still_is_when_it_was_counted(tmp_path):
    counters = torch._dynamo.utils.counters
    counters.clear()
    args = arguments(tmp_path, max_steps=3, peak_flops=1e9, torch_compile=True, torch_compile_backend="eager")
    assert run_training(args, model=gpt()).state.flops_per_token == by_hand(2, 16, LENGTH, VOCAB) and counters["frames"]["ok"] > 0
