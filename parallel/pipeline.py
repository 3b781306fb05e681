"""Pipeline parallelism, --pp N: the blocks of the built-in GPT on N ranks, its stages, each with as many consecutive ones.

The first stage has the embedding too, the last one the norm, the head and the loss. A rank holds the weights, gradients, optimizer state and
activations of its stage alone. The micro-batches of a window follow each other through the stages, forward and then backward, so that
stages work at the same time, on different ones. At both ends of the window some have nothing to do. Of m micro-batches of equal cost this is

    (N - 1) / (m + N - 1)     of the time of each rank, the bubble (GPipe, Huang et al. 2019, section 2.3).

    4 stages, 1f1b, 4 micro-batches; numbers are forward, letters backward of 1 to 4, which here take the same time
        stage 0   1  2  3  4  .  .  .  a  .  b  .  c  .  d
        stage 1   .  1  2  3  .  .  a  4  b  .  c  .  d  .
        stage 2   .  .  1  2  .  a  3  b  4  c  .  d  .  .
        stage 3   .  .  .  1  a  2  b  3  c  4  d  .  .  .

gpipe is all forwards and then all backwards. With 1f1b (PipeDream-Flush: Narayanan et al. 2021, Megatron-LM, section 2.2.1) a stage goes backward as soon
as it can, so it keeps activations of at most N micro-batches and not m, beside the inputs of the stage, for which torch has m buffers; the bubble is
the same. Both are torch.distributed.pipelining's.

A stage is the model itself with modules that do nothing in the place of those of other stages; in the place of the embedding is what came from
the stage before. Names of parameters stay, so checkpoints are those of one process. Ranks are laid out pp x dp x cp x tp: with N stages of D
ranks, rank s * D + d is stage s of pipeline d. A pipeline's ranks read the same samples; the ranks of a stage average their gradients, and may
share its layers and sequences (--tp, --cp), then each hands its tokens (B, T/(cp * tp), C) to the one at its place in the next stage.
"""
from __future__ import annotations

from functools import partial
from itertools import chain
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from collators import IGNORE
from distributed import materialize
from loss import compute_loss, labels_of
from model import GPT
from parallel.context import REFUSED as REFUSED_ELSEWHERE
from parallel.context import agree, begin, refuse_flags
from parallel.tensor import ReplicatedParts
from state import Batch, LossFn, Run, UsageError
from world import World, print0
from zero import DataParallel, Parallel, share

REFUSED = {
    **REFUSED_ELSEWHERE,
    "lora_rank": "changes which weights are saved, by names that a stage does not have",
    "lora_adapter": "changes which weights are saved, by names that a stage does not have",
    "report_histograms": "has the weights of rank 0, which are those of a stage",
    "check_replicas": "compares the weights of all ranks, and stages hold different ones",
    "save_on_each_node": "needs all of the model on each host, so give an output_dir that all hosts share"}


def refuse(model: nn.Module, args, stages: int) -> None:
    """Raises UsageError for what cannot be cut into stages, with the nearest that can."""
    refuse_flags(args, "pp", REFUSED)
    if type(model) is not GPT:
        raise UsageError(f"--pp cuts the built-in GPT of model.py into stages, and this is a {type(model).__name__}: use --strategy fsdp")
    if args.tp > 1 and args.strategy != "ddp":
        raise UsageError(f"--pp {args.pp} --tp {args.tp} goes with --strategy ddp, and not with {args.strategy}: give that, and more of --pp or --tp, which split what it would")
    if args.strategy not in ("ddp", "zero1"):
        raise UsageError(f"--pp {args.pp} goes with --strategy ddp and zero1, and not with {args.strategy}, which would send gradients or weights anew for "
                         f"each of the pipeline's micro-batches: give --strategy zero1, which splits the optimizer's state, and more stages for the rest")
    if len(model.blocks) < stages:
        raise UsageError(f"--pp {stages} makes {stages} stages of at least one block each, and the model has {len(model.blocks)}: give at most --pp {len(model.blocks)}")
    if model.head.weight is model.embed.weight:
        raise UsageError("--pp puts the embedding and the head on different ranks, and here they are one weight (tied): untie them, or use --strategy zero1 without --pp")
    for s in range(stages):
        ends = [model.embed] * (s == 0) + [model.norm, model.head] * (s + 1 == stages)
        if not any(p.requires_grad for module in [*ends, *(model.blocks[i] for i in blocks_of(s, stages, len(model.blocks)))] for p in module.parameters()):
            raise UsageError(f"--pp {stages}: nothing of stage {s} is trained, so its ranks would have no optimizer: freeze less, give fewer stages, or use --strategy fsdp")


def blocks_of(stage: int, stages: int, n_layer: int) -> range:
    return range(stage * n_layer // stages, (stage + 1) * n_layer // stages)


class Elsewhere(nn.Module):
    """In the place of a block that another stage has."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.attn = SimpleNamespace(head_dim=head_dim)      # rotary positions ask the first block

    def forward(self, x: Tensor, *_) -> Tensor:
        return x


class Received(nn.Module):
    """In the place of the embedding in later stages: gives what came from the stage before, once."""

    came: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        came, self.came = self.came, None
        return came


def keep_stage(model: GPT, stage: int, stages: int) -> None:
    """Leaves of a model, in place, what one of its stages has. Called without labels, all but the last give activations."""
    for i, block in enumerate(model.blocks):
        if i not in blocks_of(stage, stages, len(model.blocks)):
            model.blocks[i] = Elsewhere(block.attn.head_dim)
    if stage > 0:
        model.embed, model.dropout = Received(), nn.Identity()
    if stage + 1 < stages:
        model.norm, model.head = nn.Identity(), nn.Identity()


class TrainedStage(PipelineStage):
    """The stage of this rank in the schedules of torch, for one number and shape of micro-batches."""

    def __init__(self, run: Run, pipe: dist.ProcessGroup, ids: Tensor, activations: Tensor):
        """ids (B, T), activations (B, T/(cp * tp), C): what the first stage takes, and what stages hand on, as tensors of the meta device."""
        first, last = pipe.rank() == 0, pipe.rank() + 1 == pipe.size()
        super().__init__(run.model, pipe.rank(), pipe.size(), run.world.device, input_args=ids if first else activations,
                         output_args=activations.new_empty((), requires_grad=True) if last else activations, group=pipe)
        self.clock, self.precision = run.world.clock, run.precision

    def forward_maybe_with_nosync(self, *inputs, **more) -> Tensor:
        if not self.is_first:
            (self.submod.embed.came,), inputs = inputs, ()
        with self.clock.within("forward"), self.precision.autocast():
            return self.submod.forward(*inputs, **more)     # around the hooks, which are for evaluations

    def backward_maybe_with_nosync(self, *inputs, **more):
        with self.clock.within("backward"):
            return super().backward_maybe_with_nosync(*inputs, **more)


class Stages(Parallel):
    """What a pipeline adds to the data parallelism of a stage's ranks, which hold the same weights.

    pipe: the group of this rank's pipeline, in the order of the stages. Training goes through `run_window`. In evaluations the
    model is called as ever, with the whole micro-batch and on all ranks, and its hooks send activations on: the last stage gives the loss,
    the others 0, so that sums over ranks are right."""

    def __init__(self, model: nn.Module, args, world: World):
        refuse(model, args, args.pp)
        self.pipe, self.gpipe, self.C = world.groups["pp"], args.pp_schedule == "gpipe", model.embed.embedding_dim
        self.dtype = model.embed.weight.dtype       # of activations between blocks too, with --bf16 and --fp16 as well
        self.stage, self.last = self.pipe.rank(), self.pipe.rank() + 1 == self.pipe.size()
        whole = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
                 for name, tensor in model.state_dict(keep_vars=True).items()}
        built, on_meta = [*model.named_modules()], model.embed.weight.is_meta        # of all stages: each draws its weights as if it were whole
        if not on_meta and args.tp == 1:
            share([*model.parameters(), *model.buffers()])
        keep_stage(model, self.stage, self.pipe.size())
        if on_meta:
            materialize(model, world.device, built)
        model.to(world.device)
        super().__init__(model, args, world)
        self.whole, self.names = whole, [name for name, tensor in whole.items() if tensor.requires_grad]
        self.writes = world.groups["stage"].rank() == 0
        self.saves |= self.writes
        self.group = dist.group.WORLD if args.strategy == "zero1" else world.groups["model"]       # of all stages
        held = dict(model.named_parameters())
        model.idle_parameters = -sum(tensor.numel() for name, tensor in whole.items() if name not in {*held, "embed.weight"})     # other ranks compute with these
        model.register_forward_pre_hook(partial(agree, world=world, group=world.groups["model"]), with_kwargs=True, prepend=True)
        model.register_forward_pre_hook(self.receive, with_kwargs=True)
        model.register_forward_hook(self.send)
        self.shape, self.schedule = (), None
        if (m := args.gradient_accumulation_steps) < args.pp:
            print0(world, f"note: an update of {m} micro-batch{'es' * (m > 1)} lets each of {args.pp} stages wait for {(args.pp - 1) / (m + args.pp - 1):.0%} of the time: "
                          f"give --gradient_accumulation_steps {4 * args.pp} or more, and smaller micro-batches")

    def shard(self, optimizer: torch.optim.Optimizer) -> None:
        super().shard(optimizer)
        stages = self.world.gather_json(self.groups)[::self.world.groups["stage"].size()]
        self.groups = [[*chain.from_iterable(names)] for names in zip(*stages)]
        self.split = True

    def run_window(self, run: Run, window: list[Batch], loss_fn: LossFn, num_items: int) -> list[Tensor]:
        """Forward and backward of a window, in the place of the loop of `train_step`. Returns on the last stage the losses of its
        micro-batches, divided by num_items, and on the others a 0 like them. What waits for other stages is communication."""
        if loss_fn is not compute_loss:
            raise UsageError("--pp trains with the loss that the built-in model computes in its last stage, compute_loss of loss.py, and this is another: change that one, "
                             "or use --strategy fsdp")
        scaler, one, groups = run.precision.scaler, torch.ones((), device=self.world.device), self.world.groups
        self.num_items, self.losses = num_items, []
        self.scale = one if scaler is None else scaler.scale(one)       # on all stages: each divides its gradients by it again
        with self.world.clock.within("communication"):
            _, batch = agree(run.model, (), join(window, self.world.device), self.world, groups["model"])
            if run.args.cp > 1:
                _, batch = begin(run.model, (), batch, self.world)
            schedule = self.prepare(run, len(window), batch["input_ids"])
            inputs = [batch.pop("input_ids")] if self.stage == 0 else []
            labels = batch.pop("labels")
            try:
                schedule.step(*inputs, **batch, **({"labels": labels} if self.last else {}), target=torch.empty(len(window)), return_outputs=False)
            except RuntimeError as error:       # torch's stages wrap what happens in them, so that nobody knows it again
                raise error.__cause__ or error
            with self.grad_sync(last=True):     # the gradients of all micro-batches have been added up
                pass
        for _ in window[1:]:
            run.callbacks.fire("on_substep_end", run)
        return self.losses if self.last else [torch.zeros((), dtype=torch.promote_types(self.dtype, torch.float32), device=self.world.device)]

    def weigh(self, loss_sum: Tensor, _) -> Tensor:
        """What the last stage goes backward from, for a micro-batch's loss ()."""
        loss = loss_sum / self.num_items
        self.losses.append(loss.detach())
        return loss * self.world.groups["stage"].size() * self.scale        # the ranks of a stage average their gradients

    def prepare(self, run: Run, n: int, ids: Tensor):
        """The schedule of n micro-batches of this shape: torch's stages have buffers of one shape, and a window that is like the one before takes
        its. 1f1b with fewer micro-batches than stages is gpipe."""
        B, T = len(ids) // n, ids.shape[1]
        if self.shape != (n, B, T):
            ids = torch.empty(B, T, dtype=torch.int64, device="meta")
            activations = torch.empty(B, T // self.world.copies, self.C, dtype=self.dtype, device="meta", requires_grad=True)
            kind = ScheduleGPipe if self.gpipe or n < self.pipe.size() else Schedule1F1B
            self.shape = (n, B, T)
            self.schedule = kind(TrainedStage(run, self.pipe, ids, activations), n, loss_fn=self.weigh, scale_grads=False)
        return self.schedule

    def receive(self, model: nn.Module, args: tuple, given: dict) -> tuple[tuple, dict]:
        """Before forward in an evaluation."""
        if torch.is_grad_enabled():
            raise UsageError("with --pp gradients come of a whole window at once, which train_step of loop.py hands over to Stages.run_window: do the same, "
                             "or call the model under torch.no_grad()")
        if self.stage > 0:
            B, T = given["input_ids"].shape
            model.embed.came = torch.empty(B, T // self.world.copies, self.C, dtype=next(model.parameters()).dtype, device=given["input_ids"].device)
            dist.recv(model.embed.came, group=self.pipe, group_src=self.stage - 1)
        return args, given if self.last else given | {"labels": None}

    def send(self, model: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.last:
            return None     # the loss
        dist.send(output.contiguous(), group=self.pipe, group_dst=self.stage + 1)
        return output.new_zeros(())


class PipelineParallel(Stages, DataParallel):
    """ddp or zero1 among the ranks of each stage."""


class PipelineOfParts(Stages, ReplicatedParts):
    """ddp x tp in each stage."""


def join(window: list[Batch], device: torch.device) -> dict[str, Tensor]:
    """The micro-batches of a window one below the other, (m * B, T) of the largest B and T, filled with what has no label: columns behind the others,
    which no token looks at, documents of their own, and samples. So a filler micro-batch, num_samples 0, has none either."""
    packed = ["position_ids" in micro_batch for micro_batch in window]
    if any(packed) and not all(packed):
        raise UsageError("some micro-batches of an update have position_ids and others have none: let the collator give them to all, or to none")
    fills = {"input_ids": 0, "labels": IGNORE, **({"position_ids": 0} if packed[0] else {})}
    shapes = [labels_of(micro_batch).shape for micro_batch in window]
    B, T = max(rows for rows, _ in shapes), max(columns for _, columns in shapes)

    def padded(micro_batch: Batch, name: str) -> Tensor:
        rows, columns = micro_batch[name].shape
        tensor = F.pad(micro_batch[name].long(), (0, T - columns, 0, B - rows), value=fills[name])
        return tensor if micro_batch["num_samples"] or name != "labels" else torch.full_like(tensor, IGNORE)
    return {name: torch.cat([padded(micro_batch, name) for micro_batch in window]).to(device, non_blocking=True) for name in fills}
