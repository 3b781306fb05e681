"""What training costs: seconds, by what they went to, and memory."""
from __future__ import annotations

import contextlib
import sys
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

    def read(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        self.to(self.part)
        seconds, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return seconds


class Memory:
    """What each stage of a program (init, train, eval, test) does to the memory of this process and its accelerator, in bytes, by the names
    of the HF Trainer's memory metrics: alloc_delta is held at its end and was not before, peaked_delta was held for a time beyond
    that. A stage restarts the peak, that of `memory` too."""

    def __init__(self, device: torch.device = torch.device("cpu"), on: bool = False):      # noqa: B008
        self.device, self.on, self.stage = device, on, ""
        self.found: dict[str, int] = {f"before_init_mem_{what}": now for what, (now, _) in held(self.device).items()} if on else {}
        self.start("init")

    def start(self, stage: str) -> None:
        """Ends the stage before, if there is one."""
        if not self.on:
            return
        ends = held(self.device)
        for what, (now, peak) in ends.items() if self.stage else ():
            self.found |= {f"{self.stage}_mem_{what}_alloc_delta": now - self.began[what][0], f"{self.stage}_mem_{what}_peaked_delta": max(0, peak - now)}
        self.stage, self.began = stage, ends
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")     # restarts VmHWM: proc(5)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> dict[str, int]:
        """Ends the stage; what was found since the last call. Nothing if it is off."""
        self.start("")
        found, self.found = self.found, {}
        return found


def memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process, and its accelerator, have held so far, in megabytes."""
    return {{"cpu": "memory_peak_mb", "gpu": "memory_device_peak_mb"}[what]: peak / 1e6 for what, (_, peak) in held(device).items()}


def held(device: torch.device) -> dict[str, tuple[int, int]]:
    """(bytes now, the most so far) of the process, which only Linux tells, and of its accelerator."""
    found = {}
    if sys.platform == "linux":
        with open("/proc/self/status") as file:     # getrusage's peak would be that of the process which started this one, if it was larger
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file if line.startswith(("VmRSS", "VmHWM"))}
        found["cpu"] = kilobytes["VmRSS"] * 1024, kilobytes["VmHWM"] * 1024
    if device.type == "cuda":
        found["gpu"] = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return found
