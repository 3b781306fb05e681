"""Evaluation and prediction: exact over any batch size and number of ranks, without effect on training, in memory that does not
grow with the data: metrics see the predictions of one round of micro-batches at a time, and `predict` writes them to files.
"""
from __future__ import annotations

import contextlib
import glob
import inspect
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

from state import Batch, LossFn, Run, UsageError
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
    start, world, predicts = time.perf_counter(), run.world, files is not None
    check_metrics(compute_metrics)
    if stage := not (trial or run.state.in_training):
        world.memory.start(prefix)
    streams = hasattr(compute_metrics, "update")
    if compute_metrics is not None and not streams and files is None:      # a function gets all of them at once
        files = PredictionFiles(world, os.path.join(run.args.output_dir, f"tmp-{prefix}"))
    sinks = [sink for sink in (compute_metrics if streams else None, files) if sink is not None]
    loss_sum = torch.zeros((), dtype=torch.float64)
    num_items = num_samples = num_batches = 0
    waiting: list[tuple] = []       # predictions and labels on the device, with the number of samples
    with evaluating(run) as model:
        for sink in sinks:
            sink.reset()
        for batch in islice(loader.epoch(), 1 if trial else None):
            inputs = to_device(batch, world.device)
            names = label_names(run.args, inputs)
            if not names and compute_metrics is not None and not predicts:
                raise UsageError(f"metrics need labels, and the batch has none: it has {', '.join(inputs)}. Name their columns by --label_names")
            if not names and predicts:
                loss_fn = compute_metrics = None
                sinks = [files]
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
                run.callbacks.fire("on_prediction_step", run, eval_dataloader=loader)
        hand_over(world, waiting, sinks)
        num_items, num_samples = world.sum(num_items, num_samples)
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
    metrics |= {f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": num_samples / seconds, f"{prefix}_steps_per_second": num_batches / seconds, **(world.memory.read() if stage else {})}
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


def as_rows(outputs) -> Tensor | tuple[Tensor, ...]:
    """What a model returns, as a tensor or several: of a mapping its values without the loss, of lists and tuples what is in them, of
    another object its .logits. What is no tensor, such as a cache of keys and values, is left out; one alone stands for itself."""
    found = list(find_tensors(outputs))
    if not found:
        raise UsageError(f"predictions are a {type(outputs).__name__} without tensors; expected tensors with one row per sample")
    return found[0] if len(found) == 1 else tuple(found)


def find_tensors(outputs) -> Iterator[Tensor]:
    if isinstance(outputs, Mapping):
        outputs = [value for key, value in outputs.items() if key != "loss"]
    outputs = getattr(outputs, "logits", outputs)
    if isinstance(outputs, Tensor):
        yield outputs.detach()
    elif isinstance(outputs, (tuple, list)):
        for each in outputs:
            yield from find_tensors(each)


def hand_over(world: World, waiting: list[tuple], sinks: list) -> None:
    """Gives metrics and files the rows of all ranks, and forgets them."""
    for predictions, labels, num_samples in waiting:
        found = [None if rows is None else gather_rows(world, rows, num_samples) if isinstance(rows, Tensor) else
                 tuple(gather_rows(world, each, num_samples) for each in rows) for rows in (predictions, labels)]
        for sink in sinks:
            sink.update(*found)
    waiting.clear()


class PredictionFiles:
    """Predictions and labels in numpy's .npy files, one for each tensor: stem_predictions.npy, or stem_predictions_0.npy and so on. The
    rank that writes appends rows to nameless files as they come; only at the end it is known how many there are and how wide the widest
    is. After `finish`, predictions and label_ids are these files, memory-mapped, on all ranks."""

    def __init__(self, world: World, stem: str):
        self.world, self.stem = world, stem

    def reset(self) -> None:
        self.parts: dict[str, list[tuple]] = {}     # of each file: (dtype, shape) of what was appended
        self.raw: dict[str, Any] = {}

    def update(self, predictions, labels) -> None:
        with self.world.writing(self.stem):
            for kind, rows in (("predictions", predictions), ("labels", labels)):
                tensors = () if rows is None else (rows,) if isinstance(rows, Tensor) else rows
                for i, tensor in enumerate(tensors):
                    path, array = f"{self.stem}_{kind}{f'_{i}' * (len(tensors) > 1)}.npy", tensor.numpy()
                    parts = self.parts.setdefault(path, [])
                    if parts and (parts[0][0] != array.dtype or len(parts[0][1]) != array.ndim):
                        raise UsageError(f"{kind} {array.dtype} of shape {array.shape} came after {parts[0][0]} of {parts[0][1]}: give all batches the same type")
                    parts.append((array.dtype, array.shape))
                    if self.world.writes:
                        if path not in self.raw:
                            self.raw[path] = tempfile.TemporaryFile(dir=os.path.dirname(path))      # noqa: SIM115
                        self.raw[path].write(np.ascontiguousarray(array).data)

    def finish(self, keep: bool) -> None:
        """keep: else the files have no names any more, and are gone when nobody looks at them."""
        with self.world.writing(self.stem):
            if len({sum(shape[0] for _, shape in parts) for parts in self.parts.values()}) > 1:
                raise UsageError("some batches had labels or predictions that others lack: give all samples the same columns")
            if self.world.writes:
                self.remove()       # those of another time
                for path, raw in self.raw.items():
                    self.write(path, raw, self.parts[path])
        with self.world.writing(self.stem):
            found = {kind: tuple(torch.from_numpy(np.load(path, mmap_mode="c")) for path in self.parts if path.startswith(f"{self.stem}_{kind}"))
                     for kind in ("predictions", "labels")}
        if not keep:
            self.remove()
        self.predictions, self.label_ids = (None if not tensors else tensors[0] if len(tensors) == 1 else tensors for tensors in found.values())

    def write(self, path: str, raw, parts: list[tuple]) -> None:
        widest = [max(sizes) for sizes in zip(*(shape[1:] for _, shape in parts))]
        dtype, total = parts[0][0], sum(shape[0] for _, shape in parts)
        raw.seek(0)
        with raw, open(path + ".tmp", "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (total, *widest)})
            for _, shape in parts:
                rows = np.frombuffer(bytearray(raw.read(math.prod(shape) * dtype.itemsize)), dtype).reshape(shape)
                file.write(pad_to(torch.from_numpy(rows), [shape[0], *widest]).numpy().data)
        os.replace(path + ".tmp", path)     # who still looks at an older one keeps it

    def remove(self) -> None:
        for path in glob.glob(f"{glob.escape(self.stem)}_predictions*.npy") + glob.glob(f"{glob.escape(self.stem)}_labels*.npy") if self.world.writes else ():
            os.remove(path)


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
                json.dump({**known, **metrics}, file, indent=4, sort_keys=True, default=float)      # numpy's numbers too
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
    differ in every size; shorter rows are filled with -100 as in the HF Trainer. 16-bit floats become float32, whole numbers int64."""
    if rows.ndim == 0 or len(rows) != max(num_samples, 1):
        raise UsageError(f"a prediction or label of shape {tuple(rows.shape)} came for {num_samples} samples: metrics and predict need one row per "
                         f"sample; give a predict_fn, or preprocess_logits_for_metrics, that returns that")
    if rows.is_floating_point():
        rows = rows.float() if rows.element_size() < 4 else rows
    else:
        rows = rows.long()      # of others, some have no -100
    rows = rows.cpu()
    if world.world_size == 1:
        return rows
    told = world.gather(torch.tensor([num_samples, rows.ndim, *rows.shape, *[0] * 8])[:8])      # (world, 8)
    (ndim, *other), shapes = set(told[:, 1].tolist()), told[:, 2:2 + rows.ndim]
    if other or ndim > 6:
        raise UsageError(f"predictions or labels of rank {world.rank} have shape {tuple(rows.shape)}, and {told[:, 1].tolist()} dimensions by rank: give "
                         f"equally many everywhere, and at most 6")
    padded = pad_to(rows, shapes.amax(0).tolist())
    return torch.cat([part[:n] for part, n in zip(world.gather(padded), told[:, 0].tolist())])


def pad_to(tensor: Tensor, shape: list[int]) -> Tensor:
    if list(tensor.shape) == shape:
        return tensor
    padded = tensor.new_full(shape, -100)
    padded[tuple(slice(n) for n in tensor.shape)] = tensor
    return padded
