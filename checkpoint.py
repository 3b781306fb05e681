"""Checkpoints: `output_dir/checkpoint-N` after update N, exact to the bit on resume, and complete whenever the name exists.

    model.safetensors      weights under the bare model's names; a tied weight once. Above 5 GB: model-00001-of-0000N.safetensors
                           and model.safetensors.index.json, as transformers names them
    optimizer-R.safetensors  optimizer state that rank R holds, "parameter name.state name"; of a parameter that is split over
                           ranks with the range of its flattened elements, "parameter name.state name[start:stop]"
    ema-R.safetensors      averaged weights, with --ema_decay, by parameter name and range
    rng-R.json             random number generators of rank R: python, numpy, torch, cuda
    state.json             TrainState, callbacks, loss scale, the state of a plateau schedule, and the world size that wrote it
    args.json              the run's arguments
    manifest.json          written last: size and SHA-256 of every other file

A checkpoint is written as `tmp-checkpoint-N` and renamed once, after all ranks are done. No file is ever unpickled. Any
strategy on any number of ranks can go on from it: each rank reads the ranges that it holds.
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import sys

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distributed import World, local_part, rng_state, set_rng_state, set_seed, whole
from schedules import Plateau
from state import Run, TrainState, UsageError
from zero import Part

FORMAT = 2     # of the folder, in its manifest
MAX_FILE_BYTES = 5 * 10**9      # of weights in one file
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


# ---------------------------------------------------------------------------------------------------- save

def save_checkpoint(run: Run) -> str:
    """Writes `checkpoint-{global_step}` with all ranks, then removes the oldest beyond --save_total_limit. Returns its path.

    Raises UsageError (exit code 5) on all ranks if any of them cannot write; older checkpoints are untouched then."""
    output_dir, world = run.args.output_dir, run.world
    final = os.path.join(output_dir, f"checkpoint-{run.state.global_step}")
    tmp = os.path.join(output_dir, f"tmp-checkpoint-{run.state.global_step}")
    with world.writing(tmp):
        if world.is_main:
            shutil.rmtree(tmp, ignore_errors=True)
            os.makedirs(tmp)
    write_model(tmp, run.model, world)
    with world.writing(tmp):
        write_json(tmp, f"rng-{world.rank}.json", rng_state())
        if run.parallel.saves:
            write_tensors(tmp, f"optimizer-{world.rank}.safetensors", *optimizer_state(run.parallel.parts, run.optimizer))
            if run.ema is not None:
                write_tensors(tmp, f"ema-{world.rank}.safetensors", dict(name_part(part, part.name, part.piece) for part in run.ema.parts))
        if world.is_main:
            write_json(tmp, "args.json", run.args.to_dict())
            # what an optimizer keeps outside of its state it gives by get_extra_state, as JSON values
            optimizer = {"class": type(run.optimizer).__name__, "extra": run.optimizer.get_extra_state() if hasattr(run.optimizer, "get_extra_state") else None}
            write_json(tmp, "state.json", {"state": run.state.to_dict(), "optimizer": optimizer, "callbacks": run.callbacks.states(), "scaler": run.precision.state_dict(),
                                           "schedule": run.schedule.state_dict() if isinstance(run.schedule, Plateau) else {},
                                           "world_size": world.world_size, "torch": torch.__version__})
    with world.writing(tmp):
        if world.is_main:
            write_json(tmp, "manifest.json", {"format": FORMAT, "files": describe_files(tmp)})
            sync(tmp)
            if replaced := os.path.exists(final):   # saved twice at one update: `prepare_output_dir` puts it back after a crash here
                os.rename(final, os.path.join(output_dir, f"replaced-checkpoint-{run.state.global_step}"))
            os.rename(tmp, final)
            sync(output_dir)
            if replaced:
                shutil.rmtree(os.path.join(output_dir, f"replaced-checkpoint-{run.state.global_step}"))
            rotate(output_dir, run.args.save_total_limit)
    return final


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's own weights by name, whole or sharded. One with two names (tied) is kept under the first."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            weights[name] = tensor
        seen.add(id(tensor))
    return weights


def write_model(folder: str, model: nn.Module, world: World) -> None:
    """Rank 0 writes the weights, file by file; all ranks help to gather them, so all call this."""
    files: list[list[str]] = [[]]
    weights, size = model_weights(model), 0
    for name, tensor in weights.items():
        if files[-1] and size + tensor.nbytes > MAX_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.nbytes
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] if len(files) > 1 else ["model.safetensors"]
    for file, content in zip(names, files):
        tensors = {}
        for name in content:
            tensor = whole(weights[name])
            if world.is_main:
                tensors[name] = tensor.cpu() if tensor.device.type != "cpu" else tensor.clone()    # clone: weights may share a buffer
        with world.writing(folder):
            if world.is_main:
                write_tensors(folder, file, tensors)
    with world.writing(folder):
        if world.is_main and len(files) > 1:
            write_json(folder, "model.safetensors.index.json", {"metadata": {"total_size": sum(t.nbytes for t in weights.values())},
                                                                "weight_map": {name: file for file, content in zip(names, files) for name in content}})


def name_part(part: Part, name: str, value: Tensor) -> tuple[str, Tensor]:
    """How a tensor that belongs to a part is saved: as it is if the part is a whole parameter, else flat and with its range."""
    value = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return (name, value) if part.is_whole else (f"{name}[{part.start}:{part.start + value.numel()}]", value.flatten())


def optimizer_state(held: list[Part], optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """This rank's optimizer state, "parameter name.state name": tensors, and numbers."""
    tensors, numbers = {}, {}
    for part in held:
        for key, value in optimizer.state.get(part.piece, {}).items():
            name = f"{part.name}.{key}"
            if isinstance(value, Tensor):
                name, value = name_part(part, name, value) if value.shape == part.piece.shape else (name, value.detach().cpu().clone())
                tensors[name] = value
            elif value is None or isinstance(value, (int, float)):
                numbers[name] = value
            else:
                raise UsageError(f"the optimizer state {key!r} of {part.name} is a {type(value).__name__}, which only pickle could save: "
                                 f"use --save_strategy no, or another optimizer", 5)
    return tensors, numbers


def write_tensors(folder: str, name: str, tensors: dict[str, Tensor], numbers: dict | None = None) -> None:
    """One file of tensors; `numbers` go into its header, which has no fixed order, so it holds one thing."""
    path = os.path.join(folder, name)
    try:
        save_file({key: t.contiguous() for key, t in tensors.items()}, path, metadata={"format": "pt"} if numbers is None else {"numbers": json.dumps(numbers)})
    except SafetensorError as error:   # a full disk, among others
        raise OSError(str(error)) from None
    os.chmod(path, 0o666 & ~current_umask())   # safetensors makes it readable by its owner alone
    sync(path)


def write_json(folder: str, name: str, content: dict) -> None:
    path = os.path.join(folder, name)
    with open(path, "w") as file:
        json.dump(content, file, indent=1)
    sync(path)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def sync(path: str) -> None:
    """Forces a file or folder to the disk: a rename must not become durable before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_files(folder: str) -> dict[str, dict]:
    files = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            files[name] = {"bytes": os.path.getsize(file.name), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return files


def rotate(output_dir: str, limit: int | None) -> None:
    """Keeps the newest `limit` checkpoints. The others lose their name before their files, so that none is ever half there."""
    for step in list_checkpoints(output_dir)[limit or sys.maxsize:]:
        doomed = os.path.join(output_dir, f"tmp-deleted-checkpoint-{step}")
        os.rename(os.path.join(output_dir, f"checkpoint-{step}"), doomed)
        shutil.rmtree(doomed)


# ---------------------------------------------------------------------------------------------------- find

def prepare_output_dir(output_dir: str) -> None:
    """Makes the folder and shows that it can be written, before any work is done. Called on rank 0."""
    probe = os.path.join(output_dir, ".probe")
    try:
        os.makedirs(output_dir, exist_ok=True)
        with open(probe, "w"):
            os.remove(probe)
        for name in os.listdir(output_dir):     # what a save that was killed has left
            path, original = os.path.join(output_dir, name), os.path.join(output_dir, name.removeprefix("replaced-"))
            if name.startswith("replaced-checkpoint-") and not os.path.exists(original):
                os.rename(path, original)
            elif name.startswith(("tmp-checkpoint-", "tmp-deleted-checkpoint-", "replaced-checkpoint-")):
                shutil.rmtree(path)
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} cannot be written: {error}", 5) from None


def list_checkpoints(output_dir: str) -> list[int]:
    """Steps of the checkpoints in a folder, newest first."""
    matches = (CHECKPOINT.fullmatch(name) for name in os.listdir(output_dir)) if os.path.isdir(output_dir) else ()
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def find_checkpoint(args, world: World) -> str | None:
    """What --resume_from_checkpoint means, the same on every rank: the path of a complete checkpoint, or None to start.

    Raises UsageError: exit code 2 if output_dir holds a run and no flag says what to do with it, 3 if there is nothing
    to resume from."""
    wanted, output_dir = args.resume_from_checkpoint, args.output_dir
    choice, error = -1, None
    if world.is_main:
        try:
            prepare_output_dir(output_dir)
            choice = choose_checkpoint(wanted, output_dir)
        except UsageError as failure:
            error = failure
    world.raise_together(error)
    choice, = world.max(choice)
    if choice >= 0:
        return os.path.join(output_dir, f"checkpoint-{choice}")
    return None if wanted in (None, "auto") or wanted.lower() in ("true", "false") else wanted


def choose_checkpoint(wanted: str | None, output_dir: str) -> int:
    """The step to resume from in output_dir, or -1 for none of its own: a fresh start, or an explicit path."""
    steps = list_checkpoints(output_dir)
    if wanted is None or wanted.lower() == "false":
        if found := holds_run(output_dir):
            raise UsageError(f"--output_dir {output_dir} already holds a run ({found}): go on with it by "
                             f"--resume_from_checkpoint True, or start another one in a new --output_dir")
        return -1
    if wanted.lower() in ("true", "auto"):
        for step in steps:
            path = os.path.join(output_dir, f"checkpoint-{step}")
            problem = find_damage(path)
            if problem is None:
                return step
            print(f"warning: {path} is skipped: {problem}", file=sys.stderr)
        if steps or wanted.lower() == "true":
            raise UsageError(f"--resume_from_checkpoint {wanted}: no {'complete ' if steps else ''}checkpoint in {output_dir}; "
                             f"give the path of one, or start a new run in another --output_dir", 3)
        if holds_run(output_dir):
            print(f"note: {output_dir} has a metrics.jsonl but no checkpoint to go on from; the run starts anew and replaces it", file=sys.stderr)
        return -1
    if (problem := find_damage(wanted)) is not None:
        raise UsageError(f"--resume_from_checkpoint {wanted}: {problem}", 3)
    source = os.path.dirname(os.path.abspath(wanted))
    if os.path.samefile(source, output_dir):
        chosen = CHECKPOINT.fullmatch(os.path.basename(os.path.abspath(wanted)))
        if chosen is None or steps[0] > int(chosen[1]):
            raise UsageError(f"--resume_from_checkpoint {wanted}: {output_dir} goes on to checkpoint-{steps[0]}, which would be mixed with "
                             f"the new run: give a new --output_dir, or move the newer checkpoints away")
    elif holds_run(output_dir):
        raise UsageError(f"--output_dir {output_dir} already holds another run than {wanted}: give a new --output_dir, "
                         f"or {source} to go on there")
    return -1


def holds_run(output_dir: str) -> str:
    """A file or folder by which output_dir is known to hold a run, or ""."""
    if steps := list_checkpoints(output_dir):
        return f"checkpoint-{steps[0]}"
    log = os.path.join(output_dir, "metrics.jsonl")
    return "metrics.jsonl" if os.path.exists(log) and os.path.getsize(log) else ""


def find_damage(path: str) -> str | None:
    """What is wrong with a checkpoint folder compared with its manifest, or None."""
    if not os.path.isdir(path):
        return "no such folder"
    try:
        manifest = read_json(path, "manifest.json")
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, and this program knows {FORMAT}"
        expected = dict(manifest["files"])
        found = describe_files(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable manifest.json ({error})"
    found.pop("manifest.json")
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            return f"{name} is {'missing' if name not in found else 'not in its manifest'}"
        if found[name] != expected[name]:
            return f"{name} is not what was saved: {found[name]['bytes']:,} bytes, sha256 {found[name]['sha256'][:16]}..., not as in its manifest"
    return None


def read_json(folder: str, name: str) -> dict:
    with open(os.path.join(folder, name)) as file:
        return json.load(file)


# ---------------------------------------------------------------------------------------------------- load

def load_state(path: str | None) -> TrainState:
    """The progress stored in a checkpoint; a fresh one without a checkpoint."""
    if path is None:
        return TrainState()
    stored, known = read_json(path, "state.json")["state"], TrainState().to_dict()
    if stored.keys() != known.keys():
        raise UsageError(f"{path}/state.json is of another version of this program: it differs in {sorted(stored.keys() ^ known.keys())}", 3)
    return TrainState(**stored)


def load_checkpoint(run: Run, path: str) -> None:
    """Puts weights, optimizer, callbacks and this rank's random generators where the checkpoint left them.

    The flags given now stay as they are; what differs from the checkpoint's is printed. Raises UsageError (exit code 3)
    if the tensors are not those of this run's model and optimizer."""
    load_model(run.model, path)
    run.parallel.adopt()
    stored = read_json(path, "state.json")
    load_optimizer(run, path, stored["optimizer"])
    run.callbacks.load_states(stored["callbacks"])
    run.precision.load_state_dict(stored["scaler"])
    if isinstance(run.schedule, Plateau):
        run.schedule.load_state_dict(stored["schedule"])
    if run.ema is not None:     # a checkpoint without averages starts them at its weights
        with PartFiles(path, "ema") as averages, PartFiles(path, "model") as weights:
            for part in run.ema.parts:
                part.piece.copy_((averages if part.name in averages.found else weights).read(part.name, part.start, part.piece))
    if run.world.is_main:
        copy_history(os.path.dirname(os.path.abspath(path)), run)
        print(f"resuming from {path}: update {run.state.global_step} of {run.state.max_steps}")
        if stored["world_size"] != run.world.world_size:
            print(f"  ranks: {stored['world_size']} -> {run.world.world_size}; random numbers start anew from the seed")
        saved_args = read_json(path, "args.json")
        for field in dataclasses.fields(run.args):
            old, new = saved_args.get(field.name), getattr(run.args, field.name)
            if old != new and field.name not in ("output_dir", "resume_from_checkpoint", "disable_tqdm"):
                print(f"  --{field.name}: {old} -> {new}")
    if stored["world_size"] == run.world.world_size:
        set_rng_state(read_json(path, f"rng-{run.world.rank}.json"))
    else:
        set_seed(run.args.seed + run.world.rank + run.state.global_step)


def copy_history(source: str, run: Run) -> None:
    """Gives a run that continues another one's checkpoint in a new folder the rows up to it."""
    log = os.path.join(source, "metrics.jsonl")
    if os.path.exists(log) and not os.path.exists(run.state.log_path):
        with open(log, "rb") as file, open(run.state.log_path, "wb") as copy:
            copy.write(file.read(run.state.log_bytes))


class PartFiles(contextlib.ExitStack):
    """The tensors in `stem*.safetensors` of a checkpoint, of which any range of elements can be read by itself, wherever the
    ranks that wrote it had cut. A context: files are open, and mapped, inside it."""

    def __init__(self, path: str, stem: str):
        super().__init__()
        self.found: dict[str, list[tuple[int, int | None, str, object]]] = {}      # name -> (start, stop or None for all, key, file)
        self.numbers: dict = {}
        for name in sorted(os.listdir(path)):
            if re.fullmatch(rf"{stem}(-.*)?\.safetensors", name):
                file = self.enter_context(safe_open(os.path.join(path, name), framework="pt"))
                self.numbers.update(json.loads((file.metadata() or {}).get("numbers", "{}")))
                for key in file.keys():   # noqa: SIM118  a file is no dict
                    base, start, stop = RANGE.fullmatch(key).groups()
                    self.found.setdefault(base, []).append((int(start or 0), int(stop) if stop else None, key, file))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that was saved whole."""
        _, _, key, file = self.found[name][0]
        return tuple(file.get_slice(key).get_shape())

    def read(self, name: str, first: int, like: Tensor, whole_shape=None) -> Tensor:
        """The elements of the flattened tensor `name` from `first` on, as many as `like` has and in its shape. A tensor that was saved
        whole in another shape than `whole_shape` belongs to the parameter as one, such as a step count: it is read as it is."""
        last = first + like.numel()
        pieces = []
        for start, stop, key, file in sorted(self.found[name], key=lambda entry: entry[0]):
            source = file.get_slice(key)
            shape = source.get_shape()
            if stop is None and whole_shape is not None and tuple(shape) != tuple(whole_shape):
                return file.get_tensor(key)
            if stop is None:        # whole: the rows of the first dimension that have the range
                per_row = math.prod(shape[1:])
                row = first // max(per_row, 1)
                rows = source[row:-(-last // max(per_row, 1))] if shape else file.get_tensor(key)
                return rows.flatten()[first - row * per_row:last - row * per_row].view(like.shape)
            if start < last and first < stop:
                pieces.append(source[max(first - start, 0):last - start])
        return torch.cat(pieces).view(like.shape) if pieces else torch.empty_like(like)


RANGE = re.compile(r"(.*?)(?:\[(\d+):(\d+)\])?")


def load_model(model: nn.Module, path: str) -> None:
    """Loads the weights of a checkpoint folder into a bare model, each rank its own part; names and shapes must match."""
    weights = model_weights(model)
    with PartFiles(path, "model") as files, torch.no_grad():
        check_tensors(path, {k: tuple(v.shape) for k, v in weights.items()}, {k: files.shape(k) for k in files.found})
        for name, tensor in weights.items():
            local, start = local_part(tensor)
            local.copy_(files.read(name, start, local))


def load_optimizer(run: Run, path: str, stored: dict) -> None:
    optimizer, held = run.optimizer, run.parallel.parts
    if stored["class"] != type(optimizer).__name__:
        raise UsageError(f"{path} holds the state of {stored['class']}, and this run trains with {type(optimizer).__name__}: give the --optim it was "
                         f"saved with, or start a new run", 3)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    states: dict[Tensor, dict] = {}
    with PartFiles(path, "optimizer") as files:
        names: dict[str, list[str]] = {}     # of what was saved for each parameter
        for name in sorted(files.found.keys() | files.numbers.keys()):
            names.setdefault(name.rpartition(".")[0], []).append(name)
        if unknown := sorted(names.keys() - trained):
            raise UsageError(f"{path} has optimizer state of parameters that this run does not train: {unknown[:10]}", 3)
        for part in held:
            for name in names.get(part.name, ()):
                states.setdefault(part.piece, {})[name.rpartition(".")[2]] = files.numbers[name] if name in files.numbers else \
                    files.read(name, part.start, part.piece, part.shape)
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


def check_tensors(path: str, expected: dict, found: dict) -> None:
    problems = [f"{key}: {tuple(found[key]) if key in found else 'missing'} in the file, "
                f"{tuple(expected[key]) if key in expected else 'nothing'} in the model"
                for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UsageError(f"{path}/model.safetensors is of another model; give the model flags it was trained with:\n  "
                         + "\n  ".join(problems[:10]) + more, 3)
