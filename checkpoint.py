"""Checkpoints: `output_dir/checkpoint-N` after update N, exact to the bit on resume, and complete whenever the name exists.

    model.safetensors      weights under the bare model's names; a tied weight once. Above 5 GB: model-00001-of-0000N.safetensors
                           and model.safetensors.index.json, as transformers names them
    optimizer-R.safetensors  optimizer state that rank R holds, "parameter name.state name"; of a parameter that is split over
                           ranks with the range of its flattened elements, "parameter name.state name[start:stop]"
    ema-R.safetensors      averaged weights, with --ema_decay, by parameter name and range
    rng-R.json             random number generators of rank R: python, numpy, torch, cuda
    state.json             TrainState, callbacks, loss scale, the state of a plateau schedule, and the world size that wrote it
    args.json              the run's arguments
    manifest.json          written last: versions, size and SHA-256 of every other file, and the SHA-256 of this list itself

Ranks write at the same time, each what it holds: its optimizer state into a file of its own, its shards of the weights to their
places in files that all share. So nobody ever holds more than its part, and any strategy on any number of ranks can go on from
it: each rank reads the ranges that it holds. The folder is `tmp-checkpoint-N` until everything is on the disk, and then renamed
once. Nothing is ever unpickled, and no name in a file is followed out of the folder.

Beside the checkpoints, output_dir has metrics.jsonl (callbacks.py), status.json, which says how the run is or how it ended, and
.lock, which a run holds while it lives.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from args import changed_args
from distributed import World, local_part, rng_state, set_rng_state, set_seed
from schedules import Plateau
from state import Run, TrainState, UsageError
from zero import ELEMENTWISE, Part, whole_parameters

FORMAT = 4     # of the folder, in its manifest
MAX_FILE_BYTES = 5 * 10**9      # of weights in one file
MAX_JSON_BYTES = 2**26          # of a text, or the header of a file of tensors, that will be parsed
CHUNK_BYTES = 2**24             # that are written, hashed or read at a time
LOCK_WAIT_S = 5                 # for a run that was killed a moment ago to be gone
CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
RANGE = re.compile(r"(.*?)(?:\[(\d{1,15}):(\d{1,15})\])?", re.DOTALL)
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
          "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool}     # safetensors' names


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
                if world.writes:
                    shutil.rmtree(self.tmp, ignore_errors=True)
                    os.mkdir(self.tmp)
                    for name, plan in files.items():
                        if plan.shared:
                            create_file(os.path.join(self.tmp, name), plan)
            files |= plan_rest(run)
            if args.save_async:
                files = {name: plan._replace(tensors=[(key, at, self.copy(name, key, tensor)) for key, at, tensor in plan.tensors])
                         for name, plan in files.items()}
                if world.device.type == "cuda":
                    torch.cuda.synchronize()
            self.described: dict[str, dict] = {}
            self.stages = [lambda: self.describe_shared(files)]
            self.stage = self.writer.submit(self.write, files)
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

    def write(self, files: dict[str, FilePlan]) -> None:
        for name, plan in files.items():
            try:
                described = write_file(os.path.join(self.tmp, name), plan)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} (this rank writes {sum(plan.size for plan in files.values()):,} bytes)", name) from None
            if not plan.shared:
                self.described[name] = described

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
                manifest = {"format": FORMAT, "step": self.step, "only_model": args.save_only_model, "torch": torch.__version__,
                            "python": platform.python_version(),
                            "files": {name: entry for node, files in described for name, entry in sorted(files.items())
                                      if node == world.node or not args.save_on_each_node}}
                write_file(os.path.join(self.tmp, "manifest.json"), plan_json(manifest | {"sha256": checksum(manifest)}))
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

    def copy(self, file: str, key: str, tensor: Tensor) -> Tensor:
        held = self.copies.get((file, key))
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self.copies[file, key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return held.copy_(tensor, non_blocking=True)

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


class FilePlan(NamedTuple):
    """A file that is to be written: a header, or a whole text, and tensors behind it."""

    header: bytes
    size: int                                   # of the whole file
    tensors: list[tuple[str, int, Tensor]]      # this rank's: key, position in the file, elements; in the order of positions
    shared: bool = False                        # other ranks write into it too; the header is written by one, before


def plan_json(content: dict) -> FilePlan:
    text = json.dumps(content, indent=1).encode()
    return FilePlan(text, len(text), [])


def plan_tensors(tensors: dict[str, Tensor], mine: dict[str, tuple[Tensor, int]] | None = None, shared: bool = False, **metadata: str) -> FilePlan:
    """A file of tensors in the safetensors format. mine: what this rank writes of them, and from which element on (default: all)."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **metadata}}
    mine = {key: (tensor, 0) for key, tensor in tensors.items()} if mine is None else mine
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):    # keeps each one aligned
        name = next((name for name, known in DTYPES.items() if known == tensor.dtype), None)
        if name is None:
            raise UsageError(f"{key} is a tensor of {tensor.dtype}, which the safetensors format does not have: use --save_strategy no, or another type")
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    places = [(key, data + header[key]["data_offsets"][0] + first * tensor.dtype.itemsize, tensor.detach()) for key, (tensor, first) in mine.items()]
    return FilePlan(len(text).to_bytes(8, "little") + text, data + end, sorted(places, key=lambda place: place[1]), shared)


def model_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's own weights by name, whole or sharded. One with two names (tied) is kept under the first."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            weights[name] = tensor
        seen.add(id(tensor))
    return weights


def plan_weights(run: Run) -> dict[str, FilePlan]:
    files: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in model_weights(run.model).items():
        nbytes = tensor.numel() * tensor.element_size()
        if files[-1] and size + nbytes > MAX_FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size, total = size + nbytes, total + nbytes
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] if len(files) > 1 else ["model.safetensors"]
    plans = {}
    for name, weights in zip(names, files):
        sharded = {key for key, tensor in weights.items() if hasattr(tensor, "to_local")}
        mine = {key: local_part(tensor) for key, tensor in weights.items() if (run.parallel.saves if key in sharded else run.world.writes)}
        if sharded or run.world.writes:
            plans[name] = plan_tensors(weights, mine, bool(sharded))
    if len(files) > 1 and run.world.writes:
        plans["model.safetensors.index.json"] = plan_json({"metadata": {"total_size": total}, "weight_map": {
            key: name for name, weights in zip(names, files) for key in weights}})
    return plans


def plan_rest(run: Run) -> dict[str, FilePlan]:
    """Everything but the weights, of this rank."""
    args, world, files = run.args, run.world, {}
    if not args.save_only_model:
        files[f"rng-{world.rank}.json"] = plan_json(rng_state())
        if run.parallel.saves:
            tensors, numbers = optimizer_state(run.parallel.parts, run.optimizer)
            files[f"optimizer-{world.rank}.safetensors"] = plan_tensors(tensors, numbers=json.dumps(numbers))
    if run.ema is not None and run.parallel.saves:
        files[f"ema-{world.rank}.safetensors"] = plan_tensors(dict(name_part(part, part.name, part.piece) for part in run.ema.parts))
    if world.writes:
        files["args.json"] = plan_json(args.to_dict())
        # what an optimizer keeps outside of its state it gives by get_extra_state, as JSON values
        optimizer = {"class": type(run.optimizer).__name__, "evaluates": hasattr(run.optimizer, "eval"), "extra": run.optimizer.get_extra_state() if hasattr(run.optimizer, "get_extra_state") else None}
        files["state.json"] = plan_json({"state": run.state.to_dict(), "optimizer": optimizer, "callbacks": run.callbacks.states(),
                                         "scaler": run.precision.state_dict(), "world_size": world.world_size, "stream": run.state.stream,
                                         "schedule": run.schedule.state_dict() if isinstance(run.schedule, Plateau) else {}})
    return files


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


def create_file(path: str, plan: FilePlan) -> None:
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        write_at(descriptor, memoryview(plan.header), 0)
        os.truncate(descriptor, plan.size)


def write_file(path: str, plan: FilePlan) -> dict:
    """Writes a file, or this rank's tensors into a shared one, and forces it to the disk. Returns its size and SHA-256, which
    is worked out beside the writing; of a shared one it means nothing."""
    digest = hashlib.sha256()
    with opened(path, os.O_WRONLY | (0 if plan.shared else os.O_CREAT | os.O_EXCL)) as descriptor, ThreadPoolExecutor(1) as beside:
        parts = [] if plan.shared else [(0, memoryview(plan.header))]
        for position, data in (*parts, *((at, tensor) for _, at, tensor in plan.tensors)):
            data = as_bytes(data) if isinstance(data, Tensor) else data
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start:start + CHUNK_BYTES]
                hashing = None if plan.shared else beside.submit(digest.update, chunk)      # lets go of the interpreter lock
                write_at(descriptor, chunk, position + start)
                if hashing is not None:
                    hashing.result()
        os.fsync(descriptor)
    return {"bytes": plan.size, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def opened(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor, which is copied only if it is not on the CPU or not contiguous."""
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_at(descriptor: int, data: memoryview, position: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


def sync(path: str) -> None:
    """Forces a file or folder to the disk: a rename must not become durable before what it names."""
    with opened(path) as descriptor:
        os.fsync(descriptor)


def describe_file(path: str) -> dict:
    with open(path, "rb") as file:
        return {"bytes": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def checksum(manifest: dict) -> str:
    """Of everything in a manifest but this."""
    return hashlib.sha256(json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True).encode()).hexdigest()


def rotate(output_dir: str, limit: int | None, protected: set[int]) -> None:
    """Removes the oldest complete checkpoints until `limit` are left, but none of the protected ones, the newest and the best. They
    lose their name before their files, so that none is ever half there."""
    steps = [step for step in list_checkpoints(output_dir) if limit is not None and looks_complete(os.path.join(output_dir, f"checkpoint-{step}"))]
    excess = max(0, len(steps) - (limit or 0))
    for step in [step for step in reversed(steps) if step not in protected][:excess]:
        doomed = os.path.join(output_dir, f"tmp-deleted-checkpoint-{step}")
        os.rename(os.path.join(output_dir, f"checkpoint-{step}"), doomed)
        remove(doomed)


def looks_complete(path: str) -> bool:
    """Whether a checkpoint has the files of its manifest, in their sizes; contents are not read."""
    try:
        check_files(path, read_manifest(path), ranks=0)
    except UsageError:
        return False
    return True


def remove(path: str) -> None:
    """Removes a folder, or a link but not what it points to."""
    if os.path.islink(path):
        os.unlink(path)
    else:
        shutil.rmtree(path)


# ---------------------------------------------------------------------------------------------------- find

def find_checkpoint(args, world: World) -> str | None:
    """What --resume_from_checkpoint means, the same on every rank: the path of a checkpoint that is as it was saved, or None to
    start. Under torchrun, a start after a failure goes on by itself, whatever the flag says. Takes the lock of output_dir. To evaluate
    without training: the checkpoint to look at, without a lock, since its run may be going on.

    Raises UsageError: exit code 2 if output_dir is in use, or holds a run and no flag says what to do with it, 3 if there is
    nothing to resume from. A damaged checkpoint that an older one is used for is renamed, so that the name keeps its meaning."""
    wanted, output_dir = args.resume_from_checkpoint, args.output_dir
    restarted = args.trains and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    candidates, error, job, damaged = [], None, os.environ.get("TORCHELASTIC_RUN_ID"), []
    try:
        if world.writes and args.trains:
            prepare_output_dir(output_dir, world.on_exit)
        if world.is_main:
            before = read_status(output_dir)
            restarted = restarted and job is not None and before.get("job") == job      # what was refused at first is not allowed at second
            candidates = list_candidates(args, restarted)
            world.status.update(started=before["started"] if restarted else time.time(), step=before.get("step", 0))
    except UsageError as failure:
        error = failure
    world.raise_together(error)
    timed_out, restarted = world.max(int(restarted and world.is_main and before.get("exit") == 75), int(restarted and world.is_main))
    if timed_out:
        raise SystemExit(75)        # --max_time is for the job, and torchrun would start it over and over
    candidates = world.gather_json(candidates)[0]
    world.status["job"] = job if restarted else None
    if args.trains:
        world.on_exit.push(lambda kind, failure, trace: report_end(output_dir, world, failure))
    for path in candidates:
        problem, is_damaged = find_damage(path, world, args.save_on_each_node, only_model=not args.trains)
        if problem is None:
            with world.writing(output_dir):
                if world.writes:
                    os.makedirs(output_dir, exist_ok=True)
                for old in damaged if args.trains else ():
                    if world.writes and os.path.lexists(old):
                        os.rename(old, unused_path(os.path.join(output_dir, f"damaged-{os.path.basename(old)}")))
            if args.trains:
                write_status(output_dir, world, job=job)
            return path
        if path == wanted and not restarted:
            raise UsageError(f"--resume_from_checkpoint {wanted}: {problem}", 3)
        if not args.trains:     # an older one would have other results
            raise UsageError(f"{path} cannot be evaluated: {problem}", 3)
        if world.is_main:
            print(f"warning: {path} is skipped: {problem}", file=sys.stderr)
        damaged += [path] if is_damaged else []
    if not args.trains:
        raise UsageError(f"--do_eval and --do_predict alone use a checkpoint, and there is none{' of a best update' * args.load_best_model_at_end} in "
                         f"{output_dir}: give --resume_from_checkpoint PATH, or --do_train to train first", 3)
    if candidates or (wanted or "").lower() == "true":
        raise UsageError(f"--resume_from_checkpoint {wanted}: no {'complete ' if candidates else ''}checkpoint in {output_dir}; "
                         f"give the path of one, or start a new run in another --output_dir", 3)
    write_status(output_dir, world, job=job)
    return None


def list_candidates(args, restarted: bool) -> list[str]:
    """Paths of the checkpoints that may be resumed from, to be tried in this order; none for a fresh start. To evaluate without training:
    the one asked for, else the best (--load_best_model_at_end) or the newest first."""
    wanted, output_dir = args.resume_from_checkpoint, args.output_dir
    steps = list_checkpoints(output_dir)
    own = [os.path.join(output_dir, f"checkpoint-{step}") for step in steps]
    explicit = wanted is not None and wanted.lower() not in ("true", "false", "auto")
    if restarted:
        return own or ([wanted] if explicit else [])
    if not args.trains:
        if own and not explicit and args.load_best_model_at_end:
            with reading(own[0], "state.json"):
                best = read_json(own[0], "state.json")["state"]["best_saved_step"]
            own = [path for path, step in zip(own, steps) if step == best]
        return [wanted] if explicit else own
    if wanted is None or wanted.lower() == "false":
        if found := holds_run(output_dir):
            raise UsageError(f"--output_dir {output_dir} already holds a run ({found}): go on with it by "
                             f"--resume_from_checkpoint True, or start another one in a new --output_dir")
        return []
    if not explicit:
        if not own and wanted.lower() == "auto" and holds_run(output_dir):
            print(f"note: {output_dir} has a metrics.jsonl but no checkpoint to go on from; the run starts anew and replaces it", file=sys.stderr)
        return own
    source = os.path.dirname(os.path.abspath(wanted))
    if os.path.isdir(wanted) and os.path.samefile(source, output_dir):
        chosen = CHECKPOINT.fullmatch(os.path.basename(os.path.abspath(wanted)))
        if steps and (chosen is None or steps[0] > int(chosen[1])):
            raise UsageError(f"--resume_from_checkpoint {wanted}: {output_dir} goes on to checkpoint-{steps[0]}, which would be mixed with "
                             f"the new run: give a new --output_dir, or move the newer checkpoints away")
    elif os.path.isdir(wanted) and holds_run(output_dir):
        raise UsageError(f"--output_dir {output_dir} already holds another run than {wanted}: give a new --output_dir, "
                         f"or {source} to go on there")
    return [wanted]


def prepare_output_dir(output_dir: str, on_exit: contextlib.ExitStack) -> None:
    """Makes the folder, locks it, which also shows that it can be written, and removes what a save that was killed has left."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        lock(output_dir, on_exit)
        for name in os.listdir(output_dir):
            path, original = os.path.join(output_dir, name), os.path.join(output_dir, name.removeprefix("replaced-"))
            if name.startswith("replaced-checkpoint-") and not os.path.lexists(original):
                os.rename(path, original)
            elif name.startswith(("tmp-checkpoint-", "tmp-deleted-checkpoint-", "replaced-checkpoint-")):
                remove(path)
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} cannot be written: {error}", 5) from None


def lock(output_dir: str, on_exit: contextlib.ExitStack) -> None:
    """Keeps other runs out of the folder until the world is closed. If the process dies, the system gives the lock back."""
    file = on_exit.enter_context(open(os.path.join(output_dir, ".lock"), "a+"))    # noqa: SIM115
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise UsageError(f"--output_dir {output_dir} is in use by another run, {file.read() or 'which is just starting'}: "
                                 f"wait for its end, stop it, or give another --output_dir") from None
            time.sleep(0.1)
        except OSError as error:
            print(f"warning: {output_dir} cannot be locked ({error}): take care that no other run writes there", file=sys.stderr)
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    on_exit.callback(file.truncate, 0)


def list_checkpoints(output_dir: str) -> list[int]:
    """Steps of the checkpoints in a folder, newest first."""
    matches = (CHECKPOINT.fullmatch(name) for name in os.listdir(output_dir)) if os.path.isdir(output_dir) else ()
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def holds_run(output_dir: str) -> str:
    """A file or folder by which output_dir is known to hold a run, or ""."""
    if steps := list_checkpoints(output_dir):
        return f"checkpoint-{steps[0]}"
    log = os.path.join(output_dir, "metrics.jsonl")
    return "metrics.jsonl" if os.path.exists(log) and os.path.getsize(log) else ""


def unused_path(path: str) -> str:
    return unused_path(path + "+") if os.path.lexists(path) else path


def find_damage(path: str, world: World, each_node: bool, only_model: bool = False) -> tuple[str | None, bool]:
    """(why a checkpoint cannot be used, or None; whether it is damaged). only_model: weights alone will do. Ranks share the hashing of its files. Raises
    UsageError if it is another version's, which may still need it: it is neither skipped nor, later, replaced."""
    kind, problem, identity = "", "", ""
    try:
        manifest = read_manifest(path)
        identity = manifest["sha256"]
        if manifest["format"] != FORMAT:
            kind, problem = "foreign", f"its format is {show(manifest['format'])}, and this program knows {FORMAT}"
        elif manifest["only_model"] and not only_model:
            kind, problem = "partial", "it holds weights alone (--save_only_model)"
        else:
            check_files(path, manifest, *((world.local_rank, world.local_world_size) if each_node else (world.rank, world.world_size)))
    except UsageError as error:
        kind, problem = "damaged", str(error).removeprefix(path + os.sep)
    reports = world.gather_json([kind, problem, identity])
    for rank, (kind, problem, found) in enumerate(reports):
        if kind == "foreign":
            raise UsageError(f"{path}: {problem}", 3)
        if kind:
            return problem + f" (seen by rank {rank})" * (rank > 0), kind == "damaged"
        if found != reports[0][2] and not each_node:
            return f"rank {rank} sees another checkpoint under that name than rank 0: all need the same folder, or --save_on_each_node", False
    return None, False


def verify(path: str) -> dict:
    """The manifest of a checkpoint that is what was saved. Raises UsageError (exit code 3) that names the file and the reason."""
    manifest = read_manifest(path)
    if manifest["format"] != FORMAT:
        raise UsageError(f"{path}: its format is {show(manifest['format'])}, and this program knows {FORMAT}", 3)
    check_files(path, manifest)
    return manifest


def read_manifest(path: str) -> dict:
    with reading(path, "manifest.json"):
        if not os.path.isdir(path):
            raise UsageError(f"{path}: no such folder", 3)
        if steps := list_checkpoints(path):
            raise UsageError(f"{path}: it is the folder of a run: give a checkpoint in it, such as checkpoint-{steps[0]}", 3)
        manifest = read_json(path, "manifest.json")
        if manifest["sha256"] != checksum(manifest):
            raise ValueError("it is not what was saved: its own checksum is another")
        named = CHECKPOINT.fullmatch(os.path.basename(os.path.abspath(path)))
        if named and int(named[1]) != manifest["step"]:
            raise ValueError(f"it is that of update {show(manifest['step'])}")
        return {key: manifest[key] for key in ("format", "step", "only_model", "torch", "python", "files", "sha256")}


def check_files(path: str, manifest: dict, rank: int = 0, ranks: int = 1) -> None:
    """That a folder has the files of its manifest and no others. Of several ranks each hashes every N-th (of 0 ranks: nobody any)."""
    with reading(path, "manifest.json"):
        expected = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    found = set(os.listdir(path)) - {"manifest.json"}
    for name in sorted(expected.keys() | found):
        with reading(path, name):
            if name not in found or name not in expected:
                raise ValueError("it is missing" if name in expected else "it is not in the manifest")
            info = os.lstat(os.path.join(path, name))
            if not PLAIN_NAME.fullmatch(name) or not stat.S_ISREG(info.st_mode):
                raise ValueError("it is not a plain file with a plain name")
            if info.st_size != expected[name][0]:
                raise ValueError(f"it has {info.st_size:,} bytes, and {expected[name][0]:,} were saved")
    for name in sorted(expected)[rank::ranks] if ranks else []:
        with reading(path, name):
            if describe_file(os.path.join(path, name))["sha256"] != expected[name][1]:
                raise ValueError("its content is not what was saved (SHA-256)")


@contextlib.contextmanager
def reading(path: str, name: str) -> Iterator[None]:
    """Whatever a file that is not what it should be can raise, as one error that names it (exit code 3)."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        what = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        shown = name if PLAIN_NAME.fullmatch(name) else ascii(name)[:100]     # it may hold anything, for a terminal too
        raise UsageError(f"{path}{os.sep}{shown} cannot be used: {what:.1000}", 3) from error


def read_json(folder: str, name: str) -> dict:
    path = os.path.join(folder, name)
    info = os.lstat(path)
    if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_JSON_BYTES:
        raise ValueError(f"it is no plain file of at most {MAX_JSON_BYTES:,} bytes")
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not an object")
    return content


# ---------------------------------------------------------------------------------------------------- status

def write_status(output_dir: str, world: World, **changes) -> None:
    """Tells others how the run is: {"state": "running" | "finished" | "stopped" | "failed", "step", "reason", "exit"}, and until it
    is finished when its job was started, and the number that torchrun gave the job."""
    world.status.update(changes)
    path = os.path.join(output_dir, "status.json")
    if world.is_main:
        with contextlib.suppress(OSError):      # a full disk has been told of already, and must not hide the reason
            with open(path + ".tmp", "w") as file:
                json.dump(world.status, file)
            os.replace(path + ".tmp", path)


def read_status(output_dir: str) -> dict:
    try:
        return read_json(output_dir, "status.json")
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def report_end(output_dir: str, world: World, error: BaseException | None) -> None:
    if isinstance(error, SystemExit):
        write_status(output_dir, world, state="stopped", exit=error.code)
    elif error is not None:
        code = error.exit_code if isinstance(error, UsageError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        write_status(output_dir, world, state="stopped" if code == 130 else "failed", exit=code, reason=f"{type(error).__name__}: {error}")


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
    if not args.trains:
        return state        # nothing goes on
    with reading(path, "args.json"):
        changes = [(f"--{name}", show(old), new, name) for name, old, new, fixed in changed_args(read_json(path, "args.json"), args) if fixed]
    if state.data != data:
        changes.append(("the training data", show(state.data), data, "data"))
        state.data = data
    refused = [change for change in changes if change[3] not in (args.allow_change or "").split(",")]
    if refused:
        raise UsageError(f"{path} is of a run with " + "; ".join(f"{what} {old}, not {new}" for what, old, new, _ in refused)
                         + ": it would go on as a different one. Give what it was trained with, or start a new run; to go on all the "
                         f"same, give --allow_change {','.join(dict.fromkeys(name for *_, name in changes))}")
    return state


def alike(value, ours) -> bool:
    """Whether a value out of a file can be in the place of this run's: numbers for numbers, a number or nothing for nothing."""
    if isinstance(ours, dict):
        return isinstance(value, dict) and value.keys() == ours.keys() and all(alike(value[key], ours[key]) for key in ours)
    if isinstance(ours, (list, str, bool)):
        return type(value) is type(ours) and (not isinstance(ours, list) or all(alike(number, 0.0) for number in value))
    if type(ours) is int:
        return type(value) is int and min(ours, 0) <= value < 2**53
    return ours is value is None or type(value) is float or type(value) is int and abs(value) < 2**53


def show(value) -> str:
    """A value out of a file for a message: it may be of any length, and not printable."""
    return ascii(str(value)[:200])[1:-1]


def load_checkpoint(run: Run, path: str) -> None:
    """Puts weights, optimizer, callbacks and this rank's random generators where the checkpoint left them.

    The flags given now stay as they are; what differs from the checkpoint's is printed. Raises UsageError (exit code 3)
    if the tensors are not those of this run's model and optimizer."""
    load_weights(run, path)
    with reading(path, "state.json"):
        stored = read_json(path, "state.json")
        load_optimizer(run, path, stored["optimizer"])
        run.callbacks.load_states(stored["callbacks"])
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
        if (before := stored["state"]["samples_per_update"]) != run.state.samples_per_update:
            print(f"  samples per update: {before} -> {run.state.samples_per_update}")
        for name, old, new, _ in changed_args(read_json(path, "args.json"), run.args):
            print(f"  --{name}: {show(old)} -> {new}")
    if ranks == run.world.world_size:
        with reading(path, f"rng-{run.world.rank}.json"):
            set_rng_state(read_json(path, f"rng-{run.world.rank}.json"))
    else:
        set_seed(run.args.seed + run.world.rank + run.state.global_step)


def load_weights(run: Run, path: str) -> None:
    """The weights of a checkpoint and, where it has them, their averages: for --ema_decay, or to be evaluated in their place."""
    load_model(run.model, path)
    run.parallel.adopt()
    with PartFiles(path, "ema") as averages, PartFiles(path, "model") as weights:       # without averages they start at the weights
        if run.ema is not None or averages.names and not run.args.trains:
            files = averages if averages.names else weights
            for part in run.parallel.parts if run.ema is None else run.ema.parts:
                with reading(path, files.name):
                    check_state(part.name, files.found[part.name], part)
                    files.fill(part.name, part.start, part.piece.detach())
            if run.ema is None:
                run.parallel.gather()


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
    load_weights(run, path)
    with reading(path, "state.json"):
        stored = read_json(path, "state.json")["optimizer"]
        if stored["evaluates"]:     # a schedule-free one makes the weights to evaluate out of its state
            load_optimizer(run, path, stored)
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


class Stored(NamedTuple):
    """A tensor in a file: elements `start` to `stop` of a flattened parameter, or (stop None) a whole one."""

    start: int
    stop: int | None
    descriptor: int
    position: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class PartFiles(contextlib.ExitStack):
    """The tensors in `stem*.safetensors` of a checkpoint, of which any range of elements can be read by itself, wherever the
    ranks that wrote it had cut. A context: the files are open inside it."""

    def __init__(self, path: str, stem: str):
        super().__init__()
        self.path = path
        self.found: dict[str, list[Stored]] = {}
        self.numbers: dict = {}
        self.names = [name for name in sorted(os.listdir(path)) if re.fullmatch(rf"{stem}(-.*)?\.safetensors", name)]
        self.name = self.names[0] if len(self.names) == 1 else f"{stem}-R.safetensors"      # in messages
        for name in self.names:
            with reading(path, name):
                self.add(os.path.join(path, name))

    def add(self, path: str) -> None:
        descriptor = self.enter_context(opened(path, os.O_RDONLY | os.O_NOFOLLOW))
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if 8 + length > min(size, MAX_JSON_BYTES):
            raise ValueError(f"its header should have {length:,} bytes")
        header = json.loads(os.pread(descriptor, length, 8))
        numbers = json.loads(header.pop("__metadata__", {}).get("numbers", "{}"))
        if not all(type(value) is bool or alike(value, None) for value in numbers.values()):
            raise ValueError("its metadata holds other things than numbers")
        self.numbers |= numbers
        for key, entry in header.items():
            base, first, stop = RANGE.fullmatch(key).groups()
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or end > size - 8 - length \
                    or end - begin != math.prod(shape) * dtype.itemsize or stop and int(stop) - int(first) != math.prod(shape):
                raise ValueError(f"{show(key)} should have shape {show(shape)} in bytes {begin} to {end}")
            self.found.setdefault(base, []).append(Stored(int(first or 0), int(stop) if stop else None, descriptor, 8 + length + begin, dtype, shape))
        places = sorted(entry["data_offsets"] for entry in header.values())
        if [*(begin for begin, _ in places), size - 8 - length] != [0, *(end for _, end in places)]:
            raise ValueError("its tensors overlap or leave gaps")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that was saved whole."""
        return self.found[name][0].shape

    def fill(self, name: str, first: int, target: Tensor) -> None:
        """Reads the elements of the flattened tensor `name` from `first` on into `target`, as many as it has."""
        pieces = sorted(self.found[name], key=lambda stored: stored.start)
        direct = target.device.type == "cpu" and target.is_contiguous() and target.dtype == pieces[0].dtype
        buffer = target if direct else torch.empty(target.shape, dtype=pieces[0].dtype)
        view, at, last = as_bytes(buffer.detach()), first, first + target.numel()
        for start, stop, descriptor, position, dtype, shape in pieces:
            upto = min(last, start + math.prod(shape))
            if start <= at < upto and dtype == buffer.dtype:
                part = view[(at - first) * dtype.itemsize:(upto - first) * dtype.itemsize]
                read_at(descriptor, part, position + (at - start) * dtype.itemsize)
                at = upto
        if at != last:
            raise ValueError(f"elements {at} to {last} of {name} are missing")
        if not direct:
            target.detach().copy_(buffer)

    def read(self, name: str, part: Part) -> Tensor:
        """The state `name` of what a rank holds of a parameter, on the CPU. What was saved whole in another shape than the
        parameter's belongs to it as one, such as a step count."""
        stored = self.found[name][0]
        alone = stored.stop is None and stored.shape != tuple(part.shape)
        tensor = torch.empty(stored.shape if alone else part.piece.shape, dtype=stored.dtype)
        self.fill(name, 0 if alone else part.start, tensor)
        return tensor


def read_at(descriptor: int, target: memoryview, position: int) -> None:
    while len(target):
        count = os.preadv(descriptor, [target[:CHUNK_BYTES]], position)
        if count == 0:
            raise OSError("a file ends too early")
        target, position = target[count:], position + count


def load_model(model: nn.Module, path: str) -> None:
    """Loads the weights of a checkpoint folder into a bare model, each rank its own part; names and shapes must match."""
    weights = model_weights(model)
    with PartFiles(path, "model") as files, reading(path, files.name), torch.no_grad():
        check_tensors(path, {k: tuple(v.shape) for k, v in weights.items()}, {k: files.shape(k) for k in files.found})
        for name, tensor in weights.items():
            local, start = local_part(tensor)
            files.fill(name, start, local)


def load_optimizer(run: Run, path: str, stored: dict) -> None:
    optimizer, held = run.optimizer, run.parallel.parts
    if stored["class"] != type(optimizer).__name__:
        raise UsageError(f"{path} holds the state of {show(stored['class'])}, and this run trains with {type(optimizer).__name__}: give the --optim it was "
                         f"saved with, or start a new run", 3)
    if not alike(stored["evaluates"], True):
        raise ValueError(f"impossible values: evaluates={stored['evaluates']!r:.100}")
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    whole = whole_parameters(optimizer)
    known = {p for group in optimizer.param_groups if group.get("fused") or type(optimizer) in ELEMENTWISE for p in group["params"]}
    states: dict[Tensor, dict] = {}
    with PartFiles(path, "optimizer") as files, reading(path, files.name):
        if not files.names:
            raise ValueError("it is missing")
        names: dict[str, list[str]] = {}     # of what was saved for each parameter
        for name in sorted(files.found.keys() | files.numbers.keys()):
            names.setdefault(name.rpartition(".")[0], []).append(name)
        if unknown := sorted(names.keys() - trained):
            raise ValueError(f"it has states of parameters that this run does not train: {unknown[:10]}")
        for part in held:
            for name in names.get(part.name, ()):
                check_state(name, [] if name in files.numbers else files.found[name], part, part.piece in whole, part.piece in known)
                states.setdefault(part.piece, {})[name.rpartition(".")[2]] = files.numbers[name] if name in files.numbers else files.read(name, part)
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


def check_state(name: str, stored: list[Stored], part: Part, whole: bool = False, known: bool = False) -> None:
    """Raises ValueError if a saved state cannot be that of a parameter. It is like the parameter, or a single number, such as a step
    count; an optimizer that needs the parameter whole may keep others. Of a known one, the numbers have these names. Fused kernels
    rely on that: they would write behind the end of a state that is too small."""
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


def check_tensors(path: str, expected: dict, found: dict) -> None:
    problems = [f"{show(key)}: {show(tuple(found[key])) if key in found else 'missing'} in the file, "
                f"{tuple(expected[key]) if key in expected else 'nothing'} in the model"
                for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UsageError(f"{path}/model.safetensors is of another model; give the model flags it was trained with:\n  "
                         + "\n  ".join(problems[:10]) + more, 3)
