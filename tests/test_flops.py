"""Operations are counted as by hand."""
import pytest
import torch

from loss import compute_loss
from tests.toy import LENGTH, VOCAB, arguments, gpt, run_training, sequences
from tools.flops import count_flops, main


def by_hand(layers: int, C: int, T: int, V: int, backward: int = 5) -> float:
    """Per token: forward 2 operations for each weight of a matrix, backward twice that; attention 2 products of T x C forward, 5 backward."""
    return 3 * 2 * (layers * 12 * C * C + V * C) + layers * 2 * T * C * (2 + backward)


@pytest.mark.parametrize(("layers", "width", "block"), [(4, 128, 128), (2, 64, 32), (1, 32, 256)])
def test_the_count_of_the_built_in_model_is_that_of_a_hand(layers, width, block, capsys):
    flops = main(["--n_layer", str(layers), "--n_embd", str(width), "--block_size", str(block), "--per_device_train_batch_size", "2"])
    assert flops == by_hand(layers, width, block, 256)
    assert "n/a: give --run and --peak" in capsys.readouterr().out


def test_counting_leaves_nothing_behind():
    model, samples = gpt(dropout=0.5), sequences(3)
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert count_flops(model, compute_loss, {**batch, "num_items": 1, "num_samples": 3}) == 3 * LENGTH * by_hand(2, 16, LENGTH, VOCAB, backward=4)      # with dropout it keeps its weights
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())


def test_use_of_a_stated_peak_is_speed_times_operations(tmp_path, capsys):
    flags = ["--n_layer", "1", "--n_embd", "32", "--block_size", "16", "--per_device_train_batch_size", "2"]
    args = arguments(tmp_path, n_layer=1, n_embd=32, block_size=16, max_steps=4, save_strategy="steps", save_steps=4)
    speed = run_training(args, model=gpt(), train_set=sequences(8)).state.log_history[-2]["tokens_per_second"]
    flops = main(flags)
    capsys.readouterr()
    assert main(["--run", str(tmp_path), "--peak", "1e9"]) == flops
    assert f"{flops * speed / 1e9:.1%}" in capsys.readouterr().out
