"""Evaluation and prediction: exact over any batch size and number of ranks, without effect on training, in memory that does not
grow with the data: metrics see the predictions of one round of micro-batches at a time, and `predict` writes them to files.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distributed import World, rng_state, set_rng_state
from state import Batch, LossFn, Run, UsageError

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
    rounds of micro-batches at a time, shorter rows filled with -100; or a function that gets all (n, ...) at once, which are
    then held in memory. It is called alike on every rank. Several outputs or labels come as tuples, absent labels as None.

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
    there are several), labels to {prefix}_labels.npy, as they come; shorter rows are filled with -100. Loss and metrics if asked for."""
    files = PredictionFiles(run.world, os.path.join(run.args.output_dir, prefix))
    metrics = measure(run, loader, loss_fn, compute_metrics, predict_fn, preprocess_logits_for_metrics, prefix, files)
    run.callbacks.fire("on_predict", run, metrics=metrics)
    return Predictions(files.read("predictions"), files.read("labels"), metrics)


def likeliest(logits: Tensor, labels) -> Tensor:
    """The index (...) of the largest of logits (..., classes): all that most metrics need, and far less to keep."""
    return logits.argmax(-1)


def measure(run: Run, loader, loss_fn: LossFn | None, compute_metrics: Metrics, predict_fn: PredictFn | None, preprocess: Callable | None,
            prefix: str, files: PredictionFiles | None = None, trial: bool = False) -> dict[str, float]:
    """The loop of both."""
    start, world = time.perf_counter(), run.world
    metric = compute_metrics if compute_metrics is None or hasattr(compute_metrics, "update") else AtOnce(compute_metrics)
    sinks = [sink for sink in (metric, files) if sink is not None]
    loss_sum = torch.zeros((), dtype=torch.float64)
    num_items = num_samples = num_batches = 0
    waiting: list[tuple] = []       # predictions and labels on the device, with the number of samples
    with evaluating(run) as model:
        for sink in sinks:
            sink.reset()
        for batch in islice(loader.epoch(), 1 if trial else None):
            inputs = to_device(batch, world.device)
            names = label_names(run.args, inputs)
            loss = predictions = None
            with run.precision.autocast():
                if loss_fn is not None:
                    loss = loss_fn(model, inputs)
                    loss, predictions = loss if isinstance(loss, tuple) else (loss, None)
                if sinks and (predict_fn is not None or predictions is None):
                    predictions = predict_fn(model, inputs) if predict_fn else model(**{k: v for k, v in inputs.items() if k not in names})
            if loss is not None and batch["num_samples"]:        # filler has no weight
                loss_sum = loss_sum + loss.double()     # on the device: no sync per batch
            if sinks:
                labels = as_rows({name: inputs[name] for name in names}) if names else None
                predictions = as_rows(predictions)
                predictions = predictions if preprocess is None else as_rows(preprocess(predictions, labels))
                waiting.append((predictions, labels, batch["num_samples"]))
                if len(waiting) == (run.args.eval_accumulation_steps or 1):
                    hand_over(world, waiting, sinks)
            num_items += batch["num_items"]
            num_samples += batch["num_samples"]
            num_batches += 1
            if not trial:
                run.callbacks.fire("on_prediction_step", run)
        hand_over(world, waiting, sinks)
        num_items, num_samples = world.sum(num_items, num_samples)
        if num_samples == 0:
            raise UsageError("the data set to evaluate is empty: it gave no sample")
        metrics = {}
        if loss_fn is not None:
            metrics[f"{prefix}_loss"] = float(world.gather(loss_sum).sum()) / num_items if num_items else float("nan")
        for key, value in metric.compute().items() if metric is not None else ():
            metrics[key if key.startswith(f"{prefix}_") else f"{prefix}_{key}"] = value.item() if hasattr(value, "item") else value
    seconds = time.perf_counter() - start
    return metrics | {f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": num_samples / seconds,
                      f"{prefix}_steps_per_second": num_batches / seconds}


def label_names(args, batch: Batch) -> list[str]:
    """The columns of a batch that are labels; none if one of them is missing, as in the HF Trainer."""
    names = ["labels"] if "labels" in batch else ["start_positions", "end_positions"]
    names = names if args.label_names is None else args.label_names.split(",")
    return names if all(name in batch for name in names) else []


def as_rows(outputs) -> Any:
    """What a model returns as a tensor, or a (nested) tuple of tensors. Of a mapping these are its values without the loss, and one alone
    stands for itself, as in the HF Trainer; what is no tensor, such as a cache of keys and values, is left out. Of another object: its .logits."""
    if isinstance(outputs, Mapping):
        outputs = tuple(value for key, value in outputs.items() if key != "loss")
    if isinstance(outputs, (tuple, list)):
        rows = tuple(as_rows(each) for each in outputs if isinstance(each, (Tensor, tuple, list, Mapping)))
        return rows[0] if len(rows) == 1 else rows
    rows = getattr(outputs, "logits", outputs)
    if not isinstance(rows, Tensor):
        raise UsageError(f"predictions are a {type(rows).__name__}; expected tensors with one row per sample")
    return rows.detach()


def map_rows(function: Callable[..., Any], *rows) -> Any:
    """function of tensors, or of the tensors at the same place in nested tuples."""
    if not isinstance(rows[0], tuple):
        return function(*rows)
    return tuple(map_rows(function, *parts) for parts in zip(*rows, strict=True))


def hand_over(world: World, waiting: list[tuple], sinks: list) -> None:
    """Gives metrics and files the rows of all ranks, and forgets them."""
    for predictions, labels, num_samples in waiting:
        rows = map_rows(lambda tensor: gather_rows(world, tensor, num_samples), predictions)        # noqa: B023  called at once
        label_rows = None if labels is None else map_rows(lambda tensor: gather_rows(world, tensor, num_samples), labels)   # noqa: B023
        for sink in sinks:
            sink.update(rows, label_rows)
    waiting.clear()


class AtOnce:
    """compute_metrics as a function of all predictions and labels: keeps them."""

    def __init__(self, function: Callable[[Any, Any], dict]):
        self.function = function

    def reset(self) -> None:
        self.parts: list[tuple] = []

    def update(self, predictions, labels) -> None:
        self.parts.append((predictions, labels))

    def compute(self) -> dict:
        predictions, labels = zip(*self.parts)
        return self.function(map_rows(join_rows, *predictions), None if labels[0] is None else map_rows(join_rows, *labels))


class PredictionFiles:
    """Predictions and labels in files, one for each tensor; the rank that writes has them all."""

    def __init__(self, world: World, stem: str):
        self.world, self.stem = world, stem

    def reset(self) -> None:
        self.files: dict[str, RowFile | None] = {}      # None on ranks that do not write

    def update(self, predictions, labels) -> None:
        with self.world.writing(self.stem):
            for kind, rows in (("predictions", predictions), ("labels", labels)):
                tensors = [] if rows is None else flatten(rows)
                for i, tensor in enumerate(tensors):
                    path = f"{self.stem}_{kind}{f'_{i}' * (len(tensors) > 1)}.npy"
                    if path not in self.files:
                        self.files[path] = RowFile(path) if self.world.writes else None
                    if self.world.writes:
                        self.files[path].append(tensor.numpy())

    def read(self, kind: str) -> Any:
        paths = [path for path in self.files if path.startswith(f"{self.stem}_{kind}")]
        with self.world.writing(self.stem):
            for path in paths if self.world.writes else ():
                self.files[path].close()
        found = tuple(torch.from_numpy(np.load(path, mmap_mode="c")) for path in paths)
        return None if not found else found[0] if len(found) == 1 else found


def flatten(rows) -> list[Tensor]:
    return [tensor for each in rows for tensor in flatten(each)] if isinstance(rows, tuple) else [rows]


class RowFile:
    """An array (n, ...) in numpy's .npy format that grows by rows. They go to a nameless file as they come; only at the end it is known
    how many there are and how wide the widest is."""

    def __init__(self, path: str):
        self.path, self.parts = path, []
        self.raw = tempfile.TemporaryFile(dir=os.path.dirname(path))    # noqa: SIM115

    def append(self, rows: np.ndarray) -> None:
        rows.tofile(self.raw)
        self.parts.append((rows.dtype, rows.shape))

    def close(self) -> None:
        widest = [max(sizes) for sizes in zip(*(shape[1:] for _, shape in self.parts))]
        header = {"descr": self.parts[0][0].str, "fortran_order": False, "shape": (sum(shape[0] for _, shape in self.parts), *widest)}
        self.raw.seek(0)
        with self.raw, open(self.path + ".tmp", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for dtype, shape in self.parts:
                rows = np.fromfile(self.raw, dtype, math.prod(shape)).reshape(shape)
                pad_to(torch.from_numpy(rows), [shape[0], *widest]).numpy().tofile(file)
        os.replace(self.path + ".tmp", self.path)       # who still looks at an older one keeps it


def save_results(run: Run, split: str, metrics: dict[str, float]) -> None:
    """Writes {split}_results.json and puts the same into all_results.json, beside what other splits have put there."""
    paths = [os.path.join(run.args.output_dir, f"{name}_results.json") for name in (split, "all")]
    with run.world.writing(paths[0]):
        for path in paths if run.world.writes else ():
            known = {}
            if path == paths[1] and os.path.exists(path):
                with open(path) as file:
                    known = json.load(file)
            with open(path + ".tmp", "w") as file:
                json.dump({**known, **metrics}, file, indent=4, sort_keys=True)
            os.replace(path + ".tmp", path)


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """A micro-batch with its tensors on `device` and without its counts, as losses and models get it."""
    def move(value):
        if isinstance(value, dict):
            return {key: move(part) for key, part in value.items()}
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
    return {key: move(value) for key, value in batch.items() if key not in ("num_items", "num_samples")}


def gather_rows(world: World, rows: Tensor, num_samples: int) -> Tensor:
    """Rows (B, ...) of all ranks in rank order, that is in data order, without filler: (sum of num_samples, ...), on the CPU. Ranks may
    differ in every size; shorter rows are filled with -100 as in the HF Trainer. 16-bit floats become float32, bool and uint8 int64."""
    if rows.ndim == 0 or len(rows) != max(num_samples, 1):
        raise UsageError(f"a prediction or label of shape {tuple(rows.shape)} came for {num_samples} samples: metrics and predict need one row per "
                         f"sample; give a predict_fn, or preprocess_logits_for_metrics, that returns that")
    if rows.is_floating_point():
        rows = rows.float() if rows.element_size() < 4 else rows
    elif rows.dtype in (torch.bool, torch.uint8):       # they have no -100
        rows = rows.long()
    rows = rows.cpu()
    if world.world_size == 1:
        return rows
    shapes = world.gather(torch.tensor([num_samples, *rows.shape]))                      # (world, 1 + ndim)
    padded = pad_to(rows, shapes[:, 1:].amax(0).tolist())
    return torch.cat([part[:n] for part, n in zip(world.gather(padded), shapes[:, 0].tolist())])


def join_rows(*parts: Tensor) -> Tensor:
    """Rows of several batches as one tensor, shorter ones filled with -100."""
    sizes = [max(lengths) for lengths in zip(*(part.shape[1:] for part in parts))]
    return torch.cat([pad_to(part, [len(part), *sizes]) for part in parts])


def pad_to(tensor: Tensor, shape: list[int]) -> Tensor:
    if list(tensor.shape) == shape:
        return tensor
    padded = tensor.new_full(shape, -100)
    padded[tuple(slice(n) for n in tensor.shape)] = tensor
    return padded
