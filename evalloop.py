"""Evaluation and prediction: exact over any batch size and number of ranks, without effect on training, in memory that does not
grow with the data: metrics see the predictions of one round of micro-batches at a time, and `predict` writes them to files.
"""
from __future__ import annotations

import contextlib
import glob
import inspect
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from state import Batch, LossFn, Run, UsageError
from storage import read_json, replace_json
from world import World, rng_state, set_rng_state

PredictFn = Callable[[nn.Module, Batch], Any]   # (model, micro-batch) -> predictions: tensors with one row per sample, (B, ...)
# (predictions, labels) -> dict of numbers, or an object with reset(), update(predictions, labels) and compute() -> dict
Metrics = Any


@contextlib.contextmanager
def evaluating(run: Run) -> Iterator[nn.Module]:
    """The bare model in eval mode without gradients, with averaged weights if there are (--ema_decay); its modes, its weights
    and all random generators are put back afterwards. All ranks enter it, and call the model equally often."""
    model, optimizer, rng = run.model, run.optimizer, rng_state()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    if hasattr(optimizer, "eval"):      # schedule-free optimizers evaluate other weights than they train
        optimizer.eval()
    others = run.ema is not None or hasattr(optimizer, "eval")
    try:
        with torch.no_grad(), contextlib.nullcontext() if run.ema is None else run.ema.in_place():
            if others:
                run.parallel.gather()
            with run.precision.evaluation_weights(model, run.state.in_training):
                yield model
    finally:
        if hasattr(optimizer, "train"):
            optimizer.train()
        for module, training in modes:
            module.training = training
        set_rng_state(rng)
    if others:
        run.parallel.gather()       # not after an error on this rank alone: the others do not come
    run.parallel.release()


def evaluate(run: Run, loader, loss_fn: LossFn, compute_metrics: Metrics = None, predict_fn: PredictFn | None = None,
             preprocess_logits_for_metrics: Callable | None = None, prefix: str = "eval", trial: bool = False) -> dict[str, float]:
    """Loss and metrics over the whole data set, logged, and given to on_evaluate.

    {prefix}_loss is the sum of losses over the sum of label items, over all ranks: no batching can change it. The loss may return
    (loss, predictions); else predictions are what `predict_fn(model, batch)` gives, by default the model's output (see `as_rows`).
    preprocess_logits_for_metrics: (predictions, labels) -> what metrics need of them, on the device, before anything is kept.

    compute_metrics: an object whose update(predictions, labels) sees CPU tensors with the rows of all ranks in data order, one or more
    rounds of micro-batches at a time, shorter rows filled with -100; or a function that gets all (n, ...) at once, memory-mapped
    from a file. It is called alike on every rank, and what it says on rank 0 counts. Several outputs or labels come as tuples, absent labels as None.

    loader: or a dict of several, whose metrics have their names in front: {prefix}_{name}_loss. trial: only the first round of
    micro-batches, and nothing is logged: it shows that evaluation works, and the names of its metrics."""
    if isinstance(loader, Mapping):
        return {key: value for name, each in loader.items() for key, value in
                evaluate(run, each, loss_fn, compute_metrics, predict_fn, preprocess_logits_for_metrics, f"{prefix}_{name}", trial).items()}
    metrics = measure(run, loader, loss_fn, compute_metrics, predict_fn, preprocess_logits_for_metrics, prefix, trial=trial)
    if not trial:
        run.callbacks.log(run, metrics)
        run.callbacks.fire("on_evaluate", run, metrics=metrics)
    return metrics


class Predictions(NamedTuple):
    """predictions, label_ids: (n, ...) in data order, memory-mapped from the files they are in; tuples if the model gives several, None
    without labels."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]


def predict(run: Run, loader, predict_fn: PredictFn | None = None, preprocess_logits_for_metrics: Callable | None = None,
            loss_fn: LossFn | None = None, compute_metrics: Metrics = None, prefix: str = "test") -> Predictions:
    """Predictions for the whole data set in data order, on every rank. They go to output_dir/{prefix}_predictions.npy (and _0, _1 ... if
    there are several), labels to {prefix}_labels.npy, as they come; shorter rows are filled with -100. Loss and metrics if asked for and
    the data has labels."""
    files = PredictionFiles(run.world, os.path.join(run.args.output_dir, prefix))
    metrics = measure(run, loader, loss_fn, compute_metrics, predict_fn, preprocess_logits_for_metrics, prefix, files)
    run.callbacks.fire("on_predict", run, metrics=metrics)
    return Predictions(files.predictions, files.label_ids, metrics)


def likeliest(logits: Tensor, labels) -> Tensor:
    """The index (...) of the largest of logits (..., classes): all that most metrics need, and far less to keep."""
    return logits.argmax(-1)


def measure(run: Run, loader, loss_fn: LossFn | None, compute_metrics: Metrics, predict_fn: PredictFn | None, preprocess: Callable | None,
            prefix: str, files: PredictionFiles | None = None, trial: bool = False) -> dict[str, float]:
    """The loop of both. files: for predictions, of which then those without labels have neither loss nor metrics."""
    start, world, predicts, streams = time.perf_counter(), run.world, files is not None, hasattr(compute_metrics, "update")
    check_metrics(compute_metrics)
    if stage := not (trial or run.state.in_training):
        world.memory.start(prefix)
    if compute_metrics is not None and not streams and files is None:      # a function gets all of them at once
        files = PredictionFiles(world, os.path.join(run.args.output_dir, f"tmp-{prefix}"))
    loss_sum = torch.zeros((), dtype=torch.float64)
    num_items = num_samples = num_batches = 0
    waiting: list[tuple[dict[str, Tensor], int]] = []       # rows on the device, with the number of samples
    with evaluating(run) as model:
        if streams:
            compute_metrics.reset()
        for batch in islice(loader.epoch(), 1 if trial else None):
            inputs = to_device(batch, world.device)
            names = label_names(run.args, inputs)
            if not names and compute_metrics is not None and not predicts:
                raise UsageError(f"metrics need labels, and the batch has none: it has {', '.join(inputs)}. Name their columns by --label_names")
            if not names and predicts:
                loss_fn = compute_metrics = None
            collects, loss, predictions = files is not None or compute_metrics is not None, None, None
            with run.precision.autocast():
                if loss_fn is not None:
                    loss = loss_fn(model, inputs)
                    loss, predictions = loss if isinstance(loss, tuple) else (loss, None)
                if collects and (predict_fn is not None or predictions is None):
                    predictions = predict_fn(model, inputs) if predict_fn else model(**{k: v for k, v in inputs.items() if k not in names})
            if loss is not None and batch["num_samples"]:        # filler has no weight
                loss_sum = loss_sum + loss.double()     # on the device: no sync per batch
            if collects:
                labels = as_rows("labels", {name: inputs[name] for name in names}) if names else {}
                rows = as_rows("predictions", predictions)
                if preprocess is not None:
                    rows = as_rows("predictions", preprocess(pick(rows, "predictions"), pick(labels, "labels")))
                waiting.append((rows | labels, batch["num_samples"]))
                if len(waiting) == (run.args.eval_accumulation_steps or 1):
                    hand_over(world, waiting, compute_metrics, files)
            num_items += batch["num_items"]
            num_samples += batch["num_samples"]
            num_batches += 1
            if not trial:
                run.callbacks.fire("on_prediction_step", run, eval_dataloader=loader)
        hand_over(world, waiting, compute_metrics, files)
        num_items, num_samples = world.count(num_items, num_samples)
        if num_samples == 0:
            raise UsageError("the data set to evaluate is empty: it gave no sample")
        metrics = {}
        if loss_fn is not None:
            metrics[f"{prefix}_loss"] = float(world.gather(loss_sum).sum()) / num_items if num_items else float("nan")
        if files is not None:
            files.finish(keep=predicts)
        if compute_metrics is not None:
            try:
                found = compute_metrics.compute() if streams else compute_metrics(files.predictions, files.label_ids)
            except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:
                if not trial or isinstance(error, UsageError):
                    raise
                return {}       # one round may be too little for it
            metrics |= named_numbers(found, prefix)
    seconds = time.perf_counter() - start
    metrics |= {f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": num_samples / seconds,
                f"{prefix}_steps_per_second": num_batches / seconds, **(world.memory.read() if stage else {})}
    return world.gather_json(metrics)[0]        # what a rank has drawn or timed must not make it decide alone


def named_numbers(found, prefix: str) -> dict[str, float]:
    """What a metric gave, as Python's numbers, with {prefix}_ in front of their names."""
    if not isinstance(found, Mapping):
        raise UsageError(f"compute_metrics gave a {type(found).__name__}; expected a dict of names and numbers")
    for key, value in found.items():
        if not isinstance(value, (int, float)) and getattr(value, "shape", None) != ():
            raise UsageError(f"compute_metrics gave {value!r:.80} as {key}; expected a number")
    return {key if key.startswith(f"{prefix}_") else f"{prefix}_{key}": value.item() if hasattr(value, "item") else value
            for key, value in found.items()}


def check_metrics(compute_metrics: Metrics) -> None:
    """That it can be called as here: transformers gives one EvalPrediction instead."""
    wanted = "expected a function of (predictions, labels), or an object with reset(), update(predictions, labels) and compute()"
    if isinstance(compute_metrics, type):
        raise UsageError(f"compute_metrics is the class {compute_metrics.__name__}, not an object of it: add (); {wanted}")
    try:
        if hasattr(compute_metrics, "update"):
            _ = compute_metrics.reset, compute_metrics.compute
        elif compute_metrics is not None:
            inspect.signature(compute_metrics).bind(None, None)
    except (AttributeError, TypeError) as error:
        raise UsageError(f"compute_metrics: {error}; {wanted}") from None


def label_names(args, batch: Batch) -> list[str]:
    """The columns of a batch that are labels; none if one of them is missing, as in the HF Trainer."""
    names = args.label_columns or (["labels"] if "labels" in batch else ["start_positions", "end_positions"])
    return names if all(name in batch for name in names) else []


def as_rows(kind: str, outputs) -> dict[str, Tensor]:
    """What a model returns as tensors called `kind`, or {kind}_0, {kind}_1 ... if there are several: of a mapping its values without the
    loss, of lists and tuples what is in them, of another object its .logits. What is no tensor, such as a cache of keys, is left out."""
    found = list(find_tensors(outputs))
    if not found:
        raise UsageError(f"{kind} are a {type(outputs).__name__} without tensors; expected tensors with one row per sample")
    return {kind if len(found) == 1 else f"{kind}_{i}": tensor for i, tensor in enumerate(found)}


def pick(rows: dict[str, Tensor], kind: str) -> Tensor | tuple[Tensor, ...] | None:
    """The inverse: as users see them, a tensor or several."""
    found = tuple(tensor for name, tensor in rows.items() if name.startswith(kind))
    return found[0] if len(found) == 1 else found or None


def find_tensors(outputs) -> Iterator[Tensor]:
    if isinstance(outputs, Mapping):
        outputs = [value for key, value in outputs.items() if key != "loss"]
    outputs = getattr(outputs, "logits", outputs)
    if isinstance(outputs, Tensor):
        yield outputs.detach()
    elif isinstance(outputs, (tuple, list)):
        for each in outputs:
            yield from find_tensors(each)


def hand_over(world: World, waiting: list[tuple[dict[str, Tensor], int]], compute_metrics: Metrics, files: PredictionFiles | None) -> None:
    """Gives metrics and files the rows of all ranks, and forgets them."""
    for rows, num_samples in waiting:
        rows = gather_rows(world, rows, num_samples)
        if hasattr(compute_metrics, "update"):
            compute_metrics.update(pick(rows, "predictions"), pick(rows, "labels"))
        if files is not None:
            files.append(rows)
    waiting.clear()


def gather_rows(world: World, rows: dict[str, Tensor], num_samples: int) -> dict[str, Tensor]:
    """Rows (B, ...) of all ranks in rank order, that is in data order, without filler: (sum of num_samples, ...), on the CPU. Ranks may
    differ in every size; shorter rows are filled with -100 as in the HF Trainer. 16-bit floats become float32, whole numbers int64."""
    for name, tensor in rows.items():
        if tensor.ndim == 0 or len(tensor) != max(num_samples, 1):
            raise UsageError(f"{name} of shape {tuple(tensor.shape)} came for {num_samples} samples: metrics and predict need one row per "
                             f"sample; give a predict_fn, or preprocess_logits_for_metrics, that returns that")
    types = {name: torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else torch.int64 for name, tensor in rows.items()}
    rows = {name: tensor[:num_samples].to("cpu", types[name]).contiguous() for name, tensor in rows.items()}     # some types have no -100
    if world.world_size == 1:
        return rows
    parts = [load(part) for part in world.gather_bytes(save(rows))]
    dims = [{name: tensor.ndim for name, tensor in part.items()} for part in parts]
    if other := [rank for rank, found in enumerate(dims) if found != dims[0]]:
        raise UsageError(f"ranks 0 and {other[0]} have outputs and labels of different dimensions, {dims[0]} and {dims[other[0]]}: "
                         f"give the same everywhere")
    widest = {name: [max(sizes) for sizes in zip(*(part[name].shape[1:] for part in parts))] for name in rows}
    return {name: torch.cat([pad_to(part[name], shape) for part in parts]) for name, shape in widest.items()}


def pad_to(rows: Tensor, shape: list[int]) -> Tensor:
    """(B, ...) as (B, *shape)."""
    padded = rows.new_full((len(rows), *shape), -100)
    padded[tuple(map(slice, rows.shape))] = rows
    return padded


class PredictionFiles:
    """Predictions and labels in numpy's .npy files, one for each tensor: stem_predictions.npy, or stem_predictions_0.npy and so on. The
    rank that writes keeps them in nameless files as they come; only at the end it is known how many rows there are and how wide the
    widest is. After `finish`, predictions and label_ids are these files, memory-mapped, on all ranks."""

    def __init__(self, world: World, stem: str):
        self.world, self.stem = world, stem
        self.parts: dict[str, list[Tensor]] = {}        # of each tensor: what was appended, on the meta device
        self.raw = defaultdict(partial(tempfile.TemporaryFile, dir=os.path.dirname(stem)))

    def append(self, rows: dict[str, Tensor]) -> None:
        with self.world.writing(self.stem):
            for name, tensor in rows.items():
                parts = self.parts.setdefault(name, [])
                parts.append(tensor.to("meta"))
                if tensor.dtype != parts[0].dtype or tensor.ndim != parts[0].ndim:
                    raise UsageError(f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)} came after {parts[0].dtype} of "
                                     f"{tuple(parts[0].shape)}: give all batches the same type")
                if self.world.writes:
                    np.save(self.raw[name], tensor.numpy())

    def finish(self, keep: bool) -> None:
        """keep: else the files have no names any more, and are gone when nobody looks at them."""
        with self.world.writing(self.stem):
            if len({sum(map(len, parts)) for parts in self.parts.values()}) > 1:
                raise UsageError("some batches had labels or predictions that others lack: give all samples the same columns")
            if self.world.writes:
                self.remove()       # those of another time
                for name, raw in self.raw.items():
                    self.write(name, raw)
        with self.world.writing(self.stem):
            found = {name: torch.from_numpy(np.load(f"{self.stem}_{name}.npy", mmap_mode="c")) for name in self.parts}
        if not keep and self.world.writes:
            self.remove()
        self.predictions, self.label_ids = pick(found, "predictions"), pick(found, "labels")

    def write(self, name: str, raw: IO[bytes]) -> None:
        parts, path = self.parts[name], f"{self.stem}_{name}.npy"
        widest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts))]
        raw.seek(0)
        with raw, open(path + ".tmp", "wb") as file:
            for i in range(len(parts)):
                array = pad_to(torch.from_numpy(np.load(raw)), widest).numpy()
                if i == 0:
                    np.lib.format.write_array_header_1_0(file, {"descr": array.dtype.str, "fortran_order": False,
                                                                "shape": (sum(map(len, parts)), *widest)})
                file.write(array.data)
        os.replace(path + ".tmp", path)     # who still looks at an older one keeps it

    def remove(self) -> None:
        for kind in ("predictions", "labels"):
            for path in glob.glob(f"{glob.escape(self.stem)}_{kind}*.npy"):
                os.remove(path)


def save_results(run: Run, split: str, metrics: dict[str, float]) -> None:
    """Writes {split}_results.json and puts the same into all_results.json, beside what other splits have put there."""
    folder = run.args.output_dir
    with run.world.writing(os.path.join(folder, f"{split}_results.json")):
        if run.world.writes:
            known = read_json(folder, "all_results.json") if os.path.exists(os.path.join(folder, "all_results.json")) else {}
            for name, results in ((split, metrics), ("all", known | metrics)):      # float: numpy's numbers too
                replace_json(os.path.join(folder, f"{name}_results.json"), results, indent=4, sort_keys=True, default=float)


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """A micro-batch with its tensors on `device` and without its counts, as losses and models get it."""
    return {key: to_device(value, device) if isinstance(value, dict) else value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items() if key not in ("num_items", "num_samples")}
