"""Number formats of a run: what autocast computes in, how fp16 gradients are scaled, and what happens to an update that
overflows. Weights, gradients and optimizer state stay float32.

bf16 and fp16 compute the matrix products of forward and backward in 16 bits. fp16 has a small range, so the loss is
multiplied by a scale before backward and gradients are divided by it before they are clipped; an update that overflows
is skipped, the scale halved, and doubled again after 2,000 good updates (Micikevicius et al. 2018, sections 3.1-3.2).
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from state import UsageError


class Precision:
    """fp16, bf16: compute in that type. tf32: on NVIDIA GPUs, multiply float32 in 19 bits (None leaves torch's setting).

    full_eval: the weights themselves are cast for evaluation outside training.
    """

    def __init__(self, device: torch.device, fp16: bool = False, bf16: bool = False, tf32: bool | None = None,
                 full_eval: torch.dtype | None = None):
        self.device, self.full_eval = device, full_eval
        self.dtype = torch.float16 if fp16 else torch.bfloat16 if bf16 else None
        self.scaler = torch.amp.GradScaler(device.type) if fp16 else None
        self.previous: tuple[Tensor, torch.cuda.Event] | None = None
        if tf32 is not None:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the scale, once per update and before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    @property
    def scales(self) -> bool:
        return self.scaler is not None

    def step(self, optimizer: torch.optim.Optimizer, finite: Tensor) -> bool:
        """Steps the optimizer unless `finite` () is False or fp16 gradients have overflowed. Returns whether it stepped.

        On an accelerator a fused optimizer reads `finite` by itself and the host is not held up: then True may also mean
        that the device skipped the update, which `was_finite` tells one update later. Other optimizers have to wait.
        """
        if self.scaler is not None:
            before = self.scaler.get_scale()
            if not finite:                      # the scaler waits for the device anyhow
                self.scaler.update(before)      # forget this update's gradients; the scale stays
                return False
            self.scaler.step(optimizer)
            self.scaler.update()
            return self.scaler.get_scale() >= before     # lowered after an overflow, and only then
        if self.device.type != "cpu" and optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()
            optimizer.step()
            return True
        if finite:
            optimizer.step()
        return bool(finite)

    def was_finite(self, finite: Tensor) -> bool:
        """Whether this update was finite; on an accelerator the one before, which it has finished, so that nothing waits."""
        if self.device.type == "cpu":
            return bool(finite)
        copy = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        previous, self.previous = self.previous, (copy, copied)
        if previous is None:
            return True
        previous[1].synchronize()
        return bool(previous[0])

    def check_model(self, model: nn.Module) -> None:
        """fp16 scaling needs float32 weights: their gradients would else be float16 and cannot be unscaled."""
        half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
        if self.scaler is not None and half:
            raise UsageError(f"--fp16 trains float32 weights, and {half[0]} is float16 ({len(half)} parameters are): "
                             f"use model.float(), or --bf16 with model.bfloat16()")

    @contextlib.contextmanager
    def evaluation_weights(self, model: nn.Module, training: bool) -> Iterator[None]:
        """Casts the weights for the length of an evaluation outside training (--bf16_full_eval, --fp16_full_eval)."""
        if self.full_eval is None or training:
            yield
            return
        kept = {p: p.data for p in model.parameters() if p.is_floating_point()}
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
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
