"""What an update costs in floating-point operations.   python -m tools.flops --n_layer 8 --n_embd 512      any flags of train.py; nothing is trained

Counted by torch's FlopCounterMode in a forward and backward pass of one micro-batch of the built-in model: matrix products and attention, a
multiplication and an addition as two. Of any run, --peak_flops tells the share that it makes use of (FlopsCallback).
"""
from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import train
from adapters import adapt
from args import parse_args
from callbacks import Callback
from collators import default_collator
from data import build_data
from evalloop import to_device
from loss import compute_loss
from model import build_model
from state import Batch, LossFn, run_main
from world import open_world

# torch counts attention on CPUs as nothing, and in backward a product too many where a kernel computes its weights again: what is
# computed twice to save memory is not the model's (Chowdhery et al. 2022, appendix B)
ATEN = torch.ops.aten
FORMULAS = {ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)} | dict.fromkeys(
    (ATEN._scaled_dot_product_flash_attention_for_cpu_backward, ATEN._scaled_dot_product_flash_attention_backward,
     ATEN._scaled_dot_product_efficient_attention_backward, ATEN._scaled_dot_product_cudnn_attention_backward),
    lambda grad, q, k, v, *args, out_shape=None, **kwargs: 2 * sdpa_flop_count(q, k, v))


def count_flops(model: nn.Module, loss_fn: LossFn, batch: Batch) -> int:
    """Of the forward and backward pass of a micro-batch. No gradient is left, and random generators are where they were."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss = loss_fn(model, to_device(batch, trained[0].device))
        torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, trained, allow_unused=True)
    return counter.get_total_flops()


class FlopsCallback(Callback):
    """Counts the first window of this start on every rank, for --peak_flops; what the optimizer multiplies is not counted."""

    def __init__(self):
        self.counter, self.counting = FlopCounterMode(display=False, custom_mapping=FORMULAS), contextlib.ExitStack()
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


def main(argv: list[str] | None = None) -> float:
    """Prints the table; returns the operations per token."""
    args = parse_args(argv, description=__doc__)
    with open_world(args) as world:
        data, model = build_data(args), build_model(args)
        adapt(model, args)
        batch = next(train.make_loader(args, world, model, data.train, default_collator, train=True).epoch())
        flops, tokens = count_flops(model, compute_loss, batch), batch["input_ids"].numel()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    active = trained - getattr(model, "idle_parameters", 0)       # by a token, of all experts
    lines = {"trainable parameters": f"{trained:,}", **({"of which a token meets": f"{active:,}"} if active < trained else {}),
             "FLOPs per token": f"{flops / tokens:,.0f}", "6 x these parameters": f"{6 * active:,}",
             "FLOPs per update and rank": f"{flops * args.gradient_accumulation_steps:,}", "share of a peak": "n/a: --peak_flops of train.py tells it, of a run"}
    for key, value in lines.items():
        print(f"{key + ':':<28}{value}")
    return flops / tokens


if __name__ == "__main__":
    run_main(main)
