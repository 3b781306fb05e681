"""Context and tensor parallelism are the same training: the weights and losses of one process."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import parallel.tensor
from callbacks import Callback
from distributed import build_on, local_part, parallelize, whole
from loop import train
from loss import compute_loss, head_cross_entropy
from model import GPT
from state import UsageError
from tests.test_strategies import call, close, held_state, join
from tests.toy import VOCAB, arguments, rows, toy_run, weights
from world import open_world, set_seed

SAMPLES = 17        # in windows of 8: the last one of a pass has a single one, so that some data ranks have only filler
LENGTH = 10         # of a sequence; 4 does not divide it


def heads4(dtype: torch.dtype = torch.float64, **changes) -> GPT:
    set_seed(0)
    model = GPT(VOCAB, LENGTH, **{"n_layer": 2, "n_head": 4, "n_embd": 24, **changes})
    for block in model.blocks:
        nn.init.normal_(block.attn.out.weight, std=0.2)
        nn.init.normal_(block.down.weight, std=0.2)
    return model.to(dtype)


def texts(n: int, seed: int = 0, packed: bool = False) -> list[dict]:
    """n sequences of LENGTH tokens with unequal numbers of labels; packed: of two documents each."""
    generator, samples = torch.Generator().manual_seed(seed), []
    for i in range(n):
        ids = torch.randint(VOCAB, (LENGTH + 1,), generator=generator)
        labels = ids[1:].clone()
        labels[2 + (5 * i + seed) % (LENGTH - 1):] = -100
        first = 1 + (3 * i) % (LENGTH - 1)
        positions = {"position_ids": torch.cat([torch.arange(first), torch.arange(LENGTH - first)])} if packed else {}
        samples.append({"input_ids": ids[:-1], "labels": labels, **positions})
    return samples


def data_ranks(world_size: int, changes: dict) -> int:
    return world_size // math.prod(changes.get(name, 1) for name in ("pp", "cp", "tp"))


def settings(output_dir, data_ranks: int, **changes):
    return arguments(output_dir, **{"per_device_train_batch_size": 4 // data_ranks, "gradient_accumulation_steps": 2, "max_steps": 10, "max_grad_norm": 0.5,
                                    "weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 5, **changes})


def finish(output_dir, world_size: int, dtype: torch.dtype = torch.float64, packed: bool = False, **changes):
    """Weights at the end, all losses of training and evaluation, and what was counted."""
    args = settings(output_dir, data_ranks(world_size, changes), **changes)
    data = {"train_set": texts(SAMPLES, packed=packed), "eval_set": texts(5, seed=1, packed=packed)}
    with toy_run(args, model=heads4(dtype), **data) as (run, train_loader, eval_loader):
        train(run, train_loader, eval_loader, compute_loss)
        state = run.state
        logged = [row[key] for row in rows(output_dir) for key in ("loss", "grad_norm", "eval_loss") if key in row]
        return weights(run), [*logged, state.total_samples, state.num_input_tokens_seen, state.samples_per_update]


def on_ranks(ranks, function, *positional, world_size: int, **keywords):
    return ranks.run(world_size, call, function, (*positional, world_size), keywords)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    known = {packed: finish(tmp_path_factory.mktemp("one"), 1, packed=packed) for packed in (False, True)}
    return lambda packed=False: known[packed]


CP = [(2, {"cp": 2}), (4, {"cp": 4, "packed": True}), (4, {"cp": 2}), (4, {"cp": 2, "packed": True, "strategy": "hsdp", "hsdp_shard_size": 2}),
      (2, {"cp": 2, "strategy": "zero2"}), (2, {"cp": 2, "strategy": "fsdp", "activation_checkpointing": True})]

TP = [(2, {"tp": 2}), (2, {"tp": 2, "strategy": "fsdp", "packed": True}), (4, {"tp": 2}), (4, {"tp": 2, "strategy": "fsdp"}),
      (4, {"tp": 2, "cp": 2, "packed": True})]


@pytest.mark.parametrize("world_size, changes", TP)
def test_layers_that_ranks_share_are_trained_as_by_one_process(ranks, one, tmp_path, world_size, changes):
    for got in on_ranks(ranks, finish, tmp_path, world_size=world_size, **changes):
        close(got, one(changes.get("packed", False)))


@pytest.mark.parametrize("world_size, changes", CP)
def test_sequences_that_ranks_share_are_trained_as_by_one_process(ranks, one, tmp_path, world_size, changes):
    for got in on_ranks(ranks, finish, tmp_path, world_size=world_size, **changes):
        close(got, one(changes.get("packed", False)))


def from_meta(output_dir, world_size: int, **changes):
    """Initial weights, and the bytes that this rank holds of them."""
    args = settings(output_dir, 1, **changes)
    with open_world(args) as world:
        set_seed(3)
        model = build_on(world, partial(GPT, VOCAB, LENGTH, 2, 4, 24), True)
        on_meta = all(p.is_meta for p in model.parameters())
        parallelize(model, args, world)
        return {name: whole(p).numpy() for name, p in model.named_parameters()}, sum(local_part(p)[0].nbytes for p in model.parameters()), on_meta


@pytest.mark.parametrize("world_size, changes", [(2, {"tp": 2}), (4, {"tp": 2, "strategy": "fsdp"}), (2, {"pp": 2}), (4, {"pp": 2, "tp": 2})])
def test_a_model_that_is_cut_starts_with_the_weights_of_one_process_and_no_rank_holds_it_whole(ranks, tmp_path, world_size, changes):
    set_seed(3)
    expected = dict(GPT(VOCAB, LENGTH, 2, 4, 24).named_parameters())
    results = on_ranks(ranks, from_meta, tmp_path, world_size=world_size, **changes)
    assert {name for got, *_ in results for name in got} == expected.keys()
    for got, held, on_meta in results:
        assert on_meta and held < 1.1 * sum(p.nbytes for p in expected.values()) / world_size
        assert all((value == expected[name].detach().numpy()).all() for name, value in got.items())


def hidden_head_labels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64), torch.randn(VOCAB, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (3, 4), generator=generator)
    labels[0, 1:3] = -100
    return hidden, head, labels


def split_loss(world_size: int, size: int):
    """The loss and its gradients from a head that ranks share, with at most `size` logits at a time, as whole tensors."""
    kept, parallel.tensor.CHUNK_ELEMENTS = parallel.tensor.CHUNK_ELEMENTS, size
    try:
        with open_world(arguments("unused", tp=world_size)) as world:
            mesh, (hidden, head, labels) = world.device_mesh["tp"], hidden_head_labels()
            tokens = hidden.chunk(world_size, dim=1)[world.rank].clone().requires_grad_()
            weight = nn.Parameter(distribute_tensor(head, mesh, [Shard(0)], src_data_rank=None))
            loss = parallel.tensor.split_head_loss(tokens, weight, labels, 0.1, mesh, VOCAB)
            (loss * world_size).backward()
            return float(world.add(loss.detach())), torch.cat([*world.gather(tokens.grad)], dim=1).numpy(), whole(weight.grad).numpy()
    finally:
        parallel.tensor.CHUNK_ELEMENTS = kept


@pytest.mark.parametrize("size", [2**23, 30, 32])
def test_the_loss_of_a_vocabulary_that_ranks_share_is_that_of_a_whole_one(ranks, size):
    """17 words on 2 ranks, smoothed labels; 30: three tokens at a time."""
    hidden, head, labels = hidden_head_labels()
    loss = head_cross_entropy(hidden.requires_grad_(), head.requires_grad_(), labels, 0.1)
    loss.backward()
    for got in ranks.run(2, split_loss, 2, size):
        for value, expected in zip(got, (loss.item(), hidden.grad, head.grad)):
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-13)


def overflowing(output_dir, world_size: int, **changes):
    """What fp16 makes of a loss scale that is far too large: the scales after each update, and how many were skipped."""
    scales = []
    args = settings(output_dir, 1, fp16=True, optim="sgd", eval_strategy="no", max_steps=4, **changes)
    with toy_run(args, model=heads4(torch.float32), train_set=texts(SAMPLES)) as (run, loader, _):
        run.precision.load_state_dict({**run.precision.state_dict(), "scale": 2.0**21})
        run.callbacks.callbacks.append(type("Scales", (Callback,), {"on_step_end": lambda *_, **__: scales.append(run.precision.scaler.get_scale())})())
        train(run, loader, None, compute_loss)
        return scales, run.state.skipped_steps


def test_ranks_that_share_layers_agree_on_the_loss_scale(ranks, tmp_path):
    expected = overflowing(tmp_path / "one", 1)
    assert 0 < expected[1] < 4
    assert on_ranks(ranks, overflowing, tmp_path / "tp", world_size=2, tp=2) == [expected, expected]


def collate(samples: list[dict]) -> dict:
    """Shorter samples are filled up at the right."""
    fills = {"input_ids": 0, "labels": -100, "position_ids": 0}
    batch = {name: nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=fills[name]) for name in samples[0]}
    return {**batch, "num_items": int((batch["labels"] != -100).sum())}


class Noisy:
    """Samples that are drawn anew, by the global generator, each time they are read, and so are their lengths."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        ids = torch.randint(VOCAB, (int(torch.randint(3, LENGTH + 1, ())),))
        return {"input_ids": ids, "labels": torch.where(torch.rand(len(ids)) < 0.5, ids, -100)}


def on_noise(output_dir, world_size: int, **changes):
    args = settings(output_dir, 1, eval_strategy="no", max_steps=4, **changes)
    with toy_run(args, model=heads4(), train_set=Noisy(), collate=collate) as (run, loader, _):
        train(run, loader, None, compute_loss)
        return weights(run), [row["loss"] for row in rows(output_dir) if "loss" in row]


def test_ranks_that_share_a_sequence_see_the_same_one_even_if_the_data_set_draws_it(ranks, tmp_path):
    expected = on_noise(tmp_path / "one", 1)
    for got in on_ranks(ranks, on_noise, tmp_path / "cp", world_size=2, cp=2):
        close(got, expected)


def saved(output_dir, world_size: int, resume=None, **changes):
    """Everything that a checkpoint keeps, after loading and at the end: weights and moments by name, of this rank's parts."""
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9, "resume_from_checkpoint": resume, "eval_strategy": "no"}
    args = settings(output_dir, data_ranks(world_size, changes), **{**saving, **changes})
    with toy_run(args, model=heads4(), train_set=texts(SAMPLES)) as (run, loader, _):
        loaded = held_state(run)
        train(run, loader, None, compute_loss)
        return loaded, held_state(run)


def whole_states(results) -> tuple[dict, dict]:
    """Of all ranks together: after loading, and at the end."""
    return join([result[0] for result in results]), join([result[1] for result in results])


RESUMED = [{"cp": 2, "dropout": 0.1, "strategy": "zero2"}, {"cp": 2, "dropout": 0.1, "strategy": "fsdp"}, {"tp": 2, "dropout": 0.1}]


@pytest.mark.parametrize("changes", RESUMED)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(ranks, tmp_path, changes):
    _, expected = whole_states(on_ranks(ranks, saved, tmp_path / "a", world_size=2, **changes))
    _, end = whole_states(on_ranks(ranks, saved, tmp_path / "b", world_size=2, resume=str(tmp_path / "a" / "checkpoint-2"), **changes))
    assert end.keys() == expected.keys()
    assert all((end[key] == expected[key]).all() for key in expected)


@pytest.mark.parametrize("world_size, changes", [(2, {"cp": 2, "strategy": "zero1"}), (2, {"tp": 2}), (4, {"tp": 2, "strategy": "fsdp"})])
def test_a_checkpoint_of_one_process_goes_on_here_and_the_other_way_round(ranks, tmp_path, world_size, changes):
    """Loaded weights, moments and averages are bit-equal; the end is that of a run that was not cut."""
    def run(name: str, alone: bool, resume=None) -> tuple[dict, dict]:
        args = tmp_path / name, 1 if alone else world_size, resume
        return whole_states([saved(*args)] if alone else ranks.run(world_size, call, saved, args, changes))
    _, expected = run("one", True)
    run("many", False)
    for source in ("one", "many"):
        (first, end), (second, other_end) = (run(f"{source}-{alone}", alone, str(tmp_path / source / "checkpoint-2")) for alone in (True, False))
        assert first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)
        for key, value in expected.items():
            np.testing.assert_allclose(end[key], value, rtol=0, atol=1e-11, err_msg=key)
            np.testing.assert_allclose(other_end[key], value, rtol=0, atol=1e-11, err_msg=key)


def refused(output_dir, world_size: int, foreign: bool = False, metric: bool = False, n_head: int = 4, **changes) -> str:
    model = nn.Sequential(nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)) if foreign else heads4(n_head=n_head)
    args = settings(output_dir, 1, **changes)
    try:
        with toy_run(args, model=model, train_set=texts(8), eval_set=texts(2)) as (run, train_loader, eval_loader):
            train(run, train_loader, eval_loader, compute_loss, (lambda predictions, labels: {"a": 0.0}) if metric else None)
    except UsageError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("changes, said", [
    ({"cp": 2, "foreign": True}, "the built-in GPT of model.py, and this is a Sequential: use --strategy fsdp"),
    ({"cp": 2, "n_head": 3}, "--cp 2 does not divide the 3 attention heads, of which each rank takes as many: give 3, or another --n_head"),
    ({"tp": 2, "n_experts": 2}, "--tp 2 and --n_experts do not go together"), ({"cp": 2, "torch_compile": True}, "--cp 2 and --torch_compile do not go together"), ({"cp": 2, "neftune_noise_alpha": 5.0}, "--neftune_noise_alpha"),
    ({"cp": 2, "do_predict": True, "do_train": True}, "in a start without this"), ({"cp": 2, "sample_prompt": "a"}, "tools.generate"),
    ({"cp": 2, "metric": True}, "part of the summed loss and no logits"), ({"cp": 3}, "--cp 3 makes groups of 3 ranks, and there are 2"),
    ({"tp": 2, "foreign": True}, "the built-in GPT of model.py, and this is a Sequential: use --strategy fsdp"),
    ({"tp": 2, "n_head": 3}, "--tp 2 does not divide the 3 attention heads"), ({"tp": 2, "strategy": "zero1"}, "use fsdp, which splits all that zero1 does"),
    ({"tp": 2, "optim": "muon"}, "looks at whole matrices, which --tp cuts: use adamw_torch_fused"), ({"tp": 2, "lora_rank": 2}, "--lora_rank"),
    ({"tp": 2, "metric": True}, "part of the summed loss and no logits"), ({"tp": 2, "cp": 2}, "--cp 2 --tp 2 makes groups of 4 ranks, and there are 2")])
def test_what_does_not_work_is_refused_by_name(ranks, tmp_path, changes, said):
    for message in on_ranks(ranks, refused, tmp_path, world_size=2, **changes):
        assert said in message
