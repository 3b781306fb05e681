"""The loss. Every loss here is a SUM over label items; loop.py divides it once by their count over the window and all ranks.

To train with another loss, change `compute_loss` (the collator must count in num_items what it sums over). A term per
micro-batch instead of per item, such as a balance loss, is added times the micro-batch's own item count:
    return model(ids, labels) + weight * term * (labels != IGNORE).sum()
"""
from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from collators import IGNORE
from state import Batch, UsageError

CHUNK_ELEMENTS = 2**22   # logits alive at once, above which they are computed piece by piece: 16 MB in float32


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Summed loss () of one micro-batch {input_ids, labels (B, T)}, with position_ids (B, T) if samples are packed; the model computes
    it inside its one forward call, where the hooks of DDP and FSDP see it."""
    packed = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    return model(batch["input_ids"], labels_of(batch), **packed)


def logits_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy () of a model that gives logits (..., classes), itself or as .logits, for all of the batch but `labels`
    (...), where -100 is ignored: classification of samples or tokens, multiple choice, masked and sequence-to-sequence LM. Returns
    the logits too, which spares evaluations a second forward pass."""
    labels, output = labels_of(batch), model(**{key: value for key, value in batch.items() if key != "labels"})
    logits = getattr(output, "logits", output)
    try:
        return cross_entropy(logits, labels), logits
    except IndexError:      # on a CPU; a GPU's own message is a failed assertion
        row, *place = ((labels != IGNORE) & ((labels < 0) | (labels >= logits.shape[-1]))).nonzero()[0].tolist()
        raise UsageError(f"labels{place or ''} of sample {row} of the micro-batch is {labels[(row, *place)]}, and the model has classes "
                         f"0..{logits.shape[-1] - 1} (-100 marks what is ignored)") from None


def labels_of(batch: Batch) -> Tensor:
    if "labels" not in batch:
        raise UsageError(f"the batch has no labels: it has {', '.join(batch)}. Name their column labels or label, or use a loss of your own")
    return batch["labels"]


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats, summed over labels that are not -100: logits (..., V), labels (...) -> (). Computed in float32 at
    least, whatever the logits come in. label_smoothing: weight of a uniform target (Szegedy et al. 2016, section 7)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)


def head_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`cross_entropy` of logits = hidden (..., C) @ head (V, C).T, without ever holding all (..., V) of a large vocabulary."""
    if labels.numel() * len(head) <= CHUNK_ELEMENTS:
        return cross_entropy(F.linear(hidden, head), labels, label_smoothing)
    return ChunkedCrossEntropy.apply(hidden, head, labels, label_smoothing, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """Takes the gradients of each piece of logits while they are there, so that backward only scales them: the work of
    the plain loss, without its memory (the idea of Hsu et al. 2024, Liger Kernel, section 3.2). The head's gradient is added
    up in float32 at least. Under fp16 autocast the pieces are float32: the loss scale is not yet in their gradients."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor, label_smoothing: float, training: bool) -> Tensor:
        kind = hidden.device.type
        fp16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        rows, targets = (hidden.detach().float() if fp16 else hidden.detach()).flatten(0, -2), labels.flatten()
        wants_rows, wants_head = (training and needed for needed in ctx.needs_input_grad[:2])
        weight = (head.detach().float() if fp16 else head.detach()).requires_grad_(wants_head)      # fsdp gathers it in 16 bits
        total = torch.zeros((), device=hidden.device)
        grad_rows = torch.empty_like(rows) if wants_rows else None
        grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32)) if wants_head else None
        size = max(1, CHUNK_ELEMENTS // len(head))
        for start in range(0, len(rows), size):
            piece = rows[start:start + size].requires_grad_(wants_rows)
            wanted = [t for t in (piece, weight) if t.requires_grad]
            with torch.set_grad_enabled(bool(wanted)), torch.autocast(kind, enabled=False) if fp16 else contextlib.nullcontext():
                loss = cross_entropy(F.linear(piece, weight), targets[start:start + size], label_smoothing)
            grads = list(torch.autograd.grad(loss, wanted)) if wanted else []
            if wants_rows:
                grad_rows[start:start + size] = grads.pop(0)
            if wants_head:
                grad_head += grads.pop(0)
            total = total + loss.detach()
        ctx.save_for_backward(grad_rows, grad_head)
        ctx.shape, ctx.dtypes = hidden.shape, (hidden.dtype, head.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        grad_rows, grad_head = ctx.saved_tensors
        return (None if grad_rows is None else (grad_rows * grad_loss).view(ctx.shape).to(ctx.dtypes[0]),
                None if grad_head is None else (grad_head * grad_loss).to(ctx.dtypes[1]), None, None, None)
