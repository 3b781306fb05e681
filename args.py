"""All flags in one flat dataclass. A flag is spelled like its attribute, so grep finds both.

Names, defaults and meanings are those of the Hugging Face Trainer (v5) where it has the flag. To add a flag, add a line.
"""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from state import UsageError


def arg(default, help: str, low: float | None = None, high: float | None = None, fixed: bool = False):
    """A field with its help text and, for numbers, the closed range of values that make sense. fixed: a resumed run would go on as
    another one with another value, so that is refused."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "fixed": fixed})


@dataclasses.dataclass
class TrainArgs:
    """Every setting of a run; saved in each checkpoint. `check_args` says what is wrong with one."""

    # -- where the run lives
    output_dir: str = arg("trainer_output", "folder of the run: checkpoints and metrics.jsonl")
    resume_from_checkpoint: str | None = arg(None, "True: newest checkpoint in output_dir, which must exist; auto: newest if there is one,"
                                             " else start; or the path of a checkpoint")
    allow_change: str | None = arg(None, "what may differ from the resumed run all the same, with commas: names of flags, data, or weights"
                                    " (load those that fit the model by name and shape)")
    seed: int = arg(42, "seed of weights, dropout and data order", 0, 2**31 - 1, fixed=True)
    data_seed: int | None = arg(None, "seed of the data order alone (default: seed)", 0, 2**31 - 1, fixed=True)
    max_time: str | None = arg(None, "HH:MM:SS, counted once the ranks have met, before which the run saves and stops (exit code 75)")
    do_train: bool | None = arg(None, "train (default: unless do_eval or do_predict is given)")
    do_eval: bool = arg(False, "evaluate on the held-out data, at the end of training or without training a checkpoint of output_dir"
                        " (the best with load_best_model_at_end, else the newest) or the one of resume_from_checkpoint")
    do_predict: bool = arg(False, "the same, and write the predictions for --test_dataset or the held-out data to test_predictions.npy")
    full_determinism: bool = arg(False, "only deterministic kernels; an operation without one is an error")
    use_cpu: bool = arg(False, "train on the CPU even where there is an accelerator")
    # -- data
    dataset: str | None = arg(None, "text, JSON, CSV or Parquet files (comma-separated, globs allowed) or a data set name;"
                              " default: the source code of Python's standard library")
    dataset_config_name: str | None = arg(None, "configuration of a named data set")
    eval_dataset: str | None = arg(None, "files or name of the held-out data (default: 5%% of the blocks of --dataset)")
    test_dataset: str | None = arg(None, "files or name of the data of do_predict (default: the held-out data)")
    text_column: str = arg("text", "column that holds the text of JSON, CSV, Parquet and named data sets")
    streaming: bool = arg(False, "read --dataset lazily, in its own order; needs --max_steps")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = arg(
        "random", "order of an epoch: shuffled, that of the data, or shuffled with samples of like length together; a stream has its own", fixed=True)
    dataloader_drop_last: bool = arg(False, "leave out the last incomplete round of micro-batches of an epoch")
    dataloader_num_workers: int = arg(0, "processes per rank that fetch and collate samples ahead of training", 0, 10_000)
    dataloader_prefetch_factor: int | None = arg(None, "micro-batches that each of them prepares ahead (default: 2)", 1, 10**6)
    dataloader_persistent_workers: bool = arg(False, "keep them from epoch to epoch")
    dataloader_pin_memory: bool = arg(True, "put micro-batches for a GPU into pinned memory")
    remove_unused_columns: bool = arg(True, "leave out columns of a data set of the package datasets that the model does not take")
    label_names: str | None = arg(None, "columns that are labels, with commas (default: labels, or start_positions,end_positions)")
    # -- model (model.py)
    n_layer: int = arg(4, "transformer blocks", 1, 1000, fixed=True)
    n_head: int = arg(4, "attention heads per block", 1, 1000, fixed=True)
    n_embd: int = arg(128, "width of the model; a multiple of 2 * n_head", 1, 1_000_000, fixed=True)
    block_size: int = arg(128, "tokens per training sample", 1, 100_000_000, fixed=True)
    vocab_size: int = arg(256, "distinct tokens; the built-in data is bytes", 2, 100_000_000, fixed=True)
    dropout: float = arg(0.0, "probability of dropping an activation while training", 0, 0.999)
    n_experts: int = arg(0, "experts in place of each block's MLP, some of which a router chooses for each token (0: an MLP as it is)", 0, 100_000, fixed=True)
    experts_per_token: int = arg(2, "how many of them", 1, 100_000, fixed=True)
    balance_loss_weight: float = arg(0.01, "weight of the loss that keeps experts equally busy while training", 0, 1e6)
    model_name_or_path: str | None = arg(None, "start from these weights: a checkpoint of the built-in model, or in recipes that fine-tune a"
                                         " transformers model, a folder or a name of the hub", fixed=True)
    # -- adapters (adapters.py)
    lora_rank: int | None = arg(None, "train only low-rank adapters (LoRA) of this rank, on a frozen model", 1, 100_000, fixed=True)
    lora_alpha: float | None = arg(None, "their updates are scaled by alpha / rank (default: lora_rank)", 1e-6, 1e6, fixed=True)
    lora_dropout: float = arg(0.0, "probability of dropping an input of an adapter while training", 0, 0.999)
    lora_target_modules: str | None = arg(None, "linear layers that get one: ends of their names, with commas, or a regular expression"
                                          " of whole names (default: those inside numbered layers)", fixed=True)
    lora_modules_to_save: str | None = arg(None, "ends of names of modules that are trained as a whole and saved with the adapters", fixed=True)
    lora_bias: Literal["none", "all", "lora_only"] = arg("none", "biases to train: none, all, or those of layers with adapters", fixed=True)
    use_rslora: bool = arg(False, "scale by alpha / sqrt(rank) instead", fixed=True)
    lora_adapter: str | None = arg(None, "start from an adapter in PEFT's format, with its settings; a folder", fixed=True)
    lora_base: Literal["float", "nf4", "int8"] = arg("float", "keep the frozen weights of layers with adapters in 4 or 8 bits (QLoRA); needs torchao", fixed=True)
    # -- how long and how much at a time
    num_train_epochs: float = arg(3.0, "passes over the data; fractions allowed", 0, 1e9)
    max_steps: int = arg(-1, "updates to train for; above 0 it overrides num_train_epochs", -1, 10**12)
    per_device_train_batch_size: int = arg(8, "samples per rank per forward pass (one micro-batch)", 1, 10**8)
    per_device_eval_batch_size: int = arg(8, "samples per rank per forward pass of evaluation", 1, 10**8)
    gradient_accumulation_steps: int = arg(1, "micro-batches per rank per update (one window)", 1, 10**8)
    # -- the update
    learning_rate: float = arg(5e-5, "peak learning rate", 0, 1e6)
    optim: Literal["adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "lion", "muon"] = arg("adamw_torch_fused", "optimizer")
    optim_args: str | None = arg(None, "the optimizer's own settings, as momentum=0.9,nesterov=True")
    weight_decay: float = arg(0.0, "weight decay; biases and norms have none", 0, 1e6)
    adam_beta1: float = arg(0.9, "decay of AdamW's first moment", 0, 0.999999999)
    adam_beta2: float = arg(0.999, "decay of AdamW's second moment", 0, 0.999999999)
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon", 0, 1e6)
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this global norm (0: measured only)", 0, 1e12)
    lr_scheduler_type: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
                               "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
                               "warmup_stable_decay"] = arg("linear", "shape of the learning rate")
    lr_scheduler_kwargs: dict | None = arg(None, "the schedule's own settings as JSON, as {\"num_cycles\": 2}")   # noqa: RUF009
    warmup_steps: float = arg(0, "updates of linear warm-up; below 1: the ratio of all updates", 0, 10**12)
    label_smoothing_factor: float = arg(0.0, "weight of a uniform target in the loss", 0, 0.999)
    neftune_noise_alpha: float | None = arg(None, "noise on the embeddings while training, NEFTune's alpha", 0, 1e6)
    ema_decay: float | None = arg(None, "evaluate and save an average of the weights with this decay too", 0, 0.9999999)
    on_nonfinite: Literal["stop", "skip"] = arg("stop", "what to do about an update with a NaN or infinite loss or gradient;"
                                                " it is never applied (running statistics of BatchNorm excepted)")
    max_nonfinite: int = arg(10, "with --on_nonfinite skip: leave out at most this many in a row", 1, 10**9)
    # -- precision, memory and speed
    fp16: bool = arg(False, "compute in float16 with a scaled loss")
    bf16: bool = arg(False, "compute in bfloat16")
    tf32: bool | None = arg(None, "multiply float32 matrices in TF32 on NVIDIA GPUs (default: torch's setting)")
    fp16_full_eval: bool = arg(False, "cast the weights to float16 for evaluations called outside training")
    bf16_full_eval: bool = arg(False, "cast the weights to bfloat16 for evaluations called outside training")
    activation_checkpointing: bool = arg(False, "keep only each block's input and compute it again in backward")
    torch_compile: bool = arg(False, "compile the model")
    torch_compile_backend: str | None = arg(None, "backend of torch.compile (default: inductor)")
    torch_compile_mode: str | None = arg(None, "mode of torch.compile, as max-autotune")
    # -- ranks (distributed.py, zero.py, parallel/)
    strategy: Literal["ddp", "zero1", "zero2", "fsdp", "hsdp"] = arg("ddp", "split over ranks: nothing, the optimizer's state, gradients"
                                                                     " too, weights too, weights within groups of ranks")
    accumulate_unsharded: bool = arg(False, "zero2, fsdp, hsdp: reduce gradients once per window; each rank then adds up whole ones")
    reshard_after_forward: bool = arg(True, "fsdp, hsdp: let a block's weights go after forward and gather them again for backward")
    hsdp_shard_size: int | None = arg(None, "hsdp: neighbouring ranks that share one copy of the model (default: those of a host)", 1, 10**6)
    fsdp_transformer_layer_cls_to_wrap: str | None = arg(None, "fsdp, hsdp: classes, with commas, whose weights are gathered at a time"
                                                         " (default: model.blocks, or what a transformers model names)")
    ep: int = arg(1, "expert parallel: neighbouring ranks that share the experts of each layer out among them", 1, 100_000)
    cpu_offload: bool = arg(False, "keep the optimizer's state on the CPU and update there; with fsdp and hsdp weights and gradients too")
    cp: int = arg(1, "context parallel: ranks that share the sequences of a micro-batch, each with a part of every one (parallel/context.py)", 1, 100_000)
    tp: int = arg(1, "tensor parallel: ranks that share the layers, each with a part of every weight (parallel/tensor.py); ddp, fsdp", 1, 100_000)
    pp: int = arg(1, "pipeline parallel: stages of consecutive blocks that the model is cut into, one per rank (parallel/pipeline.py)", 1, 100_000)
    pp_schedule: Literal["1f1b", "gpipe"] = arg("1f1b", "pp: backward of a micro-batch as soon as it can be, or after all forwards")
    ddp_bucket_cap_mb: float = arg(25.0, "ddp, zero1, zero2: megabytes of gradients that are reduced at a time", 0.001, 1e6)
    ddp_find_unused_parameters: bool = arg(True, "ddp, zero1, zero2: allow parameters that the loss does not use; False: an error names them")
    ddp_timeout: int = arg(1800, "seconds that a rank waits for the others before it gives up", 1, 10**9)
    check_replicas: int = arg(0, "updates between checks that ranks still hold the same weights (0: none)", 0, 10**12)
    # -- log, evaluate, save
    logging_strategy: Literal["no", "steps", "epoch"] = arg("steps", "when to log")
    logging_steps: float = arg(500, "updates between logs; below 1: the ratio of all updates", 0, 10**12)
    logging_first_step: bool = arg(False, "log the first update too")
    eval_strategy: Literal["no", "steps", "epoch"] = arg("no", "when to evaluate on the held-out data")
    eval_steps: float | None = arg(None, "updates between evaluations (default: logging_steps)", 0, 10**12)
    eval_delay: float = arg(0, "no evaluation before this many updates or epochs, by eval_strategy", 0, 10**12)
    eval_on_start: bool = arg(False, "evaluate once before training")
    eval_accumulation_steps: int | None = arg(None, "micro-batches whose predictions wait on the device before the host takes them (default: 1)", 1, 10**9)
    metric_for_best_model: str | None = arg(None, "metric of evaluations by which the best update is known (default: loss, where one is needed)")
    greater_is_better: bool | None = arg(None, "whether more of it is better (default: unless its name ends in loss)")
    load_best_model_at_end: bool = arg(False, "after training, put the weights of the best update that was saved into the model")
    early_stopping_patience: int | None = arg(None, "stop when this many evaluations in a row are no better than the best", 1, 10**9)
    early_stopping_threshold: float = arg(0.0, "by how much an evaluation has to be better, to count", 0, 1e12)
    save_strategy: Literal["no", "steps", "epoch", "best"] = arg("steps", "when to save; the last update is saved too, unless no")
    save_steps: float = arg(500, "updates between checkpoints; below 1: the ratio of all updates", 0, 10**12)
    save_total_limit: int | None = arg(None, "checkpoints to keep, the newest ones and the best (default: all)", 1, 10**9)
    save_only_model: bool = arg(False, "checkpoints of weights alone, which cannot be resumed from")
    save_async: bool = arg(False, "train on while a checkpoint is written from a copy in memory")
    save_errors: Literal["stop", "continue"] = arg("stop", "what to do when a save fails: stop, or train on and try again at the next one")
    save_on_each_node: bool = arg(False, "every host writes whole checkpoints into an output_dir of its own")
    run_name: str | None = arg(None, "what loggers call the run (default: the name of output_dir)")
    report_to: str = arg("none", "who is told beside metrics.jsonl, with commas: tensorboard (in output_dir/tensorboard), wandb, mlflow")
    report_histograms: bool = arg(False, "tensorboard: every logging_steps the weights and their gradients too, as far as rank 0 holds them whole")
    report: bool = arg(False, "at the end of training write output_dir/report.html, as python -m tools.report does")
    sample_prompt: str | None = arg(None, "after each evaluation while training let the built-in model continue this text, for metrics.jsonl, loggers and the report")
    peak_flops: float | None = arg(None, "operations per second that the device of a rank could do: then logs have mfu, the share that the model made use of", 1, 1e21)
    skip_memory_metrics: bool = arg(True, "False: results of training, evaluation and prediction tell what each stage did to memory, in bytes")
    profile: str | None = arg(None, "FIRST:LAST, updates of which a trace by torch.profiler is written to output_dir/profile, for Perfetto or Chrome")
    disable_tqdm: bool | None = arg(None, "no progress bars (default: bars on a terminal and in notebooks)")

    def __post_init__(self):
        """Paths may be Path objects and "True" may be True, as people write them in Python."""
        self.output_dir = os.path.expanduser(self.output_dir)
        if self.resume_from_checkpoint is not None:
            self.resume_from_checkpoint = os.path.expanduser(str(self.resume_from_checkpoint))
        for name in ("label_names", "report_to"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, ",".join(getattr(self, name)))
        if self.load_best_model_at_end or self.save_strategy == "best" or self.early_stopping_patience is not None:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")

    @property
    def trains(self) -> bool:
        return not (self.do_eval or self.do_predict) if self.do_train is None else self.do_train

    @property
    def needs_held_out(self) -> bool:
        return self.do_eval or self.trains and (self.eval_strategy != "no" or self.eval_on_start)

    @property
    def shows_bars(self) -> bool:
        """Whether this process has progress bars: on rank 0, on a terminal or in a notebook, unless --disable_tqdm says it."""
        watched = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0 or "ipykernel" in sys.modules
        return os.environ.get("RANK", "0") == "0" and (watched if self.disable_tqdm is None else not self.disable_tqdm)

    @property
    def allowed(self) -> list[str]:
        """What --allow_change names."""
        return (self.allow_change or "").split(",")

    @property
    def reports(self) -> list[str]:
        """Those of --report_to."""
        return [name.strip() for name in self.report_to.split(",") if name.strip() != "none"]

    @property
    def label_columns(self) -> list[str]:
        """Those of --label_names; none if it is not given."""
        return [] if self.label_names is None else [name.strip() for name in self.label_names.split(",")]

    @property
    def best_key(self) -> str | None:
        """The name of --metric_for_best_model among the metrics of an evaluation."""
        name = self.metric_for_best_model
        return name if name is None or name.startswith("eval_") else f"eval_{name}"

    def to_dict(self) -> dict:
        """The settings as plain values, as `json.dump` takes them."""
        return dataclasses.asdict(self)

    def to_sanitized_dict(self) -> dict:
        """For callbacks of the HF Trainer, as `to_json_string`: what a logger takes for a setting."""
        return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in self.to_dict().items()}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def parse_args(argv: list[str] | None = None, flags: str = "", description: str = "Train a model.") -> TrainArgs:
    """The command line as `TrainArgs`. Raises one `UsageError` with every problem of the line, ranges included. flags: come before it,
    except that what is to be done, --do_train and the like, is taken from only one of them."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.startswith("--lora_adapter") for word in argv):      # has such settings itself
        flags = re.sub(r"--(lora_\w+|use_rslora)( [^-]\S*)?", "", flags)
    before = flags.split()
    if any(word.startswith("--do_") for word in argv):
        before = [word for word in before if not word.startswith("--do_")]
    parser = argparse.ArgumentParser(allow_abbrev=False, usage="%(prog)s [--flag VALUE ...]", description=description + f"\nIts flags:\n{flags}" * bool(flags),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(TrainArgs):
        parser.add_argument(f"--{f.name}", nargs="?", const=MISSING, default=argparse.SUPPRESS, metavar=type_name(HINTS[f.name]),
                            help=f.metadata["help"] + ("" if f.default is None else f" [{f.default}]"))
    glued: list[str] = []       # argparse takes a negative number for a flag; glued to its flag it cannot
    for word in [*before, *argv]:
        if glued and glued[-1].startswith("--") and "=" not in glued[-1] and not word.startswith("--"):
            glued[-1] += "=" + word
        else:
            glued.append(word)
    known, unknown = parser.parse_known_args(glued)
    problems, values, bad = [unknown_flag(word) for word in unknown], {}, set()
    for name, text in vars(known).items():
        try:
            values[name] = convert(text, name)
        except ValueError as error:
            bad.add(name)
            problems.append(f"--{name}{'' if text is MISSING else ' ' + text}: {error}")
    args = TrainArgs(**values)
    check_args(args, problems, bad)
    return args


HINTS = get_type_hints(TrainArgs)
CHOICES = {name: get_args(hint) for name, hint in HINTS.items() if get_origin(hint) is Literal}
MISSING = "<no value>"   # what a flag without a value gets from argparse


def unknown_flag(word: str) -> str:
    if not word.startswith("-"):
        return f"{word!r}: a stray word; flags are written --name value (quote globs and text with spaces)"
    name = word.lstrip("-").partition("=")[0]
    if not name:
        return f"{word!r}: a flag without a name"
    from tools.renamed import REMOVED
    if name in REMOVED:
        return f"--{name} is not a flag here: {REMOVED[name]}"
    near = [n for n in HINTS if n.startswith(name)] or difflib.get_close_matches(name, HINTS, n=1)
    return f"--{name} is not a flag" + (f": did you mean --{near[0]}?" if near else "; --help lists them all")


def type_name(hint) -> str:
    options = [t for t in get_args(hint) or (hint,) if t is not type(None)]
    return {int: "INT", float: "NUMBER", bool: "True|False", str: "TEXT", dict: "JSON"}.get(options[0]) or "|".join(options)


def convert(text: str, name: str):
    """`text` as the type of the field; ValueError says what was expected."""
    kind = type_name(HINTS[name])
    if name in CHOICES:
        if text not in CHOICES[name]:
            raise ValueError(f"expected one of {', '.join(CHOICES[name])}")
        return text
    if kind == "True|False":
        if text.lower() not in ("true", "false", MISSING):
            raise ValueError("expected True or False, or nothing for True")
        return text.lower() != "false"
    if text is MISSING:
        raise ValueError("expected a value")
    if text.lower() == "none" and type(None) in get_args(HINTS[name]):
        return None
    if kind == "TEXT":
        return text
    try:
        if kind == "JSON":
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError("it is something else")
            return value
        return int(text) if kind == "INT" or re.fullmatch(r"[-+]?\d+", text) else float(text)
    except ValueError as error:
        expected = {"INT": "a whole number", "NUMBER": "a number", "JSON": f"a JSON object in quotes, as '{{\"num_cycles\": 2}}' ({error})"}
        raise ValueError(f"expected {expected[kind]}") from None


def check_args(args: TrainArgs, problems: Iterable[str] = (), bad: Iterable[str] = ()) -> None:
    """Raises one `UsageError` with every problem of the settings: of values, and of how they fit together. problems: what
    `parse_args` has found already, of the fields `bad`."""
    problems, bad = list(problems), set(bad)
    for f in dataclasses.fields(args):
        value, low, high = getattr(args, f.name), f.metadata["low"], f.metadata["high"]
        if f.name in CHOICES:
            fits, wanted = value in CHOICES[f.name], f"one of {', '.join(CHOICES[f.name])}"
        elif low is None or value is None:
            continue
        else:
            whole = type_name(HINTS[f.name]) == "INT"
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and (not whole or value == int(value))
            wanted = f"a {'whole ' * whole}number from {low} to {high}"
        if not fits:
            problems.append(f"{f.name}={value!r} must be {wanted}")
            bad.add(f.name)
    a = dataclasses.replace(args, **{f.name: f.default for f in dataclasses.fields(args) if f.name in bad})   # comparable below

    def need(names: str, fits: bool, message: str) -> None:
        if not fits and not bad & set(names.split()):
            problems.append(message)

    for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
        value = getattr(a, name)
        need(name, value is None or value <= 1 or value == int(value), f"{name}={value} must be a whole number of updates, or a ratio below 1")
    need("max_steps", a.max_steps != 0, "max_steps=0 trains nothing: give at least 1, or -1 to count by num_train_epochs")
    need("max_steps num_train_epochs", a.max_steps >= 0 or a.num_train_epochs > 0,
         f"num_train_epochs={a.num_train_epochs} trains nothing: give more than 0, or --max_steps")
    eval_steps = a.logging_steps if a.eval_steps is None else a.eval_steps
    for what, steps, default in (("logging", a.logging_steps, ""), ("eval", eval_steps, "logging_steps"), ("save", a.save_steps, "")):
        need(f"{what}_strategy {what}_steps {default}", getattr(a, f"{what}_strategy") != "steps" or steps > 0, f"{what}_steps=0"
             f"{f' (by default it is {default})' * bool(default)} with --{what}_strategy steps: give at least 1, or --{what}_strategy no")
    need("n_embd n_head", a.n_embd % (2 * a.n_head) == 0,
         f"n_embd={a.n_embd} must be a multiple of 2 * n_head = {2 * a.n_head}: rotary positions turn pairs in each head")
    for name in ("experts_per_token", "balance_loss_weight"):
        need(f"{name} n_experts", a.n_experts or getattr(a, name) == getattr(TrainArgs, name), f"--{name} needs --n_experts")
    need("n_experts experts_per_token", not a.n_experts or a.experts_per_token <= a.n_experts,
         f"experts_per_token={a.experts_per_token} must be at most n_experts={a.n_experts}")
    need("pp_schedule pp", a.pp > 1 or a.pp_schedule == "1f1b", f"--pp_schedule {a.pp_schedule} is the order of work in a pipeline: give --pp too")
    need("n_experts lora_rank lora_adapter", not a.n_experts or a.lora_rank is a.lora_adapter is None,
         "--lora_rank and --lora_adapter are for linear layers, and --n_experts makes stacked ones: train the model as a whole")
    need("streaming dataset", not a.streaming or a.dataset is not None, "--streaming needs --dataset: the default data is read whole")
    need("streaming max_steps", not a.streaming or a.max_steps > 0, "--streaming needs --max_steps: a stream has no length to count epochs by")
    need("do_train do_eval do_predict", a.trains or a.do_eval or a.do_predict, "--do_train False leaves nothing to do: give --do_eval or --do_predict")
    for name in ("eval_dataset", "dataset_config_name"):
        need(f"{name} dataset", getattr(a, name) is None or a.dataset is not None, f"--{name} needs --dataset: the default data brings its own")
    for name in ("output_dir", "text_column"):
        need(name, getattr(a, name).strip() != "", f"{name} is empty: give a name")
    for one, other in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        need(f"{one} {other}", not (getattr(a, one) and getattr(a, other)), f"--{one} and --{other} exclude each other: use one")
    need("lr_scheduler_type eval_strategy", a.lr_scheduler_type != "reduce_lr_on_plateau" or a.eval_strategy != "no",
         "--lr_scheduler_type reduce_lr_on_plateau needs evaluations to look at: give --eval_strategy steps or epoch")
    full_eval, split = a.fp16_full_eval or a.bf16_full_eval, a.strategy in ("fsdp", "hsdp")
    need("fp16_full_eval bf16_full_eval strategy", not (full_eval and split),
         f"--fp16_full_eval and --bf16_full_eval cast whole weights, which --strategy {a.strategy} splits: use --bf16, or --strategy zero2")
    need("cpu_offload strategy", not a.cpu_offload or a.strategy != "ddp",
         "--cpu_offload moves a rank's part of the optimizer: give a --strategy that has one")
    need("accumulate_unsharded strategy", not a.accumulate_unsharded or a.strategy in ("zero2", "fsdp", "hsdp"),
         f"--accumulate_unsharded is what --strategy {a.strategy} always does")
    for name, value in (("hsdp_shard_size", a.hsdp_shard_size is None or a.strategy == "hsdp"),
                        ("fsdp_transformer_layer_cls_to_wrap", a.fsdp_transformer_layer_cls_to_wrap is None or split),
                        ("reshard_after_forward", a.reshard_after_forward or split),
                        ("ddp_bucket_cap_mb", a.ddp_bucket_cap_mb == 25.0 or not split),
                        ("ddp_find_unused_parameters", a.ddp_find_unused_parameters or not split)):
        need(f"{name} strategy", value, f"--{name} does nothing with --strategy {a.strategy}: leave it away")
    for name, used in (("save_strategy", a.save_strategy == "best"), ("load_best_model_at_end", a.load_best_model_at_end),
                       ("early_stopping_patience", a.early_stopping_patience is not None), ("sample_prompt", a.sample_prompt is not None)):
        need(f"{name} eval_strategy", not used or not a.trains or a.eval_strategy != "no",
             f"--{name} {getattr(a, name)} needs evaluations: give --eval_strategy steps or epoch")
    if a.load_best_model_at_end and a.trains and a.eval_strategy != "no" and a.save_strategy != "best":
        need("save_strategy eval_strategy", a.save_strategy == a.eval_strategy, f"--load_best_model_at_end needs a checkpoint of each evaluation: "
             f"--save_strategy {a.save_strategy} must be {a.eval_strategy} as --eval_strategy, or best")
        ratio, multiple = (a.save_steps < 1) == (eval_steps < 1), round(a.save_steps * 1e6) % max(1, round(eval_steps * 1e6)) == 0   # as in the HF Trainer
        need("save_steps eval_steps logging_steps", a.save_strategy != "steps" or ratio and multiple,
             f"--load_best_model_at_end: save_steps={a.save_steps} must be a multiple of eval_steps={eval_steps}, or give --save_strategy best")
    need("early_stopping_threshold early_stopping_patience", a.early_stopping_threshold == 0 or a.early_stopping_patience is not None,
         "--early_stopping_threshold needs --early_stopping_patience")
    for name, default in (("dataloader_prefetch_factor", None), ("dataloader_persistent_workers", False)):
        need(f"{name} dataloader_num_workers", getattr(a, name) == default or a.dataloader_num_workers > 0, f"--{name} needs --dataloader_num_workers")
    for name in a.reports:
        need("report_to", name in ("tensorboard", "wandb", "mlflow"), f"report_to={name}: expected tensorboard, wandb, mlflow, with commas, or none")
    need("report_histograms report_to logging_strategy", not a.report_histograms or "tensorboard" in a.reports and a.logging_strategy == "steps",
         "--report_histograms needs --report_to tensorboard and --logging_strategy steps")
    need("profile", a.profile is None or re.fullmatch(r"\d{1,12}:\d{1,12}", a.profile) is not None and 1 <= int(a.profile.split(":")[0]) <= int(a.profile.split(":")[1]),
         f"profile={a.profile}: expected the first and the last update of the trace, as 10:12")
    need("skip_memory_metrics", a.skip_memory_metrics or sys.platform == "linux", "--skip_memory_metrics False needs Linux: peaks come from /proc")
    need("max_time", a.max_time is None or re.fullmatch(r"\d{1,6}:[0-5]\d:[0-5]\d", a.max_time) is not None and seconds(a.max_time) > 0,
         f"max_time={a.max_time} must be hours, minutes and seconds, as 23:30:00")
    fixed = [f.name for f in dataclasses.fields(a) if f.metadata["fixed"]]
    for name in filter(None, a.allowed):
        need("allow_change", name in (*fixed, "data", "weights"), f"allow_change={name}: expected names out of {', '.join(fixed)}, data, weights; other flags need no permission, and --optim never gets it")
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "lora_bias", "use_rslora"):
        given = getattr(a, name) != getattr(TrainArgs, name)
        need(f"{name} lora_rank lora_adapter", not given or a.lora_rank is not None and a.lora_adapter is None,
             f"--{name}: {'the settings of --lora_adapter are in its adapter_config.json' if a.lora_adapter else 'it needs --lora_rank'}")
    need("lora_base lora_rank lora_adapter", a.lora_base == "float" or a.lora_rank is not None or a.lora_adapter is not None,
         f"--lora_base {a.lora_base} is for weights that adapters leave frozen: give --lora_rank or --lora_adapter")
    need("lora_base fp16_full_eval bf16_full_eval", a.lora_base == "float" or not full_eval, "--fp16_full_eval and --bf16_full_eval would cast the quantized --lora_base")
    for name in ("torch_compile_backend", "torch_compile_mode"):
        need(f"{name} torch_compile", a.torch_compile or getattr(a, name) is None, f"--{name} needs --torch_compile")
    if problems:
        raise UsageError("\n".join(problems))


def seconds(hours: str) -> int:
    """"HH:MM:SS" in seconds."""
    h, m, s = map(int, hours.split(":"))
    return h * 3600 + m * 60 + s


def changed_args(saved: dict, args: TrainArgs) -> list[tuple[str, Any, Any, bool]]:
    """(flag, saved value, value now, whether it should not have changed) of each setting that another start was given. A checkpoint that was
    taken over from another trainer does not know all of them."""
    return [(f.name, saved.get(f.name), getattr(args, f.name), f.metadata["fixed"]) for f in dataclasses.fields(args)
            if saved.get(f.name) != getattr(args, f.name) and (f.name in saved or "taken_over_from" not in saved)
            and f.name not in ("output_dir", "run_name", "resume_from_checkpoint", "allow_change", "disable_tqdm")]
