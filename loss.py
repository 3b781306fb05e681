"""The loss. Every loss here is a SUM over label items; loop.py divides it once by their count over the window and all ranks.

To train with another loss, change `compute_loss` (the collator must count in num_items what it sums over). A term per
micro-batch instead of per item, such as a balance loss, is added times the micro-batch's own item count:
    return model(ids, labels) + weight * term * (labels != IGNORE).sum()
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collators import IGNORE
from state import Batch

CHUNK_ELEMENTS = 2**23   # logits alive at once, above which they are computed piece by piece: 32 MB in float32


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Summed loss () of one micro-batch {input_ids, labels (B, T)}; the model computes it inside its one forward call,
    where the hooks of DDP and FSDP see it."""
    return model(batch["input_ids"], batch["labels"])


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats, summed over labels that are not -100: logits (..., V), labels (...) -> ().

    Computed in float32 at least, whatever the logits come in. label_smoothing: weight of a uniform target
    (Szegedy et al. 2016, section 7).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)


def head_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`cross_entropy` of logits = hidden (..., C) @ head (V, C).T, without ever holding all (..., V) of a large vocabulary."""
    if labels.numel() * len(head) <= CHUNK_ELEMENTS:
        return cross_entropy(F.linear(hidden, head), labels, label_smoothing)
    return ChunkedCrossEntropy.apply(hidden, head, labels, label_smoothing)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Takes the gradients of each piece of logits while they are there, so that backward only scales them: the work of
    the plain loss, without its memory (the idea of Hsu et al. 2024, Liger Kernel, section 3.2)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        rows, targets = hidden.detach().flatten(0, -2), labels.flatten()
        weight = head.detach().requires_grad_(head.requires_grad)
        total = torch.zeros((), device=hidden.device)
        grad_rows, grad_head = torch.empty_like(rows), torch.zeros_like(head)
        size = max(1, CHUNK_ELEMENTS // len(head))
        for start in range(0, len(rows), size):
            piece = rows[start:start + size].requires_grad_(hidden.requires_grad)
            wanted = [t for t in (piece, weight) if t.requires_grad]
            with torch.set_grad_enabled(bool(wanted)):
                loss = cross_entropy(F.linear(piece, weight), targets[start:start + size], label_smoothing)
            grads = list(torch.autograd.grad(loss, wanted)) if wanted else []
            if hidden.requires_grad:
                grad_rows[start:start + size] = grads.pop(0)
            if head.requires_grad:
                grad_head += grads.pop(0)
            total = total + loss.detach()
        ctx.save_for_backward(grad_rows.view_as(hidden), grad_head)
        return total

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, grad_head = ctx.saved_tensors
        return (grad_hidden * grad_loss if ctx.needs_input_grad[0] else None,
                grad_head * grad_loss if ctx.needs_input_grad[1] else None, None, None)
