"""What a run would hold, send and compute on so many ranks, before it is launched:

    python -m tools.dryrun --strategy fsdp --bf16 --n_layer 32 --n_embd 4096 --n_head 32 --vocab_size 128256 --block_size 4096 \\
      --per_device_train_batch_size 1 --ranks 1024 [--memory 80e9 --flops 4e14 --bandwidth 3e11 --node_bandwidth 2e11] [--compare]

Any flags of train.py, and those of this tool. Nothing is computed or sent: the code that would train, from build_model to train_step, makes two
updates of one rank on tensors without numbers, in a process group without peers, and every operator is looked at (tools/ledger.py). The first
update makes the optimizer's state, the second is counted. Of an accumulation over more than two micro-batches the first stands for all but the
last. Micro-batches are full, of --block_size tokens; data, evaluation and checkpoints are not looked at.

--measure trains on real ranks of this machine too, and shows predicted / measured.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from args import TrainArgs, parse_args
from callbacks import Callback
from collators import default_collator
from distributed import build_on, find_units, local_part
from loop import train_step
from loss import compute_loss
from model import build_model
from state import Run, UsageError, run_main
from tools.find_lr import ONLY_TRAIN
from tools.ledger import Ledger, Route, Traffic, storage_bytes
from train import assemble
from world import World, open_mesh, open_world

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError as error:
    raise UsageError(f"torch {torch.__version__} has no fake tensors or no fake process group where 2.13 has them: {error}") from None

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "hsdp")
REFUSED = {"model_name_or_path": "it would have to be read; give the flags of its shape", "lora_base": "quantized weights are made of numbers",
           "lora_adapter": "it would have to be read; give --lora_rank and its like",
           "torch_compile": "what a compiler keeps for backward is known only when it has compiled",
           "n_experts": "how many tokens an expert gets depends on numbers",
           **dict.fromkeys(("cp", "tp", "pp", "ep"), "only data-parallel ranks are, which are all alike")}
OF_BUCKETS = ["ddp_bucket_cap_mb", "ddp_find_unused_parameters"]
OF_SHARDS = ["fsdp_transformer_layer_cls_to_wrap", "reshard_after_forward", "hsdp_shard_size"]
NOT_WITH = {"ddp": [*OF_SHARDS, "cpu_offload", "accumulate_unsharded"], "zero1": [*OF_SHARDS, "accumulate_unsharded"], "zero2": OF_SHARDS,
            "fsdp": [*OF_BUCKETS, "hsdp_shard_size"], "hsdp": OF_BUCKETS}      # flags that --compare leaves away
MOST_TRACED = 2     # micro-batches
SIZES = (1, 8, 64, 512, 4096, 16384)        # ranks of --growth
COLOURS = {"ddp": "#c0392b", "zero1": "#d68910", "zero2": "#239b56", "fsdp": "#2471a3", "hsdp": "#7d3c98"}


@dataclass
class Figures:
    """Of one rank, in bytes but for flops. gradients: the most between micro-batches and before the update. activations: the most that a forward
    pass leaves for backward, without gathered weights. peak: the most at any time of an update, in peak_phase; of it, `host` bytes are not
    counted, which --cpu_offload keeps elsewhere. trained: numbers that the optimizer of each rank trains, by rank in its group of shards."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    peak_phase: str
    host: int
    flops: float
    traffic: dict[Route, Traffic]
    trained: list[int]

    def total(self, name: str) -> float:
        """count, payload, inside or between, of all collectives of an update."""
        return sum(getattr(traffic, name) for traffic in self.traffic.values())


class DryWorld(World):
    """What the ranks of a run would agree on, if they all were like this one."""

    def _reduce(self, values, op) -> list[int]:
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(len(values), dtype=torch.int64), op)        # so that it is counted
        return [value * self.world_size for value in values] if op == dist.ReduceOp.SUM else list(values)

    def add_and_agree(self, value: Tensor, flags: list[bool]) -> tuple[Tensor, list[bool]]:
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1 + len(flags), dtype=torch.float64))
        return value, flags

    def raise_together(self, error: Exception | None) -> None:
        if error is not None:
            raise error


@contextlib.contextmanager
def open_dry_world(args: TrainArgs, ranks: int, rank: int, ranks_per_node: int) -> Iterator[DryWorld]:
    """As world.open_world, for one of `ranks` ranks without the others."""
    device = torch.device("cpu")
    if ranks > 1:
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield DryWorld(rank, rank % ranks_per_node, ranks, device, open_mesh(args, rank, ranks, device, {}) if ranks > 1 else None,
                       local_world_size=min(ranks, ranks_per_node), node=rank // ranks_per_node)
    finally:
        if ranks > 1:
            dist.destroy_process_group()


class AlikeChunks(TorchFunctionMode):
    """Chunks of a weight on the meta device are alike but for the last, so one object stands for all: fully_shard cuts each weight into as many
    as there are ranks, to keep one of them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.chunk or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        (tensor, ranks), dim = args, (kwargs or {}).get("dim", 0)
        rows = -(-tensor.shape[dim] // ranks)
        full, rest = divmod(tensor.shape[dim], rows)
        chunks = [tensor.narrow(dim, 0, rows)] * full + [tensor.narrow(dim, 0, rest)] * (rest > 0)
        return chunks + [tensor.new_empty(0)] * (ranks - len(chunks))       # fully_shard would fill up with these


class Samples:
    """As many samples as one round of all ranks takes."""

    def __init__(self, args: TrainArgs, ranks: int):
        self.n, self.length = args.per_device_train_batch_size * ranks, args.block_size

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(self.length, dtype=torch.int64), "labels": torch.zeros(self.length, dtype=torch.int64)}


class Marks(Callback):
    """What a ledger says between the micro-batches of an update and before its end."""

    def __init__(self, ledger: Ledger):
        self.ledger, self.held, self.first = ledger, [], None

    def on_substep_end(self, args, state, control, **kwargs):
        self.held.append(self.ledger.now)
        self.first = self.first or (self.ledger.flops, dict(self.ledger.traffic))
    on_pre_optimizer_step = on_substep_end


def trace(args: TrainArgs, world: World, ranks_per_node: int, fake: FakeTensorMode | None = None) -> Figures:
    """Makes two updates and looks at the second one; with `fake` without computing anything."""
    samples, size = Samples(args, world.world_size), args.per_device_train_batch_size
    traced = min(args.gradient_accumulation_steps, args.gradient_accumulation_steps if fake is None else MOST_TRACED)
    window = [{**default_collator([samples[0]] * size), "num_samples": size} for _ in range(traced)]
    ledger = Ledger(world.clock, ranks_per_node, fake is not None)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as modes:
        run = build(dataclasses.replace(args, output_dir=folder), world, samples, ledger, fake, modes)
        marks = Marks(ledger)
        run.callbacks.callbacks = [marks]
        if fake is not None:
            window = [{key: fake.from_tensor(value) if isinstance(value, Tensor) else value for key, value in batch.items()} for batch in window]
        ledger.see(window)
        run.model.train()
        while run.state.skipped_steps == run.state.global_step:     # with --fp16 the first ones may overflow
            train_step(run, window[:1], compute_loss)
        ledger.start(on_host(run))
        began, marks.held, marks.first = ledger.now, [], None
        train_step(run, window, compute_loss)
        flops, traffic = ledger.flops, dict(ledger.traffic)
        if more := args.gradient_accumulation_steps - traced:
            (flops_before, before), (flops_after, after) = ledger.before_forward, marks.first
            flops += more * (flops_after - flops_before)
            traffic |= {route: traffic[route] + (sent - before.get(route, Traffic())).times(more) for route, sent in after.items()}
        return Figures(storage_bytes(weights(run)), max(marks.held) - began, storage_bytes(states(run)), ledger.activations, ledger.peak,
                       ledger.peak_phase, sum(ledger.sizes[key] for key in ledger.host), flops, traffic, trained_by_rank(run))


def build(args: TrainArgs, world: World, samples: Samples, ledger: Ledger, fake: FakeTensorMode | None, modes: contextlib.ExitStack) -> Run:
    """The run as train.main assembles it. A model that will be sharded is on the meta device until it gets its memory, and only then are
    tensors fake ones, of which fully_shard would make one for each rank."""
    def enter() -> None:
        if fake is not None:
            modes.enter_context(fake)
        modes.enter_context(ledger)

    sharded = fake is not None and world.device_mesh is not None
    if not sharded:
        enter()
    model = build_on(world, lambda: build_model(args), build_model.meta_init)
    if fake is not None and not sharded:
        model.to = lambda device: model     # torch cannot move fake weights, and they are where they belong
    with contextlib.ExitStack() as chunks:
        if sharded:
            chunks.enter_context(AlikeChunks())

            def to_empty(**where) -> nn.Module:
                del model.to_empty
                chunks.close()
                enter()
                return model.to_empty(**where)
            model.to_empty = to_empty
        run, _, _ = assemble(args, world, model, samples, checkpoint=None)
    return run


def pieces(run: Run) -> list[Tensor]:
    return [p for group in run.optimizer.param_groups for p in group["params"]]


def weights(run: Run) -> list[Tensor]:
    """On this rank: parameters and buffers of the model, and the pieces of them that the optimizer trains."""
    return [local_part(p)[0] for p in run.model.parameters()] + [*run.model.buffers(), *pieces(run)]


def states(run: Run) -> list[Tensor]:
    """Those of the optimizer, and an average of weights."""
    return [value for state in run.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)] + \
        [part.piece for part in (run.ema.parts if run.ema else ())]


def on_host(run: Run) -> list[Tensor]:
    return [*pieces(run), *states(run)] if run.args.cpu_offload else []


def trained_by_rank(run: Run) -> list[int]:
    """Numbers that the optimizer of each rank trains: of one process or under ddp all ranks' are the same, so it is one count."""
    parallel = run.parallel
    if not parallel.split:
        return [sum(part.piece.numel() for part in parallel.parts)]
    if hasattr(parallel, "buckets"):
        counts = [0] * run.world.world_size
        for bucket in parallel.buckets:
            chunk = bucket.size // len(counts)
            for name, start in bucket.offsets.items():
                stop = start + bucket.parameters[name].numel()
                for rank in range(start // chunk, -(-stop // chunk)):
                    counts[rank] += min(stop, (rank + 1) * chunk) - max(start, rank * chunk)
        return counts
    counts, owners = [0] * parallel.group.size(), {name: rank for exchange in parallel.exchanges for name, rank in exchange.owners.items()}
    for name, p in parallel.trained.items():
        rows = -(-p.shape[0] // len(counts))
        for rank in [owners[name]] if name in owners else range(-(-p.shape[0] // rows)):
            counts[rank] += p.numel() if name in owners else p.numel() // p.shape[0] * min(rows, p.shape[0] - rank * rows)
    return counts


def predict(args: TrainArgs, ranks: int, ranks_per_node: int, rank: int = 0) -> Figures:
    """Of one rank; raises UsageError for what train.py would refuse, and for what cannot be simulated."""
    for name, reason in REFUSED.items():
        if getattr(args, name) != getattr(TrainArgs, name):
            raise UsageError(f"--{name} cannot be simulated: {reason}")
    if not 0 <= rank < ranks or ranks_per_node < 1 or ranks > ranks_per_node and ranks % ranks_per_node:
        raise UsageError(f"--ranks {ranks} --ranks_per_node {ranks_per_node} --rank {rank}: expected full nodes, and a rank from 0 to {ranks - 1}")
    with open_dry_world(args, ranks, rank, ranks_per_node) as world:
        return trace(args, world, ranks_per_node, FakeTensorMode(allow_non_fake_inputs=True))


def measure(args: TrainArgs, ranks_per_node: int) -> Figures:
    """The same of a real run: every rank calls it."""
    with open_world(args) as world:
        return trace(args, world, ranks_per_node)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=1, help="of the run [%(default)s]")
    parser.add_argument("--ranks_per_node", type=int, default=8, help="neighbours on one machine [%(default)s]")
    parser.add_argument("--rank", type=int, default=0, help="whose figures [%(default)s]")
    parser.add_argument("--compare", action="store_true", help="all strategies side by side, and which is the cheapest that fits")
    parser.add_argument("--memory", type=float, help="bytes of a device")
    parser.add_argument("--flops", type=float, help="operations per second that a device can do, at the precision of the run")
    parser.add_argument("--bandwidth", type=float, help="bytes per second that a rank can send to others of its node")
    parser.add_argument("--node_bandwidth", type=float, help="bytes per second that a node can send to other nodes, all its ranks together")
    parser.add_argument("--measure", action="store_true", help="train on --ranks processes of this machine too, and show predicted / measured")
    parser.add_argument("--growth", metavar="FILE.svg", help="from 1 to 16,384 ranks, beside formulas of the ZeRO paper; writes a picture")
    flags, given = parser.parse_known_args(argv)
    args = parse_args([*given, *ONLY_TRAIN])
    check_peaks(flags)
    if flags.growth:
        grow(args, flags)
    elif flags.measure:
        show_measured(args, flags)
    elif flags.compare:
        compare(args, flags)
    else:
        show(args, flags, predict(on_nodes(args, flags.ranks_per_node), flags.ranks, flags.ranks_per_node, flags.rank))


def on_nodes(args: TrainArgs, ranks_per_node: int) -> TrainArgs:
    """hsdp shards within a node unless it is told otherwise."""
    return dataclasses.replace(args, hsdp_shard_size=args.hsdp_shard_size or ranks_per_node) if args.strategy == "hsdp" else args


def with_strategy(args: TrainArgs, strategy: str, ranks_per_node: int) -> tuple[TrainArgs, list[str]]:
    """The settings with another strategy, and the flags that it cannot have and that are left away."""
    left = {name: getattr(TrainArgs, name) for name in NOT_WITH[strategy]}
    changed = on_nodes(dataclasses.replace(args, strategy=strategy, **left), ranks_per_node)
    return changed, [name for name in left if getattr(args, name) != left[name]]


def check_peaks(flags: argparse.Namespace) -> None:
    """A time is estimated of all peaks that it depends on, or of none."""
    needed = {"flops": True, "bandwidth": min(flags.ranks, flags.ranks_per_node) > 1, "node_bandwidth": flags.ranks > flags.ranks_per_node}
    given = [name for name in needed if getattr(flags, name) is not None]
    if bad := [name for name in (*needed, "memory") if getattr(flags, name) is not None and not 0 < getattr(flags, name) < math.inf]:
        raise UsageError(f"--{bad[0]} {getattr(flags, bad[0])}: expected more than 0")
    if given and (missing := [f"--{name}" for name in needed if needed[name] and name not in given]):
        raise UsageError(f"the time of an update on {flags.ranks} ranks, {flags.ranks_per_node} on a node, depends on {', '.join(missing)} too: "
                         f"none is assumed")


def seconds(figures: Figures, flags: argparse.Namespace) -> dict[str, float]:
    """What an update takes at the stated peaks, by what bounds it; nothing if none is stated."""
    if flags.flops is None:
        return {}
    times = {"compute": figures.flops / flags.flops}
    if flags.bandwidth is not None:
        times["sending inside nodes"] = figures.total("inside") / flags.bandwidth
    if flags.node_bandwidth is not None:
        times["sending between nodes"] = figures.total("between") * min(flags.ranks, flags.ranks_per_node) / flags.node_bandwidth
    return times


def row(*cells) -> None:
    print("| " + " | ".join(f"{cell:,.0f}" if isinstance(cell, (int, float)) else cell for cell in cells) + " |", flush=True)


def header(*cells: str) -> None:
    row(*cells)
    print("|---" * len(cells) + "|")


def show(args: TrainArgs, flags: argparse.Namespace, figures: Figures) -> None:
    nodes, local = -(-flags.ranks // flags.ranks_per_node), min(flags.ranks, flags.ranks_per_node)
    print(f"{args.strategy} on {flags.ranks:,} ranks, {nodes:,} {'nodes' if nodes > 1 else 'node'} of {local}; rank {flags.rank}, in bytes")
    lines = {"parameters": figures.parameters, "gradients": figures.gradients, "optimizer state": figures.optimizer,
             "activations": figures.activations, f"peak, in {figures.peak_phase}": figures.peak}
    for name, value in (lines | ({"kept on the host, not in the peak": figures.host} if args.cpu_offload else {}) | {"FLOPs": figures.flops}).items():
        print(f"  {name:<36}{value:>26,.0f}")
    low, high = min(figures.trained), max(figures.trained)
    print("ranks are alike" if low == high else f"ranks differ: the optimizer trains from {low:,} numbers (rank {figures.trained.index(low)} of a "
          f"group) to {high:,} (rank {figures.trained.index(high)}); --rank shows another one")
    print("\nIn an update:\n")
    header("collective", "ranks", "on this node", "count", "bytes of buffers", "sent within the node", "sent to other nodes")
    for route, sent in sorted(figures.traffic.items()):
        row(route.kind + " of counts, flags and norms" * route.control, route.size, route.local, *vars(sent).values())
    if flags.memory is not None:
        fits = "fits" if figures.peak <= flags.memory else "does not fit"
        print(f"\n{fits} into {flags.memory:,.0f} bytes: the peak takes {figures.peak / flags.memory:.1%}")
    if times := seconds(figures, flags):
        parts = ", ".join(f"{name} {value:.4g} s" for name, value in times.items())
        print(f"\nan update takes at least {max(times.values()):.4g} s, bound by {max(times, key=times.get)}, "
              f"and {sum(times.values()):.4g} s if nothing overlaps: {parts}")


def compare(args: TrainArgs, flags: argparse.Namespace) -> str | None:
    """Prints a row for each strategy; returns the cheapest that fits into --memory."""
    timed, costs = flags.flops is not None, {}
    header("strategy", "parameters", "gradients", "optimizer state", "activations", "peak", "collectives", "sent within the node",
           "sent to other nodes", *["at least, s", "bound by"] * timed)
    for strategy in STRATEGIES:
        each, left = with_strategy(args, strategy, flags.ranks_per_node)
        try:
            figures = predict(each, flags.ranks, flags.ranks_per_node, flags.rank)
        except UsageError as error:
            row(strategy, f"cannot be used: {error}")
            continue
        times, sends = seconds(figures, flags), [figures.total("inside"), figures.total("between")]
        if flags.memory is not None and figures.peak <= flags.memory:
            costs[strategy] = (max(times.values()), sum(times.values())) if timed else sends[::-1]
        row(strategy + "".join(f", without --{name}" for name in left), figures.parameters, figures.gradients, figures.optimizer, figures.activations,
            figures.peak, figures.total("count"), *sends, *[f"{max(times.values()):.4g}", max(times, key=times.get)] if timed else [])
    cheapest = min(costs, key=costs.get, default=None)
    if flags.memory is None:
        print("\n--memory BYTES tells which of them fit")
    elif cheapest is None:
        print(f"\nnone fits into {flags.memory:,.0f} bytes: try more ranks, --activation_checkpointing, --bf16, a smaller micro-batch, --cpu_offload")
    else:
        print(f"\nthe cheapest that fits into {flags.memory:,.0f} bytes is --strategy {cheapest}: "
              f"{'it takes the least time' if timed else 'it sends the fewest bytes to other nodes, then within nodes'}")
    return cheapest


def show_measured(args: TrainArgs, flags: argparse.Namespace) -> None:
    """Trains for real, on gloo ranks of this machine, and shows each figure of rank 0 as "predicted / measured"."""
    from tests.ranks import Ranks
    pool = Ranks()
    header("strategy", "ranks", "parameters", "gradients", "optimizer state", "activations", "peak", "collectives", "sent", "FLOPs")
    for strategy in STRATEGIES if flags.compare else [args.strategy]:
        each, _ = with_strategy(args, strategy, flags.ranks_per_node)
        if strategy == "hsdp" and flags.ranks <= each.hsdp_shard_size:
            continue
        both = predict(each, flags.ranks, flags.ranks_per_node), pool.run(flags.ranks, measure, each, flags.ranks_per_node)[0]
        cells = [[f.parameters, f.gradients, f.optimizer, f.activations, f.peak, f.total("count"), f.total("inside") + f.total("between"), f.flops]
                 for f in both]
        row(strategy, flags.ranks, *(f"{a:,.0f} / {b:,.0f}" for a, b in zip(*cells)))
    pool.close()


def formulas(args: TrainArgs, ranks: int, shard: int) -> tuple[float, float]:
    """Bytes of model states that a rank holds (Rajbhandari et al. 2020, section 5) and that it sends per update (section 7, for g micro-batches),
    of P weights in float32 with AdamW. What is gathered of them is in 16 bits with --bf16 and --fp16; weights outside of blocks once a
    micro-batch, the others twice. hsdp: split over `shard` ranks."""
    default = TrainArgs()
    for name in ("lora_rank", "ema_decay", "cpu_offload", "accumulate_unsharded", "reshard_after_forward"):
        if getattr(args, name) != getattr(default, name) or not args.optim.startswith("adamw"):
            raise UsageError(f"the formulas are those of AdamW over all weights, on the device, and not of --{name} or --optim {args.optim}")
    with torch.device("meta"):
        model = build_model(args)
    P, n, g = sum(p.numel() for p in model.parameters()), ranks, args.gradient_accumulation_steps
    blocks = sum(p.numel() for unit in find_units(model, args.fsdp_transformer_layer_cls_to_wrap) for p in unit.parameters())
    if n == 1:
        return 16 * P, 0
    ring, width = (shard - 1) / shard, 2 if args.bf16 or args.fp16 else 4
    sharded = g * (width * (P + blocks) + 4 * P) * ring
    held = {"ddp": 16 * P, "zero1": 8 * P + 8 * P / n if g > 1 else 4 * P + 12 * P / n, "zero2": 4 * P + 12 * P / n, "fsdp": 16 * P / n,
            "hsdp": 16 * P / shard}
    sent = {"ddp": 8 * P * ring, "zero1": 8 * P * ring, "zero2": (g + 1) * 4 * P * ring, "fsdp": sharded,
            "hsdp": sharded + 8 * P / shard * (1 - shard / n)}
    return held[args.strategy], sent[args.strategy]


class Point(NamedTuple):
    """Bytes of model states held, and sent per update, by one rank: traced, and by formula."""

    strategy: str
    ranks: int
    held: float
    sent: float
    held_formula: float
    sent_formula: float


def grow(args: TrainArgs, flags: argparse.Namespace) -> list[Point]:
    """Prints the table of all strategies and sizes, and writes the picture."""
    points, one = [], predict(with_strategy(args, "ddp", flags.ranks_per_node)[0], 1, flags.ranks_per_node)      # alike for all strategies
    header("strategy", "ranks", "model states held / formula", "sent per update / formula")
    for strategy in STRATEGIES:
        each, _ = with_strategy(args, strategy, flags.ranks_per_node)
        shard = each.hsdp_shard_size if strategy == "hsdp" else None
        for ranks in [ranks for ranks in SIZES if ranks > (shard or 0)]:
            figures = one if ranks == 1 else predict(each, ranks, flags.ranks_per_node)
            held = figures.parameters + figures.gradients + figures.optimizer
            sent = sum(traffic.inside + traffic.between for route, traffic in figures.traffic.items() if not route.control)
            point = Point(strategy, ranks, held, sent, *formulas(each, ranks, shard or ranks))
            row(strategy, ranks, f"{held:,.0f} / {point.held_formula:,.0f}", f"{sent:,.0f} / {point.sent_formula:,.0f}")
            points.append(point)
    with open(flags.growth, "w") as file:
        file.write(draw(points))
    return points


def draw(points: list[Point]) -> str:
    """Both quantities over ranks as SVG, with logarithmic axes: formulas as lines, what was traced as dots."""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 420" font-family="sans-serif" font-size="13">',
             '<rect width="960" height="420" fill="white"/>']
    for left, name, title in ((80, "held", "bytes of weights, gradients and optimizer state per rank"),
                              (560, "sent", "bytes that a rank sends per update")):
        shown = [p for p in points if getattr(p, name) > 0]
        logs = [math.log10(getattr(p, field)) for p in shown for field in (name, f"{name}_formula")]
        low, high = math.floor(min(logs)), math.ceil(max(logs))

        def place(ranks: int, value: float, left=left, low=low, high=high) -> tuple[float, float]:
            return left + 360 * math.log(ranks) / math.log(SIZES[-1]), 340 - 280 * (math.log10(value) - low) / (high - low)
        parts.append(f'<text x="{left}" y="30" font-weight="bold">{title}</text>')
        for power in range(low, high + 1):
            y = place(1, 10**power)[1]
            parts.append(f'<path d="M{left} {y:.1f}h360" stroke="#ddd"/>'
                         f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
        parts += [f'<text x="{place(ranks, 10**low)[0]:.1f}" y="360" text-anchor="middle">{ranks:,}</text>' for ranks in SIZES]
        for strategy, colour in COLOURS.items():
            own = [p for p in shown if p.strategy == strategy]
            line = " ".join("{:.1f},{:.1f}".format(*place(p.ranks, getattr(p, f"{name}_formula"))) for p in own)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"/>'.format(*place(p.ranks, getattr(p, name)), colour) for p in own]
    for i, (strategy, colour) in enumerate(COLOURS.items()):
        parts.append(f'<circle cx="{84 + 90 * i}" cy="396" r="4" fill="{colour}"/><text x="{94 + 90 * i}" y="400">{strategy}</text>')
    parts.append('<text x="560" y="400">lines: ZeRO paper; dots: traced; across: ranks</text></svg>\n')
    return "\n".join(parts)


if __name__ == "__main__":
    run_main(main)
