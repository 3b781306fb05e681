"""How the training of a model is spread over ranks: FSDP and HSDP here, the rest in zero.py; what splits the model itself, in parallel/.

To change the parallelism, change `parallelize` and `clip_grads`; what `parallelize` returns is `Parallel` in zero.py.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from state import UsageError
from world import World
from zero import DataParallel, Parallel, plain, share, whole_parameters


def build_on(world: World, build: Callable[[], nn.Module], meta_init: bool) -> nn.Module:
    """build(), on the meta device and without memory if the model will be cut. meta_init: reset_parameters of its modules is all
    there is to its initial weights; `parallelize` then fills this rank's part by that."""
    with torch.device("meta") if (world.device_mesh is not None or world.stages > 1) and meta_init else contextlib.nullcontext():
        return build()


def parallelize(model: nn.Module, args, world: World) -> Parallel:
    """Moves the model, in place, to this rank's device and spreads it as --strategy says. All ranks start from rank 0's weights."""
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError("the model has no trainable parameter: give one that has, or set requires_grad on those to train")
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True:
            raise UsageError(f"{name} gives sparse gradients, which can be neither clipped nor reduced here: build it with sparse=False")
    if args.save_on_each_node and world.world_size > world.local_world_size and args.strategy != "ddp" \
            and not (args.strategy == "hsdp" and world.local_world_size % world.device_mesh["shard"].size() == 0):
        raise UsageError(f"--save_on_each_node needs all of the run on each host, and --strategy {args.strategy} splits it over hosts: give an output_dir that all "
                         f"hosts share, or --strategy ddp, or hsdp with groups within a host")
    if args.cpu_offload and world.world_size == 1:
        raise UsageError("--cpu_offload moves a rank's part of the optimizer, and one process has no part: use several ranks, or leave it away")
    sharded, data_parallel = FullySharded, DataParallel
    if args.tp > 1:
        from parallel.tensor import ReplicatedParts, ShardedParts, split_layers
        sharded, data_parallel = ShardedParts, ReplicatedParts
        split_layers(model, args, world)
    if args.cp > 1:
        from parallel.context import split_sequences
        split_sequences(model, args, world)
    if args.pp > 1:
        from parallel.pipeline import PipelineOfParts, PipelineParallel
        return (PipelineOfParts if args.tp > 1 else PipelineParallel)(model, args, world)
    if args.ep > 1:
        from parallel.experts import ExpertParallel
        return ExpertParallel(model, args, world)
    if world.world_size > 1 and args.strategy in ("fsdp", "hsdp"):
        return sharded(model, args, world)
    model.to(world.device)
    return Parallel(model, world) if world.world_size == 1 else data_parallel(model, args, world)


def clip_grads(parallel: Parallel, max_norm: float) -> Tensor:
    """Scales all gradients so that their global 2-norm is at most max_norm (0: leaves them). Returns the norm before, ()."""
    if parallel.open:
        raise UsageError("the gradients of a window are not those of all ranks yet: after its last micro-batch call loss = run.parallel.end_window(this rank's share of the loss)")
    parameters = [part.piece for part in parallel.parts if part.piece.grad is not None]
    norm = nn.utils.get_total_norm([part.piece.grad for part in parallel.parts if part.piece.grad is not None and parallel.owns(part)])
    if parallel.split:      # that is the norm of this rank's pieces, of which there may be none
        square = norm.to(parallel.world.device, torch.float64) ** 2
        dist.all_reduce(square, group=parallel.group)
        norm = square.sqrt().to(torch.promote_types(torch.float32, next(iter(parallel.trained.values())).dtype))
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """The plain tensor that this rank holds of a weight of the model, and its first element in the flattened whole."""
    if not hasattr(tensor, "to_local"):     # no DTensor
        return tensor.detach(), 0
    if "tp" in tensor.device_mesh.mesh_dim_names:
        from parallel.tensor import local_rows
        return local_rows(tensor.detach())
    rows, mesh = tensor.shape[0], tensor.device_mesh
    ranks = mesh.size(mesh.mesh_dim_names.index("shard"))
    first = min(rows, mesh.get_local_rank("shard") * -(-rows // ranks))      # rows are cut as torch.chunk does
    return tensor.detach().to_local(), first * (tensor.numel() // max(rows, 1))


@contextlib.contextmanager
def filling(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    """`local_part`, to be written into."""
    local, start = local_part(tensor)
    yield local, start
    if hasattr(tensor, "to_local") and "tp" in tensor.device_mesh.mesh_dim_names:      # it may be a copy
        from parallel.tensor import put_rows
        put_rows(tensor.detach(), local)


def whole(tensor: Tensor) -> Tensor:
    """A weight of the model as one plain tensor on every rank; all ranks have to call it."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


class FullySharded(Parallel):
    """FSDP2, which is ZeRO-3 (Rajbhandari et al. 2020, section 5.3; Zhao et al. 2023): weights, gradients and optimizer state are
    split, and a block's weights are gathered when forward or backward gets to it. hsdp: split within a group of ranks only."""

    def __init__(self, model: nn.Module, args, world: World):
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
        units = find_units(model, args.fsdp_transformer_layer_cls_to_wrap)
        check_shardable(model, units, args, world.device_mesh["shard"].size())
        on_meta = any(p.is_meta for p in model.parameters())
        if not on_meta and args.tp == 1:
            for p in model.parameters():
                if len(plain(p)) == 1:
                    p.data = p.data.contiguous()
            share([*model.parameters(), *model.buffers()])
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        mesh = world.device_mesh if args.strategy == "hsdp" else world.device_mesh["shard"]
        options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False),
                   "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if args.cpu_offload else OffloadPolicy()}
        for unit in units:
            fully_shard(unit, reshard_after_forward=args.reshard_after_forward, **options)
        fully_shard(model, **options)      # the rest; the root stays gathered from forward to backward
        model.set_reduce_scatter_unused_params(True)       # or ranks that use different parameters would reduce different ones
        if on_meta:
            materialize(model, torch.device("cpu") if args.cpu_offload else world.device)
        super().__init__(model, world, split=True)     # before the first forward: after one, gathered weights may be in place of shards
        self.group, self.every_micro_batch = world.device_mesh.get_group("shard"), not args.accumulate_unsharded
        self.saves = args.save_on_each_node or args.strategy == "fsdp" or world.device_mesh.get_local_rank("replicate") == 0
        self.exchanges: list[Exchange] = []
        self.units = [(name, unit) for name, unit in model.named_modules() if hasattr(unit, "reshard")]
        for name, unit in self.units:
            self.watch(name, unit)

    def watch(self, unit_name: str, unit: nn.Module) -> None:
        """Has the unit's parameters note that a gradient came. They exist, gathered, from its first forward on."""
        def attach(*_) -> None:
            handle.remove()
            for name, p in unit.named_parameters(unit_name):
                if name in self.trained and p is not self.trained[name]:
                    p.register_post_accumulate_grad_hook(lambda _, name=name: self.used.add(name))
        handle = unit.register_forward_pre_hook(attach)

    def shard(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives the optimizer this rank's shards to train, and of parameters that must not be cut every N-th one whole."""
        together, shapes = whole_parameters(optimizer), {}
        for name, p in self.trained.items():
            if p in together:
                shapes.setdefault(p.shape, []).append(name)
        for names in shapes.values():
            for start in range(0, len(names), self.group.size()):
                some = {name: self.trained[name] for name in names[start:start + self.group.size()]}
                self.exchanges.append(Exchange(some, self.group, turn=sum(len(e.owners) for e in self.exchanges)))
        self.shards = {name: nn.Parameter(local_part(p)[0]) for name, p in self.trained.items() if p not in together}
        self.adopt()
        self.train_pieces(optimizer, {name: (piece, local_part(self.trained[name])[1]) for name, piece in self.shards.items()} |
                          {exchange.name: (exchange.piece, 0) for exchange in self.exchanges if exchange.name})

    def grad_sync(self, last: bool) -> contextlib.AbstractContextManager:
        self.model.set_requires_gradient_sync(last or self.every_micro_batch)
        self.model.set_requires_all_reduce(last)       # hsdp: between the groups only once per window
        return super().grad_sync(last)

    def give_grads(self, used: set[str]) -> None:
        grads = {name: None if p.grad is None else p.grad.to_local() for name, p in self.trained.items()}
        for name, piece in self.shards.items():
            piece.data, piece.grad = local_part(self.trained[name])[0], grads[name] if name in used else None
        for exchange in self.exchanges:
            whole_grad = exchange.to_owners(grads)
            exchange.piece.grad = whole_grad if exchange.name in used else None
        for p in self.trained.values():
            p.grad = None

    def gather(self) -> None:
        """Whole matrices go back to their shards; all other weights are gathered where they are used."""
        for exchange in self.exchanges:
            exchange.to_shards()
        self.release()

    def release(self) -> None:
        for _, unit in self.units:
            unit.reshard()

    def adopt(self) -> None:
        """Brings whole matrices up to date with their shards; the other pieces are the shards."""
        for exchange in self.exchanges:
            whole_weight = exchange.to_owners({name: local_part(p)[0] for name, p in exchange.parameters.items()})
            if exchange.name:
                exchange.piece.data = whole_weight


class Exchange:
    """Up to N sharded parameters of one shape on N ranks, each of which updates one of them as a whole (Muon, Adafactor). An all-to-all
    brings each rank the shards of its parameter's gradient; after the update another brings the weights back."""

    def __init__(self, parameters: dict[str, Tensor], group, turn: int):
        first = next(iter(parameters.values()))
        self.parameters, self.group, self.shape = parameters, group, first.shape
        self.owners = {name: (turn + i) % group.size() for i, name in enumerate(parameters)}    # turn: so that all own about equally many
        self.name = next((name for name, rank in self.owners.items() if rank == group.rank()), "")      # of this rank's parameter
        self.piece = nn.Parameter(torch.empty(self.shape if self.name else 0, dtype=first.dtype, device=local_part(first)[0].device))

    def buffer(self) -> Tensor:
        """A shard for each rank, (N, rows, ...); the last ones may have fewer rows."""
        size = self.group.size()
        return self.piece.detach().new_zeros(size, -(-self.shape[0] // size), *self.shape[1:])

    def swap(self, rows: Tensor) -> Tensor:
        """rows[j] of this rank goes to rank j; what comes from rank j has its place."""
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=self.group)
        return received

    def to_owners(self, shards: dict[str, Tensor | None]) -> Tensor:
        """This rank's shards of all parameters -> the whole of its own one."""
        rows = self.buffer()
        for name, rank in self.owners.items():
            if shards[name] is not None:
                rows[rank, :len(shards[name])] = shards[name]
        return self.swap(rows).flatten(0, 1)[:self.shape[0]]

    def to_shards(self) -> None:
        """The whole of this rank's parameter -> everybody's shards of it."""
        rows = self.buffer()
        if self.name:
            rows.flatten(0, 1)[:self.shape[0]] = self.piece.detach()
        rows = self.swap(rows)
        for name, rank in self.owners.items():
            shard = local_part(self.parameters[name])[0]
            shard.copy_(rows[rank, :len(shard)])


def check_shardable(model: nn.Module, units: list[nn.Module], args, ranks: int) -> None:
    """What fully_shard cannot take, in our words."""
    problems = [f"{name} is {'a single number' if p.ndim == 0 else 'empty'}" for name, p in model.named_parameters() if p.ndim == 0 or not p.numel()]
    for name, p in model.named_parameters():
        if len(plain(p)) > 1:
            block = getattr(p, "block_size", 1) * getattr(p, "scaler_block_size", 1)        # of a 4-bit one
            if not hasattr(p, "fsdp_pre_all_gather") or p.shape[0] % ranks or p.numel() // ranks % block:
                problems.append(f"{name} is quantized ({type(p).__name__}) and cannot be cut for {ranks} ranks")
    home = {module: unit for unit in [model, *units[::-1]] for module in unit.modules()}     # the innermost unit of each
    first: dict[Tensor, nn.Module] = {}
    for name, module in model.named_modules():
        problems += [f"{name}.{key} is tied to a weight of another block" for key, p in module.named_parameters(recurse=False)
                     if first.setdefault(p, home[module]) is not home[module]]
    if args.bf16 or args.fp16:
        problems += [f"{name} is a BatchNorm, whose statistics stay in float32" for name, m in model.named_modules()
                     if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))]
    if problems:
        raise UsageError(f"--strategy {args.strategy} cannot shard this model: {'; '.join(problems[:5])}. Use --strategy zero2")


def find_units(model: nn.Module, class_names: str | None) -> list[nn.Module]:
    """What FSDP gathers at a time: the modules of the classes named, or .blocks, or those a transformers model does not split. Inner
    ones first, as fully_shard wants them; none: the whole model is one unit."""
    if class_names is None and hasattr(model, "blocks"):
        return list(model.blocks)
    names = getattr(model, "_no_split_modules", None) or () if class_names is None else class_names.split(",")
    units = [m for m in model.modules() if type(m).__name__ in names and m is not model]
    if class_names is not None and not units:
        raise UsageError(f"--fsdp_transformer_layer_cls_to_wrap {class_names}: the model has no module of that class; it has "
                         f"{', '.join(sorted({type(m).__name__ for m in model.modules()}))}")
    return units[::-1]


def materialize(model: nn.Module, device: torch.device, built: list[tuple[str, nn.Module]] | None = None) -> None:
    """Gives a model from the meta device the weights it would have had without: each module draws its own, whole, by
    reset_parameters, in the order in which modules are built, and this rank keeps its part. One module is whole at a time.
    built: all that were built, where the model has kept some of them only; the others draw for nothing."""
    model.to_empty(device=device)
    filled: set[Tensor] = set()
    for name, module in built or model.named_modules():
        sharded = dict(module.named_parameters(recurse=False))
        if not sharded and next(module.buffers(recurse=False), None) is None:
            continue
        if not hasattr(module, "reset_parameters"):
            raise UsageError(f"{name or 'the model'} ({type(module).__name__}) was built on the meta device and has no reset_parameters() to give it "
                             f"weights: define one, or build the model outside of torch.device('meta')")
        for key, p in sharded.items():
            module.register_parameter(key, nn.Parameter(torch.empty(p.shape), p.requires_grad))      # of the type that models are built in
        module.reset_parameters()
        for key, p in sharded.items():
            if p not in filled and not p.is_meta:     # tied weights keep the first draw, as a module that is given another's weight has it
                with filling(p) as (local, start):
                    local.copy_(module.get_parameter(key).detach().flatten()[start:start + local.numel()].view(local.shape))
            module.register_parameter(key, p)
            filled.add(p)
