"""Tells what a model is and how it was trained, in a model card, and sends it to the Hugging Face hub.

    python -m tools.publish card runs/a --license apache-2.0        # writes runs/a/README.md, for the newest checkpoint of the run
    python -m tools.publish push runs/a OWNER/NAME --private        # sends that card and the weights, as one commit

A card holds what the run has written down, and nothing else. Read it and add to it: one that was edited is kept, and sent as it is; where
there is none, push writes one. The token is that of `hf auth login`, of HF_TOKEN or in --token_file. Needs huggingface_hub, which came with
the package datasets. Sending has been tested against a stand-in of the hub (tests/hub.py), by Git LFS, and neither against the real one nor
by its newer way of storing, Xet.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import operator
import os
import re
import stat
from collections.abc import Iterator

from rundir import list_checkpoints, verify
from state import UsageError, run_main
from storage import PartFiles, read_json, reading, show
from tools.corpora import PRETRAINED
from tools.inspect import newest

WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
NEEDED = {"config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
          "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
          "chat_template.jinja", "preprocessor_config.json", "processor_config.json"}       # to use a model, beside its weights
HUB_NAME = re.compile(r"[\w-]+(/[\w.-]+)?", re.ASCII)
HUB_METRICS = ("accuracy", "bleu", "cer", "exact_match", "f1", "loss", "mae", "matthews_correlation", "mse", "pearsonr", "perplexity",
               "precision", "recall", "spearmanr", "wer")       # evaluations under these names are what the hub means by them
MARK = re.compile(r"<!-- Written by tools/publish\.py for update (\d+), SHA-256 of the rest ([0-9a-f]{64}): .*? -->\n")
SPEEDS = ("runtime", "per_second")
ADVICE = {401: "the token is not valid, or not any more: log in again with `hf auth login`, or give another one",
          403: "the token may not write there: make one that has write permission for this owner, or give another OWNER/NAME",
          404: "there is no such owner or repository, or the token may not see it: check OWNER/NAME",
          409: "somebody else is changing it: try again", 412: "somebody else has changed it meanwhile: look at it, then try again"}


def main(argv: list[str] | None = None) -> None:
    """Writes the card of a checkpoint and, to push, sends both. Raises UsageError: exit code 1 if the hub cannot be reached or fails, 2 if it
    refuses or the card is a person's, 3 if the checkpoint is damaged, 5 if the card cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parts = parser.add_subparsers(dest="action", required=True)
    card, push_ = (parts.add_parser(name, allow_abbrev=False) for name in ("card", "push"))
    for part in (card, push_):
        part.add_argument("checkpoint", help="folder of a checkpoint, or of a run, for its newest")
        part.add_argument("--best", action="store_true", help="of a run, the best checkpoint instead")
    card.add_argument("--license", help="as the hub names it: apache-2.0, mit, ...")
    card.add_argument("--datasets", nargs="+", default=[], help="names on the hub of its training data (default: the run's --dataset, if it is one)")
    card.add_argument("--tags", nargs="+", default=[], help="more tags")
    card.add_argument("--task", help="as the hub names it, such as text-generation: its results can then be listed there")
    card.add_argument("--overwrite", action="store_true", help="replace a README.md that a person has written")
    push_.add_argument("repository", metavar="OWNER/NAME")
    push_.add_argument("--private", action="store_true", help="make a private repository; refuse to send to a public one")
    push_.add_argument("--token_file", help="file that holds the token (default: the one of `hf auth login`, or HF_TOKEN)")
    push_.add_argument("--revision", default="main", help="branch, made if there is none of this name [%(default)s]")
    push_.add_argument("--everything", action="store_true", help="the whole checkpoint, to go on training; its args.json tells your paths")
    push_.add_argument("--overwrite", action="store_true", help="add to a repository that holds files, and replace those of the same name")
    flags = parser.parse_args(argv)
    token = read_token(flags.token_file) if flags.action == "push" else None        # before the work of hashing
    path = choose(flags.checkpoint, flags.best)
    manifest, output_dir = verify(path), os.path.dirname(os.path.abspath(path))
    readme, written = os.path.join(output_dir, "README.md"), read_text(output_dir, "README.md")
    mark = MARK.search(written)
    if token is None and written and not flags.overwrite and (mark is None or digest(written.replace(mark[0], "", 1)) != mark[2]):
        raise UsageError(f"{readme} was written or edited by a person, and stays: move it away, or give --overwrite to replace it")
    if token is not None and mark is not None and mark[1] != str(manifest["step"]):
        raise UsageError(f"{readme} is the card of update {mark[1]}, and {path} is another: write its card first (or, if you did so by hand, remove "
                         f"the comment that says update {mark[1]})")
    if token is None or not written:
        write_card(readme, manifest["step"], *build_card(path, manifest, flags if token is None else card.parse_args([path])))
        print(f"{readme}: the card of {path}")
    if token is not None:
        push(path, readme, flags, token)


def choose(path: str, best: bool) -> str:
    """The checkpoint that is meant."""
    steps = list_checkpoints(path)
    chosen = newest(path)
    if best:
        with reading(chosen, "state.json"):
            step = read_json(chosen, "state.json")["state"]["best_saved_step"]
        if step not in steps:
            raise UsageError(f"--best: {path} is no run that has a checkpoint of its best update; leave it away for the newest", 3)
        chosen = os.path.join(path, f"checkpoint-{step}")
    return chosen


def read_text(folder: str, name: str) -> str:
    """A file, or "" if there is none. A link is refused: a stranger's could lead to what must not be sent."""
    path = os.path.join(folder, name)
    with reading(folder, name):
        if not os.path.lexists(path):
            return ""
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ValueError("it is not a plain file")
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_card(readme: str, step: int, front: str, text: str) -> None:
    """front: what the hub reads, which has to come first; then the mark by which an edited card is known, and that of another checkpoint."""
    mark = f"<!-- Written by tools/publish.py for update {step:d}, SHA-256 of the rest {digest(front + text)}: an edited card is kept. -->\n"
    try:
        with open(readme + ".tmp", "w", encoding="utf-8", newline="") as file:
            file.write(front + mark + text)
        os.replace(readme + ".tmp", readme)
    except OSError as error:
        raise UsageError(f"{readme} cannot be written: {error}", 5) from None


def build_card(path: str, manifest: dict, flags: argparse.Namespace) -> tuple[str, str]:
    """The YAML for the hub, and the text. What files say may be a stranger's, so it is escaped."""
    (output_dir, name), held = os.path.split(os.path.abspath(path)), os.listdir(path)
    with reading(path, "state.json"):
        stored = read_json(path, "state.json")
        state, ranks, optimizer = stored["state"], operator.index(stored["world_size"]), stored["optimizer"]
        step, epoch = operator.index(manifest["step"]), cell(state["epoch"])
    with reading(path, "args.json"):
        args = read_json(path, "args.json")
        if "taken_over_from" in args:
            raise UsageError(f"{path} was taken over from another trainer, which does not tell how it was trained: train on, and give a later checkpoint", 3)
        settings, averaged = hyperparameters(args, ranks, optimizer["class"]), args["ema_decay"] is not None or optimizer["evaluates"]
        base, data, held_out = map(hub_name, (args.get("model_name_or_path"), args["dataset"], args["eval_dataset"]))
    datasets = flags.datasets or [data] * bool(data)
    tested_on = held_out if args["eval_dataset"] else datasets[0] if datasets else None
    library = "peft" if "adapter_config.json" in held else "transformers" if "config.json" in held else "pytorch"
    rows, results = read_history(output_dir, step), read_results(output_dir, name, state, args)
    figures = {} if averaged else (rows[-1] if rows and rows[-1]["step"] == step else {}) | results     # of these weights
    origin = f" from [{cell(base)}](https://huggingface.co/{base})" if base else ""
    used = {"transformers": "config.json" in held, "peft": library == "peft", "datasets": args["dataset"] is not None}
    lines = [f"# {cell(os.path.basename(output_dir))}", "",
             f"A model of {count_parameters(path, library == 'peft')}, as it was after update {step:,}, epoch {epoch}, of its training{origin}."
             + " It was evaluated with averaged weights, which are not these: the checkpoint keeps them by themselves." * averaged, "",
             "## Training procedure", "", "### Training hyperparameters", "", *(f"- {key}: {value}" for key, value in settings.items()), "",
             "### Training results", "", *table(rows), "", *(f"- {cell(key)}: {cell(results[key])}" for key in sorted(results)), *[""] * bool(results),
             "### Framework versions", "", f"- PyTorch {cell(manifest['torch'])}", f"- Python {cell(manifest['python'])}",
             *(f"- {package} {importlib.metadata.version(package)}, where this card was written" for package in used
               if used[package] and importlib.util.find_spec(package))]
    front = metadata(library, base, datasets, tested_on, figures, os.path.basename(output_dir), flags)
    return f"---\n{front}\n---\n", "\n".join(["", *lines, ""])


def metadata(library: str, base: str | None, datasets: list[str], tested_on: str | None, figures: dict, name: str, flags) -> str:
    """The YAML. The hub takes results only with the task and the data set that they are of."""
    from huggingface_hub import EvalResult, ModelCardData
    values = {key: figures.get(f"eval_{key}") for key in HUB_METRICS}
    values = {key: value for key, value in values.items() if isinstance(value, (int, float)) and abs(value) < math.inf}
    results = [EvalResult(flags.task, tested_on, tested_on, key, value) for key, value in values.items()] if flags.task and tested_on else []
    return ModelCardData(library_name=library, license=flags.license, pipeline_tag=flags.task, tags=["generated_from_trainer", *flags.tags],
                         base_model=base, datasets=datasets or None, metrics=[key for key in values if key != "loss"] or None,
                         model_name=show(name) if results else None, eval_results=results or None).to_yaml()


def hub_name(value) -> str | None:
    """What can only be a name on the hub: a path or a package tells about this machine, and nothing to others."""
    return value if value and value not in PRETRAINED and HUB_NAME.fullmatch(value) and not os.path.splitext(value)[1] and not os.path.exists(value) else None


def hyperparameters(args: dict, ranks: int, optimizer: str) -> dict[str, str]:
    """Those that the cards of the HF Trainer list, under their names, and what else tells one run from another."""
    train, evaluation, windows = (operator.index(args[name]) for name in (
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"))
    kind, about = args["optim"], f"{cell(args['optim'])} ({cell(optimizer)})"
    if kind.startswith(("adamw", "muon", "lion")):
        about += f" with betas=({cell(args['adam_beta1'])},{cell(args['adam_beta2'])})"
        about += f" and epsilon={cell(args['adam_epsilon'])}" * (kind != "lion")
    about += f" and optimizer_args={cell(args['optim_args'])}" if args["optim_args"] else ""
    found = {"learning_rate": args["learning_rate"], "train_batch_size": train, "eval_batch_size": evaluation, "seed": args["seed"],
             "strategy": args["strategy"], "num_devices": ranks, "gradient_accumulation_steps": windows,
             "total_train_batch_size": train * ranks * windows, "total_eval_batch_size": evaluation * ranks, "optimizer": "",
             **{name: args[name] for name in ("weight_decay", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs")},
             "lr_scheduler_warmup_steps": args["warmup_steps"],
             **({"training_steps": args["max_steps"]} if args["max_steps"] > 0 else {"num_epochs": args["num_train_epochs"]}),
             "mixed_precision_training": "fp16" if args["fp16"] else "bf16" if args["bf16"] else None,
             **{name: args[name] or None for name in ("label_smoothing_factor", "neftune_noise_alpha", "ema_decay")},
             **{name: args.get(name) for name in (("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "lora_bias",
                                                   "use_rslora", "lora_base") if args.get("lora_rank") else ())}}
    ours = kind.partition("_")[0] in optimizer.lower()      # else the program has brought another one, and --optim says nothing
    return {key: cell(value) for key, value in found.items() if value is not None} | {"optimizer": about if ours else cell(optimizer)}


def count_parameters(path: str, adapter: bool) -> str:
    """Told by the headers of its files."""
    with PartFiles(path, "adapter_model" if adapter else "model") as files, reading(path, files.name):
        types = ", ".join(sorted({str(pieces[0].dtype).removeprefix("torch.") for pieces in files.found.values()}))
        return f"{sum(math.prod(files.shape(name)) for name in files.found):,} parameters{' in its adapter' * adapter} ({types})"


def read_history(output_dir: str, last: int) -> list[dict]:
    """A row for each update up to `last` after which training evaluated, with the loss logged before; without any, the last loss."""
    logged, rows = {"Training Loss": "No log"}, {}
    with reading(output_dir, "metrics.jsonl"):
        for row in map(json.loads, read_text(output_dir, "metrics.jsonl").split("\n")[:-1]):
            if row["step"] > last or "train_loss" in row:       # what comes behind is of the end: *_results.json
                break
            place = {"epoch": row["epoch"], "step": operator.index(row["step"])}
            if "loss" in row:
                logged = {"Training Loss": row["loss"], **place}
            if found := {key: value for key, value in row.items() if key.startswith("eval_") and not key.endswith(SPEEDS)}:
                rows[row["step"]] = rows.get(row["step"], logged | place) | found
    return list(rows.values()) or [logged] * ("step" in logged)


def read_results(output_dir: str, name: str, state: dict, args: dict) -> dict:
    """What *_results.json say, if the weights that the run ended with are those of this checkpoint."""
    newest = f"checkpoint-{max(list_checkpoints(output_dir), default=0)}"
    if name != (f"checkpoint-{state['best_saved_step']}" if args["load_best_model_at_end"] else newest):
        return {}
    found: dict = {}
    with reading(output_dir, newest):
        epochs = state["epoch"], read_json(os.path.join(output_dir, newest), "state.json")["state"]["epoch"]
    for file in ("train_results.json", "eval_results.json", "test_results.json"):
        with reading(output_dir, file):
            content = json.loads(read_text(output_dir, file) or "{}")
            found |= {key: content[key] for key in content if key != "epoch" and not key.endswith(SPEEDS)} if content.get("epoch") in epochs else {}
    return found


def table(rows: list[dict]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    titles = ["Validation Loss" if name == "eval_loss" else " ".join(part[:1].upper() + part[1:] for part in name.removeprefix("eval_").split("_"))
              for name in names]
    lines = [[cell(title) for title in titles], [":---:"] * len(names), *([cell(row.get(name, "")) for name in names] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines] if rows else ["Nothing was logged."]


def cell(value) -> str:
    """A number to six digits; else text in which nothing is Markdown or HTML."""
    if isinstance(value, (int, float)):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    return re.sub(r"([\\`*_\[\]<>|&~$!])", r"\\\1", show(value))


def push(path: str, readme: str, flags: argparse.Namespace, token: str) -> None:
    """Sends a verified checkpoint and its card, as one commit on top of what was looked at. Raises UsageError if that has other files."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    files = {name: os.path.join(path, name) for name in sorted(os.listdir(path)) if flags.everything or name in NEEDED or WEIGHTS.fullmatch(name)}
    files["README.md"], repository, api = readme, flags.repository, HfApi(token=token)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise UsageError(f"{show(repository)}: expected OWNER/NAME, the name of a repository on the hub")
    with explaining(repository):
        api.create_repo(repository, private=flags.private or None, exist_ok=True)
        if flags.revision != "main":
            api.create_branch(repository, branch=flags.revision, exist_ok=True)
        before = api.model_info(repository, revision=flags.revision)
        there = {file.rfilename for file in before.siblings or ()} - {".gitattributes"}
        if flags.private and not before.private:
            raise UsageError(f"{repository} is public: make it private in its settings on the hub, leave --private away, or give another name")
        if there and not flags.overwrite:
            raise UsageError(f"{repository} holds {len(there):,} files already ({show(', '.join(sorted(there)))}): give another OWNER/NAME, or "
                             f"--overwrite to replace those of the same name, by a commit on top of them")
        stale = sorted(name for name in there - files.keys() if WEIGHTS.fullmatch(name))        # of other files, they would be loaded together
        changes = [*(CommitOperationAdd(name, file) for name, file in files.items()), *(CommitOperationDelete(name) for name in stale)]
        commit = api.create_commit(repository, changes, commit_message=f"Add {os.path.basename(os.path.abspath(path))}", revision=flags.revision,
                                   parent_commit=before.sha)
        missing = files.keys() - {file.rfilename for file in api.model_info(repository, revision=commit.oid).siblings or ()}
        if missing:
            raise UsageError(f"{repository} has not taken {', '.join(sorted(missing))}: does its .gitignore name them?")
    print(f"{commit.commit_url}: {', '.join(sorted(files))}" + f"; removed {show(', '.join(stale))}" * bool(stale))


def read_token(path: str | None) -> str:
    """The token, which nothing here shows or keeps."""
    from huggingface_hub import get_token
    try:
        token = get_token() if path is None else open(path, encoding="utf-8").read().strip()      # noqa: SIM115
    except (OSError, ValueError) as error:
        raise UsageError(f"--token_file {path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    if not token:
        raise UsageError(f"no token{f' in {path}' if path else ''}: log in with `hf auth login`, set HF_TOKEN, or give a --token_file that holds one")
    if not re.fullmatch(r"[!-~]+", token):
        raise UsageError("the token holds a space, a line break or a letter that none has: give the file or variable that token alone")
    return token


@contextlib.contextmanager
def explaining(repository: str) -> Iterator[None]:
    """What the hub or the way to it can raise, as one error that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
    try:
        yield
    except UsageError:
        raise
    except OfflineModeIsEnabled:
        raise UsageError(f"{repository} cannot be reached: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it to send something") from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error     # of one of several uploads
        if not isinstance(cause, HfHubHTTPError):
            raise UsageError(f"{repository}: sending failed ({type(cause).__name__}: {show(cause)}); check the network and OWNER/NAME, then try "
                             f"again", 1) from None
        code, said = cause.response.status_code, f", {show(cause.server_message)}" if cause.server_message else ""
        advice = ADVICE.get(code, "try again later, or see status.huggingface.co")
        raise UsageError(f"{repository}: the hub answers {code}{said}: {advice}", 2 if code in ADVICE else 1) from None


if __name__ == "__main__":
    run_main(main)
