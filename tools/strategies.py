"""Runs every strategy on real ranks, and shows that all are the same training and what each holds and sends:

    python -m tools.strategies [--no_memory]

One row per strategy, ranks and accumulation. The difference from one process: largest of a weight in float64 after 6 AdamW updates
with clipping, and largest of a logged loss in float32, bf16 and fp16. Bytes held per rank in float32 for weights, gradients and
optimizer state, as "measured / formula of the ZeRO paper", in multiples of the P weights' own 4P bytes; bytes that a rank
sends per update, counted at the collectives as ring algorithms send them, as "measured / theory" in the same unit; and how
many reductions of gradients an update makes. Then the growth of the memory of a process with a model of 50 million parameters.
Exits with 1 if anything is beyond its bound, and marks it with "!".
"""
from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from dataclasses import dataclass, field

import torch

from args import TrainArgs
from callbacks import Callback
from cost import Clock
from data import Blocks
from distributed import build_on, find_units, local_part, whole
from loop import train
from loss import compute_loss
from model import GPT
from tests.ranks import Ranks
from tools.ledger import Ledger, Route, Traffic, sent, storage_bytes
from world import open_world, set_seed

BATCH, LENGTH, BUCKET_MB = 8, 32, 0.05
BOUNDS = {"float64": 1e-11, "float32": 1e-5, "bf16": 3e-2, "fp16": 3e-2}
MEMORY_SHARE, SENT_SHARE, GROWTH_SHARE = 0.05, 0.05, 0.15


@dataclass
class Case:
    strategy: str
    world_size: int
    accumulation: int
    precision: str = "float32"
    n_embd: int = 64
    n_layer: int = 4
    folder: str = field(default_factory=tempfile.mkdtemp)      # of its run, the same on all ranks


class Watch(Callback):
    """Bytes that this rank holds, at the end of a micro-batch and before the update; what it sends in the last update."""

    def __init__(self, clock: Clock):
        self.held, self.ledger, self.rss, self.buckets = {"weights": 0, "gradients": 0, "optimizer": 0}, Ledger(clock, 8), 0, []
        self.peak = 0

    def look_inside(self, model) -> None:
        """Gradients at their peak: those of parameters, and whole and reduced buckets."""
        tensors = [p.grad for p in model.parameters() if p.grad is not None]
        tensors += [t for bucket in self.buckets for t in (bucket.grad, bucket.buffer, bucket.reduced) if t is not None]
        self.peak = max(self.peak, storage_bytes(tensors))

    def look(self, model, optimizer) -> None:
        weights = [local_part(p)[0] for p in model.parameters()]
        pieces = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in [*model.parameters(), *pieces] if p.grad is not None]
        gradients += [t for bucket in self.buckets for t in (bucket.grad, bucket.buffer) if t is not None]
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        for name, tensors in (("weights", weights), ("gradients", gradients), ("optimizer", states)):
            self.held[name] = max(self.held[name], storage_bytes(tensors))
        self.rss = max(self.rss, resident())

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == state.max_steps:
            self.ledger.__enter__()

    def on_substep_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step + 1 == state.max_steps:
            self.look(model, optimizer)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step + 1 == state.max_steps:
            self.look(model, optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.ledger.__exit__(None, None, None)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_case(case: Case, updates: int, weights: bool) -> dict:
    from train import assemble
    args = TrainArgs(output_dir=case.folder, strategy=case.strategy, max_steps=updates, logging_steps=1, save_strategy="no",
                     per_device_train_batch_size=BATCH // case.world_size // case.accumulation, gradient_accumulation_steps=case.accumulation,
                     learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=0.5, ddp_bucket_cap_mb=25.0 if case.strategy in ("fsdp", "hsdp") else BUCKET_MB, bf16=case.precision == "bf16",
                     fp16=case.precision == "fp16", hsdp_shard_size=2 if case.strategy == "hsdp" else None, disable_tqdm=True)
    tokens = torch.randint(256, (100 * LENGTH + 1,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = Blocks(tokens, torch.arange(0, 100 * LENGTH, LENGTH), LENGTH)
    before = resident()
    with open_world(args) as world:
        set_seed(0)
        model = build_on(world, lambda: GPT(256, LENGTH, case.n_layer, 4, case.n_embd), meta_init=True)
        if case.precision == "float64":
            model = model.double()
        run, loader, _ = assemble(args, world, model, data)
        watch = Watch(world.clock)
        run.callbacks.callbacks = [watch]
        if case.strategy in ("ddp", "zero1", "zero2") and world.world_size > 1:
            watch.buckets = run.parallel.buckets
            for p in model.parameters():        # after the trainer's own hooks: what is held in the middle of backward
                p.register_post_accumulate_grad_hook(lambda _: watch.look_inside(model))
        train(run, loader, None, compute_loss)
        losses = [row["loss"] for row in run.state.log_history if "loss" in row]
        bare = run.model
        names = dict(bare.named_parameters()) if weights else {}
        units = [sum(math.prod(p.shape) for p in unit.parameters()) for unit in find_units(bare, None)]
        traffic = {route: each for route, each in watch.ledger.traffic.items() if not route.control}
        n, told = world.world_size, 8 * (1 + len(run.parallel.names))       # a message about the loss and the use of parameters, which is no gradient
        message = sent(Route("all-reduce", "all", n, n, False), told) if n > 1 else Traffic()
        reductions = sum(traffic[route].count for route in traffic if route.kind in ("all-reduce", "reduce-scatter")) - message.count
        return {"losses": losses, "weights": {name: whole(p) for name, p in names.items()}, "held": watch.held, "sent": sum(each.inside for each in traffic.values()) - message.inside,
                "reductions": reductions, "peak": watch.peak, "buckets": [bucket.size * 4 for bucket in watch.buckets],
                "grew": watch.rss - before, "units": units,
                "total": sum(math.prod(p.shape) for p in bare.parameters())}


def held_formula(case: Case) -> dict[str, float]:
    """In multiples of the weights of one process; Rajbhandari et al. 2020, figure 1, for float32 and Adam. zero1 holds all gradients only
    while a window adds up; in its last micro-batch each bucket goes as soon as it is reduced."""
    n = 2 if case.strategy == "hsdp" else case.world_size
    split = case.strategy != "ddp"
    return {"weights": 1 / n if case.strategy in ("fsdp", "hsdp") else 1,
            "gradients": 1 if not split or case.strategy == "zero1" and case.accumulation > 1 else 1 / n, "optimizer": 2 / n if split else 2}


def sent_formula(case: Case, blocks: float) -> tuple[float, int]:
    """Multiples of the weights that a rank sends per update, and reductions of gradients. blocks: their share of the weights."""
    n, g = case.world_size, case.accumulation
    if n == 1:
        return 0.0, 0
    if case.strategy in ("ddp", "zero1"):
        return 2 * (n - 1) / n, 1
    if case.strategy == "zero2":
        return (g + 1) * (n - 1) / n, g
    shard = 2 if case.strategy == "hsdp" else n
    gathers = 2 * blocks + (1 - blocks)      # the root stays gathered from forward to backward
    between = 2 * (n // shard - 1) / (n // shard) / shard
    return g * (gathers + 1) * (shard - 1) / shard + between, g


def show(case: Case, results: dict[str, dict], expected: dict[str, dict]) -> bool:
    """Prints the row of one strategy; whether all of it is within bounds."""
    fine, cells = True, [case.strategy, str(case.world_size), str(case.accumulation)]

    def add(text: str, good: bool) -> None:
        nonlocal fine
        fine &= good
        cells.append(text + "" if good else text + " !")
    for precision, got in results.items():
        if precision == "float64":
            difference = max(float((got["weights"][name] - w).abs().max()) for name, w in expected[precision]["weights"].items())
        else:
            difference = max(abs(a - b) for a, b in zip(got["losses"], expected[precision]["losses"]))
        add(f"{difference:.1e}", difference <= BOUNDS[precision])
    got, size = results["float32"], 4 * results["float32"]["total"]
    for name, formula in held_formula(case).items():
        measured = got["held"][name] / size
        add(f"{measured:.3f} / {formula:.3f}", abs(measured - formula) <= MEMORY_SHARE * formula)
    if got["buckets"]:      # in the middle of backward: beside what is held, three buckets on their way and what fills the next ones
        formula = held_formula(case)["gradients"]
        bound = (1 if case.accumulation > 1 or case.strategy == "ddp" else 0) if case.strategy != "zero2" else formula
        bound = max(bound, formula) + 5 * max(got["buckets"]) / size
        add(f"{got['peak'] / size:.3f} < {bound:.3f}", got["peak"] / size <= bound)
    else:
        add("-", True)
    theory, reductions = sent_formula(case, sum(got["units"]) / got["total"])
    add(f"{got['sent'] / size:.3f} / {theory:.3f}", abs(got["sent"] / size - theory) <= SENT_SHARE * theory)
    buckets = len(got["units"]) + 1 if case.strategy in ("fsdp", "hsdp") else max(len(got["buckets"]), 1)
    if case.strategy == "hsdp":
        reductions += 1       # the all-reduce between the groups
    add(f"{got['reductions'] / buckets:g} / {reductions}", got["reductions"] == reductions * buckets)
    print("| " + " | ".join(cells) + " |", flush=True)
    return fine


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no_memory", action="store_true", help="leave out the model of 50 million parameters")
    flags = parser.parse_args(argv)
    os.environ.update({"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"} | ({} if torch.cuda.is_available() else {"GLOO_SOCKET_IFNAME": "lo"}))
    ranks, fine = Ranks(), True
    print("| strategy | ranks | accumulation | weights, float64 | loss, float32 | loss, bf16 | loss, fp16 | weights held | gradients held "
          "| optimizer held | gradients at their peak | sent per update | reductions |\n" + "|---" * 13 + "|")
    for accumulation in (1, 2):
        expected = {precision: ranks.run(1, run_case, Case("ddp", 1, accumulation, precision), 6, True)[0] for precision in BOUNDS}
        for strategy, world_size in [(s, n) for n in (1, 2, 4) for s in ("ddp", "zero1", "zero2", "fsdp")] + [("hsdp", 4)]:
            case = Case(strategy, world_size, accumulation)
            results = {precision: ranks.run(world_size, run_case, Case(strategy, world_size, accumulation, precision), 6, True)[0] for precision in BOUNDS}
            fine &= show(case, results, expected)
    ranks.close()
    if not flags.no_memory:
        print("\n| strategy | ranks | memory of a process grew by, MB | less than ddp by, MB | predicted, MB |\n" + "|---" * 5 + "|")
        grew = {}
        for strategy, world_size in [(s, 2) for s in ("ddp", "zero1", "zero2", "fsdp")] + [("ddp", 4), ("hsdp", 4)]:
            case, pool = Case(strategy, world_size, 2, n_embd=512, n_layer=16), Ranks()     # fresh processes
            results = pool.run(world_size, run_case, case, 2, False)
            pool.close()
            grew[strategy, world_size] = max(result["grew"] for result in results)
            ddp = Case("ddp", world_size, 2)
            predicted = 4 * results[0]["total"] * (sum(held_formula(ddp).values()) - sum(held_formula(case).values()))
            saved = grew["ddp", world_size] - grew[strategy, world_size]
            good = abs(saved - predicted) <= GROWTH_SHARE * predicted
            fine &= good
            print(f"| {strategy} | {world_size} | {grew[strategy, world_size] / 1e6:.0f} | {saved / 1e6:.0f} | {predicted / 1e6:.0f}{'' if good else ' !'} |",
                  flush=True)
    print("\nall within bounds" if fine else "\nbeyond the bounds where marked with !")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
