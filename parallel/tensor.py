"""Tensor parallelism, --tp N: wide layers on N ranks, each of which holds a part of every weight matrix.

A pair of matrices is cut so that one exchange makes up for the cut (Megatron-LM: Shoeybi et al. 2019, section 3): the first by its rows, so
that a rank has all inputs and some of the outputs (some heads, some of the MLP's units), the second by its columns, so that each rank gets
a summand of every output. Between such pairs each rank keeps T / N of the tokens, for norms, dropout and residuals (sequence parallelism:
Korthikanti et al. 2022, section 4.2.2): tokens are gathered before a pair, and summands reduce-scattered after it.

    x (B, T/N, C) -> norm -> gathered (B, T, C) -> qkv, attention of H/N heads (B, T, C/N) -> out: summands (B, T, C) -> (B, T/N, C)

torch's DTensor plans do that. Embedding and head are cut by the vocabulary, and the loss never has the logits of more than V / N words.
The ranks of a group read the same samples; each gives 1 / N of their summed loss, so that the parts of all ranks add up to the whole.

The optimizer trains plain tensors, as under zero.py: of each weight N equal pieces by rows, one on each rank, so that nobody updates
what another does, and that the files of checkpoints are the same under every layout. A matrix that is cut by rows is its own piece. For others
gradients are exchanged before the update (norms: summed), and weights after it, once per window.
"""
from __future__ import annotations

import contextlib
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from collators import IGNORE
from distributed import FullySharded, materialize
from loss import CHUNK_ELEMENTS
from model import GPT
from parallel.context import REFUSED, agree, refuse_flags
from state import UsageError
from world import World
from zero import Parallel, share, whole_parameters


def split_layers(model: nn.Module, args, world: World) -> None:
    """Cuts a GPT in place: weights become DTensors over the ranks of a group. forward(ids, labels, position_ids), which all of these call with
    the same (B, T) ids, then gives 1 / N of the summed loss. Raises UsageError for what cannot be cut."""
    refuse(model, args, world)
    mesh, on_meta = world.device_mesh["tp"], any(p.is_meta for p in model.parameters())
    if not on_meta:
        share([*model.to(world.device).parameters()])
    norm, into, out_of = SequenceParallel(use_local_output=True), ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1))
    plan = {"norm": norm, "head": into,
            "blocks.*.attn_norm": norm, "blocks.*.attn.qkv": into, "blocks.*.attn.out": out_of,
            "blocks.*.mlp_norm": norm, "blocks.*.up": into, "blocks.*.down": out_of}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parallelize_module(model, mesh, plan, src_data_rank=None)
    model.embed.weight = nn.Parameter(distribute_tensor(model.embed.weight, mesh, [Shard(0)], src_data_rank=None))
    for name, p in model.named_parameters():        # SequenceParallel forgets it
        p.requires_grad_(name in trained)
    if on_meta and args.strategy == "ddp" and args.pp == 1:     # else the parts are cut first
        materialize(model, world.device)
    model.embed.forward = partial(split_embedding, embed=model.embed, mesh=mesh, vocab_size=model.vocab_size)
    model.head_loss = partial(split_head_loss, mesh=mesh, vocab_size=model.vocab_size)
    model.register_forward_pre_hook(partial(agree, world=world, group=mesh.get_group()), with_kwargs=True)


REFUSED_HERE = {**REFUSED, "lora_rank": "does not cut adapters", "lora_adapter": "does not cut adapters",
                "cpu_offload": "keeps its pieces where the weights are",
                "ddp_bucket_cap_mb": "reduces all gradients at once, or by blocks under fsdp",
                "fp16_full_eval": "does not cast cut weights", "bf16_full_eval": "does not cast cut weights",
                "save_on_each_node": "needs one output_dir that all hosts share", "report_histograms": "has no whole weights",
                "peak_flops": "has its matrix products counted as if they were whole"}


def refuse(model: nn.Module, args, world: World) -> None:
    """What cannot be cut, in our words."""
    if type(model) is not GPT:
        raise UsageError(f"--tp cuts the layers of the built-in GPT of model.py, and this is a {type(model).__name__}: "
                         f"use --strategy fsdp, or give split_layers of parallel/tensor.py a plan for it")
    if args.strategy not in ("ddp", "fsdp") and args.pp == 1:
        raise UsageError(f"--tp {args.tp} does not go with --strategy {args.strategy}: use fsdp, which splits all that {args.strategy} does, or ddp")
    if model.head.weight is model.embed.weight:
        raise UsageError("--tp cuts the embedding and the head each for itself, and here they are one weight (tied): untie them, or use --strategy fsdp without --tp")
    refuse_flags(args, "tp", REFUSED_HERE)
    heads = model.blocks[0].attn.out.in_features // model.blocks[0].attn.head_dim
    if heads % world.copies:
        raise UsageError(f"--tp {args.tp}{f' x --cp {args.cp}' * (args.cp > 1)} does not divide the {heads} attention heads, of which each rank "
                         f"takes as many: give another, or another --n_head")
    if (args.tp - 1) * -(-model.vocab_size // args.tp) >= model.vocab_size:
        raise UsageError(f"--tp {args.tp} leaves ranks without a word of --vocab_size {model.vocab_size}: give less")


# ---------------------------------------------------------------------------------------------------- the vocabulary

def split_embedding(ids: Tensor, embed: nn.Embedding, mesh: DeviceMesh, vocab_size: int) -> Tensor:
    """ids (B, T) -> (B, T/N, C). torch's own would make the gradient of all words on each rank."""
    rows = embed.weight.to_local()
    place = ids - mesh.get_local_rank() * -(-vocab_size // mesh.size())
    mine = (place >= 0) & (place < len(rows))
    summand = F.embedding(place.where(mine, 0), rows) * mine[..., None]
    return DTensor.from_local(summand, mesh, [Partial()], run_check=False).redistribute(placements=[Shard(1)]).to_local()


def split_head_loss(hidden: Tensor, head: DTensor, labels: Tensor, label_smoothing: float, mesh: DeviceMesh, vocab_size: int) -> Tensor:
    """1 / N of `head_cross_entropy`: hidden (B, T/N, C) of this rank's tokens, labels (B, T)."""
    tokens = DTensor.from_local(hidden, mesh, [Shard(1)], run_check=False)
    whole = tokens.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])         # (B, T, C); backward reduce-scatters
    first = mesh.get_local_rank() * -(-vocab_size // mesh.size())
    loss = SplitCrossEntropy.apply(whole, head.to_local(), labels, label_smoothing, first, vocab_size, mesh.get_group(), torch.is_grad_enabled())
    return loss / mesh.size()


class SplitCrossEntropy(torch.autograd.Function):
    """`ChunkedCrossEntropy` of loss.py over ranks, each of which has the rows of the head (V/N, C) for words from `first` on, and all of hidden
    (..., C): of a piece of logits ranks exchange for each token the largest, the sum of exponentials, the label's and the sum (Shoeybi et al. 2019,
    section 3). The gradient of hidden is this rank's summand."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor, label_smoothing: float, first: int, vocab_size: int, group,
                training: bool) -> Tensor:
        kind = hidden.device.type
        fp16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16      # the loss scale is not yet in the gradients
        rows, weight, targets = (hidden.float() if fp16 else hidden).flatten(0, -2), head.float() if fp16 else head, labels.flatten()
        grad_rows = torch.empty_like(rows) if training else None
        grad_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32)) if training else None
        total, size = 0.0, max(1, CHUNK_ELEMENTS // -(-vocab_size // group.size()))     # the last rank may have fewer words, and cuts the tokens alike
        for start in range(0, len(rows), size):
            piece, target = rows[start:start + size], targets[start:start + size]
            with torch.autocast(kind, enabled=False) if fp16 else contextlib.nullcontext():
                logits = F.linear(piece, weight)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss, grad = SplitCrossEntropy.of_logits(logits, target, label_smoothing, first, vocab_size, group)
                total = total + loss
                if training:
                    grad = grad.to(piece.dtype)
                    grad_rows[start:start + size] = grad @ weight
                    grad_head += grad.T @ piece
        ctx.save_for_backward(grad_rows, grad_head)
        ctx.shape, ctx.dtypes = hidden.shape, (hidden.dtype, head.dtype)
        return total

    @staticmethod
    def of_logits(logits: Tensor, target: Tensor, label_smoothing: float, first: int, vocab_size: int, group) -> tuple[Tensor, Tensor]:
        """Logits (n, V/N) of words from `first` on -> the summed loss () of all words, and the gradient (n, V/N), in the logits' place."""
        largest = logits.amax(1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        logits = logits.sub_(largest[:, None])
        place = target - first
        mine = (place >= 0) & (place < logits.shape[1])         # tokens whose label this rank has
        place = place.where(mine, 0)[:, None]
        sums = torch.stack([logits.exp().sum(1), logits.gather(1, place)[:, 0] * mine, logits.sum(1)])
        dist.all_reduce(sums, group=group)
        log_total, own, every = sums[0].log(), sums[1], sums[2]
        asked = target != IGNORE
        loss = (log_total - (1 - label_smoothing) * own - label_smoothing / vocab_size * every).where(asked, 0.0).sum()
        grad = logits.sub_(log_total[:, None]).exp_().sub_(label_smoothing / vocab_size)
        grad.scatter_add_(1, place, mine.to(grad.dtype)[:, None] * (label_smoothing - 1.0))
        return loss, grad.mul_(asked[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        grad_rows, grad_head = ctx.saved_tensors
        return (grad_rows * grad_loss).view(ctx.shape).to(ctx.dtypes[0]), (grad_head * grad_loss).to(ctx.dtypes[1]), *[None] * 6


# ---------------------------------------------------------------------------------------------------- pieces of weights

def local_rows(tensor: DTensor) -> tuple[Tensor, int]:
    """This rank's piece of a weight, rows (n, ...), and its first element in the flattened whole. A view where the weight is cut by rows,
    else a copy, for which the ranks of the group exchange what they have; gradients that are summands are added up."""
    mesh, by_rows = tensor.device_mesh, is_cut_by_rows(tensor)
    rows = tensor if by_rows else tensor.redistribute(placements=[*tensor.placements[:-1], Shard(0)])
    first, stop = 0, tensor.shape[0]
    for dim in reversed(range(mesh.ndim)) if by_rows else range(mesh.ndim):      # fsdp has cut the rows that a rank of tp had
        size = -(-(stop - first) // mesh.size(dim))      # as torch.chunk does
        first, stop = min(stop, first + mesh.get_local_rank(dim) * size), min(stop, first + (mesh.get_local_rank(dim) + 1) * size)
    local = rows.to_local() if by_rows else rows.to_local().clone()      # on CPUs torch gathers the whole, and this would be a view of it
    return local, first * (tensor.numel() // tensor.shape[0])


def put_rows(tensor: DTensor, rows: Tensor) -> None:
    """Gives a weight that is not cut by rows the values of all ranks' pieces."""
    if not is_cut_by_rows(tensor):
        pieces = DTensor.from_local(rows, tensor.device_mesh, [*tensor.placements[:-1], Shard(0)], run_check=False,
                                    shape=tensor.shape, stride=tensor.stride())
        tensor.to_local().copy_(pieces.redistribute(placements=tensor.placements).to_local())


def is_cut_by_rows(tensor: DTensor) -> bool:
    return tensor.placements[-1] == Shard(0)        # the last dimension of meshes is tp


class Pieces(Parallel):
    """The pieces of a rank, by the names of their weights, which these two kinds of data parallelism have in common."""

    pieces: dict[str, nn.Parameter]

    def shard(self, optimizer: torch.optim.Optimizer) -> None:
        if whole_parameters(optimizer):
            raise UsageError(f"{type(optimizer).__name__} looks at whole matrices, which --tp cuts: use adamw_torch_fused, sgd, lion, "
                             f"or another optimizer that looks at one element at a time")
        found = {name: local_rows(p.detach()) for name, p in self.trained.items()}
        self.pieces = {name: nn.Parameter(rows) for name, (rows, _) in found.items()}
        self.train_pieces(optimizer, {name: (self.pieces[name], start) for name, (_, start) in found.items()})

    def take_grads(self) -> dict[str, Tensor | None]:
        grads = {name: None if p.grad is None else local_rows(p.grad)[0] for name, p in self.trained.items()}
        for p in self.trained.values():
            p.grad = None
        return grads

    def gather(self) -> None:
        for name, p in self.trained.items():
            put_rows(p.detach(), self.pieces[name].detach())
        self.release()

    def adopt(self) -> None:
        for name, p in self.trained.items():
            if not is_cut_by_rows(p):
                self.pieces[name].detach().copy_(local_rows(p.detach())[0])


class ReplicatedParts(Pieces):
    """ddp x tp: what a rank of a group has, those at its place in other groups have too. Gradients are averaged over them once per window."""

    def __init__(self, model: nn.Module, args, world: World):
        super().__init__(model, world, split=True, find_unused=args.ddp_find_unused_parameters)
        self.group, self.replicas = world.groups["tp"], world.groups["data"]
        self.saves = self.replicas.rank() == 0

    def end_window(self, loss: Tensor) -> Tensor:
        self.used.update(name for name, p in self.trained.items() if p.grad is not None)
        return super().end_window(loss)

    def give_grads(self, used: set[str]) -> None:
        with self.world.clock.within("communication"):
            grads = [self.pieces[name].new_zeros(self.pieces[name].shape) if grad is None else grad for name, grad in self.take_grads().items()]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat, dist.ReduceOp.AVG, self.replicas)
        for (name, piece), grad in zip(self.pieces.items(), flat.split([grad.numel() for grad in grads])):
            piece.grad = grad.view(piece.shape) if name in used else None


class ShardedParts(Pieces, FullySharded):
    """fsdp x tp, on a mesh of two dimensions: what a rank of a group has is split over those at its place in other groups."""

    def __init__(self, model: nn.Module, args, world: World):
        super().__init__(model, args, world)
        self.group = dist.group.WORLD

    def give_grads(self, used: set[str]) -> None:
        for name, grad in self.take_grads().items():
            if is_cut_by_rows(self.trained[name]):
                self.pieces[name].data = local_rows(self.trained[name].detach())[0]
            self.pieces[name].grad = grad if name in used else None
