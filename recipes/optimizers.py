"""The default training with an optimizer from its own package:

    python -m recipes.optimizers adamw_8bit --output_dir runs/a --max_steps 200 ...     pip install bitsandbytes
    python -m recipes.optimizers schedule_free ...                                      pip install schedulefree
    python -m recipes.optimizers galore ...                                             pip install galore-torch
    python -m recipes.optimizers apollo ...                                             pip install apollo-torch

Every flag of train.py follows. All four run on CPU. adamw_8bit keeps the moments of matrices of at least 4,096 elements in
8 bits (Dettmers et al. 2022). schedule_free needs no decaying schedule: use --lr_scheduler_type constant (Defazio et al.
2024); its checkpoints hold the weights it trains, evaluation uses their average. galore (Zhao et al. 2024) and apollo (Zhu
et al. 2025) project the gradients of hidden matrices to rank 16; their projectors cannot be saved without pickle, so they
need --save_strategy no. bitsandbytes prints a line about a missing 4-bit kernel, which nothing here uses.
"""
from __future__ import annotations

import sys

import torch
from torch import nn

from args import TrainArgs
from optim import HIDDEN, parameter_groups
from state import UsageError
from train import main, run_main

RANK = 16


def adamw_8bit(model: nn.Module, args: TrainArgs) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit
    return AdamW8bit(parameter_groups(model, args.weight_decay), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                     eps=args.adam_epsilon)


def schedule_free(model: nn.Module, args: TrainArgs) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    class Resumable(AdamWScheduleFree):
        """Keeps its counters in the groups, where checkpoints do not look."""

        elementwise = True      # so ranks may cut parameters anywhere

        def get_extra_state(self) -> dict:
            return {key: self.param_groups[0][key] for key in ("k", "weight_sum", "lr_max", "train_mode")}

        def set_extra_state(self, state: dict) -> None:
            for group in self.param_groups:
                group.update(state)

    return Resumable(parameter_groups(model, args.weight_decay), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                     eps=args.adam_epsilon)


def galore(model: nn.Module, args: TrainArgs) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW
    return GaLoreAdamW(projected(model, args, update_proj_gap=50, scale=1.0, proj_type="std"), lr=args.learning_rate,
                       betas=(args.adam_beta1, args.adam_beta2), no_deprecation_warning=True)


def apollo(model: nn.Module, args: TrainArgs) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW
    return APOLLOAdamW(projected(model, args, update_proj_gap=50, scale=1.0, proj="random", scale_type="channel", proj_type="std"),
                       lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), no_deprecation_warning=True)


def projected(model: nn.Module, args: TrainArgs, **projection) -> list[dict]:
    """The usual groups, and the hidden matrices in one of their own that is projected."""
    if args.save_strategy != "no":
        raise UsageError("the projectors of galore and apollo cannot be saved without pickle: give --save_strategy no")
    hidden = [p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and HIDDEN.search(name)]
    chosen = {id(p) for p in hidden}
    groups = [{**group, "params": [p for p in group["params"] if id(p) not in chosen]} for group in parameter_groups(model, args.weight_decay)]
    return [*groups, {"params": hidden, "rank": RANK, "weight_decay": args.weight_decay, **projection}]


OPTIMIZERS = {f.__name__: f for f in (adamw_8bit, schedule_free, galore, apollo)}


def run(argv: list[str], **parts):
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return None
    if argv[0] not in OPTIMIZERS:
        raise UsageError(f"{argv[0]!r}: expected one of {', '.join(OPTIMIZERS)}, then the flags of train.py")
    return main(argv[1:], make_optimizer=OPTIMIZERS[argv[0]], **parts)


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
