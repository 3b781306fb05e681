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
    from distributed import World

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
    which they do not if another rank holds the same. split: whether other ranks train other parts."""

    def __init__(self, model: nn.Module, world: World, split: bool = False):
        self.model, self.world, self.split, self.saves = model, world, split, split or world.writes
        self.parts: list[Part] = []
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # what changes in training beside parameters, such as the statistics of BatchNorm: all ranks go on with rank 0's
        saved = model.state_dict(keep_vars=True)
        self.shared_buffers = [buffer for name, buffer in model.named_buffers() if name in saved]

    def shard(self, optimizer: torch.optim.Optimizer) -> None:
        """Has an optimizer that was built on the bare model train what this rank holds."""
        self.check_held(optimizer)
        self.parts = [Part(name, p, 0, p.shape) for name, p in self.trained.items()]

    def grad_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one micro-batch. After the last of a window the parts have their gradients, means over ranks."""
        return contextlib.nullcontext()

    def check_held(self, optimizer: torch.optim.Optimizer) -> None:
        """What no optimizer trains would pile up gradients, and count in their norm."""
        held = {p for group in optimizer.param_groups for p in group["params"]}
        if missing := [name for name, p in self.trained.items() if p not in held]:
            raise UsageError(f"the optimizer trains {len(held)} parameters, and not {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}: "
                             f"put all into its groups, or set requires_grad to False on what is not to be trained")

    def check_trained(self) -> None:
        """A parameter that is unfrozen in between would be reduced by nobody."""
        if new := [name for name, p in self.model.named_parameters() if p.requires_grad and name not in self.trained]:
            raise UsageError(f"{new[0]} did not require a gradient when training began, and now it does: ranks would train it each for itself; "
                             f"set requires_grad before, and freeze by a learning rate of 0")

    def end_window(self) -> None:
        """After the last micro-batch of a window, where there are several ranks."""
        self.check_trained()
        self.give_grads()
        share(self.shared_buffers)

    def gather(self) -> None:
        """Has the model's weights follow the parts, when something other than optimizer.step has changed these; after evaluations too."""

    def adopt(self) -> None:
        """Has the parts follow the model's weights, when these were loaded."""


class Bucket:
    """Parameters whose gradients are reduced together, last ones of the model first, as backward gets to them.

    split: `flat` (world_size * chunk,) holds their weights, `mine` (chunk,) is this rank's part of it, and `held` is what the
    optimizer updates: `mine`, or a copy on the CPU (ZeRO-Offload, Ren et al. 2021). Not split: a chunk is all, and nothing moves.
    """

    def __init__(self, parameters: list[Tensor], world: World, split: bool, whole: bool, offload: bool, turn: int):
        self.parameters, self.split = parameters, split
        chunk, self.offsets = lay_out([p.numel() for p in parameters], whole, world.world_size if split else 1, turn)
        self.size, self.first = chunk * (world.world_size if split else 1), world.rank * chunk if split else 0
        # the parameters in this rank's chunk: (index, first and last element in the bucket)
        ends = [(i, max(o, self.first), min(o + p.numel(), self.first + chunk)) for i, (p, o) in enumerate(zip(parameters, self.offsets))]
        self.ranges = [(index, start, stop) for index, start, stop in ends if start < stop]
        self.pieces = [parameters[index] for index, _, _ in self.ranges]
        if split:
            self.flat = parameters[0].detach().new_zeros(self.size)
            for index, p in enumerate(parameters):
                p.data = self.slot(self.flat, index).copy_(p.detach())
            self.mine = self.flat[self.first:self.first + chunk]
            self.held = self.mine.to("cpu", copy=True) if offload else self.mine
            self.pieces = [nn.Parameter(piece) for piece in self.cut(self.held)]
        self.used = [False] * len(parameters)       # in this window, by this rank's loss
        self.arrived: set[int] = set()              # in this backward
        self.buffer = self.grad = self.work = self.reduced = None

    def slot(self, flat: Tensor, index: int) -> Tensor:
        """The place of a parameter in a buffer of the whole bucket, in its shape."""
        p = self.parameters[index]
        return flat[self.offsets[index]:self.offsets[index] + p.numel()].view(p.shape)

    def cut(self, chunk: Tensor) -> list[Tensor]:
        """The pieces of parameters in this rank's chunk, or in one like it, as views; whole ones have their shape."""
        pieces = [chunk[start - self.first:stop - self.first] for _, start, stop in self.ranges]
        shapes = [self.parameters[index].shape for index, _, _ in self.ranges]
        return [piece.view(shape) if piece.numel() == shape.numel() else piece for piece, shape in zip(pieces, shapes)]

    def take(self, index: int) -> None:
        """Moves a gradient that backward has finished into the buffer."""
        p = self.parameters[index]
        if self.buffer is None:
            self.buffer = p.grad.new_zeros(self.size)
        self.slot(self.buffer, index).copy_(p.grad)
        p.grad, self.used[index] = None, True
        self.arrived.add(index)

    def start(self, group) -> None:
        """Begins the reduction to the mean over ranks: of everything, or of this rank's chunk."""
        buffer = self.parameters[0].detach().new_zeros(self.size) if self.buffer is None else self.buffer
        self.reduced = torch.empty_like(self.mine) if self.split else buffer
        self.work = dist.reduce_scatter_single(self.reduced, buffer, op=dist.ReduceOp.AVG, group=group, async_op=True) if self.split else \
            dist.all_reduce(buffer, op=dist.ReduceOp.AVG, group=group, async_op=True)

    def finish(self) -> None:
        """Waits for the reduction and adds its result up over micro-batches."""
        self.work.wait()
        self.grad = self.reduced if self.grad is None else self.grad.add_(self.reduced)
        self.buffer = self.work = self.reduced = None


class DataParallel(Parallel):
    """ddp, zero1 and zero2. All ranks start from rank 0's weights.

    find_unused: allow parameters that a loss does not use. One that no rank has used is left alone, as in one process."""

    def __init__(self, model: nn.Module, world: World, strategy: str, every_micro_batch: bool, bucket_bytes: int, find_unused: bool, offload: bool):
        super().__init__(model, world, split=strategy != "ddp")
        self.every_micro_batch, self.bucket_bytes, self.find_unused, self.offload = every_micro_batch, bucket_bytes, find_unused, offload
        self.group, self.buckets, self.reducing = dist.group.WORLD, [], False
        share([*model.parameters(), *model.buffers()])

    def shard(self, optimizer: torch.optim.Optimizer) -> None:
        """Lays out the buckets, and with ZeRO gives the optimizer this rank's pieces to train in place of the parameters."""
        whole = whole_parameters(optimizer) if self.split else set()
        found: dict[Tensor, tuple[Tensor, int]] = {}
        self.check_held(optimizer)
        for parameters in fill_buckets(list(self.trained.values()), whole, self.world.world_size, self.bucket_bytes):
            bucket = Bucket(parameters, self.world, self.split, parameters[0] in whole, self.offload, turn=len(self.buckets))
            self.buckets.append(bucket)
            for index, p in enumerate(parameters):
                p.register_post_accumulate_grad_hook(lambda p, bucket=bucket, index=index: self.on_grad(bucket, index))
            found |= {parameters[index]: (piece, start - bucket.offsets[index]) for piece, (index, start, _) in zip(bucket.pieces, bucket.ranges)}
        self.parts = [Part(name, *found[p], p.shape) for name, p in self.trained.items() if p in found]
        if self.split:
            train_pieces(optimizer, {p: piece for p, (piece, _) in found.items()})
            optimizer.register_step_post_hook(lambda *_: self.gather())

    @contextlib.contextmanager
    def grad_sync(self, last: bool) -> Iterator[None]:
        """Around one micro-batch. Reductions start while backward still runs, in the same order on every rank."""
        self.reducing, self.started, self.finished = last or self.every_micro_batch, 0, 0
        for bucket in self.buckets:
            bucket.arrived.clear()
        yield
        if self.reducing:
            self.reducing = False
            for bucket in self.buckets[self.started:]:
                for index, p in enumerate(bucket.parameters):
                    if p.grad is not None:      # not reached by this backward, but by an earlier one of the window
                        bucket.take(index)
                self.start_next()
            for bucket in self.buckets[self.finished:]:
                bucket.finish()
        if last:
            self.end_window()

    def start_next(self) -> None:
        """Starts to reduce the next bucket, and waits for the one before the last, so that few are ever whole."""
        self.buckets[self.started].start(self.group)
        self.started += 1
        if self.started - self.finished > 2:
            self.buckets[self.finished].finish()
            self.finished += 1

    def on_grad(self, bucket: Bucket, index: int) -> None:
        """Called by autograd when the gradient of a parameter is complete."""
        if self.reducing:
            if index in bucket.arrived:
                name = next(name for name, p in self.trained.items() if p is bucket.parameters[index])
                raise UsageError(f"the gradient of {name} came twice in one backward: checkpoint activations with use_reentrant=False")
            bucket.take(index)
            while self.started < len(self.buckets) and len(self.buckets[self.started].arrived) == len(self.buckets[self.started].parameters):
                self.start_next()

    def give_grads(self) -> None:
        """Gives the pieces their gradients."""
        used = [flag for bucket in self.buckets for flag in bucket.used]
        if self.find_unused:
            used = self.world.max(*used)
        elif not all(used):
            names = {p: name for name, p in self.trained.items()}
            unused = [names[p] for bucket in self.buckets for p, flag in zip(bucket.parameters, bucket.used) if not flag]
            raise UsageError(f"the loss does not use {', '.join(sorted(unused)[:5])}: leave --ddp_find_unused_parameters at True, "
                             f"or set requires_grad to False on what is never trained")
        flags = iter(used)
        for bucket in self.buckets:
            mine = [next(flags) for _ in bucket.parameters]
            grads = bucket.cut(bucket.grad.cpu() if self.offload else bucket.grad)
            for piece, grad, (index, _, _) in zip(bucket.pieces, grads, bucket.ranges):
                piece.grad = grad if mine[index] else None
            bucket.grad, bucket.used = None, [False] * len(bucket.parameters)

    def gather(self) -> None:
        """Brings all weights up to date with the pieces that the ranks have changed."""
        works = []
        for bucket in self.buckets if self.split else []:
            if self.offload:
                bucket.mine.copy_(bucket.held)
            works.append(dist.all_gather_single(bucket.flat, bucket.mine, group=self.group, async_op=True))
        for work in works:
            work.wait()

    def adopt(self) -> None:
        """Brings the pieces up to date with weights that were loaded."""
        for bucket in self.buckets if self.offload else []:
            bucket.held.copy_(bucket.mine)


def share(tensors: list[Tensor]) -> None:
    """Gives every rank what rank 0 has."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), 0)


def whole_parameters(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    """The parameters that must not be cut: of groups that say "whole", and of optimizers not known to be elementwise."""
    elementwise = type(optimizer) in ELEMENTWISE or getattr(optimizer, "elementwise", False)
    return {p for group in optimizer.param_groups if group.get("whole", not elementwise) for p in group["params"]}


def fill_buckets(parameters: list[Tensor], whole: set[Tensor], world_size: int, bucket_bytes: int) -> list[list[Tensor]]:
    """Parameters in the order in which backward reaches them, in buckets of about bucket_bytes; of whole ones at least enough
    for each rank to have one."""
    filling: dict[tuple, list[Tensor]] = {}
    full = []
    for p in reversed(parameters):
        key = (p.dtype, p.device, p in whole)
        bucket = filling.setdefault(key, [])
        bucket.append(p)
        enough = max(bucket_bytes, world_size * max(q.nbytes for q in bucket)) if p in whole else bucket_bytes
        if sum(q.nbytes for q in bucket) >= enough:
            full.append(filling.pop(key))
    return [*full, *filling.values()]


def lay_out(sizes: list[int], whole: bool, ranks: int, turn: int) -> tuple[int, list[int]]:
    """(elements of a chunk, offset of each parameter): one behind the other, or whole ones each in the emptiest chunk so far.
    turn: the rank that comes first, where chunks are equally full."""
    if not whole:
        return -(-sum(sizes) // ranks), [0, *accumulate(sizes)][:-1]
    filled, place = [0] * ranks, {}
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = min(range(ranks), key=lambda rank: (filled[rank], (rank - turn) % ranks))
        place[index] = rank, filled[rank]
        filled[rank] += sizes[index]
    chunk = max(filled)     # all chunks are as long as the fullest
    return chunk, [rank * chunk + start for rank, start in (place[index] for index in range(len(sizes)))]


def train_pieces(optimizer: torch.optim.Optimizer, pieces: dict[Tensor, Tensor]) -> None:
    """Puts this rank's pieces into the optimizer's groups in place of the parameters; what other ranks have drops out."""
    if optimizer.state:
        raise UsageError(f"{type(optimizer).__module__}.{type(optimizer).__name__} makes its state before training, so it cannot be split over "
                         f"ranks: use --strategy ddp")
    for group in optimizer.param_groups:
        group["params"] = [pieces[p] for p in group["params"] if p in pieces]
