"""Data-parallel training over ranks, and ZeRO: each rank updates its part of the weights, with its part of the optimizer's state.

N ranks train one model of P parameters, each on samples of its own, and average their gradients (Li et al. 2020). Under ddp all
of them hold all states and make the same update N times. Adam in float32 takes 4P bytes of weights, 4P of gradients and 8P
of moments. ZeRO splits them (Rajbhandari et al. 2020, section 5):

            gradients                              update   weights                     bytes held per rank
    ddp     all-reduce once per window             all      as they are                 4P   + 4P   + 8P
    zero1   reduce-scatter once per window         1/N      all-gather after it         4P   + 4P   + 8P/N
    zero2   reduce-scatter every micro-batch       1/N      all-gather after it         4P   + 4P/N + 8P/N
    fsdp    reduce-scatter every micro-batch       1/N      gathered where used         4P/N + 4P/N + 8P/N   (distributed.py)

An all-reduce is a reduce-scatter and an all-gather: zero1 sends what ddp sends (section 7.1), 2P (N - 1)/N elements.

Gradients travel in flat buckets while backward still runs. With ZeRO the weights live in such buckets too, of one chunk per
rank; a chunk may begin and end inside a parameter. What this rank owns of a parameter is a plain tensor, its piece, and the
optimizer trains pieces. An update that looks at one element at a time, as Adam's does, cannot tell. Any other, such as Muon's
or Adafactor's, gets buckets in which each parameter is whole, in the chunk of one rank.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from state import UsageError

if TYPE_CHECKING:
    from world import World

# torch's optimizers that update each element by itself; others say so by an attribute, elementwise = True
ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
               torch.optim.Adamax, torch.optim.Adadelta, torch.optim.ASGD, torch.optim.Rprop)


class Part(NamedTuple):
    """What this rank's optimizer trains of a parameter: `piece`, the elements from `start` of the flattened whole of `shape`."""

    name: str
    piece: Tensor
    start: int
    shape: torch.Size

    @property
    def is_whole(self) -> bool:
        return self.piece.numel() == self.shape.numel()


class Parallel:
    """How the training of a model is spread over ranks. This one is for one process: nothing is sent or split.

    parts: what this rank's optimizer trains, in the order of the model's parameters. saves: whether these belong into a checkpoint,
    which they do not if another rank holds the same. split: whether other ranks train other parts; `group` then joins ranks whose parts are
    all of the model, each once. find_unused: allow parameters that a loss does not use. One that no rank has used is left alone, as in one process."""

    def __init__(self, model: nn.Module, world: World, split: bool = False, find_unused: bool = True):
        self.model, self.world, self.split, self.saves, self.find_unused = model, world, split, split or world.writes, find_unused
        self.writes = world.writes      # whether weights that this rank holds whole are for it to save
        self.whole: dict[str, Tensor] = {}      # with --pp, where ranks hold different weights: all of the model, on the meta device
        self.parts: list[Part] = []
        self.groups: list[list[str]] = []       # names of the parameters in the optimizer's groups, on all ranks together
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.used: set[str] = set()     # parameters that got a gradient in this window, on this rank
        self.open = False               # the last micro-batch of a window is through, and `end_window` is still to come
        self.names = list(self.trained)     # those that ranks tell each other about
        # what changes in training beside parameters, such as the statistics of BatchNorm: all ranks go on with rank 0's
        saved = model.state_dict(keep_vars=True)
        self.shared_buffers = [buffer for name, buffer in model.named_buffers() if name in saved]

    def owns(self, part: Part) -> bool:
        """Whether this rank is the one that has a part in the norm of the gradients and in checkpoints, of those that `group` joins."""
        return True

    def shard(self, optimizer: torch.optim.Optimizer) -> None:
        """Has an optimizer that was built on the bare model train what this rank holds."""
        self.train_pieces(optimizer, {name: (p, 0) for name, p in self.trained.items()})

    def train_pieces(self, optimizer: torch.optim.Optimizer, pieces: dict[str, tuple[Tensor, int]]) -> None:
        """pieces: of parameters by name, each with the place of its first element. They take the parameters' place in the optimizer's
        groups, where what other ranks train drops out; after each step the model's weights follow them."""
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if missing := [name for name, p in self.trained.items() if p not in held]:      # their gradients would pile up
            raise UsageError(f"the optimizer trains {len(held)} parameters, and not {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}: "
                             f"put all into its groups, or set requires_grad to False on what is not to be trained")
        if self.split and optimizer.state:
            raise UsageError(f"{type(optimizer).__module__}.{type(optimizer).__name__} makes its state before training, so it cannot be "
                             f"split over ranks: use --strategy ddp")
        name_of = {p: name for name, p in (self.trained | self.frozen).items()}
        self.groups = [[name_of[p] for p in group["params"] if p in name_of] for group in optimizer.param_groups]
        self.parts = [Part(name, *pieces[name], p.shape) for name, p in self.trained.items() if name in pieces]
        if self.split:
            piece_of = {self.trained[part.name]: part.piece for part in self.parts}
            for group in optimizer.param_groups:
                group["params"] = [piece_of[p] for p in group["params"] if p in piece_of]
            optimizer.register_step_post_hook(lambda *_: self.gather())

    def grad_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one micro-batch."""
        self.open = last
        return contextlib.nullcontext()

    def end_window(self, loss: Tensor) -> Tensor:
        """After the last micro-batch of a window: gives the parts their gradients, means over ranks. loss (): this rank's share. Returns the sum
        over ranks."""
        self.open = False
        if self.world.world_size == 1:
            return loss
        if new := [name for name, p in self.frozen.items() if p.requires_grad]:
            raise UsageError(f"{new[0]} did not require a gradient when training began, and now it does: ranks would train it each for "
                             f"itself; set requires_grad before, and freeze by a learning rate of 0")
        loss, flags = self.world.add_and_agree(loss, [name in self.used for name in self.names] if self.find_unused else [])
        used = self.used
        if self.find_unused:
            used = {name for name, flag in zip(self.names, flags) if flag}
        elif unused := sorted(self.trained.keys() - used):
            raise UsageError(f"the loss does not use {', '.join(unused[:5])}: leave --ddp_find_unused_parameters at True, "
                             f"or set requires_grad to False on what is never trained")
        self.give_grads(used)
        self.used.clear()
        share(self.shared_buffers)
        return loss

    def gather(self) -> None:
        """Has the model's weights follow the parts, when something has changed these."""

    def release(self) -> None:
        """Lets go of the weights of other ranks that an evaluation has left here."""

    def adopt(self) -> None:
        """Has the parts follow the model's weights, when these were loaded."""


class Bucket:
    """Parameters, by name, whose gradients are reduced together, last ones of the model first, as backward gets to them.

    split: `flat` (ranks * chunk,) holds their weights, `mine` (chunk,) is this rank's part of it, and `held` is what the
    optimizer updates: `mine`, or a copy on the CPU (ZeRO-Offload, Ren et al. 2021). Not split: a chunk is all, and nothing moves."""

    def __init__(self, parameters: dict[str, Tensor], group: dist.ProcessGroup, split: bool, whole: bool, offload: bool, turn: int):
        ranks, rank = (group.size(), group.rank()) if split else (1, 0)
        chunk, self.offsets = lay_out({name: p.numel() for name, p in parameters.items()}, whole, ranks, turn)
        self.parameters, self.group, self.split, self.size, self.first = parameters, group, split, ranks * chunk, rank * chunk
        last = self.first + chunk
        ends = {name: (max(start, self.first), min(start + parameters[name].numel(), last)) for name, start in self.offsets.items()}
        self.ranges = {name: (start, stop) for name, (start, stop) in ends.items() if start < stop}      # of the bucket, in this chunk
        self.pieces = {name: parameters[name] for name in self.ranges}
        if split:
            self.flat = next(iter(parameters.values())).detach().new_zeros(self.size)
            for name, p in parameters.items():
                p.data = self.slot(self.flat, name).copy_(p.detach())
            self.mine = self.flat[self.first:self.first + chunk]
            self.held = self.mine.to("cpu", copy=True) if offload else self.mine
            self.pieces = {name: nn.Parameter(piece) for name, piece in self.cut(self.held).items()}
        self.arrived: set[str] = set()      # the gradients of this backward
        self.buffer = self.grad = self.work = self.reduced = None

    def slot(self, flat: Tensor, name: str) -> Tensor:
        """The place of a parameter in a buffer of the whole bucket, in its shape."""
        p = self.parameters[name]
        return flat[self.offsets[name]:self.offsets[name] + p.numel()].view(p.shape)

    def cut(self, chunk: Tensor) -> dict[str, Tensor]:
        """The pieces of parameters in this rank's chunk, or in one like it, as views; whole ones have their shape."""
        pieces = {name: chunk[start - self.first:stop - self.first] for name, (start, stop) in self.ranges.items()}
        shapes = {name: self.parameters[name].shape for name in pieces}
        return {name: piece.view(shapes[name]) if piece.numel() == shapes[name].numel() else piece for name, piece in pieces.items()}

    def take(self, name: str) -> None:
        """Moves a gradient that backward has finished into the buffer."""
        p = self.parameters[name]
        if self.buffer is None:
            self.buffer = p.grad.new_zeros(self.size)
        self.slot(self.buffer, name).copy_(p.grad)
        p.grad = None
        self.arrived.add(name)

    def start(self) -> None:
        """Begins the reduction to the mean over ranks: of everything, or of this rank's chunk."""
        buffer = next(iter(self.parameters.values())).detach().new_zeros(self.size) if self.buffer is None else self.buffer
        self.reduced = torch.empty_like(self.mine) if self.split else buffer
        self.work = dist.reduce_scatter_single(self.reduced, buffer, op=dist.ReduceOp.AVG, group=self.group, async_op=True) if self.split else \
            dist.all_reduce(buffer, op=dist.ReduceOp.AVG, group=self.group, async_op=True)

    def finish(self) -> None:
        """Waits for the reduction and adds its result up over micro-batches."""
        self.work.wait()
        self.grad = self.reduced if self.grad is None else self.grad.add_(self.reduced)
        self.buffer = self.work = self.reduced = None


class DataParallel(Parallel):
    """ddp, zero1 and zero2 among `peers`, all ranks or those of a pipeline's stage, which start from the first one's weights."""

    def __init__(self, model: nn.Module, args, world: World):
        super().__init__(model, world, args.strategy != "ddp", args.ddp_find_unused_parameters)
        self.cuts, self.every_micro_batch = args.strategy != "ddp", args.strategy == "zero2" and not args.accumulate_unsharded
        self.bucket_bytes, self.offload = int(args.ddp_bucket_cap_mb * 2**20), args.cpu_offload
        self.peers = world.groups.get("stage", dist.group.WORLD)
        self.group, self.buckets, self.reducing = self.peers, [], False      # group: keeps its store for ranks that are late
        share([tensor for tensor in (*model.parameters(), *model.buffers()) if not hasattr(tensor, "to_local")], self.peers)

    def shard(self, optimizer: torch.optim.Optimizer) -> None:
        """Lays out the buckets, and with ZeRO gives the optimizer this rank's pieces to train in place of the parameters."""
        whole = whole_parameters(optimizer) if self.cuts else set()
        pieces, alike = {}, {name: p for name, p in self.trained.items() if not hasattr(p, "to_local")}     # the others, DTensors, are a subclass's
        for names in fill_buckets(alike, whole, self.peers.size(), self.bucket_bytes):
            parameters = {name: self.trained[name] for name in names}
            bucket = Bucket(parameters, self.peers, self.cuts, parameters[names[0]] in whole, self.offload, turn=len(self.buckets))
            self.buckets.append(bucket)
            for name, p in parameters.items():
                p.register_post_accumulate_grad_hook(lambda _, bucket=bucket, name=name: self.on_grad(bucket, name))
            pieces |= {name: (piece, bucket.ranges[name][0] - bucket.offsets[name]) for name, piece in bucket.pieces.items()}
        self.train_pieces(optimizer, pieces)

    @contextlib.contextmanager
    def grad_sync(self, last: bool) -> Iterator[None]:
        """Around one micro-batch. Reductions start while backward still runs, in the same order on every rank."""
        self.open, self.reducing, self.waiting, self.running = last, last or self.every_micro_batch, list(self.buckets), []
        for bucket in self.buckets:
            bucket.arrived.clear()
        yield
        if self.reducing:
            self.reducing = False
            with self.world.clock.within("communication"):      # what backward could not hide
                while self.waiting:
                    for name, p in self.waiting[0].parameters.items():
                        if p.grad is not None:      # not reached by this backward, but by an earlier one of the window
                            self.waiting[0].take(name)
                    self.start_next()
                for bucket in self.running:
                    bucket.finish()
            self.used.update(*(bucket.arrived for bucket in self.buckets))

    def start_next(self) -> None:
        """Starts to reduce the next bucket, and waits for the one before the last, so that few are ever whole."""
        self.running.append(self.waiting.pop(0))
        self.running[-1].start()
        if len(self.running) > 2:
            with self.world.clock.within("communication"):
                self.running.pop(0).finish()

    def on_grad(self, bucket: Bucket, name: str) -> None:
        """Called by autograd when the gradient of a parameter is complete."""
        if self.reducing:
            if name in bucket.arrived:
                raise UsageError(f"the gradient of {name} came twice in one backward: checkpoint activations with use_reentrant=False")
            bucket.take(name)
            while self.waiting and len(self.waiting[0].arrived) == len(self.waiting[0].parameters):
                self.start_next()

    def give_grads(self, used: set[str]) -> None:
        for bucket in self.buckets:
            for name, grad in bucket.cut(bucket.grad.cpu() if self.offload else bucket.grad).items():
                bucket.pieces[name].grad = grad if name in used else None
            bucket.grad = None

    def gather(self) -> None:
        for bucket in self.buckets if self.offload else []:
            bucket.mine.copy_(bucket.held)
        with self.world.clock.within("communication"):
            works = [dist.all_gather_single(bucket.flat, bucket.mine, group=self.peers, async_op=True) for bucket in self.buckets if bucket.split]
            for work in works:
                work.wait()

    def adopt(self) -> None:
        for bucket in self.buckets if self.offload else []:
            bucket.held.copy_(bucket.mine)


def share(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Gives every rank of the group, by default all, what its first one has."""
    for tensor in tensors:
        for part in plain(tensor):
            dist.broadcast(part.detach(), group=group, group_src=0)


def plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the numbers of one: itself, or what a quantized one is made of."""
    if not hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "to_local"):     # to_local: a DTensor
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in plain(getattr(tensor, name))]


def whole_parameters(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    """The parameters that must not be cut: of groups that say "whole", and of optimizers not known to be elementwise."""
    elementwise = type(optimizer) in ELEMENTWISE or getattr(optimizer, "elementwise", False)
    return {p for group in optimizer.param_groups if group.get("whole", not elementwise) for p in group["params"]}


def fill_buckets(parameters: dict[str, Tensor], whole: set[Tensor], world_size: int, bucket_bytes: int) -> list[list[str]]:
    """Names of parameters in the order in which backward reaches them, in buckets of about bucket_bytes; of whole ones at least enough
    for each rank to have one."""
    filling: dict[tuple, list[str]] = {}
    full = []
    for name, p in reversed(parameters.items()):
        key = (p.dtype, p.device, p in whole)
        bucket = filling.setdefault(key, [])
        bucket.append(name)
        sizes = [parameters[other].nbytes for other in bucket]
        if sum(sizes) >= (max(bucket_bytes, world_size * max(sizes)) if p in whole else bucket_bytes):
            full.append(filling.pop(key))
    return [*full, *filling.values()]


def lay_out(sizes: dict[str, int], whole: bool, ranks: int, turn: int) -> tuple[int, dict[str, int]]:
    """(elements of a chunk, offset of each parameter): one behind the other, or whole ones each in the emptiest chunk so far.
    turn: the rank that comes first, where chunks are equally full."""
    if not whole:
        return -(-sum(sizes.values()) // ranks), dict(zip(sizes, [0, *accumulate(sizes.values())]))
    filled, place = [0] * ranks, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = min(range(ranks), key=lambda rank: (filled[rank], (rank - turn) % ranks))
        place[name] = rank, filled[rank]
        filled[rank] += sizes[name]
    chunk = max(filled)     # all chunks are as long as the fullest
    return chunk, {name: rank * chunk + start for name, (rank, start) in place.items()}
