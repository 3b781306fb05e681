"""Checkpoints: `output_dir/checkpoint-N` after update N, exact to the bit on resume, and complete whenever the name exists.

    model.safetensors      weights under the bare model's names; a tied weight once. Above 5 GB: model-00001-of-0000N.safetensors
                           and model.safetensors.index.json, as transformers names them
    adapter_model.safetensors, adapter_config.json   in its place, of a model with adapters: only what is trained, in PEFT's format
    optimizer-R.safetensors  optimizer state that rank R holds, "parameter name.state name"; of a parameter that is split over
                           ranks with the range of its flattened elements, "parameter name.state name[start:stop]"
    ema-R.safetensors      averaged weights, with --ema_decay, by parameter name and range
    rng-R.json             random number generators of rank R: python, numpy, torch, cuda
    state.json             TrainState, callbacks, loss scale, the state of a plateau schedule, and the world size that wrote it
    args.json              the run's arguments
    config.json, ...       of a transformers model its configuration, and the files of the run's tokenizer, if it has one: then
                           from_pretrained takes the folder
    manifest.json          written last: versions, size and SHA-256 of every other file, and the SHA-256 of this list itself

Ranks write at the same time, each what it holds: its optimizer state into a file of its own, its shards of the weights to their
places in files that all share. So nobody ever holds more than its part, and any strategy on any number of ranks can go on from
it: each rank reads the ranges that it holds. The folder is `tmp-checkpoint-N` until everything is on the disk, and then renamed
once. Nothing is ever unpickled, and no name in a file is followed out of the folder.

storage.py has the files themselves, rundir.py which folders are complete, and which one a run goes on from.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import NoneType

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from adapters import adapter_weights, lora_of
from args import changed_args
from distributed import filling, local_part
from rundir import FORMAT, checksum, find_damage, remove, rotate, write_status
from schedules import Plateau
from state import Run, TrainState, UsageError
from storage import FilePlan, PartFiles, alike, describe_file, plan_json, plan_tensors, read_json, reading, show, sync, write_file
from world import rng_state, set_rng_state, set_seed
from zero import ELEMENTWISE, Part, whole_parameters

MAX_FILE_BYTES = 5 * 10**9      # of weights in one file
PLANNED = ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")      # of TrainState, for other trainers to go on by


# ---------------------------------------------------------------------------------------------------- save

class Saver:
    """Saves a run, one checkpoint at a time: while training waits, or with --save_async on a thread, from a copy that is made in
    the same buffers each time. All ranks call each method at the same update.

    A save has stages, in which a rank reads and writes by itself; between them all agree that nobody failed. A failure removes what
    was written and touches no older checkpoint. It raises UsageError (exit code 5) on all ranks, or with --save_errors continue
    is a warning, unless it is the `last` save."""

    def __init__(self, run: Run):
        self.run, self.copies = run, {}
        there = run.world.is_main and os.path.isdir(os.path.join(run.args.output_dir, f"checkpoint-{run.state.global_step}"))
        self.saved_step = run.state.global_step if run.world.max(int(there))[0] else None       # newest complete checkpoint
        self.step: int | None = None        # the one that is being written, and what is left to do for it
        self.stages: list[Callable[[], None]] = []
        self.writer = ThreadPoolExecutor(1)
        run.world.on_exit.callback(self.writer.shutdown)        # the lock is held until nobody writes any more
        self.free = threading.Event()       # to change the optimizer's state, which is copied beside training: only the optimizer's step does
        self.free.set()
        if run.args.save_async:
            run.optimizer.register_step_pre_hook(lambda *_: self.free.wait() and None)
        self.began = self.seconds = 0.0     # seconds: from the start of the last save to its end

    def save(self, last: bool = False) -> None:
        """Saves this update. With --save_async it returns when training may go on, and `poll` does the rest."""
        self.finish()
        run, args, world, step = self.run, self.run.args, self.run.world, self.run.state.global_step
        if self.saved_step == step and (run.state.best_global_step != step or run.state.best_saved_step == step):
            return      # else it was saved before its evaluation: again, with what that said
        self.step, self.began, self.best_before = step, time.monotonic(), run.state.best_saved_step
        if run.state.best_global_step == step:
            run.state.best_saved_step = step
        self.tmp = os.path.join(args.output_dir, f"tmp-checkpoint-{step}")
        with self.tolerating(last):
            files = plan_weights(run)
            with world.writing(self.tmp):
                if world.is_main:
                    run.callbacks.write_rows(run)       # a checkpoint must not know rows that a power cut could take
                    sync(run.state.log_path)
                files |= plan_rest(run)
                if world.writes:
                    shutil.rmtree(self.tmp, ignore_errors=True)
                    os.mkdir(self.tmp)
                    for name, plan in files.items():
                        if plan.shared:
                            write_file(os.path.join(self.tmp, name), plan._replace(tensors=[], shared=False))
            later: dict[str, FilePlan] = {}
            if args.save_async:
                later = {name: plan for name, plan in files.items() if name.startswith("optimizer-") and world.device.type == "cpu"}
                files = {name: plan if name in later else self.copied(name, plan) for name, plan in files.items()}
                if world.device.type == "cuda":
                    torch.cuda.synchronize()
            self.described: dict[str, dict] = {}
            self.stages = [lambda: self.describe_shared(files)]
            if later:
                self.free.clear()
            self.stage = self.writer.submit(self.write, files, later)
        if not args.save_async:
            self.finish(last)

    def poll(self) -> None:
        """Takes a background save further as soon as all ranks are through with a stage of it."""
        if self.step is not None and not self.run.world.max(int(not self.stage.done()))[0]:
            self.advance()

    def finish(self, last: bool = False) -> None:
        """Waits until the save that is under way, if there is one, is complete."""
        while self.step is not None:
            self.advance(last)

    def advance(self, last: bool = False) -> None:
        with self.tolerating(last):
            with self.run.world.writing(self.tmp):
                self.stage.result()
            if self.stages:
                self.stage = self.writer.submit(self.stages.pop(0))
            else:
                self.commit()

    def write(self, files: dict[str, FilePlan], later: dict[str, FilePlan]) -> None:
        """Weights and optimizer state at the same time, as hashing takes longer than writing. later: what is still to be copied."""
        try:
            files |= {name: self.copied(name, plan) for name, plan in later.items()}
        finally:
            self.free.set()
        total = sum(plan.size for plan in files.values())

        def write_one(name: str) -> tuple[str, dict]:
            try:
                return name, write_file(os.path.join(self.tmp, name), files[name], bar.update)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} (this rank writes {total:,} bytes)", name) from None
        with tqdm(total=total, desc=f"save checkpoint-{self.step}", unit="B", unit_scale=True, leave=False, delay=1,
                  disable=not self.run.args.shows_bars) as bar, ThreadPoolExecutor(2) as writers:
            self.described |= {name: described for name, described in writers.map(write_one, files) if not files[name].shared}

    def describe_shared(self, files: dict[str, FilePlan]) -> None:
        """What several ranks have written is hashed by one, when all are done."""
        if self.run.world.writes:
            self.described |= {name: describe_file(os.path.join(self.tmp, name)) for name, plan in files.items() if plan.shared}

    def commit(self) -> None:
        """The folder gets its manifest and its name; then older ones may go."""
        run, args, world = self.run, self.run.args, self.run.world
        described = world.gather_json([world.node, self.described])
        final, replaced = (os.path.join(args.output_dir, f"{prefix}checkpoint-{self.step}") for prefix in ("", "replaced-"))
        with world.writing(self.tmp):
            if world.writes:
                files = {name: entry for node, files in described for name, entry in sorted(files.items())
                         if node == world.node or not args.save_on_each_node}
                write_file(os.path.join(self.tmp, "manifest.json"), plan_manifest(self.step, args.save_only_model, files))
                sync(self.tmp)
        with world.writing(self.tmp):
            if world.writes:
                if os.path.lexists(final):      # `prepare_output_dir` puts it back after a crash here
                    os.rename(final, replaced)
                os.rename(self.tmp, final)
                sync(args.output_dir)
        if world.writes:        # on all hosts it has its name by now
            try:
                if os.path.lexists(replaced):
                    remove(replaced)
                rotate(args.output_dir, args.save_total_limit, {self.step, run.state.best_saved_step})
            except OSError as error:
                print(f"warning: an old checkpoint in {args.output_dir} could not be removed: {error}", file=sys.stderr)
        write_status(args.output_dir, world, step=run.state.global_step)
        self.saved_step, self.step, self.seconds = self.step, None, time.monotonic() - self.began
        run.callbacks.fire("on_save", run)

    def copied(self, file: str, plan: FilePlan) -> FilePlan:
        return plan._replace(tensors=[(key, at, self.copy(file, key, tensor)) for key, at, tensor in plan.tensors])

    def copy(self, file: str, key: str, tensor: Tensor) -> Tensor:
        place = file, key, tensor.shape, tensor.dtype
        if place not in self.copies:
            self.copies[place] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return self.copies[place].copy_(tensor, non_blocking=True)

    @contextlib.contextmanager
    def tolerating(self, last: bool) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            if error.exit_code != 5:
                raise
            if self.run.world.writes:
                shutil.rmtree(self.tmp, ignore_errors=True)
            self.step, self.stages, self.run.state.best_saved_step = None, [], self.best_before
            if last or self.run.args.save_errors == "stop":
                raise
            if self.run.world.is_main:
                print(f"warning: {error}; training goes on, and the next save is another try (--save_errors continue)", file=sys.stderr)


def plan_manifest(step: int, only_model: bool, files: dict[str, dict]) -> FilePlan:
    manifest = {"format": FORMAT, "step": step, "only_model": only_model, "torch": torch.__version__, "python": platform.python_version(),
                "files": files}
    return plan_json(manifest | {"sha256": checksum(manifest)})


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's own weights by the names they have in files, whole or sharded. One with two names (tied) is kept under the first. Of a
    model with adapters: what is trained (adapters.py)."""
    tied = tied_names(model)
    weights = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}
    return adapter_weights(model, weights) if lora_of(model) else weights


def weights_stem(model: nn.Module) -> str:
    return "adapter_model" if lora_of(model) else "model"


def plan_weights(run: Run) -> dict[str, FilePlan]:
    """Files of weights, of which this rank writes its part."""
    files: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in (run.parallel.whole | model_weights(run.model)).items():
        if files[-1] and size + tensor.nbytes > MAX_FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    stem, plans = weights_stem(run.model), {}
    names = [f"{stem}-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] if len(files) > 1 else [f"{stem}.safetensors"]
    for name, weights in zip(names, files):
        sharded = {key for key, tensor in weights.items() if hasattr(tensor, "to_local")}
        mine = {key: local_part(tensor) for key, tensor in weights.items() if not tensor.is_meta and (run.parallel.saves if key in sharded else run.parallel.writes)}
        if sharded or run.parallel.whole or run.world.writes:
            plans[name] = plan_tensors(weights, mine, bool(sharded or run.parallel.whole))
    if len(files) > 1 and run.world.writes:
        plans[f"{stem}.safetensors.index.json"] = plan_json({"metadata": {"total_size": total}, "weight_map": {
            key: name for name, weights in zip(names, files) for key in weights}})
    return plans


def plan_rest(run: Run) -> dict[str, FilePlan]:
    """Everything but the weights, of this rank."""
    from tools.formats import plan_foreign
    args, rank, files = run.args, run.world.rank, {}
    if not args.save_only_model:
        files[f"rng-{rank}.json"] = plan_json(rng_state())
        if run.parallel.saves:
            tensors, numbers = optimizer_state([part for part in run.parallel.parts if run.parallel.owns(part)], run.optimizer)
            files[f"optimizer-{rank}.safetensors"] = plan_tensors(tensors, numbers=json.dumps(numbers))
    if run.ema is not None and run.parallel.saves:
        files[f"ema-{rank}.safetensors"] = plan_tensors(dict(name_part(part, part.name, part.piece) for part in run.ema.parts if run.parallel.owns(part)))
    if run.world.writes:
        files |= {"args.json": plan_json(args.to_dict()), "state.json": plan_json(describe_run(run))}
        files |= plan_foreign(run.model, run.processing_class, args.model_name_or_path)
    return files


def describe_run(run: Run) -> dict:
    """state.json. What an optimizer keeps outside of its state it gives by get_extra_state, as JSON values."""
    state, optimizer = run.state, run.optimizer
    more = state.global_step < state.max_steps       # then there is a next update, and this is its learning rate
    return {"state": state.to_dict(),
            "optimizer": {"class": type(optimizer).__name__, "evaluates": hasattr(optimizer, "eval"), "groups": run.parallel.groups,
                          "extra": optimizer.get_extra_state() if hasattr(optimizer, "get_extra_state") else None,
                          "settings": [plain_settings(group) for group in optimizer.param_groups]},
            "planned": {**{name: getattr(state, name) for name in PLANNED},
                        "learning_rate": run.schedule(state.global_step - state.skipped_steps) if more else state.learning_rate},
            "tied": tied_names(run.model), "callbacks": run.callbacks.states(), "scaler": run.precision.state_dict(),
            "world_size": run.world.world_size, "stream": state.stream,
            "schedule": run.schedule.state_dict() if isinstance(run.schedule, Plateau) else {}}


def plain_settings(group: dict) -> dict:
    """What a group of an optimizer says beside its parameters and the learning rate of an update, as far as JSON has it."""
    def plain(value) -> bool:
        return isinstance(value, (bool, int, float, str, NoneType)) or isinstance(value, (list, tuple)) and all(map(plain, value))
    return {key: value for key, value in group.items() if key not in ("params", "lr") and plain(value)}


def tied_names(model: nn.Module) -> dict[str, str]:
    """The other names of weights that have several, each with the one under which `model_weights` keeps it."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: kept for name, kept in names.items() if name != kept}


def name_part(part: Part, name: str, value: Tensor) -> tuple[str, Tensor]:
    """How a tensor that belongs to a part is saved: as it is if the part is a whole parameter, else flat and with its range."""
    return (name, value) if part.is_whole else (f"{name}[{part.start}:{part.start + value.numel()}]", value.flatten())


def optimizer_state(held: list[Part], optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """This rank's optimizer state, "parameter name.state name": tensors, and numbers."""
    tensors, numbers = {}, {}
    for part in held:
        for key, value in optimizer.state.get(part.piece, {}).items():
            name = f"{part.name}.{key}"
            if isinstance(value, Tensor):
                name, value = name_part(part, name, value) if value.shape == part.piece.shape else (name, value)
                tensors[name] = value
            elif value is None or isinstance(value, (int, float)):
                numbers[name] = value
            else:
                raise UsageError(f"the optimizer state {key!r} of {part.name} is a {type(value).__name__}, which only pickle could save: "
                                 f"use --save_strategy no, or another optimizer")
    return tensors, numbers


# ---------------------------------------------------------------------------------------------------- load

def load_state(path: str | None, args, data: str) -> TrainState:
    """The progress stored in a checkpoint; a fresh one without a checkpoint. data: what identifies the training data.

    Raises UsageError: exit code 2 if a setting is another than the checkpoint's, without which the run would go on as a
    different one, and --allow_change does not name it; 3 if the file is not usable."""
    if path is None:
        return TrainState(data=data)
    with reading(path, "state.json"):
        content, fresh = read_json(path, "state.json"), TrainState().to_dict()
        stored = content["state"]
        if stored.keys() != fresh.keys():
            raise ValueError(f"it is of another version of this program: it differs in {sorted(stored.keys() ^ fresh.keys())}")
        if wrong := [f"{name}={stored[name]!r:.100}" for name in fresh if not alike(stored[name], fresh[name])]:
            raise ValueError(f"impossible values: {', '.join(wrong)}")
        if not isinstance(content["stream"], (dict, NoneType)):
            raise TypeError("impossible values: stream")
        state = TrainState(**stored, stream=content["stream"], max_steps=stored["global_step"])
    adapted = os.path.exists(os.path.join(path, "adapter_config.json"))
    if not args.trains and not adapted:
        return state        # nothing goes on
    with reading(path, "args.json"):
        saved = read_json(path, "args.json")
        changes = [(f"--{name}", show(old), new, name) for name, old, new, fixed in changed_args(saved, args) if fixed]
        if "taken_over_from" in saved and data.startswith(state.data):       # it knows the number of samples at most
            state.data = data
    if not args.trains:     # the base of adapters is in no checkpoint: it has to be the same
        base = {"model_name_or_path", "lora_base", "lora_adapter", *(() if args.model_name_or_path else ("seed",))}
        changes = [change for change in changes if change[3] in base]
    elif state.data != data:
        changes.append(("the training data", show(state.data), data, "data"))
        state.data = data
    refused = [change for change in changes if change[3] not in args.allowed]
    if refused:
        raise UsageError(f"{path} is of a run with " + "; ".join(f"{what} {old}, not {new}" for what, old, new, _ in refused)
                         + ": it would go on as a different one. Give what it was trained with, or start a new run; to go on all the "
                         f"same, give --allow_change {','.join(dict.fromkeys(name for *_, name in changes))}")
    return state


def load_checkpoint(run: Run, path: str) -> None:
    """Puts weights, optimizer, callbacks and this rank's random generators where the checkpoint left them.

    The flags given now stay as they are; what differs from the checkpoint's is printed. Raises UsageError (exit code 3)
    if the tensors are not those of this run's model and optimizer."""
    left = load_weights(run, path)
    with reading(path, "state.json"):
        stored = read_json(path, "state.json")
        load_optimizer(run, path, stored["optimizer"], left)
        run.callbacks.load_states(stored["callbacks"], run.world.is_main)
        ranks = stored["world_size"]
        if not alike(ranks, 1):
            raise ValueError(f"impossible values: world_size={ranks!r:.100}")
        for name, keeper in (("scaler", run.precision), ("schedule", run.schedule)):     # another run may have had none of them
            ours = keeper.state_dict() if name == "scaler" or isinstance(keeper, Plateau) else {}
            if ours and stored[name]:
                if not alike(stored[name], ours):
                    raise ValueError(f"impossible values: {name}={stored[name]!r:.100}")
                keeper.load_state_dict(stored[name])
    if run.world.is_main:
        copy_history(os.path.dirname(os.path.abspath(path)), run)
        print(f"resuming from {path}: update {run.state.global_step} of {run.state.max_steps}")
        if ranks != run.world.world_size:
            print(f"  ranks: {ranks} -> {run.world.world_size}; random numbers start anew from the seed")
        if (before := stored["state"]["samples_per_update"]) not in (0, run.state.samples_per_update):      # 0: not known
            print(f"  samples per update: {before} -> {run.state.samples_per_update}")
        for name, old, new, _ in changed_args(read_json(path, "args.json"), run.args):
            print(f"  --{name}: {show(old)} -> {new}")
    if ranks == run.world.world_size:
        with reading(path, f"rng-{run.world.rank}.json"):
            set_rng_state(read_json(path, f"rng-{run.world.rank}.json"))
    else:
        set_seed(run.args.seed + run.world.rank + run.state.global_step)


def load_weights(run: Run, path: str) -> set[Tensor]:
    """The weights of a checkpoint and, where it has them, their averages: for --ema_decay, or to be evaluated in their place. Returns the
    weights that --allow_change weights has left as they were, since the file has none for them."""
    left, problems = load_model(run.model, path, "weights" in run.args.allowed, run.parallel.whole)
    if problems and run.world.is_main:
        print("\n  ".join([f"warning: {path} does not fit the model everywhere, and --allow_change weights goes on:", *problems]), file=sys.stderr)
    run.parallel.adopt()
    with PartFiles(path, "ema") as averages, torch.no_grad():
        if run.ema is not None:
            run.ema.restart()       # without averages they start at the weights
        if averages.names and (run.ema is not None or not run.args.trains):
            for part in run.parallel.parts if run.ema is None else run.ema.parts:
                if run.parallel.trained[part.name] not in left:
                    with reading(path, averages.name):
                        check_state(part.name, averages.found[part.name], part)
                        averages.fill(part.name, part.start, part.piece.detach())
            if run.ema is None:
                run.parallel.gather()
    return left


def load_best(run: Run) -> None:
    """--load_best_model_at_end, after training: the weights of the best update that was saved."""
    best = run.state.best_model_checkpoint
    if not run.args.load_best_model_at_end:
        return
    if best is None:
        raise UsageError(f"--load_best_model_at_end: the best update, {run.state.best_global_step}, has no checkpoint in {run.args.output_dir}: no "
                         f"evaluation gave a number, or it was removed. What was trained is in the newest checkpoint", 3)
    problem, _ = find_damage(best, run.world, run.args.save_on_each_node, only_model=True)
    if problem is not None:
        raise UsageError(f"{best}: {problem}", 3)
    load_for_evaluation(run, best)


def load_for_evaluation(run: Run, path: str) -> None:
    """What an evaluation needs of a checkpoint."""
    left = load_weights(run, path)
    with reading(path, "state.json"):
        stored = read_json(path, "state.json")["optimizer"]
        if stored["evaluates"]:     # a schedule-free one makes the weights to evaluate out of its state
            load_optimizer(run, path, stored, left)
    if run.world.is_main:
        print(f"weights of {path}")
        with reading(path, "args.json"):
            for name, old, new, _ in changed_args(read_json(path, "args.json"), run.args):
                if name in ("dataset", "dataset_config_name", "eval_dataset", "text_column", "block_size"):
                    print(f"note: it was trained with --{name} {show(old)}, and this is {new}: other data, and other blocks of it held out")


def copy_history(source: str, run: Run) -> None:
    """Gives a run that continues another one's checkpoint in a new folder the rows up to it."""
    log = os.path.join(source, "metrics.jsonl")
    if os.path.exists(log) and not os.path.exists(run.state.log_path):
        with open(log, "rb") as file, open(run.state.log_path, "wb") as copy:
            copy.write(file.read(min(run.state.log_bytes, os.path.getsize(log))))


def load_model(model: nn.Module, path: str, partly: bool = False, whole: dict[str, Tensor] | None = None) -> tuple[set[Tensor], list[str]]:
    """Loads the weights of a checkpoint folder into a bare model, each rank its own part. Names and shapes must match; partly: those that
    do not are left alone. whole: all weights, where the model is only a stage of one. Returns these weights, and what was wrong, a line each."""
    from tools.formats import lora_from_peft
    weights, lora, stem = model_weights(model), lora_of(model), weights_stem(model)
    with PartFiles(path, stem) as files, reading(path, files.name), torch.no_grad():
        if not files.names:
            if stem == "model" and os.path.exists(os.path.join(path, "adapter_config.json")):
                raise UsageError(f"{path} holds adapters: give the --lora_rank and the other settings they were trained with", 3)
            if stem != "model" and os.path.exists(os.path.join(path, "model.safetensors")):
                raise UsageError(f"{path} holds whole weights: to train adapters on it, give it as --model_name_or_path; "
                                 f"to go on with all of it, no --lora_rank", 3)
            raise UsageError(f"{path}{os.sep}{stem}.safetensors is missing", 3)
        if lora and (stored := lora_from_peft(path)).scale != lora.scale:
            raise UsageError(f"{path} holds adapters with the scale {stored.scale:g} (r={stored.r}, lora_alpha={stored.lora_alpha:g}, "
                             f"use_rslora={stored.use_rslora}), and this run's is {lora.scale:g}: give the --lora_rank, --lora_alpha and "
                             f"--use_rslora they were trained with", 3)
        wanted = {key: tuple(tensor.shape) for key, tensor in ((whole or {}) | weights).items()}
        found = {key: files.shape(key) for key in files.found if not re.search(r"\.(original_module|modules_to_save)\.", key)}     # PEFT's copies
        problems = misfits(wanted, found)
        if problems and not partly:
            raise UsageError("\n  ".join([(f"{os.path.join(path, files.name)} is of another model; give the model flags it was trained with, "
                                          f"or --allow_change weights to load what fits:"), *problems]), 3)
        left = {tensor for key, tensor in weights.items() if wanted[key] != found.get(key)}
        for key, tensor in weights.items():
            if tensor not in left:
                with filling(tensor) as (local, start):
                    files.fill(key, start, local)
    return left, problems


def misfits(wanted: dict[str, tuple], found: dict[str, tuple]) -> list[str]:
    """Where the shapes of a model's tensors and those in a file differ, by name, a line each."""
    problems = [f"{show(key)}: {show(found[key]) if key in found else 'missing'} in the file, {wanted.get(key, 'nothing')} in the model"
                for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
    return problems if len(problems) <= 20 else [*problems[:20], f"and {len(problems) - 20} more"]


def load_optimizer(run: Run, path: str, stored: dict, left: set[Tensor]) -> None:
    """left: weights that did not come from the checkpoint, whose states start anew."""
    optimizer, held = run.optimizer, run.parallel.parts
    if stored["class"] != type(optimizer).__name__:
        raise UsageError(f"{path}{os.sep}state.json holds the state of {show(stored['class'])}, and this run trains with "
                         f"{type(optimizer).__name__}: give the --optim it was saved with, or start a new run", 3)
    if not alike(stored["evaluates"], True):
        raise ValueError(f"impossible values: evaluates={stored['evaluates']!r:.100}")
    trained = {*run.parallel.names}
    whole = whole_parameters(optimizer)
    known = {p for group in optimizer.param_groups if group.get("fused") or type(optimizer) in ELEMENTWISE for p in group["params"]}
    states: dict[Tensor, dict] = {}
    with PartFiles(path, "optimizer") as files, reading(path, files.name):
        if not files.names:
            raise ValueError("it is missing")
        names: dict[str, list[str]] = {}     # of what was saved for each parameter
        for name in sorted(files.found.keys() | files.numbers.keys()):
            names.setdefault(name.rpartition(".")[0], []).append(name)
        if (unknown := sorted(names.keys() - trained)) and "weights" not in run.args.allowed:
            raise ValueError(f"it has states of parameters that this run does not train: {unknown[:10]}")
        for part in (part for part in held if run.parallel.trained[part.name] not in left):
            for name in names.get(part.name, ()):
                number = name in files.numbers
                check_state(name, [] if number else files.found[name], part, part.piece in whole, part.piece in known)
                states.setdefault(part.piece, {})[name.rpartition(".")[2]] = files.numbers[name] if number else files.read(name, part)
        for group in optimizer.param_groups:
            if len({frozenset(states[p]) for p in group["params"] if p in states and p not in whole}) > 1:
                raise ValueError("some parameters have states that others lack")
    packed = optimizer.state_dict()   # its groups hold the flags given now
    pieces = [p for group in optimizer.param_groups for p in group["params"]]
    packed["state"] = {index: states[p] for index, p in enumerate(pieces) if p in states}
    optimizer.load_state_dict(packed)
    for p, state in states.items():     # torch casts states to the dtype of their parameter, which is not always theirs
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dtype != optimizer.state[p][key].dtype:
                optimizer.state[p][key] = value.to(optimizer.state[p][key].device)
    if stored["extra"] is not None:
        optimizer.set_extra_state(stored["extra"])


def check_state(name: str, stored: list, part: Part, whole: bool = False, known: bool = False) -> None:
    """stored: what PartFiles.found has of a state. Raises ValueError if it cannot be that of a parameter. It is like the parameter, or a
    single number, such as a step count; an optimizer that needs the parameter whole may keep others. Of a known one, the numbers have these
    names. Fused kernels rely on that: they would write behind the end of a state that is too small."""
    fits = bool(stored) or not known
    for piece in stored:
        like = piece.shape == tuple(part.shape) if piece.stop is None else piece.stop <= part.shape.numel()
        single = piece.stop is None and math.prod(piece.shape) == 1
        if known:
            number = single and name.endswith((".step", ".mu", ".mu_product", ".eta")) and piece.dtype in (torch.float32, torch.float64)
            fits &= number or like and piece.dtype == part.piece.dtype
        else:
            fits &= like or single or whole and piece.stop is None
    if not fits:
        raise ValueError(f"{show(name)} does not fit a parameter of shape {tuple(part.shape)}")
