"""The loss. Every loss here is a SUM over label items; loop.py divides it once by their count over the window and all ranks.

To train with another loss, change `compute_loss` (the collator must count in num_items what it sums over).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collators import IGNORE
from state import Batch


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Summed loss () of one micro-batch {input_ids, labels (B, T)}; the model computes it inside its one forward call,
    where the hooks of DDP and FSDP see it."""
    return model(batch["input_ids"], batch["labels"])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over labels that are not -100: logits (..., V), labels (...) -> ().

    Computed in float32 at least, whatever the logits come in.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")
