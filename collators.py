"""How samples become a micro-batch: a dict of tensors for the model plus `num_items`, which the collator counts because only it
knows what the loss sums over."""
from __future__ import annotations

import torch

from state import Batch, UsageError

IGNORE = -100   # a label that weighs nothing, torch.nn.functional.cross_entropy's default


def default_collator(samples: list[dict] | Batch) -> Batch:
    """Stacks equally shaped samples; a data set with a batched `__getitems__` may hand over a finished batch instead. num_items is the
    number of labels that are not -100 if `labels` are whole numbers, else the number of samples."""
    if not isinstance(samples, dict):
        samples = {key: stack(key, [sample[key] for sample in samples]) for key in samples[0]}
    labels = samples.get("labels")
    if labels is None or labels.is_floating_point():
        num_items = len(next(iter(samples.values())))
    else:
        num_items = int((labels != IGNORE).sum())
    return {**samples, "num_items": num_items}


def stack(key: str, values: list) -> torch.Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) > 1:
        raise UsageError(f"the samples of a batch have different shapes in {key!r}: {sorted(shapes)}; "
                         f"pad them in the data set or give a collator that does")
    return torch.stack(tensors)
