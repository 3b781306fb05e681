"""Ranks: who this process is (`World`), how they meet, what happens when one is lost, and their random generators.

One process has no process group; every method here then does nothing but return what it was given.
"""
from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cost import Clock, Memory
from state import UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class World:
    """This process among all. Control flow of a run may only depend on values that `sum`, `max` or `gather` agreed."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    device_mesh: DeviceMesh | None = None    # fsdp: ("shard",) over all ranks; hsdp, --ep: ("replicate", "shard"); --tp: ("shard", "tp")
    local_world_size: int = 1
    node: int = 0                            # number of the host
    writes: bool = True                      # into output_dir what all ranks hold: rank 0, with --save_on_each_node one rank of each host
    copies: int = 1                          # neighbouring ranks that read the same samples (--cp, --tp)
    stages: int = 1                          # and as many times all of the data is read, by one stage of the pipelines after the other (--pp)
    groups: dict = field(default_factory=dict)      # of model parallelism: by flag the process group that this rank is in
    # code: the exit code that this rank wants to stop with; wish: it may want something else; asked: whether some rank did at the last `count`
    stop: dict = field(default_factory=lambda: {"code": 0, "wish": False, "asked": True})
    status: dict = field(default_factory=lambda: {"state": "running", "step": 0, "reason": "", "exit": None, "started": time.time()})
    on_exit: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)     # what is to be undone when the world is closed
    clock: Clock = field(default_factory=Clock)
    memory: Memory = field(default_factory=Memory)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the parts of the data this rank reads, out of `data_ranks`."""
        return self.rank // self.copies % self.data_ranks

    @property
    def data_ranks(self) -> int:
        return self.world_size // self.stages // self.copies

    def sum(self, *values: int) -> list[int]:
        """Host integers added up over ranks. No accelerator is waited for: they travel over gloo."""
        return list(values) if self.world_size == 1 else self._reduce(values, dist.ReduceOp.SUM)

    def count(self, *values: int) -> list[int]:
        """Numbers of samples or items that ranks have read, added up; what several ranks have read alike counts once. Whether some rank
        wants to stop, or something else, travels along: a message of its own would cost 1.5 ms over gloo."""
        counts = self.rank % self.copies == 0 and self.rank < self.world_size // self.stages
        *totals, asked = self.sum(*(values if counts else [0] * len(values)), int(self.stop["code"] != 0 or self.stop["wish"]))
        self.stop["asked"] = asked > 0
        return totals

    def max(self, *values: int) -> list[int]:
        return list(values) if self.world_size == 1 else self._reduce(values, dist.ReduceOp.MAX)

    def all(self, flag: bool) -> bool:
        """Whether it is so on all ranks."""
        return self.max(int(not flag)) == [0]

    def _reduce(self, values, op) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        with self.clock.within("communication"):
            dist.all_reduce(tensor, op)
        return tensor.tolist()

    def of_first(self, values: list[int], group: dist.ProcessGroup) -> list[int]:
        """Host integers of a group's first rank, on all of its ranks."""
        tensor = torch.tensor(values)
        with self.clock.within("communication"):
            dist.broadcast(tensor, group=group, group_src=0)
        return tensor.tolist()

    def add(self, tensor: Tensor) -> Tensor:
        """A device tensor summed over ranks; the host does not wait for an accelerator."""
        if self.world_size > 1:
            tensor = tensor.clone()
            with self.clock.within("communication"):
                dist.all_reduce(tensor)
        return tensor

    def add_and_agree(self, value: Tensor, flags: list[bool]) -> tuple[Tensor, list[bool]]:
        """`add` of a number (), and which flags some rank has set. On a CPU they are one message: small ones take 1.5 ms each over gloo."""
        if self.device.type != "cpu":
            return self.add(value), list(map(bool, self.max(*flags))) if flags else []
        total, *counts = self.add(torch.tensor([float(value), *flags], dtype=torch.float64)).tolist()
        return torch.tensor(total, dtype=value.dtype), [count > 0 for count in counts]

    def gather(self, tensor: Tensor) -> Tensor:
        """Equally shaped tensors (...) of all ranks as one CPU tensor (world_size, ...), the same bits on every rank."""
        tensor = tensor.detach().cpu().contiguous()
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with self.clock.within("communication"):
            dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Those of all ranks, of any lengths."""
        sizes = self.gather(torch.tensor(len(data))).tolist()
        padded = torch.frombuffer(bytearray(data.ljust(max(sizes), b"\0")), dtype=torch.uint8)
        return [row[:size].numpy().tobytes() for row, size in zip(self.gather(padded), sizes)]

    def gather_json(self, value) -> list:
        """JSON values of all ranks, the same list on every rank."""
        return [json.loads(data) for data in self.gather_bytes(json.dumps(value).encode())]

    def raise_together(self, error: Exception | None) -> None:
        """Raises on every rank if any rank has an error: its own, or one that tells the first one's, with the same exit code."""
        code = 0 if error is None else getattr(error, "exit_code", 1)
        if any(self.gather(torch.tensor(code)).tolist()):
            rank, (code, message) = next((rank, told) for rank, told in enumerate(self.gather_json([code, str(error)])) if told[0])
            raise error or UsageError(f"rank {rank} failed: {message}", code)

    @contextlib.contextmanager
    def writing(self, path: str) -> Iterator[None]:
        """A piece of work on files that all ranks enter and leave together; a failure of one is an error of all."""
        error = None
        try:
            yield
        except OSError as failure:
            with contextlib.suppress(OSError):
                failure.strerror = f"{failure.strerror}, {shutil.disk_usage(os.path.dirname(path)).free:,} bytes are free"
            error = UsageError(f"cannot write {path}: {failure}; older checkpoints are as they were. Free space or permissions there, then resume", 5)
        except Exception as failure:    # noqa: BLE001  the others wait here
            error = failure
        self.raise_together(error)


def torchrun_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Where ranks find each other. Under torchrun it outlives them, with what they have left there."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        if torchrun_serves():     # or it is dead, and nobody will ever answer
            socket.create_connection((host, int(port)), timeout_s).close()
        return dist.TCPStore(host, int(port), world_size, is_master=rank == 0 and not torchrun_serves(), multi_tenant=True,
                             timeout=timedelta(seconds=timeout_s))
    except (dist.DistError, OSError) as error:
        raise UsageError(f"rank {rank} cannot {'open' if rank == 0 else 'reach'} {host}:{port}, where the ranks meet (MASTER_ADDR, MASTER_PORT): "
                         f"{str(error).splitlines()[0][:160]}", 6) from None


def meet(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> tuple[dist.Store, list[str]]:
    """The part of the store that this start has for itself, else it would hand out the addresses of dead peers, and the hosts of all ranks.
    Rank 0 names it, as each torchrun counts only some of the restarts, and answers all who ask: those that an earlier start has left there too."""
    name, end = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank > 0:
        store.set(f"asks{rank}", name)
        name = store.get(name).decode()
    store.set(f"{name}/host{rank}", f"host {socket.gethostname()} (node {os.environ.get('GROUP_RANK', '0')})")
    hosts = [f"{name}/host{r}" for r in range(world_size)]
    while rank == 0 and not store.check(hosts) and time.monotonic() < end:
        store.multi_set([asking.decode() for asking in store.multi_get([f"asks{r}" for r in range(1, world_size)])], [name] * (world_size - 1))
        time.sleep(0.001)
    return dist.PrefixStore(name, store), [host.decode() for host in store.multi_get(hosts)]


@contextlib.contextmanager
def open_world(args) -> Iterator[World]:
    """The world that torchrun started, or one process; the process group is always destroyed at the end.

    An error on one rank ends all of them: those that lose touch with it raise a UsageError with its message, or, when nobody
    knows, with the collective that failed and the ranks that are silent (exit code 6). Workers die with their torchrun."""
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
    if torchrun_serves() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG: they have sessions of their own, and would write on as orphans
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
    with contextlib.ExitStack() as on_exit, joined(args, rank, world_size, cuda):
        world = World(rank, local_rank, world_size, device, local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
                      node=int(os.environ.get("GROUP_RANK", "0")), writes=rank == 0 or args.save_on_each_node and local_rank == 0, on_exit=on_exit,
                      memory=Memory(device, not args.skip_memory_metrics), copies=args.cp * args.tp, stages=args.pp)
        check_same_start(world, args)
        groups = open_groups(args, rank, world_size)
        yield dataclasses.replace(world, groups=groups, device_mesh=open_mesh(args, rank, world_size, device, groups) if world_size > 1 else None)


@contextlib.contextmanager
def joined(args, rank: int, world_size: int, cuda: bool) -> Iterator[None]:
    """The process group, if there are several ranks, and what an error means when ranks have lost touch."""
    store = open_store(rank, world_size, args.ddp_timeout) if world_size > 1 or torchrun_serves() else None
    if world_size == 1:
        yield
        return
    store, hosts = meet(store, rank, world_size, args.ddp_timeout)
    # gloo carries the small host-side values, NCCL (where there are GPUs) the gradients
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size,
                            timeout=timedelta(seconds=args.ddp_timeout))
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        told = explain(error, rank, hosts, store, args.ddp_timeout)
        if told is error:
            raise
        raise told from error
    finally:
        dist.destroy_process_group()   # leaving gloo without this aborts one exit in ten


def check_same_start(world: World, args) -> None:
    """Ranks that were started with other flags or other code would train something else together, or wait for each other for ever."""
    code = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted([*root.glob("*.py"), *root.glob("parallel/*.py")]) if world.world_size > 1 else []:
        code.update(path.read_bytes())
    first, *others = world.gather_json({"source code": code.hexdigest()[:16], **args.to_dict()})
    for rank, other in enumerate(others, 1):
        if different := [f"{name}: {other[name]!r}, and rank 0 with {first[name]!r}" for name in first if other[name] != first[name]
                         and not (name == "output_dir" and args.save_on_each_node)]:
            raise UsageError(f"rank {rank} was started with another {'; '.join(different)}: start all alike")


def open_groups(args, rank: int, world_size: int) -> dict[str, dist.ProcessGroup]:
    """The groups of model parallelism that this rank is in; data: those at its place in others. Ranks are laid out pp x dp x cp x tp: those that
    talk most are neighbours."""
    size = args.pp * args.cp * args.tp
    if world_size % size:
        given = " ".join(f"--{name} {getattr(args, name)}" for name in ("pp", "cp", "tp") if getattr(args, name) > 1)
        raise UsageError(f"{given} makes groups of {size} ranks, and there {f'are {world_size}' if world_size > 1 else 'is 1'}: let torchrun start a multiple of that")
    grid, stages = torch.arange(world_size).view(-1, args.cp, args.tp), torch.arange(world_size).view(args.pp, -1)
    by_place = stages.unflatten(1, (-1, args.tp))       # (stages, models of a stage, tp)
    kinds = {"tp": grid, "data": by_place.mT} if args.tp > 1 else {}     # first: DTensor remembers groups by their numbers, in all worlds of a process
    kinds |= {"cp": grid.mT} if args.cp > 1 else {}
    kinds |= {"pp": stages.T, "stage": stages, "model": by_place.transpose(0, 1).flatten(1)} if args.pp > 1 else {}     # model: ranks that hold one together
    return {name: open_group(args, rank, ranks.flatten(0, -2)) for name, ranks in kinds.items()}


def open_group(args, rank: int, groups: Tensor) -> dist.ProcessGroup:
    """groups: the ranks of each, (groups, ranks). Returns this rank's. new_group is a collective of all ranks; it would not inherit the timeout."""
    opened_here = {tuple(ranks): dist.new_group(ranks, timeout=timedelta(seconds=args.ddp_timeout)) for ranks in groups.tolist()}
    return next(group for ranks, group in opened_here.items() if rank in ranks)


def open_mesh(args, rank: int, world_size: int, device: torch.device, groups: dict) -> DeviceMesh | None:
    """The grid of ranks that fsdp and hsdp shard over: hsdp shards among --hsdp_shard_size neighbours and replicates those; so does --ep."""
    if args.tp > 1:
        from torch.distributed.device_mesh import DeviceMesh
        grid = torch.arange(world_size).view(args.pp, -1, args.tp)[rank * args.pp // world_size]
        return DeviceMesh.from_group([groups["data"], groups["tp"]], device.type, mesh=grid, mesh_dim_names=("shard", "tp"))
    if world_size % args.ep:
        raise UsageError(f"--ep {args.ep} shares experts out among {args.ep} ranks, and there are {world_size}: start a multiple of that with torchrun")
    size = args.ep if args.ep > 1 else args.hsdp_shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if args.strategy == "hsdp" and (world_size % size or size in (1, world_size)):
        sizes = [str(n) for n in range(2, world_size // 2 + 1) if world_size % n == 0]
        raise UsageError(f"--strategy hsdp splits {world_size} ranks into groups of --hsdp_shard_size={size} (by default all ranks of a host), "
                         f"and needs at least 2 full groups of at least 2: {f'give {sizes[0]}, or' if sizes else ''} use --strategy fsdp")
    if args.strategy not in ("fsdp", "hsdp") and args.ep == 1:
        return None
    from torch.distributed.device_mesh import DeviceMesh
    if args.strategy == "fsdp":
        return DeviceMesh.from_group(dist.group.WORLD, device.type, mesh_dim_names=("shard",))
    grid = torch.arange(world_size).view(-1, size)
    mine = [open_group(args, rank, groups) for groups in (grid.T, grid)]
    return DeviceMesh.from_group(mine, device.type, mesh=grid, mesh_dim_names=("replicate", "shard"))


ROLL_CALL_S = 3     # after a failure: how long ranks may take to say what they know


def explain(error: BaseException, rank: int, hosts: list[str], store: dist.Store, timeout_s: float) -> BaseException:
    """The error itself where it is this rank's own; where a peer was lost, what that one said, or who is silent. hosts: of all ranks."""
    lost_peer = isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)
    ours = os.path.dirname(os.path.abspath(__file__))
    frames = traceback.extract_tb(error.__traceback__)
    here = next((f for f in reversed(frames) if os.path.dirname(f.filename) in (ours, os.path.join(ours, "parallel"))), frames[-1])
    name = next((f.name for f in frames if f.filename.endswith("distributed_c10d.py")), here.name)
    line = f"{os.path.basename(here.filename)}:{here.lineno}"
    told: dict[int, str] = {}

    def roll_call() -> None:
        with contextlib.suppress(dist.DistError):
            store.set(f"left{rank}", "" if lost_peer else json.dumps([f"{type(error).__name__}: {error}", getattr(error, "exit_code", 1)]))
            if lost_peer:
                with contextlib.suppress(dist.DistStoreError):      # some are silent
                    store.wait([f"left{r}" for r in range(len(hosts))], timedelta(seconds=ROLL_CALL_S))
                told.update({r: store.get(f"left{r}").decode() for r in range(len(hosts)) if store.check([f"left{r}"])})
    thread = threading.Thread(target=roll_call, daemon=True)    # a store that a stopped rank keeps would never answer
    thread.start()
    thread.join(2 * ROLL_CALL_S)
    if not lost_peer:
        return error
    for r, message in told.items():
        if message:
            said, code = json.loads(message)
            return UsageError(f"rank {rank} stops in {name} ({line}): rank {r} failed with {said}", code)
    silent = [r for r, host in enumerate(hosts) if (r not in told if told else r == 0 or host == hosts[0] != hosts[rank])]    # the store is on rank 0's
    several, by_host = len({*hosts}) > 1, {host: [r for r in silent if hosts[r] == host] for host in hosts}
    who = ", ".join(f"{f'on {host} ' * several}rank{'s' * (len(them) > 1)} {', '.join(map(str, them))}" for host, them in by_host.items() if them)
    what = f"{who} did not answer: dead (see its own message), stopped, {'cut off, ' * several}or busy for longer than --ddp_timeout {timeout_s} s" \
        if silent else "all ranks answer, so they were in different collectives: look for code that only some ranks run, with fsdp also for " \
        "blocks of the model"
    return UsageError(f"rank {rank} lost touch in {name} ({line}): {what}. {str(error).splitlines()[0][:160]}", 6)


def print0(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


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
    """Raises ValueError, TypeError, LookupError or RuntimeError for what is no state. numpy and torch would take positions behind the
    end of their tables of 624 words, and read on there."""
    version, keys, gauss = state["python"]
    name, words, position, *rest = state["numpy"]
    data = bytearray.fromhex(state["torch"])
    left, after = int.from_bytes(data[8:12], "little"), int.from_bytes(data[16:24], "little")      # at::mt19937's, as torch lays them out
    if not (gauss is None or type(gauss) is float) or not 0 <= position <= 624 or left + after > 625:
        raise ValueError("it is not the state of a random generator")
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state((name, np.array(words, dtype=np.uint32), position, *rest))
    torch.set_rng_state(torch.frombuffer(data, dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))
