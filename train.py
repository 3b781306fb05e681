"""Train a model.   python train.py --output_dir runs/a     torchrun --standalone --nproc-per-node 2 train.py --output_dir runs/b

One batch: data.py -> loop.py -> loss.py -> model.py -> loop.py. To change one thing, follow its arrow below.
"""
from __future__ import annotations

import os

import torch

from adapters import adapt
from args import TrainArgs, check_args, parse_args
from callbacks import Callbacks, CheckReplicas, ProgressCallback
from checkpoint import find_checkpoint, load_checkpoint, load_state
from collators import default_collator
from data import Loader, build_data
from distributed import World, build_on, open_world, parallelize, set_seed
from loop import plan, train, windows
from loss import compute_loss
from model import build_model
from optim import EMA, build_optimizer
from precision import Precision
from schedules import build_schedule, notice
from state import Run, UsageError, run_main


def main(argv: list[str] | None = None, make_optimizer=build_optimizer) -> Run:
    args = parse_args(argv)                                   # args.py        one flat dataclass
    with open_world(args) as world:                           # distributed.py one process is not a special case
        checkpoint = find_checkpoint(args, world)             # checkpoint.py  before the work of reading data
        set_seed(args.seed)                                   # the same initial weights on every rank
        data = build_data(args)                               # data.py        <- your data
        model = build_on(world, lambda: build_model(args))    # model.py       <- your model
        run, train_loader, eval_loader = assemble(args, world, model, data.train, data.eval, checkpoint=checkpoint,
                                                  make_optimizer=make_optimizer)
        print_summary(run, train_loader, eval_loader, data.about)
        train(run, train_loader, eval_loader, compute_loss)   # loop.py, loss.py <- your loss
        print_end(run)
    return run


def assemble(args: TrainArgs, world: World, model: torch.nn.Module, train_set, eval_set=None, collate=default_collator,
             callbacks=(), checkpoint: str | None = "find", make_optimizer=build_optimizer) -> tuple[Run, Loader, Loader | None]:
    """Puts a run together from any model and data sets, and resumes it if --resume_from_checkpoint says so.

    train_set, eval_set: map-style or iterable. collate: list of samples -> batch of tensors with num_items.
    callbacks: called after the progress bar, in this order. checkpoint: what find_checkpoint has said, None included,
    if it has been asked.
    make_optimizer: (bare model, args) -> optimizer. Returns the run and the loaders for train, evaluate, predict.
    """
    check_args(args)
    collate = collate or default_collator
    if checkpoint == "find":
        checkpoint = find_checkpoint(args, world)
    vocab_size = getattr(model, "vocab_size", None)
    seed = None if args.train_sampling_strategy == "sequential" else args.seed if args.data_seed is None else args.data_seed
    train_loader = Loader(train_set, collate, args.per_device_train_batch_size, world.rank, world.world_size, seed,
                          args.dataloader_drop_last, vocab_size, args.train_sampling_strategy == "group_by_length")
    eval_loader = None if eval_set is None else \
        Loader(eval_set, collate, args.per_device_eval_batch_size, world.rank, world.world_size, vocab_size=vocab_size)
    if eval_loader is None and (args.eval_strategy != "no" or args.eval_on_start):
        raise UsageError(f"--eval_strategy {args.eval_strategy} needs held-out data, and there is none: give an eval_set")
    state = load_state(checkpoint, args, train_loader.identity)
    world.status["step"] = state.global_step
    plan(args, state, train_loader)
    state.is_world_process_zero, state.is_local_process_zero = world.is_main, world.local_rank == 0
    state.log_path = os.path.join(args.output_dir, "metrics.jsonl")
    watching = [ProgressCallback(args.disable_tqdm)] if world.is_main else []   # printing is rank 0's
    watching += [CheckReplicas(world, args.check_replicas)] if args.check_replicas else []
    if args.label_smoothing_factor and getattr(model, "label_smoothing", None) != args.label_smoothing_factor:
        raise UsageError("--label_smoothing_factor is for the built-in model: give your loss function's cross_entropy the smoothing instead")
    if unused := notice(args):
        print0(world, unused)
    precision = Precision(world.device, args.fp16, args.bf16, args.tf32,
                          torch.float16 if args.fp16_full_eval else torch.bfloat16 if args.bf16_full_eval else None)
    precision.check_model(model)
    adapt(model, args)                                        # adapters.py    before wrapping
    parallel = parallelize(model, args, world)                # distributed.py <- your parallelism
    optimizer = make_optimizer(model, args)                   # optim.py       <- your optimizer; after that
    parallel.shard(optimizer)                                 # zero.py        from here on it trains this rank's parts
    schedule = build_schedule(args, state.max_steps)          # schedules.py   <- your learning rate
    run = Run(args, world, model, parallel, optimizer, schedule, precision, state, Callbacks([*watching, *callbacks]),
              None if args.ema_decay is None else EMA(parallel.parts, args.ema_decay))
    set_seed(args.seed + world.rank)                          # dropout differs over ranks
    if checkpoint is not None:
        load_checkpoint(run, checkpoint)                      # checkpoint.py  random generators and data position too
    run.callbacks.open_log(run)
    run.callbacks.fire("on_init_end", run)
    return run, train_loader, eval_loader


def print0(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


def print_summary(run: Run, train_loader: Loader, eval_loader: Loader | None, about: str) -> None:
    args, state, world = run.args, run.state, run.world
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    epochs = "" if train_loader.num_samples is None else f" ({state.max_steps / windows(args, len(train_loader)):.3g} epochs)"

    def count(loader: Loader | None) -> str:
        return "none" if loader is None else "unknown, a stream" if loader.num_samples is None else f"{loader.num_samples:,}"
    if world.world_size == 1 and args.strategy != "ddp":
        print0(world, f"note: --strategy {args.strategy} splits over ranks, and this is one process: torchrun starts more")
    print0(world, f"data: {about}\n"
           f"samples: {count(train_loader)} of {args.block_size} tokens, held out: {count(eval_loader)}\n"
           f"updates: {state.max_steps:,}{epochs}, each of {micro * accumulation * world.world_size:,} samples = "
           f"micro-batch {micro} x accumulation {accumulation} x ranks {world.world_size}{f', {args.strategy}' * (world.world_size > 1)}\n"
           f"model: {parameters:,} trainable parameters on {world.device}, "
           f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} per rank")


def print_end(run: Run) -> None:
    folder, step = run.args.output_dir, run.state.global_step
    if run.state.finished:
        print0(run.world, f"{folder} is finished: {step} updates are done, and {run.state.max_steps} were asked for. "
                          f"To go on, raise --max_steps or --num_train_epochs; to start another run, give a new --output_dir.")
    elif run.args.save_strategy == "no":
        print0(run.world, f"saved in {folder}: metrics.jsonl")
    else:
        print0(run.world, f"saved in {folder}: metrics.jsonl, checkpoint-{step}\n"
                          f"to see what it writes: python -m tools.generate {folder} --prompt 'def '")


if __name__ == "__main__":
    run_main(main)
