"""Small models and data that the tests train."""
from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import runpy
import sys
import warnings

import numpy as np
import torch

from args import TrainArgs
from callbacks import PrinterCallback
from collators import default_collator
from distributed import whole
from loop import train
from loss import compute_loss
from model import GPT
from train import assemble
from world import open_world, set_seed

VOCAB, LENGTH = 17, 8


def gpt(dropout: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT:
    set_seed(seed)
    model = GPT(VOCAB, LENGTH, n_layer=2, n_head=2, n_embd=16, dropout=dropout)
    for block in model.blocks:      # as if trained for a while: every parameter takes part
        torch.nn.init.normal_(block.attn.out.weight, std=0.2)
        torch.nn.init.normal_(block.down.weight, std=0.2)
    return model.to(dtype)


def sequences(n: int, seed: int = 0) -> list[dict]:
    """n samples with unequal numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(n):
        ids = torch.randint(VOCAB, (LENGTH + 1,), generator=generator)
        labels = ids[1:].clone()
        labels[2 + (5 * i + seed) % (LENGTH - 1):] = -100
        samples.append({"input_ids": ids[:-1], "labels": labels})
    return samples


def as_program(module: str, *words) -> tuple[int, str]:
    """(exit code, standard error) of `python -m module words`, run in this process, which has imported torch already."""
    argv, sys.argv = sys.argv, [module, *map(str, words)]
    with contextlib.redirect_stderr(io.StringIO()) as said, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)     # that it has been imported before
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as ended:
            return ended.code, said.getvalue()
        finally:
            sys.argv = argv
    return 0, said.getvalue()


@contextlib.contextmanager
def files_of_at_most(size: int):
    """As on a full disk: a write beyond so many bytes fails in the middle."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)       # Python ignores the signal that comes with it
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


class Numbers:
    """Sample i is the number i; counts how often each was read."""

    def __init__(self, n: int):
        self.n, self.read = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.read.append(i)
        return {"x": torch.tensor([float(i)])}


def arguments(output_dir, **changes) -> TrainArgs:
    values = {"output_dir": str(output_dir), "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
              "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    return TrainArgs(**{**values, **changes})


@contextlib.contextmanager
def toy_run(args: TrainArgs, model=None, train_set=None, eval_set=None, collate=default_collator, callbacks=(), **parts):
    """(run, train_loader, eval_loader) of a small run, silent, in the world of the environment."""
    model = gpt() if model is None else model
    train_set = sequences(8) if train_set is None else train_set
    with open_world(args) as world:
        assembled = assemble(args, world, model, train_set, eval_set, collate, callbacks, **parts)
        watching = assembled[0].callbacks
        watching.callbacks = [c for c in watching.callbacks if not isinstance(c, PrinterCallback)]
        yield assembled


def run_training(args: TrainArgs, loss_fn=compute_loss, **parts):
    """Trains a small run to its end; returns it."""
    return train_and(args, lambda run: run, loss_fn, **parts)


def train_and(args: TrainArgs, look, loss_fn=compute_loss, compute_metrics=None, **parts):
    """Trains a small run to its end; returns look(run), which every rank calls while the ranks are still together."""
    with toy_run(args, **parts) as (run, train_loader, eval_loader):
        train(run, train_loader, eval_loader, loss_fn, compute_metrics)
        return look(run)


def weights(run) -> dict[str, np.ndarray]:
    """All weights, whole, as rank 0 would save them; under fsdp every rank has to call it."""
    return {name: whole(p).numpy().copy() for name, p in run.model.named_parameters()}


def flat(run) -> np.ndarray:
    return np.concatenate([w.ravel() for w in weights(run).values()])


def rows(output_dir) -> list[dict]:
    with open(os.path.join(output_dir, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def timeless(row: dict) -> dict:
    """A row without what a clock measured."""
    return {k: v for k, v in row.items() if not k.endswith(("runtime", "per_second")) and not k.startswith(("time_", "memory_"))}
