"""What an update costs in floating-point operations, and how much of a machine's peak a run makes use of.

    python -m tools.flops --n_layer 8 --n_embd 512 --per_device_train_batch_size 16        # any flags of train.py; nothing is trained
    python -m tools.flops --run runs/a --peak 2e11                                          # of a run, with its speed, against a stated peak

Counted by torch's FlopCounterMode in a forward and backward pass of one micro-batch: matrix products and attention, a multiplication and
an addition as two, as torch counts on GPUs: the backward of attention has five products, since it computes its weights again. Peak: operations per second of one rank, as its maker or a benchmark says; none is guessed.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import train
from args import TrainArgs, parse_args
from callbacks import Callback
from collators import default_collator
from data import build_data
from evalloop import to_device
from loss import compute_loss
from model import build_model
from rundir import list_checkpoints
from state import Batch, LossFn, UsageError, run_main
from storage import read_json, reading
from world import open_world

CPU_ATTENTION_FORMULAS = {     # torch counts it as nothing
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(grad, q, k, v)}


def count_flops(model: nn.Module, loss_fn: LossFn, batch: Batch) -> int:
    """Of the forward and backward pass of a micro-batch. No gradient is left, and random generators are where they were."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FORMULAS) as counter:
        loss = loss_fn(model, to_device(batch, trained[0].device))
        torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, trained, allow_unused=True)
    return counter.get_total_flops()


class FlopsCallback(Callback):
    """Counts the first window of this start on every rank, for --peak_flops; what the optimizer multiplies is not counted."""

    def __init__(self):
        self.counter, self.counting = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FORMULAS), contextlib.ExitStack()
        self.counted = False

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.counted:
            self.tokens_before = state.num_input_tokens_seen
            if args.torch_compile:      # what it first calls under the counter, the compiler would leave alone for ever
                self.counting.enter_context(torch.compiler.set_stance("force_eager"))
            self.counting.enter_context(self.counter)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.counting.close()

    def on_step_end(self, args, state, control, run=None, **kwargs):
        if not self.counted:
            self.counting.close()
            flops, tokens = run.world.sum(self.counter.get_total_flops())[0], state.num_input_tokens_seen - self.tokens_before
            state.flops_per_token = flops / tokens if tokens else 0.0
            self.counted = flops > 0        # a window without label items has neither pass


def read_run(folder: str) -> tuple[list[str], float]:
    """(its flags, the tokens per second and rank of its last row that tells them)."""
    if not (steps := list_checkpoints(folder)):
        raise UsageError(f"--run {folder}: it has no checkpoint; give the folder of a run", 3)
    path = os.path.join(folder, f"checkpoint-{steps[0]}")
    with reading(path, "args.json"):
        default, saved = TrainArgs().to_dict(), read_json(path, "args.json")
        flags = [word for name, value in saved.items() if name in default and value != default[name]
                 for word in (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))]
    with reading(path, "state.json"):
        ranks = read_json(path, "state.json")["world_size"]
    with reading(folder, "metrics.jsonl"), open(os.path.join(folder, "metrics.jsonl")) as file:
        speeds = [row["tokens_per_second"] for row in map(json.loads, file) if "tokens_per_second" in row]
    return flags, speeds[-1] / ranks if speeds else 0.0


def main(argv: list[str] | None = None) -> float:
    """Prints the table; returns the operations per token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", help="folder of a run of train.py, for its flags and its speed")
    parser.add_argument("--peak", type=float, help="operations per second that a rank could do")
    own, flags = parser.parse_known_args(argv)
    known, speed = read_run(own.run) if own.run else ([], 0.0)
    args = parse_args([*known, *flags])
    with open_world(args) as world:
        data, model = build_data(args), build_model(args)
        batch = next(train.make_loader(args, world, model, data.train, default_collator, train=True).epoch())
        flops, tokens = count_flops(model, compute_loss, batch), batch["input_ids"].numel()
    update = flops * args.gradient_accumulation_steps
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = {"parameters": f"{trained:,}", "FLOPs per token": f"{flops / tokens:,.0f}", "6 x parameters": f"{6 * trained:,}",
             "FLOPs per update and rank": f"{update:,}", "tokens per second and rank": f"{speed:,.0f}" if speed else "n/a: give --run",
             "MFU": f"{flops / tokens * speed / own.peak:.1%}" if speed and own.peak else "n/a: give --run and --peak"}
    for key, value in lines.items():
        print(f"{key + ':':<28}{value}")
    return flops / tokens


if __name__ == "__main__":
    run_main(main)
