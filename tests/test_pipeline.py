"""A model in stages on several ranks is the same training: the weights and losses of one process."""
import os

import numpy as np
import pytest
import torch
from torch import nn

from callbacks import Callback
from loop import train
from loss import compute_loss
from state import UsageError
from tests.test_parallel import SAMPLES, Noisy, collate, data_ranks, heads4, on_ranks, texts
from tests.test_strategies import call, held_state, join
from tests.toy import VOCAB, arguments, rows, toy_run, weights
from tools.chaos import exit_codes, said, start

LOGGED = ("loss", "grad_norm", "eval_loss")


def settings(output_dir, data_ranks: int = 1, **changes):
    """Windows of 8 samples, as four micro-batches of all data-parallel ranks together; the last one of a pass has 5, in three."""
    return arguments(output_dir, **{"per_device_train_batch_size": 2 // data_ranks, "gradient_accumulation_steps": 4, "max_steps": 10, "max_grad_norm": 0.5,
                                    "weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 5, **changes})


def ragged(n: int, seed: int = 0, packed: bool = False) -> list[dict]:
    """texts of different lengths: so are micro-batches."""
    return [{name: row[:len(row) - i % 3] for name, row in sample.items()} for i, sample in enumerate(texts(n, seed, packed))]


class Substeps(Callback):
    count = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.count += 1


def finish(output_dir, world_size: int, dtype: torch.dtype = torch.float64, packed: bool = False, n_layer: int = 5, frozen: tuple = (), **changes):
    """This rank's weights at the end, all losses and norms, and what was counted."""
    args, substeps = settings(output_dir, data_ranks(world_size, changes), **changes), Substeps()
    model = heads4(dtype, n_layer=n_layer)
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in frozen))
    train_set, eval_set = ragged(SAMPLES, packed=packed), ragged(5, seed=1, packed=packed)
    with toy_run(args, model=model, train_set=train_set, eval_set=eval_set, collate=collate, callbacks=[substeps]) as (run, train_loader, eval_loader):
        train(run, train_loader, eval_loader, compute_loss)
        state = run.state
        logged = [row[key] for row in rows(output_dir) for key in LOGGED if key in row]
        return weights(run), [*logged, state.total_samples, state.samples_per_update, substeps.count], [state.num_input_tokens_seen, state.total_flos]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    known = {packed: finish(tmp_path_factory.mktemp("one"), 1, packed=packed) for packed in (False, True)}
    return lambda packed=False: known[packed]


def close(results, expected, tolerance: float = 1e-11) -> None:
    """The stages of all ranks together against a whole model; every rank has counted and logged the same."""
    assert {name for mine, *_ in results for name in mine} == expected[0].keys()
    for mine, logged, _ in results:
        for name, value in mine.items():
            np.testing.assert_allclose(value, expected[0][name], rtol=0, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(logged, expected[1], rtol=tolerance, atol=tolerance)


PP = [(2, {"pp": 2}), (4, {"pp": 4, "pp_schedule": "gpipe", "packed": True}), (4, {"pp": 4, "activation_checkpointing": True}),
      (8, {"pp": 2, "tp": 2}), (4, {"pp": 2, "cp": 2, "packed": True}), (4, {"pp": 2, "packed": True}), (4, {"pp": 2, "strategy": "zero1", "ddp_bucket_cap_mb": 0.01, "cpu_offload": True})]


@pytest.mark.parametrize("world_size, changes", PP)
def test_stages_train_as_one_process_does(ranks, one, tmp_path, world_size, changes):
    results = on_ranks(ranks, finish, tmp_path, world_size=world_size, **changes)
    expected = one(changes.get("packed", False))
    close(results, expected)
    assert all(len(mine) < len(expected[0]) for mine, *_ in results)        # nobody holds the whole model
    if changes["pp"] == world_size:     # else micro-batches are of other samples, and padded to other lengths
        assert all(counted == expected[2] for *_, counted in results)


@pytest.mark.parametrize("optim", ["muon", "adafactor"])
def test_optimizers_that_look_at_whole_matrices_have_them_in_a_stage(ranks, tmp_path, optim):
    changes = {"optim": optim, "max_steps": 3, "eval_strategy": "no"}
    close(on_ranks(ranks, finish, tmp_path / "pp", world_size=4, pp=2, strategy="zero1", **changes), finish(tmp_path / "one", 1, **changes))


def test_half_precision_goes_by_the_same_scale_and_loss_on_all_stages(ranks, tmp_path):
    """In 16 bits up to rounding. The first scale of fp16, 65536, is far too large for some windows."""
    for kind in ("bf16", "fp16"):
        changes = {"dtype": torch.float32, "max_steps": 4, "learning_rate": 1e-3, "eval_steps": 4, kind: True}
        expected = finish(tmp_path / f"{kind}-one", 1, **changes)
        close(on_ranks(ranks, finish, tmp_path / kind, world_size=2, pp=2, **changes), expected, tolerance=1e-2)


def test_what_is_frozen_stays_so_and_a_stage_may_train_its_head_alone(ranks, tmp_path):
    changes = {"frozen": ("embed", "norm", "blocks.0", "blocks.2", "blocks.3", "blocks.4"), "max_steps": 3, "eval_strategy": "no"}
    close(on_ranks(ranks, finish, tmp_path / "pp", world_size=4, pp=2, tp=2, **changes), finish(tmp_path / "one", 1, **changes))


def on_noise(output_dir, world_size: int, **changes):
    args = settings(output_dir, eval_steps=2, max_steps=3, **changes)
    with toy_run(args, model=heads4(), train_set=Noisy(), eval_set=Noisy(), collate=collate) as (run, train_loader, eval_loader):
        train(run, train_loader, eval_loader, compute_loss)
        return weights(run), [row[key] for row in rows(output_dir) for key in LOGGED if key in row], []


def test_stages_see_the_same_samples_even_if_the_data_set_draws_them(ranks, tmp_path):
    close(on_ranks(ranks, on_noise, tmp_path / "pp", world_size=2, pp=2), on_noise(tmp_path / "one", 1))


def break_down(*_):
    raise UsageError("a block that breaks down", 7)


def broken(output_dir: str) -> None:
    model = heads4()
    if os.environ["RANK"] == "3":
        model.blocks[-1].register_forward_pre_hook(break_down)
    with toy_run(settings(output_dir, pp=2, tp=2, eval_strategy="no"), model=model, train_set=texts(8)) as (run, train_loader, _):
        train(run, train_loader, None, compute_loss)


def codes_of_broken(folder: str) -> tuple[list[int], str]:
    return exit_codes(start(f"{folder}/log", 4, broken, folder), folder), said(f"{folder}/log")


def test_an_error_inside_of_a_stage_is_told_by_all_ranks_as_it_is(fresh, tmp_path):
    codes, told = fresh(codes_of_broken, str(tmp_path))
    assert codes == [7] * 4 and told.count("rank 3 failed with UsageError: a block that breaks down") == 3, told


def saved(output_dir, world_size: int, resume=None, **changes):
    """Everything that a checkpoint keeps, of this rank's parts, after loading and at the end: weights, moments and averages by name."""
    args = settings(output_dir, data_ranks(world_size, changes), **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9,
                                                                       "resume_from_checkpoint": resume, "eval_strategy": "steps", "eval_steps": 2, **changes})
    with toy_run(args, model=heads4(), train_set=texts(SAMPLES), eval_set=texts(3, seed=1)) as (run, train_loader, eval_loader):
        loaded = held_state(run)
        train(run, train_loader, eval_loader, compute_loss)
        return loaded, held_state(run)


def states(results) -> tuple[dict, dict]:
    """Of all ranks together: after loading, and at the end."""
    return join([result[0] for result in results]), join([result[1] for result in results])


@pytest.mark.parametrize("world_size, changes", [(4, {"pp": 2, "tp": 2, "save_async": True}), (4, {"pp": 2, "strategy": "zero1"})])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(ranks, tmp_path, world_size, changes):
    changes = {**changes, "dropout": 0.1}
    _, expected = states(on_ranks(ranks, saved, tmp_path / "a", world_size=world_size, **changes))
    _, end = states(on_ranks(ranks, saved, tmp_path / "b", world_size=world_size, resume=str(tmp_path / "a" / "checkpoint-2"), **changes))
    assert end.keys() == expected.keys()
    assert all((end[key] == expected[key]).all() for key in expected)


@pytest.mark.parametrize("world_size, changes", [(2, {"pp": 2}), (4, {"pp": 2, "tp": 2})])
def test_a_checkpoint_of_stages_goes_on_in_one_process_and_the_other_way_round(ranks, tmp_path, world_size, changes):
    """Loaded weights, moments and averages are bit-equal; the end is that of a run that was not cut."""
    def run(name: str, alone: bool, resume=None) -> tuple[dict, dict]:
        return states([saved(tmp_path / name, 1, resume)] if alone else ranks.run(world_size, call, saved, (tmp_path / name, world_size, resume), changes))
    _, expected = run("one", True)
    run("stages", False)
    assert sorted(path.name for path in (tmp_path / "stages" / "checkpoint-2").glob("model*")) == ["model.safetensors"]
    for source in ("one", "stages"):
        (first, end), (second, other_end) = (run(f"{source}-{alone}", alone, str(tmp_path / source / "checkpoint-2")) for alone in (True, False))
        assert first.keys() == second.keys() == expected.keys() and all((first[key] == second[key]).all() for key in first)
        for key, value in expected.items():
            np.testing.assert_allclose(end[key], value, rtol=0, atol=1e-11, err_msg=key)
            np.testing.assert_allclose(other_end[key], value, rtol=0, atol=1e-11, err_msg=key)


def refused(output_dir, world_size: int, foreign: bool = False, tied: bool = False, metric: bool = False, own_loss: bool = False, **changes) -> str:
    model = nn.Sequential(nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)) if foreign else heads4()
    if tied:
        model.head.weight = model.embed.weight
    loss = (lambda model, batch: 2 * compute_loss(model, batch)) if own_loss else compute_loss
    try:
        with toy_run(settings(output_dir, **changes), model=model, train_set=texts(8), eval_set=texts(2)) as (run, train_loader, eval_loader):
            train(run, train_loader, eval_loader, loss, (lambda predictions, labels: {"a": 0.0}) if metric else None)
    except UsageError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("changes, said", [
    ({"foreign": True}, "the built-in GPT of model.py into stages, and this is a Sequential: use --strategy fsdp"), ({"tied": True}, "one weight (tied)"),
    ({"pp": 3}, "--pp 3 makes groups of 3 ranks, and there are 2"), ({"strategy": "zero2"}, "give --strategy zero1"), ({"strategy": "fsdp"}, "give --strategy zero1"),
    ({"cp": 2}, "--pp 2 --cp 2 makes groups of 4 ranks"), ({"ep": 2}, "--pp 2 and --ep do not go together"), ({"n_experts": 2}, "--n_experts"), ({"lora_rank": 2}, "--lora_rank"),
    ({"torch_compile": True}, "--torch_compile"), ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha"), ({"sample_prompt": "a"}, "tools.generate"),
    ({"do_predict": True, "do_train": True}, "in a start without this"), ({"check_replicas": 5}, "stages hold different ones"), ({"report_histograms": True, "report_to": "tensorboard"}, "--report_histograms"),
    ({"save_on_each_node": True}, "an output_dir that all hosts share"), ({"metric": True}, "part of the summed loss and no logits"),
    ({"own_loss": True}, "compute_loss of loss.py, and this is another")])
def test_what_does_not_work_is_refused_by_name(ranks, tmp_path, changes, said):
    for message in on_ranks(ranks, refused, tmp_path, world_size=2, **{"pp": 2, **changes}):
        assert said in message
