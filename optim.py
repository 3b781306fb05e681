"""Optimizers and their parameter groups. To use another one, return it from `build_optimizer`. Two that
keep less than AdamW, Adafactor and Lion, are in recipes/lean_optimizers.py.

Sharding (zero.py) cuts parameters anywhere if an optimizer is `elementwise`, unless a group says "whole".
"""
from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from args import TrainArgs
from state import UsageError
from zero import Part

NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")     # by name, as in the HF Trainer
HIDDEN = re.compile(r"(?:^|\.)\d+\.")    # inside a numbered layer, such as blocks.0.up.weight


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups of the trainable parameters: decayed, and not (biases, norms by name, whatever is inside an nn.LayerNorm)."""
    in_layer_norm = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    groups: list[dict] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[id(parameter) in in_layer_norm or NO_DECAY.search(name.lower()) is not None]["params"].append(parameter)
    return groups


def build_optimizer(model: nn.Module, args: TrainArgs) -> torch.optim.Optimizer:
    """The optimizer of --optim over the bare model's parameters. --optim_args: its own settings, as "momentum=0.9,nesterov=True"."""
    betas, own = (args.adam_beta1, args.adam_beta2), parse_optim_args(args.optim_args)
    adamw = {"betas": betas, "eps": args.adam_epsilon}
    try:
        if args.optim == "muon":
            return MuonAdamW(model, args.learning_rate, args.weight_decay, **adamw, **own)
        if args.optim in ("adafactor", "lion"):
            from recipes.lean_optimizers import Adafactor, Lion
            kind, settings = (Adafactor, {}) if args.optim == "adafactor" else (Lion, {"betas": betas})
        else:
            kind, settings = {"adamw_torch_fused": (torch.optim.AdamW, {**adamw, "fused": True}), "adamw_torch": (torch.optim.AdamW, adamw),
                              "sgd": (torch.optim.SGD, {})}[args.optim]
        return kind(parameter_groups(model, args.weight_decay), **{"lr": args.learning_rate, **settings, **own})
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, UsageError) else \
            UsageError(f"--optim_args {args.optim_args}: {args.optim} does not take that ({error})") from None


def parse_optim_args(text: str | None) -> dict:
    """"a=1,b=0.5,c=True" as keyword arguments; words are kept as text."""
    values: dict = {}
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"--optim_args {text}: expected name=value pairs with commas between, got {part!r}")
        if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value):
            values[key] = int(value) if re.fullmatch(r"[-+]?\d+", value) else float(value)
        else:
            values[key] = {"True": True, "true": True, "False": False, "false": False}.get(value, value)
    return values


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Sets the learning rate of each group, times the group's "lr_scale" if it has one, and returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon (Jordan et al. 2024) for the matrices inside numbered layers, AdamW for everything else. The orthogonalised
    update is scaled to the size of AdamW's (adjust_lr_fn="match_rms_adamw", Liu et al. 2025, section 2.2), so both take the same
    learning rate and weight decay. momentum, nesterov, ns_steps go to Muon."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, **muon):
        matrices = {p for name, p in model.named_parameters() if p.ndim == 2 and HIDDEN.search(name)}
        decayed, plain = parameter_groups(model, weight_decay)
        hidden = [p for p in decayed["params"] if p in matrices]
        if not hidden:
            raise UsageError("--optim muon found no matrix inside a numbered layer (such as blocks.0.up.weight): use another optimizer")
        decayed["params"] = [p for p in decayed["params"] if p not in matrices]
        self.muon = torch.optim.Muon([{"params": hidden, "whole": True}], lr=lr, weight_decay=weight_decay,
                                     **{"adjust_lr_fn": "match_rms_adamw", **muon})
        self.adamw = torch.optim.AdamW([{**decayed, "whole": False}, {**plain, "whole": False}], lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self.share()

    def share(self) -> None:
        """One set of groups and one state for the two parts and the whole, so that checkpoints see one optimizer."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.share()

    @torch.no_grad()
    def step(self, closure=None):
        self.muon.step()
        self.adamw.step()


class EMA:
    """Exponential moving average of the trained weights, taken after every update (Polyak and Juditsky 1992):
    average = decay * average + (1 - decay) * weight, in float32 at least. Each rank averages the parts that it trains."""

    def __init__(self, parts: list[Part], decay: float):
        self.parts = [part._replace(piece=part.piece.detach().to(torch.promote_types(part.piece.dtype, torch.float32), copy=True)) for part in parts]
        self.trained, self.averages = [part.piece for part in parts], [part.piece for part in self.parts]
        self.average = get_ema_multi_avg_fn(decay)

    def restart(self) -> None:
        """From the weights as they are."""
        copy_all(self.averages, self.trained)

    def update(self) -> None:
        self.average(self.averages, [p.detach().to(a.dtype) for p, a in zip(self.trained, self.averages)], None)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The pieces have the averages for weights, to evaluate them; then their own again."""
        kept = [p.detach().clone() for p in self.trained]
        copy_all(self.trained, self.averages)
        try:
            yield
        finally:
            copy_all(self.trained, kept)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources):
        target.detach().copy_(source.detach())
