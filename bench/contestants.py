"""The same training written with this trainer and with what people use instead, as somebody who knows each of them well would write it.

    python -m bench.contestants NAME time|memory '{"width": 32, "updates": 1}'

A contestant is a function of a `Job`, which has what all of them share: the model, the batches, AdamW (fused, without decay of norms), the
schedule and the loss. Each trains from the first batch to the last, one micro-batch per update, clips gradients to norm 1 and logs every 100
updates. Nothing is evaluated or saved, and the peers show no progress bar; this trainer keeps its own callbacks. The HF Trainer gets its
batches through `get_train_dataloader`, and so spares torch's DataLoader, as the others do.

The command line trains one contestant in a process of its own, and prints the time, or resident memory, at the end of each update, and the peak.
"""
from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from array import array
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from collators import default_collator
from data import Blocks
from loader import Loader
from model import GPT
from state import Batch

PEAK, DECAY, LOG = 1e-3, 0.1, 100


@dataclasses.dataclass
class Job:
    """So many updates of a fresh GPT on random tokens. clock: what is read at the end of every optimizer step, into ticks. all_logits: the peers
    take the loss from logits (B, T, V), as the models of transformers do, in place of the chunked one that is inside of this GPT."""

    updates: int = 100
    batch: int = 2              # samples of a rank
    layers: int = 1
    heads: int = 2
    width: int = 32
    length: int = 16
    vocab: int = 256
    all_logits: bool = False
    clock: Callable[[], float] = time.perf_counter
    threads: int = 1
    ranks: int = dataclasses.field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))
    folder: str = ""
    last_loss: float | Tensor = 0.0     # of this rank, of the last update

    def __post_init__(self):
        self.ticks, self.done = array("d", bytes(8 * self.updates)), 0      # all there from the start: a list would grow

    def tick(self) -> None:
        self.ticks[self.done] = self.clock()
        self.done += 1

    def model(self) -> GPT:
        torch.manual_seed(0)
        model = GPT(self.vocab, self.length, self.layers, self.heads, self.width)
        for block in model.blocks:      # they start as zeros, which would hide a wrong update of what is before them
            torch.nn.init.normal_(block.attn.out.weight, std=0.02)
            torch.nn.init.normal_(block.down.weight, std=0.02)
        return model

    def data(self) -> Blocks:
        """As many samples as there are updates for."""
        tokens = self.updates * self.batch * self.ranks * self.length
        return Blocks(torch.randint(self.vocab, (tokens + 1,), generator=torch.Generator().manual_seed(0)).int(), torch.arange(0, tokens, self.length), self.length)

    def batches(self) -> Batches:
        return Batches(self.data(), default_collator, self.batch, int(os.environ.get("RANK", "0")), self.ranks, seed=42, shuffle=True)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
                  {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
        return self.watch(torch.optim.AdamW(groups, lr=PEAK, fused=True))

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_post_hook(lambda *_: self.tick())
        return optimizer

    def factor(self, step: int) -> float:
        """Of the learning rate, after so many updates."""
        return (self.updates - step) / self.updates

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)

    def loss_sum(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Summed over the tokens of a micro-batch, ()."""
        if self.all_logits:
            loss = F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        else:
            loss = model(batch["input_ids"], batch["labels"])
        self.last_loss = loss.detach()
        return loss

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        return self.loss_sum(model, batch) / batch["num_items"]


class Batches(Loader):
    """This trainer's loader as an iterable with a length, which is all that the peers need."""

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch()


# ---------------------------------------------------------------------------------------------------- contestants
def bare(job: Job, wrap: Callable[[GPT], torch.nn.Module] = lambda model: model) -> None:
    """The loop that one would write by hand. Over ranks it divides by the tokens of all of them."""
    model = wrap(job.model())
    optimizer, parameters = job.optimizer(model), list(model.parameters())
    model.train()
    for step, batch in enumerate(job.batches()):
        num_items = batch["num_items"]
        if job.ranks > 1:
            total = torch.tensor(num_items)
            dist.all_reduce(total)
            num_items = total.item() / job.ranks        # gradients are averaged over ranks
        loss = job.loss_sum(model, batch) / num_items
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * job.factor(step)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOG == 0:
            print(step + 1, loss.item())


def ddp(job: Job) -> None:
    bare(job, torch.nn.parallel.DistributedDataParallel)


def fsdp2(job: Job) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (job.ranks,))

    def wrap(model: GPT) -> torch.nn.Module:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    bare(job, wrap)


def ours(job: Job, watched: bool = True, train_step: Callable | None = None, **settings) -> None:
    import loop
    from args import TrainArgs
    from optim import build_optimizer
    from train import assemble
    from world import open_world
    args = TrainArgs(output_dir=job.folder, per_device_train_batch_size=job.batch, learning_rate=PEAK, weight_decay=DECAY,
                     **{"max_steps": job.updates, "logging_steps": LOG, "save_strategy": "no", **settings})
    job.all_logits = False
    with open_world(args) as world:
        run, loader, _ = assemble(args, world, job.model(), job.data(), make_optimizer=lambda model, args: job.watch(build_optimizer(model, args)))
        if not watched:
            run.callbacks.callbacks = []
        loop.train(run, loader, None, job.loss_sum, train_step=train_step or loop.train_step)


def ours_watched(job: Job) -> None:
    ours(job, logging_steps=10, disable_tqdm=False)


def ours_unwatched(job: Job) -> None:
    ours(job, watched=False, logging_strategy="no")


def ours_saving(job: Job) -> None:
    ours(job, save_strategy="steps", save_steps=100, save_total_limit=2)


def ours_long(job: Job) -> None:
    """Leaves checkpoints 10 and 100,000 in the job's folder; what it does in an update is only to count it."""
    from loop import train_step
    from state import Run, Update

    def count(run: Run, window: list[Batch], loss_fn: Callable) -> Update | None:
        if run.state.global_step < 10:
            return train_step(run, window, loss_fn)
        run.state.global_step += 1
        run.state.samples_seen += job.batch
        run.state.total_samples += job.batch
        return None
    ours(job, max_steps=10, save_strategy="steps", save_steps=10)
    ours(job, train_step=count, max_steps=LONG, save_strategy="steps", save_steps=LONG, resume_from_checkpoint="True")


def ours_resumed(job: Job, step: int) -> None:
    """One update from a checkpoint of `ours_long`, whose folder is in the environment."""
    ours(job, max_steps=step + 1, resume_from_checkpoint=f"{os.environ['BENCH_RUN']}/checkpoint-{step}")
    job.last_loss = 0.0


def hf_trainer(job: Job) -> None:
    from transformers import Trainer, TrainingArguments

    class MeanLossTrainer(Trainer):
        def get_train_dataloader(self) -> Batches:
            return job.batches()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
            return job.loss(model, inputs)
    args = TrainingArguments(job.folder, max_steps=job.updates, per_device_train_batch_size=job.batch, max_grad_norm=1.0, logging_steps=LOG,
                             save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, logging_nan_inf_filter=False,
                             ddp_find_unused_parameters=False)
    model = job.model()
    optimizer = job.optimizer(model)
    MeanLossTrainer(model, args, optimizers=(optimizer, job.scheduler(optimizer))).train()


def accelerate(job: Job) -> None:
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    model = job.model()
    model, optimizer = accelerator.prepare(model, job.optimizer(model))
    scheduler = job.scheduler(optimizer.optimizer)      # a prepared one would step once for each rank
    model.train()
    for step, batch in enumerate(job.batches()):
        loss = job.loss(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % LOG == 0:
            print(step + 1, loss.item())


def fabric(job: Job) -> None:
    from lightning.fabric import Fabric
    fabric = Fabric(accelerator="cpu", devices=job.ranks, strategy="ddp" if job.ranks > 1 else "auto")
    fabric.launch()
    model = job.model()
    model, optimizer = fabric.setup(model, job.optimizer(model))
    scheduler = job.scheduler(optimizer)
    model.train()
    for step, batch in enumerate(job.batches()):
        loss = job.loss(model, batch)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % LOG == 0:
            print(step + 1, loss.item())


def lightning(job: Job) -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = job.model()

        def training_step(self, batch: Batch, index: int) -> Tensor:
            loss = job.loss(self.model, batch)
            if (index + 1) % LOG == 0:
                print(index + 1, loss.item())
            return loss

        def configure_optimizers(self) -> dict:
            optimizer = job.optimizer(self.model)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": job.scheduler(optimizer), "interval": "step"}}
    Trainer(accelerator="cpu", devices=job.ranks, strategy="ddp" if job.ranks > 1 else "auto", max_steps=job.updates, gradient_clip_val=1.0,
            log_every_n_steps=LOG, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=job.folder, use_distributed_sampler=False).fit(Module(), job.batches())


OURS, BARE, LONG = "ours", "bare loop", 100_000
RESUMED_EARLY, RESUMED_LATE = "ours, resumed at update 10", "ours, resumed at update 100,000"
WATCHED, UNWATCHED = "ours, bar and a log every 10 updates", "ours, nothing watched"
PEERS = {"HF Trainer": hf_trainer, "Accelerate": accelerate, "Lightning Fabric": fabric, "Lightning Trainer": lightning}
ONE_PROCESS = {OURS: ours, BARE: bare, **PEERS}
STRATEGIES = {f"ours, {name}": lambda job, name=name: ours(job, strategy=name) for name in ("ddp", "zero1", "zero2", "fsdp")}
RANKS = {**STRATEGIES, "DDP": ddp, "FSDP2": fsdp2, **PEERS}
CONTESTANTS = {**ONE_PROCESS, **RANKS, "ours, saving": ours_saving, WATCHED: ours_watched, UNWATCHED: ours_unwatched, "ours, long": ours_long,
                RESUMED_EARLY: lambda job: ours_resumed(job, 10), RESUMED_LATE: lambda job: ours_resumed(job, LONG)}


# ---------------------------------------------------------------------------------------------------- running them
def run(name: str, folder: str | None = None, **settings) -> Job:
    """Has a contestant do a job, without output, in an empty folder; on several ranks they have to be told a common one."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    gc.collect()
    gc.freeze()         # or every collection goes through what the other contestants have imported
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as own, open(os.devnull, "w") as nothing:
        job = Job(folder=folder or own, **settings)
        torch.set_num_threads(job.threads)
        with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing), process_group(name, job.ranks):
            CONTESTANTS[name](job)
            job.last_loss = float(job.last_loss) / (job.batch * job.length)
    os.environ.clear()
    os.environ.update(before)       # Lightning takes WORLD_SIZE away, others add to it
    return job


@contextlib.contextmanager
def process_group(name: str, ranks: int) -> Iterator[None]:
    """Peers find one that is open; this trainer opens its own."""
    if ranks == 1 or name in STRATEGIES:
        yield
        return
    from args import TrainArgs
    from world import open_world
    with open_world(TrainArgs()):
        yield


def resident(field: str = "VmRSS") -> float:
    """Megabytes of this process, as the kernel tells them: VmRSS now, VmHWM at the peak (ru_maxrss would begin with that of the parent)."""
    with open("/proc/self/status") as file:
        return int(file.read().partition(f"\n{field}:")[2].split(maxsplit=1)[0]) / 1024


if __name__ == "__main__":
    job = run(sys.argv[1], clock={"time": time.monotonic, "memory": resident}[sys.argv[2]], **json.loads(sys.argv[3]))
    print(json.dumps({"ticks": job.ticks.tolist(), "peak": resident("VmHWM"), "loss": job.last_loss}))
