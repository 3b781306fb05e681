"""Number formats of a run: what autocast computes in, how fp16 gradients are scaled, and what happens to an update that
overflows. Weights, gradients and optimizer state stay float32.

bf16 and fp16 compute the matrix products of forward and backward in 16 bits. fp16 has a small range, so the loss is
multiplied by a scale before backward and gradients are divided by it before they are clipped; an update that overflows
is skipped, the scale halved, and doubled again after 2,000 good updates (Micikevicius et al. 2018, sections 3.1-3.2).
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from state import Update, UsageError


class Precision:
    """fp16, bf16: compute in that type. tf32: on NVIDIA GPUs, multiply float32 in 19 bits (None leaves torch's setting).
    full_eval: the weights themselves are cast for evaluation outside training."""

    def __init__(self, device: torch.device, fp16: bool = False, bf16: bool = False, tf32: bool | None = None,
                 full_eval: torch.dtype | None = None):
        self.device, self.full_eval = device, full_eval
        self.dtype = torch.float16 if fp16 else torch.bfloat16 if bf16 else None
        self.scaler = torch.amp.GradScaler(device.type) if fp16 else None
        self.pending: tuple | None = None       # the update an accelerator has not been asked about yet
        if tf32 is not None:
            torch.backends.fp32_precision = "tf32" if tf32 else "ieee"

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the scale, once per update and before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    @property
    def scales(self) -> bool:
        """Whether an overflow of the gradients can be cured by a lower scale."""
        return self.scaler is not None and self.scaler.get_scale() >= 1.0

    def device_skips(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer itself leaves out an update that is not finite, on the device and without the host waiting."""
        return self.device.type != "cpu" and self.scaler is None and bool(optimizer.defaults.get("fused")) \
            and isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam))

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor) -> tuple[bool, bool | Tensor]:
        """Steps the optimizer unless `loss` or `grad_norm` () are not finite. Returns whether it stepped, and whether the update failed: an
        overflow in fp16 is no failure. Where the device skips by itself it always steps, and a tensor () tells `find_nonfinite` one update later."""
        if self.device_skips(optimizer):
            total = loss + grad_norm
            failed = total - total != 0     # infinite or NaN; torch.isfinite would be five kernels for each
            optimizer.found_inf = failed.float()
            optimizer.step()
            return True, failed
        loss_finite, norm_finite = math.isfinite(loss), math.isfinite(grad_norm)        # here the host has to know
        finite = loss_finite and norm_finite
        failed = not (loss_finite if self.scales else finite)
        if finite:
            optimizer.step()
        if self.scaler is not None:
            # The scaler's own step and update go by this rank's gradients alone. All ranks have to agree, so the norm decides.
            state = self.scaler.state_dict()
            if finite:
                state["_growth_tracker"] += 1
                if state["_growth_tracker"] == state["growth_interval"]:
                    state["scale"], state["_growth_tracker"] = state["scale"] * state["growth_factor"], 0
            elif loss_finite:       # or else the scale was not to blame
                state["scale"], state["_growth_tracker"] = state["scale"] * state["backoff_factor"], 0
            self.scaler.load_state_dict(state)
            self.scaler.update(state["scale"])      # and forgets these gradients
        return finite, failed

    def find_nonfinite(self, step: int, update: Update) -> tuple[int, Update] | None:
        """The update known by now not to be finite: this one, or, on an accelerator, the one before. That one is done,
        so nothing waits; `find_last_nonfinite` asks about the last one."""
        if isinstance(update.failed, bool) or self.device.type == "cpu":
            return (step, update) if update.failed else None
        copy = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(update.failed, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        found = self.find_last_nonfinite()
        self.pending = (step, update, copy, copied)
        return found

    def find_last_nonfinite(self) -> tuple[int, Update] | None:
        if self.pending is None:
            return None
        (step, update, copy, copied), self.pending = self.pending, None
        copied.synchronize()
        return (step, update) if copy else None

    def check_model(self, model: nn.Module) -> None:
        """fp16 scaling needs float32 weights: their gradients would else be float16 and cannot be unscaled."""
        half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
        if self.scaler is not None and half:
            raise UsageError(f"--fp16 trains float32 weights, and {half[0]} is float16 ({len(half)} parameters are): "
                             f"use model.float(), or --bf16 with model.bfloat16()")

    @contextlib.contextmanager
    def evaluation_weights(self, model: nn.Module, training: bool) -> Iterator[None]:
        """Casts the weights for the length of an evaluation outside training (--bf16_full_eval, --fp16_full_eval)."""
        cast = self.full_eval is not None and not training
        kept = {p: p.data for p in [*model.parameters(), *model.buffers()] if cast and p.is_floating_point()}
        for p in kept:
            p.data = p.data.to(self.full_eval)
        try:
            yield
        finally:
            for p, data in kept.items():
                p.data = data

    def state_dict(self) -> dict:
        """The loss scale and its counter, for the checkpoint."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if state and self.scaler is not None:
            self.scaler.load_state_dict(state)
