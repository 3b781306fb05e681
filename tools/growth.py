"""How what a rank holds and sends grows from 1 to 16,384 ranks, traced by tools/dryrun.py beside the formulas of papers (its --growth).

Each strategy alone, and --tp, --pp and --cp over as many as 8 ranks with ddp for the rest. In bytes, float32 and AdamW: P weights, of
them C x V in the embedding and as many in the head; L blocks, m micro-batches of B T tokens, C channels, n ranks.
"""
from __future__ import annotations

import argparse
import dataclasses
import math
from typing import NamedTuple

import torch

from args import TrainArgs
from distributed import find_units
from loss import CHUNK_ELEMENTS
from model import build_model
from state import UsageError
from tools.dryrun import STRATEGIES, Figures, header, predict, row, with_strategy

SIZES = (1, 8, 64, 512, 4096, 16384)        # ranks
LAYOUTS = ("tp", "pp", "cp")
DEEPEST = 8         # ranks that share a model: a node
COLOURS = {"ddp": "#c0392b", "zero1": "#d68910", "zero2": "#239b56", "fsdp": "#2471a3", "hsdp": "#7d3c98", "tp": "#2471a3", "pp": "#d68910", "cp": "#239b56"}
PANELS = ((0, STRATEGIES, "held", "weights, gradients, optimizer state"), (1, STRATEGIES, "sent", "sent per update"),
          (3, LAYOUTS, "held", "weights, gradients, optimizer state"), (4, LAYOUTS, "sent", "sent per update"), (5, LAYOUTS, "kept", "activations"))


class Bytes(NamedTuple):
    """Of one rank: model states that it holds, what it sends per update, activations that it keeps for backward."""

    held: float
    sent: float
    kept: float


class Point(NamedTuple):
    kind: str
    ranks: int
    traced: Bytes
    formula: Bytes


def formulas(args: TrainArgs, ranks: int, rank: int = 0) -> Bytes:
    """What papers say of a strategy, or of one of --tp, --pp and --cp with ddp."""
    for name in ("lora_rank", "ema_decay", "cpu_offload", "accumulate_unsharded", "reshard_after_forward", "bf16", "fp16", "dropout", "n_experts",
                 "activation_checkpointing"):
        if getattr(args, name) != getattr(TrainArgs, name) or not args.optim.startswith("adamw"):
            raise UsageError(f"the formulas are those of AdamW over all weights in float32, on the device, and not of --{name} or --optim {args.optim}")
    if args.tp * args.pp * args.cp > 1:
        return of_layout(args, ranks, rank)
    with torch.device("meta"):
        model = build_model(args)
    P, m = sum(p.numel() for p in model.parameters()), args.gradient_accumulation_steps
    blocks = sum(p.numel() for unit in find_units(model, args.fsdp_transformer_layer_cls_to_wrap) for p in unit.parameters())
    return Bytes(*of_strategy(args, ranks, P, blocks, m), activations(args))


def of_strategy(args: TrainArgs, n: int, P: int, blocks: int, m: int) -> tuple[float, float]:
    """Held (Rajbhandari et al. 2020, section 5) and sent (section 7). fsdp gathers weights of blocks twice a micro-batch, the others once."""
    if n == 1:
        return 16 * P, 0
    shard = args.hsdp_shard_size if args.strategy == "hsdp" else n
    ring = (shard - 1) / shard
    sharded = 4 * m * (2 * P + blocks) * ring
    held = {"ddp": 16 * P, "zero1": 8 * P + 8 * P / n if m > 1 else 4 * P + 12 * P / n, "zero2": 4 * P + 12 * P / n, "fsdp": 16 * P / n,
            "hsdp": 16 * P / shard}
    sent = {"ddp": 8 * P * ring, "zero1": 8 * P * ring, "zero2": (m + 1) * 4 * P * ring, "fsdp": sharded,
            "hsdp": sharded + 8 * P / shard * (1 - shard / n)}
    return held[args.strategy], sent[args.strategy]


def of_layout(args: TrainArgs, n: int, rank: int) -> Bytes:
    """One of these three over N ranks, and ddp over the n / N that hold the same.

    tp (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2): weights / N. A block gathers B T C tokens twice and scatters summands
    of them twice, as much in backward; embedding and head once each. Here a rank updates rows of the 5 C^2 weights of a block that are cut by columns
    (`local_rows` of parallel/tensor.py): it holds those as well, and their gradients and weights are gathered, once per update.
    pp (Narayanan et al. 2021, section 2.2): weights of a stage; activations to the next stage, their gradients to the one before, for each micro-batch.
    cp (Jacobs et al. 2023, section 3): an all-to-all of q, k, v and one of the outputs in each block, 4 B T C / N, and as much in backward."""
    C, V, L, m, N = args.n_embd, args.vocab_size, args.n_layer, args.gradient_accumulation_steps, args.tp * args.pp * args.cp
    BTC, ring = args.per_device_train_batch_size * args.block_size * C, (N - 1) / N
    stage = rank * args.pp // n
    blocks = (stage + 1) * L // args.pp - stage * L // args.pp
    P = (blocks * (12 * C * C + 2 * C) + V * C * (stage == 0) + (V + 1) * C * (stage == args.pp - 1)) / args.tp
    extra, exchanged = (20 * C * C * L / N, 4 * m * BTC * (8 * L + 4) * ring + 40 * C * C * L * ring) if args.tp > 1 else \
        (0, 4 * m * BTC * ((stage > 0) + (stage < N - 1))) if args.pp > 1 else (0, 4 * m * 8 * BTC / N * L * ring)
    alike = n if args.cp > 1 else n // N
    return Bytes(16 * P + extra, exchanged + 8 * P * (alike - 1) / alike, activations(args, stage, blocks))


def activations(args: TrainArgs, stage: int = 0, blocks: int | None = None) -> float:
    """What is kept for backward, as Korthikanti et al. 2022, section 4, count it: s b h (34 + 5 a s / h) bytes per layer there, in 16 bits.

    In float32 and with fused attention a block of this model keeps, in B T C numbers: input, normed, times weight 3, q k v 3, turned q and k 2, attention
    and by token again 2, residual, normed, times weight 3, relu 4, square 4: 21. Under tp all is cut but what goes into matrices, which is kept as gathered
    (there it is gathered again in backward): 2 + 19/N. The loss keeps the input of the last norm, normed, and gradients of its output and the head
    (`ChunkedCrossEntropy`), or of few logits the output and a probability of each. A stage s of pp keeps that, and
    what it has sent on, of min(m, N - s) micro-batches (gpipe: m)."""
    C, V, m, tp, cp = args.n_embd, args.vocab_size, args.gradient_accumulation_steps, args.tp, args.cp
    tokens = args.per_device_train_batch_size * args.block_size // cp
    each = 2 + 19 / tp if tp > 1 else 21
    loss = tokens * (2 * C / tp + C) + (V / tp * C if tp > 1 or tokens * V > CHUNK_ELEMENTS else tokens * V)
    flying = 1 if args.pp == 1 else m if args.pp_schedule == "gpipe" or m < args.pp else min(m, args.pp - stage)
    return 4 * flying * (each * tokens * C * (args.n_layer if blocks is None else blocks) + (loss if stage == args.pp - 1 else tokens * C))


def arrange(args: TrainArgs, kind: str, ranks: int, ranks_per_node: int) -> TrainArgs:
    """The settings with a strategy, or with a layout and ddp."""
    each, _ = with_strategy(args, kind if kind in STRATEGIES else "ddp", ranks_per_node)
    return each if kind in STRATEGIES else dataclasses.replace(each, **{kind: min(DEEPEST, ranks)})


def traced(figures: Figures) -> Bytes:
    sent = sum(traffic.inside + traffic.between for route, traffic in figures.traffic.items() if not route.control)
    return Bytes(figures.parameters + figures.gradients + figures.optimizer, sent, figures.activations)


def grow(args: TrainArgs, flags: argparse.Namespace) -> list[Point]:
    """Prints the table of all strategies, layouts and sizes, and writes the picture."""
    one, points = predict(arrange(args, "ddp", 1, flags.ranks_per_node), 1, flags.ranks_per_node), []        # alike for all
    header("over ranks", "ranks", "model states held / formula", "sent per update / formula", "activations / formula")
    for kind, ranks in [(kind, ranks) for kind in (*STRATEGIES, *LAYOUTS) for ranks in SIZES if kind != "hsdp" or ranks > flags.ranks_per_node]:
        each = arrange(args, kind, ranks, flags.ranks_per_node)
        figures = one if ranks == 1 else predict(each, ranks, flags.ranks_per_node, flags.rank)
        points.append(Point(kind, ranks, traced(figures), formulas(each, ranks, flags.rank)))
        row(kind, ranks, *(f"{found:,.0f} / {formula:,.0f}" for found, formula in zip(*points[-1][2:])))
    with open(flags.growth, "w") as file:
        file.write(draw(points))
    return points


def draw(points: list[Point]) -> str:
    """Bytes over ranks as SVG, with logarithmic axes: formulas as lines, what was traced as dots."""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1260 700" font-family="sans-serif" font-size="13">',
             '<rect width="1260" height="700" fill="white"/>']
    for place, kinds, name, title in PANELS:
        shown = [(p, getattr(p.traced, name), getattr(p.formula, name)) for p in points if p.kind in kinds and getattr(p.traced, name) > 0]
        parts += draw_panel(70 + place % 3 * 410, 40 + place // 3 * 350, shown, title)
    for i, kind in enumerate((*STRATEGIES, *LAYOUTS)):
        y, text = 80 + 26 * i, kind if kind in STRATEGIES else f"below: --{kind} over up to {DEEPEST} ranks, ddp over the rest"
        parts.append(f'<circle class="key" cx="900" cy="{y - 4}" r="4" fill="{COLOURS[kind]}"/><text x="912" y="{y}">{text}</text>')
    parts.append('<text x="890" y="310">bytes of one rank, over ranks; lines: formulas, dots: traced</text></svg>\n')
    return "\n".join(parts)


def draw_panel(left: int, top: int, shown: list[tuple[Point, float, float]], title: str) -> list[str]:
    """shown: points with what was traced and the formula's."""
    logs = [math.log10(value) for _, *values in shown for value in values]
    low, high = math.floor(min(logs)), math.ceil(max(logs))

    def place(ranks: int, value: float) -> tuple[float, float]:
        return left + 330 * math.log(ranks) / math.log(SIZES[-1]), top + 260 - 240 * (math.log10(value) - low) / max(1, high - low)
    parts = [f'<text x="{left}" y="{top}" font-weight="bold">{title}</text>']
    for power in range(low, high + 1):
        y = place(1, 10**power)[1]
        parts.append(f'<path d="M{left} {y:.1f}h330" stroke="#ddd"/><text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
    parts += [f'<text x="{place(ranks, 10**low)[0]:.1f}" y="{top + 280}" text-anchor="middle">{ranks:,}</text>' for ranks in SIZES]
    for kind, colour in COLOURS.items():
        own = [(p.ranks, found, formula) for p, found, formula in shown if p.kind == kind]
        line = " ".join("{:.1f},{:.1f}".format(*place(ranks, formula)) for ranks, _, formula in own)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"/>'.format(*place(ranks, found), colour) for ranks, found, _ in own]
    return parts
