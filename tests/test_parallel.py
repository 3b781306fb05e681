"""Context and tensor parallelism are the same training: the weights and losses of one process."""
import numpy as np
import pytest
import torch
from torch import nn

from loop import train
from loss import compute_loss
from model import GPT
from state import UsageError
from tests.test_strategies import call, close, held_state, join
from tests.toy import VOCAB, arguments, rows, toy_run, weights
from world import set_seed

SAMPLES = 21        # in windows of 8: the last one of a pass has five, so that some data ranks have only filler
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


def settings(output_dir, data_ranks: int, **changes):
    return arguments(output_dir, **{"per_device_train_batch_size": 4 // data_ranks, "gradient_accumulation_steps": 2, "max_steps": 10, "max_grad_norm": 0.5,
                                    "weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 5, **changes})


def finish(output_dir, world_size: int, dtype: torch.dtype = torch.float64, packed: bool = False, **changes):
    """Weights at the end, all losses of training and evaluation, and what was counted."""
    data_ranks = world_size // changes.get("cp", 1)
    args = settings(output_dir, data_ranks, **changes)
    with toy_run(args, model=heads4(dtype), train_set=texts(SAMPLES, packed=packed), eval_set=texts(5, seed=1, packed=packed)) as (run, train_loader, eval_loader):
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


@pytest.mark.parametrize("world_size, changes", CP)
def test_sequences_that_ranks_share_are_trained_as_by_one_process(ranks, one, tmp_path, world_size, changes):
    for got in on_ranks(ranks, finish, tmp_path, world_size=world_size, **changes):
        close(got, one(changes.get("packed", False)))


class Noisy:
    """Samples that are drawn anew, by the global generator, each time they are read."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        ids = torch.randint(VOCAB, (LENGTH,))
        return {"input_ids": ids, "labels": torch.where(torch.rand(LENGTH) < 0.5, ids, -100)}


def on_noise(output_dir, world_size: int, **changes):
    args = settings(output_dir, 1, eval_strategy="no", max_steps=4, **changes)
    with toy_run(args, model=heads4(), train_set=Noisy()) as (run, loader, _):
        train(run, loader, None, compute_loss)
        return weights(run), [row["loss"] for row in rows(output_dir) if "loss" in row]


def test_ranks_that_share_a_sequence_see_the_same_one_even_if_the_data_set_draws_it(ranks, tmp_path):
    expected = on_noise(tmp_path / "one", 1)
    for got in on_ranks(ranks, on_noise, tmp_path / "cp", world_size=2, cp=2):
        close(got, expected)


def saved(output_dir, world_size: int, resume=None, **changes):
    """Everything that a checkpoint keeps, after loading and at the end: weights and moments by name, of this rank's parts."""
    args = settings(output_dir, world_size // changes.get("cp", 1), **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9,
                                                                       "resume_from_checkpoint": resume, "eval_strategy": "no", **changes})
    with toy_run(args, model=heads4(), train_set=texts(SAMPLES)) as (run, loader, _):
        loaded = held_state(run)
        train(run, loader, None, compute_loss)
        return loaded, held_state(run)


def whole_states(results) -> tuple[dict, dict]:
    """Of all ranks together: after loading, and at the end."""
    return join([result[0] for result in results]), join([result[1] for result in results])


RESUMED = [{"cp": 2, "dropout": 0.1, "strategy": "zero2"}, {"cp": 2, "dropout": 0.1, "strategy": "fsdp"}]


@pytest.mark.parametrize("changes", RESUMED)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(ranks, tmp_path, changes):
    _, expected = whole_states(on_ranks(ranks, saved, tmp_path / "a", world_size=2, **changes))
    _, end = whole_states(on_ranks(ranks, saved, tmp_path / "b", world_size=2, resume=str(tmp_path / "a" / "checkpoint-2"), **changes))
    assert end.keys() == expected.keys()
    assert all((end[key] == expected[key]).all() for key in expected)


@pytest.mark.parametrize("changes", [{"cp": 2, "strategy": "zero1"}])
def test_a_checkpoint_of_one_process_goes_on_here_and_the_other_way_round(ranks, tmp_path, changes):
    """Loaded weights, moments and averages are bit-equal; the end is that of a run that was not cut."""
    def run(name: str, alone: bool, resume=None) -> tuple[dict, dict]:
        args = tmp_path / name, 1 if alone else 2, resume
        return whole_states([saved(*args)] if alone else ranks.run(2, call, saved, args, changes))
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
    ({"cp": 2, "torch_compile": True}, "--cp 2 and --torch_compile do not go together"), ({"cp": 2, "neftune_noise_alpha": 5.0}, "--neftune_noise_alpha"),
    ({"cp": 2, "do_predict": True, "do_train": True}, "in a start without --cp"), ({"cp": 2, "sample_prompt": "a"}, "tools.generate"),
    ({"cp": 2, "metric": True}, "gives its summed loss and no logits"), ({"cp": 3}, "--cp 3 makes groups of 3 ranks, and there are 2")])
def test_what_does_not_work_is_refused_by_name(ranks, tmp_path, changes, said):
    for message in on_ranks(ranks, refused, tmp_path, world_size=2, **changes):
        assert said in message
