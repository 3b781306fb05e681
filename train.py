"""Train a model.   python train.py --output_dir runs/a     torchrun --standalone --nproc-per-node 2 train.py --output_dir runs/b

One batch: data.py -> loop.py -> loss.py -> model.py -> loop.py. To change one thing, follow its arrow below.
"""
from __future__ import annotations

import os

import torch

from adapters import adapt
from args import TrainArgs, check_args, parse_args
from callbacks import Callback, Callbacks, CheckReplicas, EarlyStoppingCallback, PrinterCallback, ProfileCallback, ProgressCallback
from checkpoint import load_checkpoint, load_for_evaluation, load_state, load_weights
from collators import default_collator
from data import build_data, keep_columns
from distributed import build_on, parallelize
from evalloop import evaluate, likeliest, predict, save_results
from loader import Loader
from loop import plan, train, train_step, windows
from loss import compute_loss
from model import GPT, build_model
from optim import EMA, build_optimizer
from precision import Precision
from rundir import find_checkpoint, is_of_hf_trainer
from schedules import build_schedule, notice
from state import Run, UsageError, run_main
from storage import reading
from world import World, open_world, print0, set_seed


def main(argv: list[str] | None = None, build_data=build_data, build_model=build_model, collate=default_collator, loss_fn=compute_loss,
         compute_metrics=None, predict_fn=None, preprocess_logits_for_metrics=None, callbacks=(), make_optimizer=build_optimizer,
         make_schedule=build_schedule, train_step=train_step, processing_class=None, flags: str = "", description: str = "Train a model.") -> Run:
    """Trains, evaluates and predicts as the flags in argv say. The other arguments are the parts that a task of one's own replaces: see the
    function of that name in data.py, model.py, ..., `evaluate` for the ones of metrics, and `parse_args` for flags and description."""
    args = parse_args(argv, flags, description)               # args.py        one flat dataclass
    refuse_flags(args, build_data, build_model, flags)
    with open_world(args) as world:                           # world.py       one process is not a special case
        checkpoint = find_checkpoint(args, world)             # rundir.py      before the work of reading data
        set_seed(args.seed)                                   # the same initial weights on every rank
        data = build_data(args)                               # data.py        <- your data
        if args.do_predict and data.test is data.eval is None:
            raise UsageError("--do_predict needs data to predict for: give --test_dataset or held-out data")
        fresh = args.model_name_or_path is args.lora_rank is args.lora_adapter is None
        model = build_on(world, lambda: build_model(args), fresh and getattr(build_model, "meta_init", False))     # model.py <- your model
        run, train_loader, eval_loader = assemble(args, world, model, data.train, data.eval, collate, callbacks, checkpoint, make_optimizer,
                                                  make_schedule, processing_class)
        measures = {"compute_metrics": compute_metrics, "predict_fn": predict_fn, "preprocess_logits_for_metrics": preprocess_logits_for_metrics}
        if args.trains:
            print_summary(run, train_loader, eval_loader, data.about)
            metrics = train(run, train_loader, eval_loader, loss_fn, **measures, train_step=train_step)     # loop.py, loss.py <- your loss
            if not run.state.finished:
                save_results(run, "train", metrics)
            print_end(run)
        else:
            print0(world, f"data: {data.about}")
        if args.do_eval:
            save_results(run, "eval", evaluate(run, eval_loader, loss_fn, **measures))      # evalloop.py
        if args.do_predict:
            test_loader = eval_loader if data.test is None else make_loader(args, world, model, data.test, collate)
            metrics = {}
            for name, loader in (test_loader if isinstance(test_loader, dict) else {"": test_loader}).items():
                prefix = f"test_{name}" if name else "test"
                metrics |= predict(run, loader, loss_fn=loss_fn, **measures, prefix=prefix).metrics
                print0(world, f"predictions are in {args.output_dir}/{prefix}_predictions.npy, labels in {prefix}_labels.npy if there are any")
            print0(world, "  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
            save_results(run, "test", metrics)
        if args.report and world.is_main:
            from tools.report import main as report
            report([args.output_dir])
    return run


def assemble(args: TrainArgs, world: World, model: torch.nn.Module, train_set, eval_set=None, collate=default_collator,
             callbacks=(), checkpoint: str | None = "find", make_optimizer=build_optimizer,
             make_schedule=build_schedule, processing_class=None) -> tuple[Run, Loader | None, Loader | dict | None]:
    """Puts a run together from any model and data sets, and resumes it if --resume_from_checkpoint says so.

    train_set, eval_set: map-style or iterable; eval_set may be a dict of several. collate: list of samples -> batch of tensors with
    num_items. callbacks: called after the progress bar, in this order. checkpoint: what find_checkpoint has said, None included, if it
    has been asked. make_optimizer: (bare model, args) -> optimizer. make_schedule: (args, updates of the run) -> function of the finished
    updates that gives the learning rate. processing_class: a tokenizer or the like, whose save_pretrained(folder) fills each checkpoint too.
    Returns the run and the loaders for train, evaluate, predict.
    With --do_eval or --do_predict and no --do_train the run has the weights of a checkpoint, and train_set is not looked at."""
    check_args(args)
    if checkpoint == "find":
        checkpoint = find_checkpoint(args, world)
    if eval_set is None and args.needs_held_out:
        raise UsageError("to evaluate needs held-out data, and there is none: give an eval_set, or --eval_strategy no and no --do_eval")
    collate = collate or default_collator
    train_loader = make_loader(args, world, model, train_set, collate, train=True) if args.trains else None
    eval_loader = make_loader(args, world, model, eval_set, collate)
    if args.trains and checkpoint is not None and world.gather_json(is_of_hf_trainer(checkpoint))[0]:
        from tools.convert import take_over
        checkpoint = take_over(args, world, model, train_loader, checkpoint)
    state = load_state(checkpoint, args, train_loader.identity if args.trains else "")
    if args.trains:
        world.status["step"] = state.global_step
        if state.samples_seen:
            with reading(checkpoint, "state.json"):
                sought = train_loader.seek(state.stream)
            if train_loader.num_samples is None:
                print0(world, f"the stream {'goes on after' if sought else 'is read again up to'} sample {state.samples_seen} of its pass")
        plan(args, state, train_loader)
        state.log_path = os.path.join(args.output_dir, "metrics.jsonl")
    state.is_world_process_zero, state.is_local_process_zero = world.is_main, world.local_rank == 0
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
    if args.save_only_model and hasattr(optimizer, "eval"):
        raise UsageError(f"{type(optimizer).__name__} makes the weights to evaluate out of its state, which --save_only_model leaves out: leave it away")
    parallel.shard(optimizer)                                 # zero.py        from here on it trains this rank's parts
    schedule = make_schedule(args, state.max_steps)           # schedules.py   <- your learning rate
    run = Run(args, world, model, parallel, optimizer, schedule, precision, state, Callbacks([*build_callbacks(args, world), *callbacks]),
              None if args.ema_decay is None else EMA(parallel.parts, args.ema_decay), processing_class)
    set_seed(args.seed + world.rank)                          # dropout differs over ranks
    if args.lora_adapter is not None and checkpoint is None:
        load_weights(run, args.lora_adapter)
    if not args.trains:
        load_for_evaluation(run, checkpoint)
    elif checkpoint is not None:
        load_checkpoint(run, checkpoint)                      # checkpoint.py  random generators and data position too
    if args.trains:
        run.callbacks.open_log(run)
    run.callbacks.fire("on_init_end", run)
    return run, train_loader, eval_loader


def make_loader(args: TrainArgs, world: World, model: torch.nn.Module, dataset, collate, train: bool = False) -> Loader | dict | None:
    """The micro-batches of a data set for training, in the order of --train_sampling_strategy, or for evaluation, in its own; of a dict
    of data sets a dict of them, of none none."""
    if dataset is None or isinstance(dataset, dict):
        return dataset and {name: make_loader(args, world, model, each, collate, train) for name, each in dataset.items()}
    if args.remove_unused_columns:
        dataset, note = keep_columns(dataset, model, collate, args.label_columns)
        if note:
            print0(world, f"note: {note} (--remove_unused_columns False keeps them)")
    vocab_size = getattr(model, "vocab_size", getattr(getattr(model, "config", None), "vocab_size", None))
    return Loader(dataset, collate, args.per_device_train_batch_size if train else args.per_device_eval_batch_size, world.data_rank, world.data_ranks,
                  seed=args.seed if args.data_seed is None else args.data_seed, shuffle=train and args.train_sampling_strategy != "sequential",
                  group_by_length=train and args.train_sampling_strategy == "group_by_length", drop_last=train and args.dataloader_drop_last,
                  vocab_size=vocab_size, num_labels=getattr(model, "num_labels", None), num_workers=args.dataloader_num_workers,
                  prefetch_factor=args.dataloader_prefetch_factor, persistent_workers=args.dataloader_persistent_workers,
                  pin_memory=args.dataloader_pin_memory and world.device.type == "cuda")


def build_callbacks(args: TrainArgs, world: World) -> list[Callback]:
    """Those that flags ask for; what only a flag needs is imported with it."""
    built = [ProgressCallback() if args.shows_bars else PrinterCallback()] if world.is_main else []        # printing is rank 0's
    for name in args.reports if world.is_main else ():
        from recipes.loggers import MlflowCallback, TensorBoardCallback, WandbCallback
        built.append(TensorBoardCallback(args.report_histograms) if name == "tensorboard" else WandbCallback() if name == "wandb" else MlflowCallback())
    if args.profile:
        built.append(ProfileCallback(*map(int, args.profile.split(":")), world.rank))
    if args.peak_flops is not None:
        from tools.flops import FlopsCallback
        built.append(FlopsCallback())
    if args.sample_prompt is not None:
        from tools.generate import SampleCallback
        built.append(SampleCallback(args.sample_prompt))
    if args.check_replicas:
        built.append(CheckReplicas(world, args.check_replicas))
    if args.early_stopping_patience is not None:
        built.append(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
    return built


def refuse_flags(args: TrainArgs, data_of_task, model_of_task, flags: str) -> None:
    """A flag that only build_data or build_model looks at is an error where a task has its own in their place, and not ignored; but for those
    that the task's own flags have."""
    default = TrainArgs()
    for names, used, what in ((("dataset", "dataset_config_name", "eval_dataset", "test_dataset", "text_column", "streaming"), data_of_task is build_data, "data"),
                              (("model_name_or_path", "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "n_experts", "experts_per_token",
                                "balance_loss_weight", "sample_prompt"), model_of_task is build_model, "model")):
        if given := [f"--{name}" for name in names if not used and f"--{name}" not in flags.split() and getattr(args, name) != getattr(default, name)]:
            raise UsageError(f"{', '.join(given)}: this task has its own {what}, which {'they do' if len(given) > 1 else 'it does'} not change")


def print_summary(run: Run, train_loader: Loader, eval_loader: Loader | None, about: str) -> None:
    args, state, world = run.args, run.state, run.world
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    parameters = sum(p.numel() for p in (dict(run.model.named_parameters()) | run.parallel.whole).values() if p.requires_grad)
    layout = f"ranks: {world.world_size} = pp {args.pp} x data-parallel {world.data_ranks} x cp {args.cp} x tp {args.tp}\n" * (world.data_ranks < world.world_size)
    epochs = "" if train_loader.num_samples is None else f" ({state.max_steps / windows(args, len(train_loader)):.3g} epochs)"

    def count(loader: Loader | dict | None) -> str:
        if isinstance(loader, dict):
            return ", ".join(f"{name} {count(each)}" for name, each in loader.items())
        return "none" if loader is None else "unknown, a stream" if loader.num_samples is None else f"{loader.num_samples:,}"
    if world.world_size == 1 and args.strategy != "ddp":
        print0(world, f"note: --strategy {args.strategy} splits over ranks, and this is one process: torchrun starts more")
    print0(world, f"data: {about}\n"
           f"samples: {count(train_loader)}, held out: {count(eval_loader)}\n"
           f"updates: {state.max_steps:,}{epochs}, each of {micro * accumulation * world.data_ranks:,} samples = "
           f"micro-batch {micro} x accumulation {accumulation} x {'data-parallel ' * bool(layout)}ranks {world.data_ranks}"
           f"{f', {args.strategy}' * (world.world_size > 1)}{f', ep {args.ep}' * (args.ep > 1)}\n{layout}"
           f"model: {parameters:,} trainable parameters on {world.device}, "
           f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} per rank")


def print_end(run: Run) -> None:
    folder, step = run.args.output_dir, run.state.global_step
    if step < run.state.max_steps:
        print0(run.world, f"stopped early, after update {step} of {run.state.max_steps}, as a callback asked for it"
                          f"{' (to go on, raise --early_stopping_patience)' * (run.args.early_stopping_patience is not None)}")
    elif run.state.finished:
        print0(run.world, f"{folder} is finished: {step} updates are done, and {run.state.max_steps} were asked for. "
                          f"To go on, raise --max_steps or --num_train_epochs; to start another run, give a new --output_dir.")
        return
    if run.args.save_strategy == "no":
        print0(run.world, f"saved in {folder}: metrics.jsonl")
    else:
        best = f", best: {run.state.best_model_checkpoint}" if run.state.best_model_checkpoint else ""
        print0(run.world, f"saved in {folder}: metrics.jsonl, checkpoint-{step}{best}")
        if isinstance(run.model, GPT):
            print0(run.world, f"to see what it writes: python -m tools.generate {folder} --prompt 'def '")


def run(argv: list[str] | None = None, **parts) -> Run:
    return main(argv, preprocess_logits_for_metrics=likeliest, **parts)      # of language modelling nobody wants the logits


if __name__ == "__main__":
    run_main(run)
