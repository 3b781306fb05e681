"""Optimizers and their parameter groups. To use another one, return it from `build_optimizer`."""
from __future__ import annotations

import re

import torch
from torch import nn

from args import TrainArgs

# parameters without weight decay, by name, as in the HF Trainer
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups of the trainable parameters: decayed, and not (biases, norms by name, whatever is inside an nn.LayerNorm)."""
    in_layer_norm = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    groups: list[dict] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[id(parameter) in in_layer_norm or NO_DECAY.search(name.lower()) is not None]
            group["params"].append(parameter)
    return groups


def build_optimizer(model: nn.Module, args: TrainArgs) -> torch.optim.Optimizer:
    """The optimizer of --optim over the bare model's parameters."""
    groups = parameter_groups(model, args.weight_decay)
    if args.optim == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                             eps=args.adam_epsilon, fused=True if args.optim == "adamw_torch_fused" else None)


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> float:
    """Sets each group's learning rate to `multiplier` times its peak, and returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * multiplier
    return optimizer.param_groups[0]["lr"]
