"""Context parallelism, --cp N: long sequences on N ranks, each of which computes a part of every one.

The ranks of a group read the same samples. Rank i takes the i-th of N equal pieces of each sequence, and with it a share of the
activations. All of a transformer but attention looks at one token at a time, so weights, optimizer and strategies know nothing of it:
these ranks are data-parallel ranks, of pieces of samples, and their gradients are averaged like any other.

In attention tokens meet. Before it an all-to-all changes pieces with all heads into whole sequences with H / N heads, after it another
one changes back (DeepSpeed Ulysses: Jacobs et al. 2023, section 3). The other way, to gather keys and values (Llama 3: Grattafiori et al.
2024, section 3.3.2), lets N be larger than H, but every rank then holds the keys and values of all tokens, and masks of (T / N, T), pieces
of a causal mask that ranks must be dealt unequal pieces to share fairly. Here each rank has the attention kernel and the mask of
one process, all do the same work, and the model has no line about it: hooks cut the sequences, and swap pieces for heads.

    ids (B, T) -> embed (B, T/N, C) -> qkv (B, T/N, 3C) -> (B, T, 3C/N) -> attention -> (B, T, C/N) -> (B, T/N, C) -> out, MLP, loss
"""
from __future__ import annotations

import inspect
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from args import TrainArgs
from collators import IGNORE
from model import GPT, Attention
from state import UsageError
from world import World

REFUSED = {     # flags by which the model would be called for something else than its loss, or would look at whole sequences or all layers
    "n_experts": "adds a balance loss of whole sequences, and of all layers, to the loss",
    "ep": "shares out what --n_experts makes, which does not go with this either",
    "torch_compile": "does not see through exchanges between ranks",
    "neftune_noise_alpha": "scales its noise by the length of a sequence, of which a rank has a part",
    "do_predict": "needs outputs that no rank has whole, so predict with a checkpoint, in a start without this",
    "sample_prompt": "lets the model write token by token, as python -m tools.generate does with a checkpoint"}


def split_sequences(model: nn.Module, args, world: World) -> None:
    """Has a GPT compute this rank's part of each sequence: its forward, which all ranks of the group call with the same (B, T) ids, gives
    the summed loss of T / N tokens. Raises UsageError for what cannot be split."""
    refuse(model, args)
    group = world.groups["cp"]
    model.register_forward_pre_hook(partial(begin, world=world), with_kwargs=True)
    model.embed.register_forward_pre_hook(lambda embed, inputs: piece(inputs[0], group), prepend=True)      # to come before those of --tp
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        attention.qkv.register_forward_hook(lambda qkv, inputs, output: to_heads(output, group))
        attention.out.register_forward_pre_hook(lambda out, inputs: to_pieces(inputs[0], group), prepend=True)


def refuse(model: nn.Module, args) -> None:
    if type(model) is not GPT:
        raise UsageError(f"--cp splits the sequences of the built-in GPT of model.py, and this is a {type(model).__name__}: "
                         f"use --strategy fsdp and --activation_checkpointing, or hook its attention as parallel/context.py does")
    refuse_flags(args, "cp", REFUSED)
    heads = model.blocks[0].attn.out.in_features // model.blocks[0].attn.head_dim
    if heads % args.cp:
        fit = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise UsageError(f"--cp {args.cp} does not divide the {heads} attention heads, of which each rank takes as many: "
                         f"{f'give {fit}, or ' if fit else ''}another --n_head")


def refuse_flags(args, ours: str, reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        if getattr(args, name) != getattr(TrainArgs, name):
            raise UsageError(f"--{ours} {getattr(args, ours)} and --{name} do not go together: it {reason}. Leave one of them away")


def begin(model: nn.Module, args: tuple, kwargs: dict, world: World) -> tuple[tuple, dict]:
    """Before the model's forward: all of the batch, but of the labels this rank's piece."""
    _, given = agree(model, args, kwargs, world, world.groups["cp"])
    return (), {**given, "labels": piece(given["labels"], world.groups["cp"])}


def agree(model: nn.Module, args: tuple, kwargs: dict, world: World, group: dist.ProcessGroup) -> tuple[tuple, dict]:
    """What a model is called with on the first rank of a group, on all of them: a data set may draw with generators that differ over ranks.
    Padded, to a length that ranks can share, with tokens that nobody looks at."""
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    if given.get("labels") is None or given.get("cache") is not None:
        raise UsageError("with --cp, --tp and --pp the model gives this rank's part of the summed loss and no logits: leave away what asks for them "
                         "(compute_metrics, a loss of logits, generation), or do it with a checkpoint, in a start without these")
    ids = given["input_ids"]
    fills = {name: fill for name, fill in (("input_ids", 0), ("labels", IGNORE), ("position_ids", 0)) if given.get(name) is not None}   # 0: a document of its own
    B, T = world.of_first(list(ids.shape), group)
    together = ids.new_empty(len(fills), B, T + -T % world.copies, dtype=torch.int64)
    if group.rank() == 0:
        for tensor, (name, fill) in zip(together, fills.items()):
            tensor.copy_(F.pad(given[name], (0, -T % world.copies), value=fill))
    dist.broadcast(together, group=group, group_src=0)
    return (), {**given, **dict(zip(fills, together))}


def piece(sequences: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T) -> this rank's (B, T/N)."""
    return sequences.chunk(group.size(), dim=1)[group.rank()].contiguous()


def to_heads(qkv: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All heads of a piece of the sequence -> some heads of the whole: (B, T/N, H 3 D) -> (B, T, H/N 3 D)."""
    heads = qkv.unflatten(-1, (group.size(), -1))                   # (B, T/N, N, H/N 3 D)
    return Swap.apply(heads.movedim(2, 0), group).movedim(0, 1).flatten(1, 2)


def to_pieces(y: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Back: (B, T, H/N D) -> (B, T/N, H D)."""
    pieces = y.unflatten(1, (group.size(), -1))                     # (B, N, T/N, H/N D)
    return Swap.apply(pieces.movedim(1, 0), group).movedim(0, 2).flatten(2)


class Swap(torch.autograd.Function):
    """Of x (N, ...) on N ranks x[j] goes to rank j, and what rank j has for this one takes its place. Gradients go the same way."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, x = group, x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor):
        return Swap.apply(grad, ctx.group), None
