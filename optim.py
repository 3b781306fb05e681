"""Optimizers and their parameter groups. To use another one, return it from `build_optimizer`.

Sharding (zero.py) cuts parameters anywhere if an optimizer is `elementwise`, unless a group says "whole".
"""
from __future__ import annotations

import contextlib
import math
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
        kind, settings = {"adamw_torch_fused": (torch.optim.AdamW, {**adamw, "fused": True}), "adamw_torch": (torch.optim.AdamW, adamw),
                          "sgd": (torch.optim.SGD, {}), "adafactor": (Adafactor, {}), "lion": (Lion, {"betas": betas})}[args.optim]
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


class Adafactor(torch.optim.Optimizer):
    """Second moments of a matrix kept as a row and a column. Shazeer and Stern 2018, algorithms 4 and 5, with an external
    learning rate, as the HF Trainer uses it (scale_parameter=False, relative_step=False): the update is clipped to root mean
    square `clip_threshold`; the decay of the moments is 1 - step ** decay_rate (section 7.2)."""

    def __init__(self, params, lr: float, eps: float = 1e-30, clip_threshold: float = 1.0, decay_rate: float = -0.8,
                 beta1: float | None = None, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate, "beta1": beta1,
                                  "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.state[p], p.grad.to(torch.promote_types(p.dtype, torch.float32))
                if not state:
                    shapes = {"row": p.shape[:-1], "column": p.shape[:-2] + p.shape[-1:]} if p.ndim >= 2 else {"square": p.shape}
                    if group["beta1"] is not None:
                        shapes["exp_avg"] = p.shape
                    state.update({name: grad.new_zeros(shape) for name, shape in shapes.items()}, step=torch.zeros(()))
                state["step"] += 1
                decay = 1.0 - math.pow(state["step"].item(), group["decay_rate"])     # a CPU tensor: no device is waited for
                square = grad**2 + group["eps"]
                if p.ndim >= 2:
                    state["row"].mul_(decay).add_(square.mean(dim=-1), alpha=1.0 - decay)
                    state["column"].mul_(decay).add_(square.mean(dim=-2), alpha=1.0 - decay)
                    row = (state["row"] / state["row"].mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
                    update = (row * state["column"].unsqueeze(-2).rsqrt()).mul_(grad)
                else:
                    state["square"].mul_(decay).add_(square, alpha=1.0 - decay)
                    update = state["square"].rsqrt().mul_(grad)
                root_mean_square = update.norm(2) / (update.numel() ** 0.5)
                update.div_((root_mean_square / group["clip_threshold"]).clamp_(min=1.0)).mul_(group["lr"])
                if group["beta1"] is not None:
                    update = state["exp_avg"].mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
                if group["weight_decay"] != 0:
                    p.add_(p, alpha=-group["weight_decay"] * group["lr"])
                p.add_(-update)


class Lion(torch.optim.Optimizer):
    """Steps by the sign of an interpolated momentum. Chen et al. 2023, algorithm 2: use a 3-10 times smaller learning rate
    than AdamW's and as much larger weight decay (section 5)."""

    elementwise = True

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(state["exp_avg"].lerp(p.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                state["exp_avg"].lerp_(p.grad, 1 - beta2)


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
        self.trained = [part.piece for part in parts]
        self.average = get_ema_multi_avg_fn(decay)

    def restart(self) -> None:
        """From the weights as they are."""
        for part, p in zip(self.parts, self.trained):
            part.piece.copy_(p.detach())

    def update(self) -> None:
        averages = [part.piece for part in self.parts]
        self.average(averages, [p.detach().to(a.dtype) for p, a in zip(self.trained, averages)], None)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The pieces have the averages for weights, to evaluate them; then their own again."""
        kept = [p.detach().clone() for p in self.trained]
        self.set([part.piece for part in self.parts])
        try:
            yield
        finally:
            self.set(kept)

    def set(self, values: list[Tensor]) -> None:
        for p, value in zip(self.trained, values):
            p.detach().copy_(value)
