"""What training costs: seconds, by what they went to, and memory."""
from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import torch

PARTS = ("data", "forward", "backward", "communication", "optimizer", "log", "evaluate", "save", "other")


class Clock:
    """Where the time of a run goes, in seconds by part. It is always in one part, so that they add up to all of it. On a GPU it is the
    host's time: kernels are queued there, and waited for where a result is needed."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.part, self.at, self.held = "other", time.perf_counter(), False

    def to(self, part: str) -> str:
        """From here on time counts as this part. Returns the one before."""
        before, now = self.part, time.perf_counter()
        if not self.held:
            self.seconds[before] += now - self.at
            self.part, self.at = part, now
        return before

    @contextlib.contextmanager
    def within(self, part: str, hold: bool = False) -> Iterator[None]:
        """hold: all that is done inside counts as this part."""
        before, held = self.to(part), self.held
        self.held = held or hold
        try:
            yield
        finally:
            self.held = held
            self.to(before)

    def timing(self, part: str, iterator: Iterator) -> Iterator:
        """The same iterator, whose work counts as this part."""
        while True:
            with self.within(part):
                item = next(iterator, self)
            if item is self:
                return
            yield item

    def read(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        self.to(self.part)
        seconds, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return seconds


def memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process, and its accelerator, have held so far, in megabytes."""
    host = {"memory_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}       # Linux counts in kilobytes
    return host if device.type == "cpu" else {**host, "memory_device_peak_mb": torch.cuda.max_memory_allocated(device) / 1e6}
