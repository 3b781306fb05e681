"""CPU time per update of this trainer over a bare loop, on a model so small that overhead is all there is.

    python -m bench.overhead [--rounds 10] [--updates 300]

Both train the same GPT (d=32, one block, micro-batch 2 x 16) on the same batches with the same fused AdamW, clipping and
schedule; the rounds alternate, and the ratio is given per round with its spread.
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch

from args import TrainArgs
from collators import default_collator
from data import Blocks
from loader import Loader
from loop import train
from loss import compute_loss
from model import GPT
from optim import build_optimizer
from schedules import build_schedule
from train import assemble
from world import open_world, set_seed


def make(updates: int) -> tuple[TrainArgs, GPT, Blocks]:
    args = TrainArgs(output_dir=tempfile.mkdtemp(), max_steps=updates, per_device_train_batch_size=2, logging_steps=100, save_strategy="no",
                     learning_rate=1e-3)
    set_seed(0)
    tokens = torch.randint(256, (100_000,), dtype=torch.uint8)
    return args, GPT(256, 16, n_layer=1, n_head=2, n_embd=32), Blocks(tokens, torch.arange(0, 99_000, 16), 16)


def bare(updates: int) -> float:
    """CPU seconds of the loop anybody would write by hand over the same data path."""
    args, model, data = make(updates)
    optimizer, schedule = build_optimizer(model, args), build_schedule(args, updates)
    batches = Loader(data, default_collator, 2, seed=42, shuffle=True).epoch()
    start = time.process_time()
    for step in range(updates):
        batch = next(batches)
        loss = model(batch["input_ids"], batch["labels"]) / batch["num_items"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            loss.item()
    return time.process_time() - start


def ours(updates: int) -> float:
    args, model, data = make(updates)
    with open_world(args) as world:
        run, loader, _ = assemble(args, world, model, data)
        run.callbacks.callbacks = []      # printing is not what is measured
        start = time.process_time()
        train(run, loader, None, compute_loss)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--updates", type=int, default=300)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    bare(50), ours(50)      # the first updates pay for lazy imports
    ratios = []
    for _ in range(flags.rounds):
        base = bare(flags.updates)
        mine = ours(flags.updates)
        ratios.append(mine / base)
        print(f"bare {1e3 * base / flags.updates:.3f} ms  trainer {1e3 * mine / flags.updates:.3f} ms  ratio {ratios[-1]:.3f}", flush=True)
    print(f"CPU time per update over the bare loop: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}, "
          f"{flags.rounds} rounds, torch {torch.__version__}, 1 thread")


if __name__ == "__main__":
    main()
