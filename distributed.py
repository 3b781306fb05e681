"""Ranks: the process group, who this process is (`World`), its randomness, and how a model is spread over ranks.

To change the parallelism, change `parallelize`, `unwrap`, `set_grad_sync` and `clip_grads`.
One process has no process group; every function here then does nothing but return what it was given.
"""
from __future__ import annotations

import atexit
import contextlib
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from state import UsageError


@dataclass(frozen=True)
class World:
    """This process among all. Control flow of a run may only depend on values that `sum`, `max` or `gather` agreed."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: int) -> list[int]:
        """Host integers added up over ranks. No accelerator is waited for: they travel over gloo."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: int) -> list[int]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values, op) -> list[int]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op)
        return tensor.tolist()

    def add(self, tensor: Tensor) -> Tensor:
        """A device tensor summed over ranks; the host does not wait for an accelerator."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Equally shaped tensors (...) of all ranks as one CPU tensor (world_size, ...), the same bits on every rank."""
        tensor = tensor.detach().cpu().contiguous()
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def raise_together(self, error: Exception | None) -> None:
        """Raises on every rank if any rank has an error: its own, or one that names the ranks that failed."""
        failed = self.gather(torch.tensor(error is not None)).nonzero().flatten().tolist()
        if error is not None:
            raise error
        if failed:
            raise UsageError(f"rank {failed[0]} failed; its own message says why", 1)

    @contextlib.contextmanager
    def writing(self, path: str) -> Iterator[None]:
        """A piece of work on files that all ranks enter and leave together; a failure of one is an error of all."""
        error = None
        try:
            yield
        except OSError as failure:
            error = UsageError(f"cannot write {path}: {failure}; free space or permissions there, then resume", 5)
        self.raise_together(error)


kept_group: list = []   # the process group closed last; see open_world
atexit.register(kept_group.clear)   # while Python still runs: a group that is left over can abort the process
opened: Counter[str] = Counter()   # worlds opened by this process, by the address they met at


def open_store(rank: int, world_size: int) -> dist.Store:
    """Where ranks find each other. Each restart and each world of a process gets keys of its own: a store that outlives
    a group would else hand out the addresses of dead peers."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    torchrun_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(host, int(port), world_size, is_master=rank == 0 and not torchrun_serves, multi_tenant=True)
    opened[f"{host}:{port}"] += 1
    return dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{opened[f'{host}:{port}']}", store)


@contextlib.contextmanager
def open_world(args) -> Iterator[World]:
    """The world that torchrun started, or one process; the process group is always destroyed at the end."""
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
    cuda = torch.cuda.is_available() and not args.use_cpu
    if cuda and local_rank >= torch.cuda.device_count():
        raise UsageError(f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}; "
                         f"start at most that many processes, or train on the CPU with --use_cpu")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if args.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")   # cuBLAS needs it before its first call
        torch.use_deterministic_algorithms(True)
    world = World(rank, local_rank, world_size, device)
    if world_size == 1:
        yield world
        return
    # gloo carries the small host-side values, NCCL (where there are GPUs) the gradients
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=open_store(rank, world_size), rank=rank, world_size=world_size)
    try:
        yield world
    finally:
        # A DDP module may outlive the group and would then destroy it while holding the interpreter lock, which deadlocks
        # with gloo's threads when they still want it (seen): so the last reference has to be Python's, which lets go first.
        kept_group[:] = [dist.group.WORLD]
        dist.destroy_process_group()   # leaving gloo without this aborts one exit in ten


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """The global random number generators of this rank as JSON values; `set_rng_state` puts them back exactly."""
    name, keys, *rest = np.random.get_state()
    return {"python": list(random.getstate()), "numpy": [name, keys.tolist(), *rest],
            "torch": torch.get_rng_state().numpy().tobytes().hex(),
            "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_initialized() else None}


def set_rng_state(state: dict) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))


def parallelize(model: nn.Module, world: World) -> nn.Module:
    """The model on this rank's device, wrapped so that backward averages its gradients over ranks."""
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError("the model has no trainable parameter: give one that has, or set requires_grad on those to train")
    model = model.to(world.device)
    if world.world_size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel  # imports torch._dynamo: a second that one process need not pay
    return DistributedDataParallel(model, device_ids=[world.local_rank] if world.device.type == "cuda" else None)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module: what is evaluated, saved and generated from."""
    return model.module if type(model).__name__ == "DistributedDataParallel" else model


def set_grad_sync(model: nn.Module, last: bool) -> None:
    """Whether the next backward reduces gradients: ddp does so once per window, in its last micro-batch."""
    if unwrap(model) is not model:
        model.require_backward_grad_sync = last


def clip_grads(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients so that their global 2-norm is at most max_norm (0: leaves them). Returns the norm before, ()."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if max_norm == 0:
        return nn.utils.get_total_norm([p.grad for p in parameters])
    return nn.utils.clip_grad_norm_(parameters, max_norm)
