"""A mixture of experts is the loop over tokens that it replaces, drops none, and is the same training wherever its experts are."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loss import compute_loss, cross_entropy
from parallel.experts import ExpertGPT, Experts, balance
from tests.toy import LENGTH, VOCAB, arguments, rows, run_training, sequences
from tools.flops import main as count_flops
from world import set_seed

E = 4


def layer(k: int, dtype: torch.dtype = torch.float64) -> Experts:
    set_seed(0)
    made = Experts(6, E, k).to(dtype)
    nn.init.normal_(made.down, std=0.3)
    return made


def expert_gpt(k: int = 2, weight: float = 0.1) -> ExpertGPT:
    set_seed(0)
    model = ExpertGPT(VOCAB, LENGTH, 2, 2, 16, n_experts=E, experts_per_token=k, balance_loss_weight=weight)
    for block in model.blocks:
        nn.init.normal_(block.attn.out.weight, std=0.2)
        nn.init.normal_(block.experts.down, std=0.2)
    return model.double()


def by_hand(made: Experts, x):
    """Token by token, expert by expert."""
    out = []
    for token in x.flatten(0, -2):
        p = F.softmax(made.router @ token, dim=0)
        best = sorted(range(E), key=lambda e: -p[e])[:made.k]
        total = sum(p[e] for e in best) if made.k > 1 else 1
        out.append(sum(p[e] / total * (made.down[e] @ F.relu(made.up[e] @ token).square()) for e in best))
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("k", [1, 2, E])
def test_the_layer_and_its_gradients_are_those_of_a_loop_over_tokens_and_experts(k):
    made, x = layer(k), torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    wanted = [x, *made.parameters()]
    got, expected = made(x), by_hand(made, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (got, expected))):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_no_token_is_dropped_when_all_go_to_one_expert():
    made = layer(1)
    with torch.no_grad():
        made.router[:] = torch.tensor([0.0, 50.0, 0.0, 0.0], dtype=torch.float64)[:, None]
    x = torch.rand(7, 3, 6, dtype=torch.float64) + 0.1
    only = F.linear(F.relu(F.linear(x, made.up[1])).square(), made.down[1])
    torch.testing.assert_close(made(x), only, rtol=0, atol=1e-12)


def test_the_balance_loss_is_1_where_experts_are_equally_busy_and_the_number_of_experts_where_one_does_all():
    even = torch.full((8, E), 1 / E)
    assert balance(even, torch.full((E,), 4))[0].item() == 1
    one = F.one_hot(torch.ones(8, dtype=torch.long), E).double()
    loss, shares = balance(one, torch.tensor([0, 8, 0, 0]))
    assert loss.item() == E and shares.tolist() == [0, 1, 0, 0]


def batch_of(n: int):
    made = sequences(n)
    return {key: torch.stack([sample[key] for sample in made]) for key in made[0]}


def test_the_loss_of_training_has_the_weighted_balance_loss_of_each_layer_for_every_label_item_and_evaluation_has_none():
    batch, plain = batch_of(4), expert_gpt(weight=0.0)
    model, items = expert_gpt(weight=0.1), int((batch["labels"] != -100).sum())
    entropy = cross_entropy(model(batch["input_ids"]), batch["labels"])
    torch.testing.assert_close(compute_loss(plain, batch), entropy, rtol=0, atol=1e-11)
    extra = compute_loss(model, batch) - entropy
    torch.testing.assert_close(extra, 0.1 * items * model.seen[0].sum(), rtol=0, atol=1e-11)
    assert (model.seen[0] > 0.9).all() and extra > 0.18 * items
    torch.testing.assert_close(compute_loss(model.eval(), batch), entropy, rtol=0, atol=1e-11)


def routing_after(output_dir, weight: float) -> dict:
    model = expert_gpt(k=1, weight=weight)
    with torch.no_grad():
        for block in model.blocks:      # as if the first expert had won
            block.experts.router[0] += 3 * block.experts.router[0].sign()
    run_training(arguments(output_dir, max_steps=60, learning_rate=3e-2, per_device_train_batch_size=8, logging_steps=60), model=model, train_set=sequences(16))
    return next(row for row in rows(output_dir) if "busiest_expert" in row)


def test_training_with_the_balance_loss_balances(tmp_path):
    balanced, left = routing_after(tmp_path / "a", 0.5), routing_after(tmp_path / "b", 0.0)
    assert balanced["balance_loss"] < 1.1 < left["balance_loss"]
    assert balanced["busiest_expert"] < 0.4 < left["busiest_expert"]


def test_operations_are_those_of_the_experts_that_a_token_meets(capsys):
    flags = ["--n_layer", "2", "--n_embd", "64", "--block_size", "32", "--per_device_train_batch_size", "2"]
    layer = 4 * 64**2 + E * 64 + 2 * 8 * 64**2      # attention, router, two experts
    attention = 2 * 2 * 32 * 64 * 6
    assert count_flops([*flags, "--n_experts", str(E)]) == 3 * 2 * (2 * layer + 256 * 64) + attention
    assert f"of which a token meets:     {2 * layer + 2 * 256 * 64 + 5 * 64:,}" in capsys.readouterr().out      # embeddings and norms too
