"""What a run would hold, send and compute on so many ranks, before it is launched:

    python -m tools.dryrun --strategy fsdp --bf16 --n_layer 32 --n_embd 4096 --n_head 32 --vocab_size 128256 --block_size 4096 \\
      --per_device_train_batch_size 1 --ranks 1024 [--memory 80e9 --flops 4e14 --bandwidth 3e11 --node_bandwidth 2e11] [--compare]

Any flags of train.py, and those of this tool. Nothing is computed or sent: the code that would train, from build_model to train_step, makes two
updates of one rank on tensors without numbers, in a process group without peers, and every operator is looked at (tools/ledger.py). The first
update makes the optimizer's state, the second is counted. Of an accumulation over more than two micro-batches the first stands for all but the
last; under --pp all are looked at. Micro-batches are full, of --block_size tokens; data, evaluation and checkpoints are not looked at.
Under --n_experts each expert is assumed to get as many tokens. --rank: stages, and last parts of what ranks do not divide, differ.

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

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from args import TrainArgs, parse_args
from callbacks import Callback
from collators import default_collator
from distributed import build_on
from loop import train_step
from loss import compute_loss
from model import build_model
from state import Run, UsageError, run_main
from tools.find_lr import ONLY_TRAIN
from tools.ledger import Ledger, Route, Traffic, storage_bytes
from train import assemble
from world import World, open_groups, open_mesh, open_world

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError as error:
    raise UsageError(f"torch {torch.__version__} has no fake tensors or no fake process group where 2.13 has them: {error}") from None

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "hsdp")
REFUSED = {"model_name_or_path": "it would have to be read; give the flags of its shape", "lora_base": "quantized weights are made of numbers",
           "lora_adapter": "it would have to be read; give --lora_rank and its like",
           "torch_compile": "what a compiler keeps for backward is known only when it has compiled"}
OF_BUCKETS = ["ddp_bucket_cap_mb", "ddp_find_unused_parameters"]
OF_SHARDS = ["fsdp_transformer_layer_cls_to_wrap", "reshard_after_forward", "hsdp_shard_size"]
NOT_WITH = {"ddp": [*OF_SHARDS, "cpu_offload", "accumulate_unsharded"], "zero1": [*OF_SHARDS, "accumulate_unsharded"], "zero2": OF_SHARDS,
            "fsdp": [*OF_BUCKETS, "hsdp_shard_size"], "hsdp": OF_BUCKETS}      # flags that --compare leaves away
MOST_TRACED = 2     # micro-batches, but with --pp
WAITED_FOR = ("cp", "tp", "pp", "ep")       # groups


@dataclass
class Figures:
    """Of one rank, in bytes but for flops. gradients: the most between micro-batches and before the update. activations: the most that a forward
    pass leaves for backward, with --pp those of all micro-batches on their way, without gathered weights. peak: the most at any time of an
    update, in peak_phase; of it, `host` bytes are not counted, which --cpu_offload keeps elsewhere. trained: numbers that its optimizer trains."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    peak_phase: str
    host: int
    flops: float
    traffic: dict[Route, Traffic]
    trained: int

    def total(self, name: str) -> float:
        """count, payload, inside or between, of all collectives of an update."""
        return sum(getattr(traffic, name) for traffic in self.traffic.values())


class DryWorld(World):
    """What the ranks of a run would agree on, if they all had read as much as this one."""

    def count(self, *values: int) -> list[int]:
        super().count(*values)
        return [value * self.data_ranks for value in values]

    def of_first(self, values: list[int], group: dist.ProcessGroup) -> list[int]:
        dist.broadcast(torch.zeros(len(values), dtype=torch.int64), group=group, group_src=0)
        return values

    def gather_json(self, value) -> list:
        return [value] * self.world_size

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
        groups = open_groups(args, rank, ranks)
        yield DryWorld(rank, rank % ranks_per_node, ranks, device, open_mesh(args, rank, ranks, device, groups) if ranks > 1 else None,
                       local_world_size=min(ranks, ranks_per_node), node=rank // ranks_per_node, copies=args.cp * args.tp, stages=args.pp, groups=groups)
    finally:
        if ranks > 1:
            dist.destroy_process_group()
            _clear_sharding_prop_cache()        # it has meshes, and with them who this rank is


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


class EvenRouting(TorchFunctionMode):
    """Of the rows of a micro-batch each expert gets as many, and each rank of --ep: real counts depend on numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.bincount:
            self.rows = args[0].numel()
            return args[0].new_empty(kwargs["minlength"])
        if func is Tensor.item and args[0]._base is not None:       # tolist() asks for one after the other
            shares = args[0]._base.numel()
            return self.rows // shares + (args[0].storage_offset() < self.rows % shares)
        if func is Tensor.repeat_interleave:
            kwargs["output_size"] = self.rows
        return func(*args, **kwargs)


class Samples:
    """As many samples as one round of all ranks takes."""

    def __init__(self, args: TrainArgs, ranks: int):
        self.n, self.length, self.vocab_size = args.per_device_train_batch_size * ranks, args.block_size, args.vocab_size

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(self.vocab_size, (self.length + 1,), generator=torch.Generator().manual_seed(index))      # real routers tell tokens apart
        return {"input_ids": ids[:-1], "labels": ids[1:]}


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
    traced = args.gradient_accumulation_steps if fake is None or args.pp > 1 else min(args.gradient_accumulation_steps, MOST_TRACED)
    window = [{**default_collator([samples[i] for i in range(size)]), "num_samples": size} for _ in range(traced)]
    ledger = Ledger(world.clock, ranks_per_node, fake is not None, group_names(args, world))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as modes:
        run = build(dataclasses.replace(args, output_dir=folder), world, samples, ledger, fake, modes)
        marks = Marks(ledger)
        run.callbacks.callbacks = [marks]
        if fake is not None:
            window = [{key: fake.from_tensor(value) if isinstance(value, Tensor) else value for key, value in batch.items()} for batch in window]
        ledger.see(window)
        run.model.train()
        while run.state.skipped_steps == run.state.global_step:     # with --fp16 the first ones may overflow
            train_step(run, window if args.pp > 1 else window[:1], compute_loss)        # buffers of a pipeline are of all micro-batches
        ledger.start(on_host(run))
        began, marks.held, marks.first = ledger.now, [], None
        train_step(run, window, compute_loss)
        flops, traffic = ledger.flops, dict(ledger.traffic)
        if more := args.gradient_accumulation_steps - traced:
            (flops_before, before), (flops_after, after) = ledger.before_forward, marks.first
            flops += more * (flops_after - flops_before)
            traffic |= {route: traffic[route] + (sent - before.get(route, Traffic())).times(more) for route, sent in after.items()}
        return Figures(storage_bytes(weights(run)), max(marks.held) - began, storage_bytes(states(run)), ledger.activations, ledger.peak,
                       ledger.peak_phase, sum(ledger.sizes[key] for key in ledger.host), flops, traffic, sum(part.piece.numel() for part in run.parallel.parts))


def group_names(args: TrainArgs, world: World) -> dict[str, dist.ProcessGroup]:
    """What groups that are not of all ranks are called."""
    names, mesh = {}, world.device_mesh
    if mesh is not None and mesh.ndim == 2:
        names = {"ep" if args.ep > 1 else "shard": mesh.get_group(0 if args.tp > 1 else 1), "replicate": mesh.get_group(0)}
    return names | world.groups


def build(args: TrainArgs, world: World, samples: Samples, ledger: Ledger, fake: FakeTensorMode | None, modes: contextlib.ExitStack) -> Run:
    """The run as train.main assembles it. A model that will be sharded is on the meta device until it gets its memory, and only then are
    tensors fake ones, of which fully_shard would make one for each rank."""
    def enter() -> None:
        if fake is not None:
            modes.enter_context(fake)
            modes.enter_context(EvenRouting() if args.n_experts else contextlib.nullcontext())
        modes.enter_context(ledger)

    sharded = fake is not None and build_on(world, lambda: torch.empty(0), build_model.meta_init).is_meta
    if not sharded:
        enter()
    model = build_on(world, lambda: build_model(args), build_model.meta_init)
    if fake is not None:
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
    return [p.to_local() if hasattr(p, "to_local") else p for p in run.model.parameters()] + [*run.model.buffers(), *pieces(run)]


def states(run: Run) -> list[Tensor]:
    """Those of the optimizer, and an average of weights."""
    return [value for state in run.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)] + \
        [part.piece for part in (run.ema.parts if run.ema else ())]


def on_host(run: Run) -> list[Tensor]:
    return [*pieces(run), *states(run)] if run.args.cpu_offload else []


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
    parser.add_argument("--growth", metavar="FILE.svg", help="from 1 to 16,384 ranks, beside formulas of papers (tools/growth.py); writes a picture")
    flags, given = parser.parse_known_args(argv)
    args = parse_args([*given, *ONLY_TRAIN])
    check_peaks(flags)
    if flags.growth:
        from tools.growth import grow
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


def seconds(figures: Figures, args: TrainArgs, flags: argparse.Namespace) -> dict[str, float]:
    """What the parts of an update take at the stated peaks; nothing if none is stated.

    What --cp, --tp, --pp and --ep exchange is waited for (parallel/), and so are gradients where they are reduced after all of backward, under --pp
    and under ddp with --tp: nothing is computed meanwhile. What strategies send may hide behind computing. Stages are assumed to cost alike: of m
    micro-batches in N stages a rank idles for (N - 1) / m of what it computes (parallel/pipeline.py)."""
    if flags.flops is None:
        return {}
    compute, late = figures.flops / flags.flops, args.pp > 1 or args.tp > 1 and args.strategy == "ddp"
    times = {"compute": compute, "waiting for stages": compute * (args.pp - 1) / args.gradient_accumulation_steps, "exchanges in between": 0.0,
             "sending inside nodes": 0.0, "sending between nodes": 0.0}
    for route, traffic in figures.traffic.items():
        inside = traffic.inside / flags.bandwidth if flags.bandwidth else 0.0
        between = traffic.between * min(flags.ranks, flags.ranks_per_node) / flags.node_bandwidth if flags.node_bandwidth else 0.0
        if late or route.group in WAITED_FOR:
            times["exchanges in between"] += inside + between
        else:
            times["sending inside nodes"] += inside
            times["sending between nodes"] += between
    return {name: value for name, value in times.items() if value}


def at_least(times: dict[str, float]) -> float:
    """Seconds of an update, if all that can overlap does."""
    hidden = max(times.get("sending inside nodes", 0), times.get("sending between nodes", 0))
    return times.get("exchanges in between", 0) + max(times["compute"] + times.get("waiting for stages", 0), hidden)


def row(*cells) -> None:
    print("| " + " | ".join(f"{cell:,.0f}" if isinstance(cell, (int, float)) else cell for cell in cells) + " |", flush=True)


def header(*cells: str) -> None:
    row(*cells)
    print("|---" * len(cells) + "|")


def show(args: TrainArgs, flags: argparse.Namespace, figures: Figures) -> None:
    nodes, local = -(-flags.ranks // flags.ranks_per_node), min(flags.ranks, flags.ranks_per_node)
    print(f"{args.strategy} on {flags.ranks:,} ranks, {nodes:,} {'nodes' if nodes > 1 else 'node'} of {local}; rank {flags.rank}, in bytes")
    lines = {"parameters": figures.parameters, "gradients": figures.gradients, "optimizer state": figures.optimizer,
             "activations": figures.activations, f"peak, in {figures.peak_phase}": figures.peak, "numbers that its optimizer trains": figures.trained}
    for name, value in (lines | ({"kept on the host, not in the peak": figures.host} if args.cpu_offload else {}) | {"FLOPs": figures.flops}).items():
        print(f"  {name:<36}{value:>26,.0f}")
    print("\nIn an update:\n")
    header("collective", "group", "ranks", "on this node", "count", "bytes of buffers", "sent within the node", "sent to other nodes")
    for route, sent in sorted(figures.traffic.items()):
        row(route.kind + " of ids, counts, norms" * route.control, route.group, route.size, route.local, *vars(sent).values())
    if flags.memory is not None:
        fits = "fits" if figures.peak <= flags.memory else "does not fit"
        print(f"\n{fits} into {flags.memory:,.0f} bytes: the peak takes {figures.peak / flags.memory:.1%}")
    if args.pp > 1:
        m, N = args.gradient_accumulation_steps, args.pp
        print(f"\nthe pipeline's bubble: {(N - 1) / (m + N - 1):.1%} of the time, with {m} micro-batches in {N} stages"
              f"{f'; they are fewer than stages, so give --gradient_accumulation_steps {N} or more' * (m < N)}")
    if args.n_experts:
        print("\nexperts are assumed to get equal shares of the tokens: real routers are uneven, and a busy expert's rank holds, sends and computes more")
    if times := seconds(figures, args, flags):
        parts = ", ".join(f"{name} {value:.4g} s" for name, value in times.items())
        print(f"\nan update takes at least {at_least(times):.4g} s, mostly {max(times, key=times.get)}, "
              f"and {sum(times.values()):.4g} s if nothing overlaps: {parts}")


def compare(args: TrainArgs, flags: argparse.Namespace) -> str | None:
    """Prints a row for each strategy; returns the cheapest that fits into --memory."""
    timed, costs = flags.flops is not None, {}
    header("strategy", "parameters", "gradients", "optimizer state", "activations", "peak", "collectives", "sent within the node",
           "sent to other nodes", *["at least, s", "mostly"] * timed)
    for strategy in STRATEGIES:
        each, left = with_strategy(args, strategy, flags.ranks_per_node)
        try:
            figures = predict(each, flags.ranks, flags.ranks_per_node, flags.rank)
        except UsageError as error:
            row(strategy, f"cannot be used: {error}")
            continue
        times, sends = seconds(figures, each, flags), [figures.total("inside"), figures.total("between")]
        if flags.memory is not None and figures.peak <= flags.memory:
            costs[strategy] = (at_least(times), sum(times.values())) if timed else sends[::-1]
        row(strategy + "".join(f", without --{name}" for name in left), figures.parameters, figures.gradients, figures.optimizer, figures.activations,
            figures.peak, figures.total("count"), *sends, *[f"{at_least(times):.4g}", max(times, key=times.get)] if timed else [])
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
    """Trains for real, on gloo ranks of this machine, and shows each figure of a rank as "predicted / measured"."""
    from tests.ranks import Ranks
    pool = Ranks()
    header("strategy", "ranks", "parameters", "gradients", "optimizer state", "activations", "peak", "collectives", "sent", "FLOPs")
    for strategy in STRATEGIES if flags.compare else [args.strategy]:
        each, _ = with_strategy(args, strategy, flags.ranks_per_node)
        try:
            predicted = predict(each, flags.ranks, flags.ranks_per_node, flags.rank)
        except UsageError as error:
            row(strategy, flags.ranks, f"cannot be used: {error}")
            continue
        measured = pool.run(flags.ranks, measure, each, flags.ranks_per_node)[flags.rank]
        cells = [[f.parameters, f.gradients, f.optimizer, f.activations, f.peak, f.total("count"), f.total("inside") + f.total("between"), f.flops]
                 for f in (predicted, measured)]
        row(strategy, flags.ranks, *(f"{a:,.0f} / {b:,.0f}" for a, b in zip(*cells)))
    pool.close()


if __name__ == "__main__":
    run_main(main)
