"""Number formats of a run: what autocast computes in, and how the loss is scaled before backward."""
from __future__ import annotations

import contextlib

from torch import Tensor


class Precision:
    """float32 throughout. Every operation of an update whose maths depends on the number format goes through here."""

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
