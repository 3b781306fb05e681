"""The folder of a run, output_dir: who may write there, which checkpoints in it are complete, and how the run is.

Beside the checkpoints it has metrics.jsonl (callbacks.py), status.json, which says how the run is or how it ended, and .lock, which
a run holds while it lives.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import time

from state import UsageError
from storage import PLAIN_NAME, describe_file, read_json, reading, replace_json, show
from world import World

FORMAT = 6     # of the folder, in its manifest; up to 5 the built-in model had the rows of qkv.weight in another order
LOCK_WAIT_S = 5                 # for a run that was killed a moment ago to be gone
CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")


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
        if path == wanted and world.gather_json(is_of_hf_trainer(path))[0]:
            if not args.trains:
                raise UsageError(f"{path} is of the HF Trainer: to evaluate it, first make a run of it, "
                                 f"python -m tools.convert from-hf {path} DIR", 3)
            break       # train.assemble takes it over, when it knows model and data
        problem, is_damaged = find_damage(path, world, args.save_on_each_node, only_model=not args.trains)
        if problem is None:
            with world.writing(output_dir):
                if world.writes:
                    os.makedirs(output_dir, exist_ok=True)
                    for old in filter(os.path.lexists, damaged):
                        new = os.path.join(output_dir, f"damaged-{os.path.basename(old)}")
                        while os.path.lexists(new):
                            new += "+"
                        os.rename(old, new)
            break
        if path == wanted and not restarted:
            raise UsageError(f"--resume_from_checkpoint {wanted}: {problem}", 3)
        if not args.trains:     # an older one would have other results
            raise UsageError(f"{path} cannot be evaluated: {problem}", 3)
        if world.is_main:
            print(f"warning: {path} is skipped: {problem}", file=sys.stderr)
        damaged += [path] if is_damaged else []
    else:
        path = None
        if not args.trains:
            best = " of a best update" * args.load_best_model_at_end
            raise UsageError(f"--do_eval and --do_predict alone use a checkpoint, and there is none{best} in {output_dir}: "
                             f"give --resume_from_checkpoint PATH, or --do_train to train first", 3)
        if candidates or (wanted or "").lower() == "true":
            raise UsageError(f"--resume_from_checkpoint {wanted}: no {'complete ' if candidates else ''}checkpoint in {output_dir}; "
                             f"give the path of one, or start a new run in another --output_dir", 3)
    if args.trains:
        write_status(output_dir, world, job=job)
    return path


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


def is_of_hf_trainer(path: str) -> bool:
    """Whether a folder is a checkpoint of the Hugging Face Trainer."""
    return os.path.isfile(os.path.join(path, "trainer_state.json")) and not os.path.lexists(os.path.join(path, "manifest.json"))


def find_damage(path: str, world: World, each_node: bool, only_model: bool = False) -> tuple[str | None, bool]:
    """(why a checkpoint cannot be used, or None; whether it is damaged). only_model: weights alone will do. Ranks share the hashing of its
    files. Raises UsageError if it is another version's, which may still need it: it is neither skipped nor, later, replaced."""
    kind = problem = identity = ""
    rank, ranks = (world.local_rank, world.local_world_size) if each_node else (world.rank, world.world_size)
    try:
        manifest = read_manifest(path)
        identity = manifest["sha256"]
        if manifest["format"] != FORMAT:
            kind, problem = "foreign", f"its format is {show(manifest['format'])}, and this program knows {FORMAT}"
        elif manifest["only_model"] and not only_model:
            kind, problem = "partial", "it holds weights alone (--save_only_model)"
        else:
            check_files(path, manifest, rank, ranks)
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
        if not os.path.lexists(os.path.join(path, "manifest.json")):
            theirs = "; a model of transformers is for recipes such as recipes/finetune_lm.py" * os.path.exists(os.path.join(path, "config.json"))
            raise UsageError(f"{path}{os.sep}manifest.json is missing: it is no complete checkpoint of this trainer{theirs}", 3)
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
    (os.unlink if os.path.islink(path) else shutil.rmtree)(path)


def write_status(output_dir: str, world: World, **changes) -> None:
    """Tells others how the run is: {"state": "running" | "finished" | "stopped" | "failed", "step", "reason", "exit"}, and until it
    is finished when its job was started, and the number that torchrun gave the job."""
    world.status.update(changes)
    if world.is_main:
        with contextlib.suppress(OSError):      # a full disk has been told of already, and must not hide the reason
            replace_json(os.path.join(output_dir, "status.json"), world.status)


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
