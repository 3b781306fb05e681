"""What a piece of training holds and sends, seen operator by operator, on real or on fake tensors: memory by the storages that are alive, and
each collective with its group. tools/dryrun.py predicts with it, and measures real ranks with it."""
from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from cost import Clock
from state import UsageError
from tools.flops import FORMULAS

# by the names of operators: those of torch.distributed, and functional ones, which DTensor calls
KINDS = {"all-reduce": "allreduce_ allreduce_coalesced_ all_reduce all_reduce_ all_reduce_coalesced",
         "reduce-scatter": "_reduce_scatter_base_ reduce_scatter_ reduce_scatter_tensor_coalesced_ reduce_scatter_tensor "
                           "reduce_scatter_tensor_coalesced",
         "all-gather": "_allgather_base_ allgather_ allgather_into_tensor_coalesced_ all_gather_into_tensor all_gather_into_tensor_coalesced",
         "broadcast": "broadcast_ broadcast", "all-to-all": "alltoall_base_ alltoall_ all_to_all_single shard_dim_alltoall",
         "send": "send", "receive": "recv_", "barrier": "barrier monitored_barrier_"}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}
NAMESPACES = ("c10d", "_c10d_functional", "_dtensor")
FLOPS = flop_registry | {name: shape_wrapper(formula) for name, formula in FORMULAS.items()}
CONTROL = 16        # numbers; a collective of integers, or of at most so many, carries ids, counts, flags and norms, and not the model


class Route(NamedTuple):
    """A kind of collective in a group, by its name, of `size` ranks, of which `local` are on this rank's node."""

    kind: str
    group: str
    size: int
    local: int
    control: bool


@dataclass
class Traffic:
    """count: collectives. payload: bytes of the buffers, each as long as the parts of all ranks together. inside, between: bytes that a rank sends
    within its node and to other nodes, as ring algorithms send them; mean over the ranks of the node, of which a ring leaves the node at one."""

    count: float = 0.0
    payload: float = 0.0
    inside: float = 0.0
    between: float = 0.0

    def __sub__(self, other: Traffic) -> Traffic:
        return self + other.times(-1)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def times(self, factor: float) -> Traffic:
        return Traffic(*(factor * value for value in vars(self).values()))


def sent(route: Route, payload: int) -> Traffic:
    """One collective. Of a ring of N ranks each sends (N - 1)/N of the buffer, in an all-reduce twice that (Rajbhandari et al. 2020, section
    7.1); in an all-to-all 1/N of it to each other rank."""
    n, local = route.size, route.local
    if route.kind in ("receive", "barrier") or n == 1:
        return Traffic(1, payload)
    if route.kind == "send":        # local: 2 if it is for a rank of this node, else 1
        return Traffic(1, payload, payload * (local - 1), payload * (2 - local))
    if route.kind == "all-to-all":
        return Traffic(1, payload, payload * (local - 1) / n, payload * (n - local) / n)
    total = payload * (n - 1) / n * (2 if route.kind == "all-reduce" else 1)
    return Traffic(1, payload, total, 0) if local == n else Traffic(1, payload, total * (local - 1) / local, total / local)


class Ledger(TorchDispatchMode):
    """Watches every operator while it is entered: `now` and `peak` are bytes on the device, `traffic` what was sent, by route.

    clock: the world's, which knows whether forward, backward or the optimizer is at work. fake: tensors have no numbers; a host that asks
    for one outside of passes (is a norm finite? have stages agreed?) is told 1, and any other is refused. groups: by name, those that are not of all ranks.
    `activations`: the most that forward passes have left for backward."""

    def __init__(self, clock: Clock, ranks_per_node: int, fake: bool = False, groups: dict[str, dist.ProcessGroup] | None = None):
        super().__init__()
        self.clock, self.ranks_per_node, self.fake = clock, ranks_per_node, fake
        self.names = {group.group_name: name for name, group in (groups or {}).items()}
        self.storages: dict[int, weakref.ref] = {}      # that are alive, by identity
        self.sizes: dict[int, int] = {}
        self.elastic: set[int] = set()      # those that FSDP empties, which no operator shows, and fills again
        self.filled: set[int] = set()       # of these
        self.host: set[int] = set()         # those that are not on the device
        self.foreign: set[int] = set()      # those that no operator has made: buffers of gloo, as others of NCCL would be
        self.now = self.peak = self.activations = self.began = 0
        self.phase = self.peak_phase = "other"
        self.traffic: dict[Route, Traffic] = {}
        self.flops = 0
        self.before_forward: tuple[int, dict[Route, Traffic]] | None = None     # flops and traffic, before the first forward pass

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False        # or torch imports its compiler, which takes longer than all the rest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim" or any(kind.__module__.startswith("torch.distributed") for kind in types):
            return NotImplemented       # no work; or of a DTensor, which comes again as operators on its parts
        self.enter_phase()
        if self.fake and func is torch.ops.aten._local_scalar_dense.default:
            if self.phase in ("forward", "backward"):
                raise UsageError(f"the {self.phase} pass depends on a number that only a real run has (.item() or a like call): "
                                 f"it cannot be simulated")
            return 1.0 if args[0].is_floating_point() else 1
        self.see([args, kwargs], self.foreign)
        result = func(*args, **kwargs)
        if func.namespace in NAMESPACES:
            self.count(func._overloadpacket.__name__, [*args, *kwargs.values()], result)
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **kwargs, out_val=result)
        self.see([args, kwargs, result])
        for key in [*self.filled]:
            self.resize(key, self.storages[key]().nbytes())
        if self.now > self.peak:
            self.peak, self.peak_phase = self.now, self.phase
        return result

    def enter_phase(self) -> None:
        part = self.clock.part
        if part != self.phase and part in ("forward", "backward", "optimizer"):
            if part == "forward":
                self.began = self.now - self.gathered()
                self.before_forward = self.before_forward or (self.flops, dict(self.traffic))
            elif part == "backward":
                self.activations = max(self.activations, self.now - self.gathered() - self.began)
            self.phase = part

    def gathered(self) -> int:
        """Bytes of weights that FSDP has gathered."""
        return sum(self.sizes[key] for key in self.filled)

    def see(self, value, unknown: set[int] | None = None) -> None:
        """Takes note of the storages of all tensors in a value; of those that are new in `unknown` too, if there is one."""
        for tensor in tensors_in(value):
            if tensor.device.type == "meta":        # it has no memory
                continue
            storage = tensor.untyped_storage()
            key = id(storage)
            if key not in self.sizes:
                self.storages[key], self.sizes[key] = weakref.ref(storage, lambda _, key=key: self.forget(key)), 0
                if unknown is not None:
                    unknown.add(key)
            self.resize(key, storage.nbytes())

    def resize(self, key: int, size: int) -> None:
        if size != self.sizes[key]:
            self.now += 0 if key in self.host or key in self.foreign else size - self.sizes[key]
            self.sizes[key] = size
            if key in self.elastic:
                (self.filled.add if size else self.filled.discard)(key)

    def forget(self, key: int) -> None:
        self.resize(key, 0)
        del self.storages[key], self.sizes[key]
        self.elastic.discard(key)
        self.host.discard(key)
        self.foreign.discard(key)

    def start(self, on_host: Iterable[Tensor]) -> None:
        """From here on peaks and traffic are counted, between two updates. Storages whose size has changed unseen are known from now on."""
        for key, storage in self.storages.items():
            if (size := storage().nbytes()) != self.sizes[key]:
                self.elastic.add(key)
                self.resize(key, size)
        for tensor in on_host:
            self.see(tensor)
            key = id(tensor.untyped_storage())
            if key not in self.host:
                self.now -= self.sizes[key]
                self.host.add(key)
        self.peak, self.activations, self.traffic, self.flops, self.before_forward = self.now, 0, {}, 0, None

    def count(self, name: str, args: list, result) -> None:
        """A collective, or what comes with a functional one."""
        if name in ("wait_tensor", "_wrap_tensor_autograd"):
            return
        if name not in KIND_OF:
            raise UsageError(f"the collective {name} is not known here: it cannot be counted")
        group = find_group(args)
        tensors = [list(tensors_in(value)) for value in (*args, result)]
        largest = max(tensors, key=lambda some: sum(t.nbytes for t in some))
        control = not any(t.is_floating_point() for t in largest) or sum(t.numel() for t in largest) <= CONTROL
        route = self.route(KIND_OF[name], group, args, control)
        self.traffic[route] = self.traffic.get(route, Traffic()) + sent(route, sum(t.nbytes for t in largest))

    def route(self, kind: str, group: dist.ProcessGroup, args: list, control: bool) -> Route:
        ranks, node = dist.get_process_group_ranks(group), dist.get_rank() // self.ranks_per_node
        if kind in ("send", "receive"):
            peer = next(arg for arg in args if type(arg) is int)        # its rank in the group
            ranks = [dist.get_rank(), ranks[peer]]
        return Route(kind, self.names.get(group.group_name, "all"), len(ranks), sum(rank // self.ranks_per_node == node for rank in ranks), control)


def find_group(args: list) -> dist.ProcessGroup:
    """Of the arguments of an operator: an object, or the name by which functional collectives know it."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    name, = (arg for arg in args if isinstance(arg, str) and arg not in ("sum", "avg", "max", "min", "product"))
    return dist.distributed_c10d._resolve_process_group(name)


def tensors_in(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all storages that tensors lie in, each counted once."""
    return sum({id(storage): storage.nbytes() for storage in [t.untyped_storage() for t in tensors]}.values())
