"""A mixture of experts is the loop over tokens that it replaces, drops none, and is the same training wherever its experts are."""
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from args import parse_args
from callbacks import Callback
from distributed import build_on, parallelize, whole
from loss import compute_loss, cross_entropy
from model import build_model
from parallel.experts import ExpertGPT, Experts, balance
from state import UsageError
from tests.test_strategies import close, on_ranks, refused
from tests.toy import LENGTH, VOCAB, arguments, rows, run_training, sequences, timeless, train_and, weights
from tools.flops import main as count_flops
from world import open_world, set_seed

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
    entropy = cross_entropy(model.eval()(batch["input_ids"]), batch["labels"])
    model.train()
    torch.testing.assert_close(compute_loss(plain, batch), entropy, rtol=0, atol=1e-11)
    extra = compute_loss(model, batch) - entropy
    torch.testing.assert_close(extra, 0.1 * items * model.seen[0].sum(), rtol=0, atol=1e-11)
    assert (model.seen[0] > 0.9).all() and extra > 0.18 * items
    with pytest.raises(UsageError, match="give it labels, or --balance_loss_weight 0"):
        model(batch["input_ids"])
    assert plain(batch["input_ids"]).shape == (4, LENGTH, VOCAB)
    torch.testing.assert_close(compute_loss(model.eval(), batch), entropy, rtol=0, atol=1e-11)


def routing_after(output_dir, weight: float) -> dict:
    model = expert_gpt(k=1, weight=weight)
    with torch.no_grad():
        for block in model.blocks:      # as if the first expert had won
            block.experts.router[0] += 3 * block.experts.router[0].sign()
    args = arguments(output_dir, max_steps=40, learning_rate=3e-2, per_device_train_batch_size=8, logging_steps=40)
    run_training(args, model=model, train_set=sequences(16))
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


def settings(output_dir, world_size: int, **changes):
    """8 micro-batches of 2 samples in a window, over all ranks."""
    return arguments(output_dir, **{"gradient_accumulation_steps": 8 // world_size, "max_steps": 10, "max_grad_norm": 0.5, "weight_decay": 0.1,
                                    "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 5, **changes})


def finish(output_dir, world_size: int, callbacks=(), dropout: float = 0.0, **changes):
    """Weights, and the losses of training and evaluation. The second window of a pass, and an evaluation, end with a round that leaves
    ranks without samples."""
    args, model = settings(output_dir, world_size, **changes), expert_gpt()
    for block in model.blocks:
        block.dropout.p = dropout
    result = train_and(args, weights, model=model, train_set=sequences(29), eval_set=sequences(5, seed=1), callbacks=callbacks)
    return result, [row[key] for row in rows(output_dir) for key in ("loss", "eval_loss", "grad_norm") if row.get(key) is not None]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize("world_size, changes", [(2, {"ep": 2, "activation_checkpointing": True}), (4, {"ep": 2, "check_replicas": 1}),
                                                 (2, {"strategy": "zero2"}), (2, {"strategy": "fsdp"})])
def test_wherever_experts_are_the_training_is_that_of_one_process(ranks, one, tmp_path, world_size, changes):
    for got in on_ranks(ranks, finish, tmp_path, world_size=world_size, **changes):
        close(got, one)


def test_a_checkpoint_of_any_ep_goes_on_on_any_other(ranks, one, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 20, "eval_steps": 10}
    on_ranks(ranks, finish, tmp_path, world_size=2, ep=2, max_steps=3, **save)
    with safe_open(tmp_path / "checkpoint-3" / "optimizer-1.safetensors", "np") as file:
        assert {*file.keys()} == {f"blocks.{i}.experts.{name}.{state}" for i in range(2) for name in ("up", "down")
                                  for state in ("step", f"exp_avg[{8 * 16 * 16}:{16 * 16 * 16}]", f"exp_avg_sq[{8 * 16 * 16}:{16 * 16 * 16}]")}
    finish(tmp_path, 1, max_steps=6, resume_from_checkpoint="True", **save)
    got, losses = on_ranks(ranks, finish, tmp_path, world_size=2, ep=2, resume_from_checkpoint="True", **save)[1]
    close((got, losses), (one[0], losses))


def test_a_resumed_run_is_the_one_that_was_never_stopped_to_the_bit(ranks, tmp_path):
    changes = {"world_size": 2, "ep": 2, "dropout": 0.1, "ema_decay": 0.9, "save_strategy": "steps", "save_steps": 3, "eval_steps": 3}
    straight = on_ranks(ranks, finish, tmp_path / "a", max_steps=4, **changes)
    on_ranks(ranks, finish, tmp_path / "b", max_steps=3, **changes)
    resumed = on_ranks(ranks, finish, tmp_path / "b", max_steps=4, resume_from_checkpoint="True", **changes)
    for got in resumed:
        close(got, straight[0], 0, 0)
    ours, theirs = ([timeless(row) for row in rows(tmp_path / name) if "loss" in row] for name in "ab")
    assert ours == theirs and "balance_loss" in ours[-1]
    for name in ("model.safetensors", "optimizer-0.safetensors", "optimizer-1.safetensors", "ema-0.safetensors", "ema-1.safetensors"):
        assert (tmp_path / "a" / "checkpoint-4" / name).read_bytes() == (tmp_path / "b" / "checkpoint-4" / name).read_bytes()


def fresh_weights(world_size: int, ep: int = 1):
    args = parse_args(f"--n_experts 4 --n_layer 2 --n_head 2 --n_embd 16 --ep {ep}".split())
    with open_world(args) as world:
        set_seed(3)
        model = build_on(world, lambda: build_model(args), build_model.meta_init)
        assert world_size == 1 or model.blocks[0].experts.up.is_meta
        parallelize(model, args, world)
        held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
        return {name: whole(p).numpy() for name, p in model.named_parameters()}, held


def test_ranks_build_only_their_own_experts_with_the_weights_that_one_process_gives_them(ranks):
    expected, held = fresh_weights(1)
    for got, part in on_ranks(ranks, fresh_weights, world_size=2, ep=2):
        assert all((got[name] == value).all() for name, value in expected.items())
        assert held - part == sum(value.size for name, value in expected.items() if name.endswith(("up", "down"))) // 2


class Meddle(Callback):
    """Changes a weight that all ranks hold, on one of them."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if os.environ["RANK"] == "1" and state.global_step == 1:
            model.norm.weight.detach()[0] += 1e-9


@pytest.mark.parametrize("world_size, changes, said", [
    (2, {"callbacks": [Meddle()], "check_replicas": 1}, "update 2: rank 1 holds other weights"),
    (2, {"optim": "adafactor"}, "Adafactor looks at 4 weights of experts as a whole"),
    (3, {}, "--ep 2 shares experts out among 2 ranks, and there are 3"), (1, {}, "this is one process"),
    (2, {"strategy": "fsdp"}, "--ep 2 and --strategy do not go together: it would split experts once more, unless it is ddp"),
    (3, {"ep": 3}, "the model has 4: give a multiple")])
def test_what_experts_cannot_be_shared_out_under_is_refused_by_name(ranks, tmp_path, world_size, changes, said):
    for message in on_ranks(ranks, refused, tmp_path, world_size=world_size, finish=finish, **{"ep": 2, **changes}):
        assert said in message
