"""Peak memory of training with a large vocabulary: all logits at once against the chunked loss.

    python -m bench.memory [--vocab 32000] [--rows 4096]

Each case is a process of its own; what is printed is its peak resident memory above that after building the model.
"""
from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch

import loss
from model import GPT


def measure(chunk_elements: int, vocab: int, rows: int) -> None:
    """Prints the growth of peak memory in MB, the loss, and the seconds of the second of two updates."""
    torch.manual_seed(0)
    loss.CHUNK_ELEMENTS = chunk_elements
    model = GPT(vocab, 256, n_layer=2, n_head=4, n_embd=128)
    ids = torch.randint(vocab, (rows // 256, 257))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        start = time.perf_counter()
        value = model(ids[:, :-1], ids[:, 1:]) / rows
        value.backward()
        seconds = time.perf_counter() - start
        model.zero_grad()
    print(f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f} {value.item():.6f} {seconds:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--chunk", type=int, help="measure one case in this process")
    flags = parser.parse_args()
    if flags.chunk is not None:
        measure(flags.chunk, flags.vocab, flags.rows)
        return
    print(f"vocabulary {flags.vocab}, {flags.rows} tokens\n| logits | peak memory, MB | loss | seconds |\n|---|---|---|---|")
    peaks = []
    for name, chunk in (("all at once", 2**62), ("chunked", loss.CHUNK_ELEMENTS)):
        command = [sys.executable, "-m", "bench.memory", "--vocab", str(flags.vocab), "--rows", str(flags.rows), "--chunk", str(chunk)]
        peak, value, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        peaks.append(float(peak))
        print(f"| {name} | {peak} | {value} | {seconds} |", flush=True)
    if peaks[1] > peaks[0] / 2:
        sys.exit("the chunked loss takes more than half the memory")


if __name__ == "__main__":
    main()
