"""Two optimizers that keep less than AdamW's two moments: --optim adafactor, a row and a column of each matrix, and --optim lion, one
moment."""
from __future__ import annotations

import math

import torch


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
