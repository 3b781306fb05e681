"""Checkpoints of the Hugging Face Trainer made from ours, and taken over as ours. Both go on with the next update, to the bit.

    python -m tools.convert to-hf runs/a/checkpoint-500 hf/checkpoint-500        # then trainer.train(resume_from_checkpoint="hf/checkpoint-500")
    python -m tools.convert from-hf hf/checkpoint-500 runs/b --num_samples 8000   # then --output_dir runs/b --resume_from_checkpoint True

A run's folder stands for its newest checkpoint. AdamW and SGD; weights alone (--only_model) of any optimizer. Of a model that is not one of
transformers, the HF Trainer's files do not say which optimizer state belongs to which parameter: give such a folder to
--resume_from_checkpoint of the program that builds the model, which converts it too. Nothing is unpickled, training_args.bin never opened.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from args import TrainArgs
from checkpoint import PLANNED, misfits, model_weights, plain_settings, plan_manifest, tied_names
from loader import Loader
from optim import parameter_groups
from rundir import find_damage, holds_run, verify
from state import TrainState, UsageError, run_main
from storage import PLAIN_NAME, FilePlan, PartFiles, alike, plan_json, plan_tensors, read_json, reading, show, sync, write_file
from tools.formats import read_plan
from tools.inspect import newest
from world import World, print0

OURS = re.compile(r"(model|optimizer|ema|rng)(-.*)?\.(safetensors|json)|model\.safetensors\.index\.json|(state|args|manifest|config)\.json")
BESIDE = re.compile(r"(?!trainer_state|model\.safetensors).*\.(json|txt|jinja|model)")      # configuration and tokenizer in a folder of the HF Trainer
RNG = re.compile(r"rng_state(?:_(\d{1,6}))?\.pth")
REBUILD = np._core.multiarray._reconstruct
NUMPY = [REBUILD, (REBUILD, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, type(np.dtype(np.uint32))]     # a state of NumPy's generator, 1 or 2


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ways = parser.add_subparsers(dest="way", required=True)
    there = ways.add_parser("to-hf", allow_abbrev=False, help="make a checkpoint of the HF Trainer")
    there.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    there.add_argument("folder", help="the folder to be made, best named checkpoint-N as ours")
    there.add_argument("--only_model", action="store_true", help="weights, configuration and tokenizer, without the optimizer and random generators")
    here = ways.add_parser("from-hf", allow_abbrev=False, help="make a run out of a checkpoint of the HF Trainer")
    here.add_argument("folder", help="its checkpoint-N")
    here.add_argument("output_dir", help="of the run to be made")
    here.add_argument("--num_samples", type=int, help="of the training data; needed for a checkpoint from inside of an epoch")
    here.add_argument("--dataloader_drop_last", action="store_true", help="if it was trained so")
    here.add_argument("--allow_change", choices=["weights"], help="load what fits the model by name and shape, and start the rest anew")
    flags = parser.parse_args(argv)
    if flags.way == "to-hf":
        to_hf(newest(flags.checkpoint), flags.folder, flags.only_model)
        print(f"made {flags.folder}" + f"; to go on: trainer.train(resume_from_checkpoint={flags.folder!r}), with the same batch size, accumulation, ranks and data"
              * (not flags.only_model))
    else:
        made = from_hf(flags.folder, flags.output_dir, None, flags.num_samples, flags.dataloader_drop_last, flags.allow_change == "weights")
        print(f"made {made}; to go on: --output_dir {flags.output_dir} --resume_from_checkpoint True")


@contextlib.contextmanager
def making(folder: str) -> Iterator[str]:
    """A new folder to write into, which gets its name when everything in it is on the disk."""
    parent, name = os.path.split(os.path.abspath(folder))
    tmp = os.path.join(parent, f"tmp-{name}")
    for taken in (folder, tmp):
        if os.path.lexists(taken):
            raise UsageError(f"{taken} exists already: give another folder, or move that one away")
    try:
        os.makedirs(tmp)
        yield tmp
        for entry in os.listdir(tmp):
            sync(os.path.join(tmp, entry))
        sync(tmp)
        os.rename(tmp, folder)
        sync(parent)
    except BaseException as error:
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(error, OSError):
            raise UsageError(f"{folder} cannot be written: {error}", 5) from None
        raise


# ---------------------------------------------------------------------------------------------------- to the HF Trainer

def to_hf(path: str, folder: str, only_model: bool = False) -> None:
    """Makes `folder`, a checkpoint of the HF Trainer, out of the checkpoint `path` of any strategy and number of ranks.

    Raises UsageError: exit code 2 if the folder exists or the HF Trainer has no such optimizer or schedule, 3 if `path` is not usable."""
    manifest = verify(path)
    if "adapter_config.json" in manifest["files"]:
        raise UsageError(f"{path} holds adapters, which PEFT's from_pretrained takes as they are: there is nothing to convert")
    with reading(path, "state.json"), making(folder) as tmp:
        stored, args = read_json(path, "state.json"), read_json(path, "args.json")
        if manifest["only_model"] and not only_model:
            print(f"note: {path} holds weights alone (--save_only_model): so does {folder}, and the HF Trainer starts a new optimizer")
        only_model = only_model or manifest["only_model"]
        if not only_model and (problem := find_obstacle(stored, args)):
            raise UsageError(f"{path}: {problem}; give --only_model for the weights alone")
        if any(name.startswith("ema-") for name in manifest["files"]):
            print(f"note: the averaged weights of {path} (--ema_decay) stay behind")
        shapes = write_weights(path, tmp, stored["tied"])
        for name in manifest["files"]:
            if not OURS.fullmatch(name):
                shutil.copyfile(os.path.join(path, name), os.path.join(tmp, name))
        if not only_model:
            write_optimizer(path, tmp, stored, args["learning_rate"], shapes)
            for rank in range(stored["world_size"]):
                name = "rng_state.pth" if stored["world_size"] == 1 else f"rng_state_{rank}.pth"
                torch.save(read_rng(path, rank, stored["world_size"]), os.path.join(tmp, name))
            if stored["scaler"]:
                torch.save(stored["scaler"], os.path.join(tmp, "scaler.pt"))
        progress = trainer_state(path, folder, stored, args)
        with open(os.path.join(tmp, "trainer_state.json"), "w", encoding="utf-8") as file:
            file.write(json.dumps(progress, indent=2, sort_keys=True) + "\n")


def find_obstacle(stored: dict, args: dict) -> str:
    """Why the HF Trainer could not go on from a checkpoint, or ""."""
    state, kind, ranks = stored["state"], stored["optimizer"]["class"], stored["world_size"]
    if kind not in ("AdamW", "SGD"):
        return f"the HF Trainer has no optimizer {show(kind)} of that state"
    if args.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        return "the state of reduce_lr_on_plateau is not converted"
    if stored["planned"]["num_train_epochs"] == sys.maxsize:
        return "its training data is a stream, in which the HF Trainer would not find the place"
    if args.get("train_sampling_strategy") == "group_by_length" and state["samples_seen"]:
        return "it is from inside of an epoch with group_by_length, whose order the HF Trainer draws in another way"
    known = re.match(r"(\d{1,15}) samples", state["data"])
    if known and state["samples_per_update"]:       # the HF Trainer works the place out from the number of updates
        accumulation, last = args["gradient_accumulation_steps"], args["dataloader_drop_last"]
        micro = args["per_device_train_batch_size"] * ranks
        per_epoch, here = (-(-(samples // micro if last else -(-samples // micro)) // accumulation) for samples in (int(known[1]), state["samples_seen"]))
        if state["global_step"] != state["epochs_done"] * per_epoch + here:
            return f"{state['global_step']} updates are not what this batch size makes of the data so far, so the HF Trainer would go on at another sample"
    return ""


def read_whole(files: PartFiles, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=files.found[name][0].dtype)
    files.fill(name, 0, tensor)
    return tensor


def write_weights(path: str, folder: str, tied: dict) -> dict[str, tuple[int, ...]]:
    """Of a transformers model as its class saves them, of any other under all names of each. Returns the shapes by name."""
    with PartFiles(path, "model") as files, reading(path, files.name):
        weights = {name: read_whole(files, name, files.shape(name)) for name in files.found}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    weights |= {other: weights[name] for other, name in tied.items()}
    if not os.path.exists(os.path.join(path, "config.json")):
        from safetensors.torch import save_file
        save_file({name: tensor.clone() if name in tied else tensor for name, tensor in weights.items()},
                  os.path.join(folder, "model.safetensors"), {"format": "pt"})
        return shapes
    with reading(path, "config.json"):
        cls = find_class(path)
        with torch.device("meta"):
            model = cls(cls.config_class.from_pretrained(path))
    with reading(path, "model.safetensors"):
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
    return shapes


def find_class(path: str):
    """The class of transformers that a folder's config.json names."""
    import transformers
    names = read_json(path, "config.json").get("architectures") or [None]
    cls = getattr(transformers, str(names[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise TypeError(f"it names the class {show(names[0])}, which is no model of transformers")
    return cls


def write_optimizer(path: str, folder: str, stored: dict, learning_rate: float, shapes: dict) -> None:
    """optimizer.pt and scheduler.pt. States have numbers there, which count the parameters through the groups."""
    groups, settings, upcoming = stored["optimizer"]["groups"], stored["optimizer"]["settings"], stored["planned"]["learning_rate"]
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
    states: dict[int, dict] = {number: {} for number in numbers.values()}
    with PartFiles(path, "optimizer") as files, reading(path, files.name):
        for full in (*files.found, *files.numbers):
            name, _, key = full.rpartition(".")
            cut = full in files.found and any(piece.stop is not None for piece in files.found[full])
            states[numbers[name]][key] = files.numbers[full] if full in files.numbers else \
                read_whole(files, full, shapes[name] if cut else files.shape(full))
    scales = [group.get("lr_scale", 1.0) for group in settings]
    packed = [{**{key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}, "lr": upcoming * scale,
               "initial_lr": learning_rate * scale, "params": [numbers[name] for name in names]}
              for group, scale, names in zip(settings, scales, groups, strict=True)]
    torch.save({"state": {number: state for number, state in states.items() if state}, "param_groups": packed}, os.path.join(folder, "optimizer.pt"))
    applied = stored["state"]["global_step"] - stored["state"]["skipped_steps"]
    torch.save({"base_lrs": [group["initial_lr"] for group in packed], "last_epoch": applied, "_step_count": applied + 1, "_is_initial": False,
                "_get_lr_called_within_step": False, "_last_lr": [group["lr"] for group in packed], "lr_lambdas": [{} for _ in packed]},
               os.path.join(folder, "scheduler.pt"))


def read_rng(path: str, rank: int, ranks: int) -> dict:
    with reading(path, f"rng-{rank}.json"):
        saved = read_json(path, f"rng-{rank}.json")
        (version, keys, gauss), (name, words, *rest) = saved["python"], saved["numpy"]
        found = {"python": (version, tuple(keys), gauss), "numpy": (name, np.array(words, dtype=np.uint32), *rest),
                 "cpu": torch.frombuffer(bytearray.fromhex(saved["torch"]), dtype=torch.uint8)}
        if saved["cuda"] is not None:       # of several ranks each has a list of the states of all devices, and uses its own one
            cuda = torch.frombuffer(bytearray.fromhex(saved["cuda"]), dtype=torch.uint8)
            found["cuda"] = cuda if ranks == 1 else [cuda] * ranks
        return found


def trainer_state(path: str, folder: str, stored: dict, args: dict) -> dict:
    state, log, rows = stored["state"], os.path.join(os.path.dirname(os.path.abspath(path)), "metrics.jsonl"), []
    if os.path.exists(log):
        with open(log, "rb") as file:
            rows = [json.loads(line) for line in file.read(state["log_bytes"]).splitlines()]
    elif state["log_bytes"]:
        print(f"note: {log} is not there, so log_history is empty")
    best = os.path.join(os.path.dirname(os.path.abspath(folder)), f"checkpoint-{state['best_global_step']}")
    if state["best_global_step"] and best != os.path.abspath(folder) and not os.path.isdir(best):
        print(f"note: {best}, the best update, is not there: best_model_checkpoint is null. Convert it first, to go on with it")
        best = None
    control = dict.fromkeys(("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log"), False)
    callbacks: dict = {"TrainerControl": {"args": control, "attributes": {}}}
    for name, kept in stored["callbacks"]:
        callbacks[name] = kept if name not in callbacks else [*(callbacks[name] if isinstance(callbacks[name], list) else [callbacks[name]]), kept]
    return {**{name: stored["planned"][name] for name in PLANNED},
            **{name: state[name] for name in ("epoch", "global_step", "num_input_tokens_seen", "total_flos", "best_metric")},
            "best_global_step": state["best_global_step"] or None, "best_model_checkpoint": best if state["best_global_step"] else None,
            "train_batch_size": args["per_device_train_batch_size"], "log_history": rows, "stateful_callbacks": callbacks, "trial_name": None,
            "trial_params": None, "is_local_process_zero": True, "is_world_process_zero": True, "is_hyper_param_search": False}


# ---------------------------------------------------------------------------------------------------- from the HF Trainer

def from_hf(folder: str, output_dir: str, model: nn.Module | None = None, num_samples: int | None = None, drop_last: bool = False,
            partly: bool = False) -> str:
    """Takes over `folder`, a checkpoint-N of the HF Trainer, as output_dir/checkpoint-N, with its log, and with the weights of the best
    update if its checkpoint stands beside it. model: the run's bare one, which stays as it is; without one, it is built as config.json
    says. num_samples: of the training data, which gives the place in it. partly: weights that the file lacks, or has in another shape, stay
    those of the model, and have no moments. Returns the path of the checkpoint.

    Raises UsageError: exit code 2 if output_dir holds a run or num_samples is missing or does not fit, 3 if `folder` is not usable."""
    if found := holds_run(output_dir):
        raise UsageError(f"{output_dir} already holds a run ({found}): give a new folder, or go on there by --resume_from_checkpoint True")
    ranks = len([name for name in os.listdir(folder) if RNG.fullmatch(name)]) if os.path.isdir(folder) else 0
    if not ranks:
        raise UsageError(f"{folder} has no rng_state.pth: it is no checkpoint of the HF Trainer, or holds weights alone, and no run can go on from it", 3)
    theirs = read_progress(folder)
    step, best = theirs["global_step"], theirs["best_global_step"]
    best_folder = os.path.join(os.path.dirname(os.path.abspath(folder)), f"checkpoint-{best}")
    best_saved = best if best == step or best and os.path.isdir(best_folder) else 0
    round_size = theirs["train_batch_size"] * ranks
    epochs_done, samples_seen = find_position(theirs, num_samples, round_size, drop_last)
    weights, like, left = read_weights(folder, model, partly)
    applied, base_lr, upcoming = read_schedule(folder, step)
    optimizer, tensors = read_optimizer(folder, like, left)
    log = "".join(json.dumps(row) + "\n" for row in theirs["log_history"]).encode()
    state = TrainState(
        global_step=step, skipped_steps=step - applied, recent_skipped_steps=step - applied, last_logged_step=step, epochs_done=epochs_done,
        samples_seen=samples_seen, total_samples=samples_seen + epochs_done * ((num_samples or 0) - (num_samples or 0) % round_size * drop_last),
        log_bytes=len(log), best_saved_step=best_saved, data="" if num_samples is None else f"{num_samples} samples",
        **{name: theirs[name] for name in ("epoch", "num_input_tokens_seen", "total_flos", "learning_rate", "grad_norm", "best_metric", "best_global_step")})
    content = {"state": state.to_dict(), "optimizer": optimizer, "callbacks": theirs["callbacks"], "scaler": read_scaler(folder), "world_size": ranks,
               "stream": None, "schedule": {}, "tied": tied_names(like), "planned": {**{name: theirs[name] for name in PLANNED}, "learning_rate": upcoming}}
    known = {"taken_over_from": os.path.abspath(folder), "per_device_train_batch_size": theirs["train_batch_size"], "learning_rate": base_lr}
    final = os.path.join(output_dir, f"checkpoint-{step}")
    with making(final) as tmp:
        files = {f"rng-{rank}.json": plan_rng(folder, rank, ranks) for rank in range(ranks)}
        write_checkpoint(folder, tmp, weights, content, known, {**files, "optimizer-0.safetensors": plan_tensors(tensors, numbers="{}")})
        if best_saved not in (0, step):
            with making(os.path.join(output_dir, f"checkpoint-{best}")) as other:
                before = {**content, "state": {**content["state"], "global_step": best, "log_bytes": 0}}
                write_checkpoint(best_folder, other, read_weights(best_folder, model, partly)[0], before, known)
        with open(os.path.join(output_dir, "metrics.jsonl"), "wb") as file:
            file.write(log)
        sync(os.path.join(output_dir, "metrics.jsonl"))
    return final


def take_over(args: TrainArgs, world: World, model: nn.Module, loader: Loader, checkpoint: str) -> str:
    """Makes a checkpoint of ours in output_dir out of one of the HF Trainer, on all ranks; its path."""
    if loader.num_samples is None:
        raise UsageError(f"--resume_from_checkpoint {checkpoint} is of the HF Trainer, and does not tell a place in a stream: train on data with a length")
    name = ""
    with world.writing(args.output_dir):
        if world.writes:
            name = os.path.basename(from_hf(checkpoint, args.output_dir, model, loader.num_samples, args.dataloader_drop_last,
                                            partly="weights" in args.allowed))
    made = os.path.join(args.output_dir, world.gather_json(name)[0])
    print0(world, f"{checkpoint} is of the HF Trainer: taken over as {made}")
    if args.train_sampling_strategy == "group_by_length":
        print0(world, "note: the HF Trainer draws the order of group_by_length in another way; some samples of the epoch under way may come twice, others not")
    problem, _ = find_damage(made, world, args.save_on_each_node)
    if problem is not None:
        raise UsageError(f"{made}: {problem}", 3)
    return made


def read_progress(folder: str) -> dict:
    """trainer_state.json, with what is used of it there and of the right kind; and the "callbacks" as our checkpoints have them."""
    with reading(folder, "trainer_state.json"):
        theirs = read_json(folder, "trainer_state.json")
        found = {name: theirs[name] for name in ("epoch", "global_step", "train_batch_size")}
        found |= {name: theirs.get(name) or 0 for name in (*PLANNED, "num_input_tokens_seen", "total_flos", "best_global_step")}
        found |= {"best_metric": theirs.get("best_metric"), "log_history": theirs.get("log_history") or []}
        last = next((row for row in reversed(found["log_history"]) if "learning_rate" in row), {})
        found |= {"learning_rate": last.get("learning_rate", 0.0), "grad_norm": last.get("grad_norm")}
        like = {**dict.fromkeys(found, 0), "epoch": 0.0, "total_flos": 0.0, "best_metric": None, "learning_rate": 0.0, "grad_norm": None,
                **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), 0.0), "log_history": found["log_history"]}
        wrong = [name for name in found if name not in ("log_history", "num_train_epochs") and not alike(found[name], like[name])]
        if wrong or found["epoch"] < 0 or found["train_batch_size"] < 1 or found["best_global_step"] > found["global_step"]:
            raise ValueError(f"impossible values: {', '.join(wrong) or 'epoch, train_batch_size or best_global_step'}")
        several = {name: kept if isinstance(kept, list) else [kept] for name, kept in (theirs.get("stateful_callbacks") or {}).items()}
        found["callbacks"] = [[name, kept] for name, states in several.items() if name != "TrainerControl" for kept in states if kept.get("attributes")]
        return found


def read_schedule(folder: str, step: int) -> tuple[int, float, float]:
    """(updates that it has made, its peak, the learning rate of the next update)."""
    schedule = load_plain(folder, "scheduler.pt")
    with reading(folder, "scheduler.pt"):
        if "num_bad_epochs" in schedule:
            raise ValueError("it is of reduce_lr_on_plateau, whose state is not taken over")
        applied = schedule["last_epoch"]
        if not alike(applied, 0) or applied > step:
            raise ValueError(f"it has made {show(applied)} of {step} updates")
        return applied, float(schedule["base_lrs"][0]), float(schedule["_last_lr"][0])


def read_scaler(folder: str) -> dict:
    """The loss scale of fp16, if there is one."""
    if not os.path.exists(os.path.join(folder, "scaler.pt")):
        return {}
    scaler = load_plain(folder, "scaler.pt")
    with reading(folder, "scaler.pt"):
        return {str(name): value if isinstance(value, int) else float(value) for name, value in scaler.items()}


def find_position(theirs: dict, num_samples: int | None, round_size: int, drop_last: bool) -> tuple[int, int]:
    """(whole passes over the data, samples seen in the one that is going on). round_size: samples of all ranks in one round of micro-batches."""
    if theirs.get("num_train_epochs") == sys.maxsize:
        raise UsageError("its training data is a stream, in which the HF Trainer's checkpoint gives no place: only data with a length is taken over")
    epochs_done, fraction = int(theirs["epoch"]), theirs["epoch"] % 1
    if not fraction:
        return epochs_done, 0
    if num_samples is None:
        raise UsageError(f"it is from inside of an epoch ({theirs['epoch']}): give --num_samples, the number of samples of the training data")
    rounds = num_samples // round_size if drop_last else -(-num_samples // round_size)
    done = fraction * rounds
    if abs(done - round(done)) > 1e-6:
        raise UsageError(f"epoch {theirs['epoch']} is no whole number of micro-batches: {num_samples} samples are {rounds} rounds of {round_size}, and {done:.6g} "
                         f"of them would be done; give the data that it was trained on")
    return epochs_done, round(done) * round_size


def read_weights(folder: str, model: nn.Module | None, partly: bool = False) -> tuple[dict[str, Tensor], nn.Module, set[str]]:
    """The weights under the names they have in memory, a model that has these names, the run's, if it is given, and (partly) the names of
    weights that are the model's and not the file's."""
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        raise UsageError(f"{folder} holds adapters of PEFT: no run can go on from it, but one can start from them, by --lora_adapter {folder}", 3)
    index = "model.safetensors.index.json"
    if os.path.exists(os.path.join(folder, index)):
        with reading(folder, index):
            for name in {*read_json(folder, index)["weight_map"].values()}:
                if not PLAIN_NAME.fullmatch(name) or not is_plain(os.path.join(folder, name)):
                    raise ValueError(f"it names {show(name)}, which is no file beside it")
    elif not is_plain(os.path.join(folder, "model.safetensors")):
        raise UsageError(f"{folder} has no model.safetensors: other forms of weights are not taken over", 3)
    if hasattr(model, "save_pretrained") or model is None and os.path.exists(os.path.join(folder, "config.json")):
        with reading(folder, "config.json"):
            cls = find_class(folder) if model is None else type(model)
            loaded, info = cls.from_pretrained(folder, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, local_files_only=True)
        problems = [f"{what.replace('_', ' ')}: {', '.join(sorted(show(key) for key in info[what]))}" for what in info if info[what]]
        left = {str(key if isinstance(key, str) else key[0]) for what in ("missing_keys", "mismatched_keys") for key in info[what]}
        if problems and not partly:
            raise UsageError(f"{folder}/model.safetensors is not of this {cls.__name__}: {'; '.join(problems):.1000}", 3)
        weights, model = {name: tensor.detach() for name, tensor in model_weights(loaded).items()}, loaded if model is None else model
    elif model is None:
        raise UsageError(f"{folder} has no config.json: only the program that builds its model knows which state belongs to which parameter; give that one "
                         f"--resume_from_checkpoint {folder}")
    else:
        with PartFiles(folder, "model") as files, reading(folder, files.name):
            weights = {name: read_whole(files, name, files.shape(name)) for name in files.found}
        for other, name in tied_names(model).items():       # the file has one of the names, or both
            if other in weights and not torch.equal(weights[other], weights.setdefault(name, weights[other])):
                raise UsageError(f"{folder}: {other} and {name} are one weight of the model, and two in the file", 3)
            weights.pop(other, None)
        left = {name for name, p in model_weights(model).items() if name not in weights or weights[name].shape != p.shape}
    own = model_weights(model)
    if partly:
        weights = {name: own[name].detach() if name in left else weights[name] for name in own}
    if problems := misfits({name: tuple(p.shape) for name, p in own.items()}, {name: tuple(tensor.shape) for name, tensor in weights.items()}):
        raise UsageError("\n  ".join([f"{folder}/model.safetensors is of another model; --allow_change weights loads what fits:", *problems]), 3)
    return weights, model, left


def is_plain(path: str) -> bool:
    return os.path.isfile(path) and not os.path.islink(path)


def load_plain(folder: str, name: str, safe: list = ()) -> dict:
    """Tensors and plain values of a file of torch.save. safe: what else may be in it."""
    with reading(folder, name):
        if not is_plain(os.path.join(folder, name)):
            raise ValueError("it is missing, or no plain file")
        try:
            with torch.serialization.safe_globals(list(safe)):
                return torch.load(os.path.join(folder, name), map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception:     # noqa: BLE001  a file that was made to do harm may raise anything
            raise ValueError("it is damaged, or holds other things than tensors and plain values, and is not unpickled") from None


def read_optimizer(folder: str, model: nn.Module, left: set[str]) -> tuple[dict, dict[str, Tensor]]:
    """(what state.json tells of an optimizer, its states by "parameter name.state name"). The HF Trainer groups parameters as we do: the
    decayed ones, and the others. Its numbers count them through the groups."""
    packed = load_plain(folder, "optimizer.pt")
    with reading(folder, "optimizer.pt"):
        states, settings, tensors = packed["state"], [plain_settings(group) for group in packed["param_groups"]], {}
        kind = tell_class({key for state in states.values() for key in state}, settings)
        parameters = dict(model.named_parameters())
        name_of = {p: name for name, p in parameters.items()}
        groups = [[name_of[p] for p in group["params"]] for group in parameter_groups(model, 0.0)]
        if (found := [len(group["params"]) for group in packed["param_groups"]]) != (ours := [len(group) for group in groups]):
            raise ValueError(f"its groups have {show(found)} parameters, and those of the model {ours}")
        for names, group in zip(groups, packed["param_groups"]):
            for name, number in zip(names, group["params"]):
                for key, value in states.get(number, {}).items() if name not in left else ():
                    tensors[f"{name}.{key}"] = value = value if isinstance(value, Tensor) else torch.tensor(float(value))
                    if value.shape != (() if key == "step" else parameters[name].shape) or value.layout is not torch.strided:
                        raise ValueError(f"{key} of {name} has shape {tuple(value.shape)}, and the parameter {tuple(parameters[name].shape)}")
    return {"class": kind, "evaluates": False, "extra": None, "groups": groups, "settings": settings}, tensors


def tell_class(keys: set[str], settings: list[dict]) -> str:
    """Which optimizer has states of these names, and such settings of its groups."""
    if keys <= {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} and all("amsgrad" in group and group.get("decoupled_weight_decay", True) for group in settings):
        return "AdamW"
    if keys <= {"momentum_buffer"} and all("nesterov" in group for group in settings):
        return "SGD"
    raise ValueError(f"it is of neither AdamW nor SGD, as its states {show(sorted(keys))} tell: other optimizers are not taken over")


def plan_rng(folder: str, rank: int, ranks: int) -> FilePlan:
    """A rank's random generators, as world.rng_state gives them."""
    name = "rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"
    found = load_plain(folder, name, NUMPY)
    with reading(folder, name):
        kind, words, *rest = found["numpy"]
        cuda = found.get("cuda")
        cuda = cuda[rank % len(cuda)] if isinstance(cuda, list) else cuda       # of several ranks, the list of all devices
        return plan_json({"python": list(found["python"]), "numpy": [kind, words.tolist(), *rest], "torch": found["cpu"].numpy().tobytes().hex(),
                          "cuda": None if cuda is None else cuda.numpy().tobytes().hex()})


def write_checkpoint(folder: str, tmp: str, weights: dict[str, Tensor], content: dict, known: dict, more: dict[str, FilePlan] | None = None) -> None:
    """A checkpoint of ours with configuration and tokenizer of the HF Trainer's. known: of the run's arguments. more: without it, weights alone."""
    files = {name: read_plan(os.path.join(folder, name)) for name in sorted(os.listdir(folder)) if BESIDE.fullmatch(name)}
    files |= {"model.safetensors": plan_tensors(weights), "state.json": plan_json(content), "args.json": plan_json(known), **(more or {})}
    described = {name: write_file(os.path.join(tmp, name), plan) for name, plan in files.items()}
    write_file(os.path.join(tmp, "manifest.json"), plan_manifest(content["state"]["global_step"], more is None, described))


if __name__ == "__main__":
    run_main(main)
