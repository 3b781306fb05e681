"""The HF Trainer and this one, side by side on one model, data and flags: every update alike.

`make test` runs a set in which every pair of values occurs; `make parity` runs the full product (PARITY=full).
All cases are equal bit for bit, so there is no list of exceptions but the deliberate differences at the end.
"""
import itertools
import math
import os

import pytest
import torch
import transformers

from args import TrainArgs
from collators import default_collator
from schedules import build_schedule
from tests.parity import hf

transformers.logging.set_verbosity_error()

SCHEDULES = [("linear", None), ("cosine", None), ("cosine_with_restarts", {"num_cycles": 2}), ("polynomial", {"power": 2.0}), ("constant", None),
             ("constant_with_warmup", None), ("inverse_sqrt", None), ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
             ("cosine_warmup_with_min_lr", {"min_lr": 1e-4}), ("warmup_stable_decay", {"num_decay_steps": 3}),
             ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "1-sqrt", "warmup_type": "cosine", "min_lr_ratio": 0.1}),
             ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "linear"})]
FACTORS = [SCHEDULES, ["adamw_torch_fused", "sgd", "adafactor"], [1, 3], [0, 0.1, 5], [0.0, 1.0]]


def pairwise(factors: list[list]) -> list[tuple]:
    """A small set of cases in which every pair of values of two factors occurs, chosen greedily."""
    cases = list(itertools.product(*(range(len(f)) for f in factors)))
    def pairs(case): return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return [tuple(f[i] for f, i in zip(factors, case)) for case in chosen]


CASES = list(itertools.product(*FACTORS)) if os.environ.get("PARITY") == "full" else pairwise(FACTORS)


def flags(schedule, optim, accumulation, warmup, clipping) -> dict:
    return {"lr_scheduler_type": schedule[0], "lr_scheduler_kwargs": schedule[1], "optim": optim, "gradient_accumulation_steps": accumulation,
            "warmup_steps": warmup, "max_grad_norm": clipping, "learning_rate": 1e-2, "weight_decay": 0.1, "num_train_epochs": 3 if accumulation == 3 else 2}


def same(there, here) -> None:
    """Rows and weights equal to the bit."""
    (their_rows, their_weights), (our_rows, our_weights) = there, here
    keys = ("loss", "grad_norm", "learning_rate", "epoch", "step")
    assert [[row[k] for k in keys] for row in our_rows] == [[row[k] for k in keys] for row in their_rows]
    for name, value in their_weights.items():
        assert torch.equal(our_weights[name], value), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case))
def test_every_update_is_that_of_the_hf_trainer(tmp_path, case):
    given = flags(*case)
    same(hf.train_there(tmp_path / "there", **given), hf.train_here(tmp_path / "here", **given))


@pytest.mark.parametrize("given", [{"optim": "adamw_torch"}, {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"}, {"neftune_noise_alpha": 5.0},
                                   {"activation_checkpointing": True}, {"bf16": True}, {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
                                   {"max_steps": 9}, {"num_train_epochs": 1.5}, {"data_seed": 7, "seed": 5}], ids=str)
def test_other_flags_mean_the_same(tmp_path, given):
    same(hf.train_there(tmp_path / "there", learning_rate=1e-2, **given), hf.train_here(tmp_path / "here", learning_rate=1e-2, **given))


def test_label_smoothing_is_the_same_to_rounding(tmp_path):
    """The HF Trainer sums log-probabilities by itself, here torch's cross-entropy does: another order of adding."""
    there = hf.train_there(tmp_path / "there", learning_rate=1e-2, optim="sgd", label_smoothing_factor=0.1, gradient_accumulation_steps=3)
    here = hf.train_here(tmp_path / "here", hf.smoothed_loss(0.1), learning_rate=1e-2, optim="sgd", gradient_accumulation_steps=3)
    for theirs, ours in zip(there[0], here[0], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6) and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-6)
        assert ours["learning_rate"] == theirs["learning_rate"]
    for name, value in there[1].items():
        torch.testing.assert_close(here[1][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{"patience": 0, "mode": "max", "factor": 0.5}, {"patience": 1, "factor": 0.1, "threshold": 1.0}])
def test_a_plateau_schedule_looks_at_the_same_evaluations(tmp_path, kwargs):
    given = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": kwargs, "eval_strategy": "steps", "eval_steps": 3,
             "eval_on_start": True, "learning_rate": 1e-2, "num_train_epochs": 2}
    there, here = hf.train_there(tmp_path / "there", **given), hf.train_here(tmp_path / "here", **given)
    same(there, here)
    assert len({row["learning_rate"] for row in here[0]}) > 1


def test_difference_a_schedule_with_a_minimum_stays_there_after_the_last_update():
    """The HF Trainer's cosine rises again when training goes on longer than it was planned for."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=10.0)
    theirs = transformers.get_scheduler("cosine_with_min_lr", optimizer, 2, 10, scheduler_specific_kwargs={"min_lr_rate": 0.1}).lr_lambdas[0]
    ours = build_schedule(TrainArgs(lr_scheduler_type="cosine_with_min_lr", learning_rate=10.0, lr_scheduler_kwargs={"min_lr_rate": 0.1},
                                    warmup_steps=2), 10)
    assert [10 * theirs(step) for step in (10, 11, 12)] == pytest.approx([1, 1.3425, 2.3180], abs=1e-4)
    assert [ours(step) for step in (10, 11, 12)] == pytest.approx([1, 1, 1])


def test_difference_a_window_without_labels_is_left_out(tmp_path):
    """The HF Trainer divides by 0 items; here there is no update, and the schedule waits."""
    def unlabeled(batch):
        batch = hf.collate_counted(batch)
        return {**batch, "labels": torch.full_like(batch["labels"], -100), "num_items": 0}
    there = hf.train_there(tmp_path / "there", collator=lambda batch: {k: v for k, v in unlabeled(batch).items() if k != "num_items"},
                           max_steps=1, learning_rate=0.1, logging_nan_inf_filter=False)
    assert math.isnan(there[0][0]["loss"])
    rows, weights = hf.train_here(tmp_path / "here", collator=unlabeled, max_steps=1, learning_rate=0.1)
    assert rows[0]["loss"] is None and rows[0]["empty_steps"] == 1
    assert all(torch.equal(weights[name], p) for name, p in hf.model().named_parameters())


class Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter({"x": torch.tensor([1.0]), "labels": torch.tensor([0.0])} for _ in range(5))


class Slope(torch.nn.Module):
    """dL/dw is 1 for every sample."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x).mean()}


def test_difference_the_tail_of_a_stream_does_not_leak_into_the_next_pass(tmp_path):
    """The HF Trainer's gradients are 1, 1, 2, 1, 2 where the window of two micro-batches does not divide the stream of five."""
    given = {"max_steps": 5, "learning_rate": 0.0, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "optim": "sgd"}
    there = hf.train_there(tmp_path / "there", model=Slope, data=Numbers(), collator=None, batch=1, **given)
    here = hf.train_here(tmp_path / "here", lambda model, batch: (model.weight * batch["x"]).sum(), model=Slope, data=Numbers(),
                         collator=default_collator, batch=1, **given)
    assert max(row["grad_norm"] for row in there[0]) > 1.4
    assert [row["grad_norm"] for row in here[0]] == pytest.approx([1.0] * 5)


def test_difference_eval_loss_is_the_mean_per_label(tmp_path):
    """The HF Trainer averages the means of batches, which depends on the batch size."""
    losses = {}
    for batch in (1, 2, 4):
        given = {"eval_strategy": "steps", "max_steps": 1, "learning_rate": 0.0, "per_device_eval_batch_size": batch}
        losses[batch] = (hf.train_there(tmp_path / f"there{batch}", evaluation=True, **given), hf.train_here(tmp_path / f"here{batch}", evaluation=True, **given))
    theirs, ours = zip(*losses.values())
    assert max(theirs) - min(theirs) > 1e-4 and max(ours) - min(ours) < 1e-6


def test_difference_gpt2_labels_are_counted_after_the_shift(tmp_path):
    """The HF Trainer does not know that GPT-2's loss shifts its labels and counts the first of each row too: its loss is low by
    the share of labels / (labels + rows). Here the collator counts what the loss sums over."""
    there = hf.train_there(tmp_path / "there", model=hf.gpt2, learning_rate=0.0, max_steps=1)[0][0]["loss"]
    here = hf.train_here(tmp_path / "here", model=hf.gpt2, learning_rate=0.0, max_steps=1)[0][0]["loss"]
    lengths = [len(hf.samples()[i]["input_ids"]) for i in torch.randperm(hf.SAMPLES, generator=torch.Generator().manual_seed(42))[:2].tolist()]
    labels = sum(lengths) - 2
    assert there == pytest.approx(here * labels / (labels + 2), rel=1e-6)


def test_difference_nan_losses_are_not_hidden(tmp_path):
    """logging_nan_inf_filter shows a NaN loss as the mean of the others, 0 at the first update; here the run stops."""
    def broken():
        model = hf.model()
        with torch.no_grad():
            model.lm_head.weight[3] = math.nan
        return model
    there = hf.train_there(tmp_path / "there", model=broken, learning_rate=1e-2, max_steps=2)
    assert there[0][0]["loss"] == 0
    with pytest.raises(ValueError, match="update 1: the loss of rank 0 is not finite"):
        hf.train_here(tmp_path / "here", model=broken, learning_rate=1e-2, max_steps=2)


def test_difference_a_model_without_loss_kwargs_is_averaged_over_items_too(tmp_path):
    """For a plain module the HF Trainer averages the means of micro-batches; here every sample of the window weighs the same."""
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, labels=None):
            return {"loss": ((self.weight * x - x) ** 2).mean()}
    samples = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([float(i)])} for i in range(9)]
    theirs, _ = hf.train_there(tmp_path / "there", model=Plain, data=samples, collator=None, learning_rate=0.0, gradient_accumulation_steps=5,
                               num_train_epochs=1)
    means = [[samples[i]["x"].item() ** 2 for i in part] for part in torch.randperm(9, generator=torch.Generator().manual_seed(42)).split(2)]
    assert theirs[0]["loss"] == pytest.approx(sum(sum(m) / len(m) for m in means) / 5)

    def summed(model, batch):
        return ((model.weight * batch["x"] - batch["x"]) ** 2).sum()
    ours, _ = hf.train_here(tmp_path / "here", summed, model=Plain, data=samples, collator=default_collator, learning_rate=0.0,
                            gradient_accumulation_steps=5, num_train_epochs=1)
    assert ours[0]["loss"] == pytest.approx(sum(i * i for i in range(9)) / 9)
