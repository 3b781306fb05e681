"""Evaluation and prediction: exact over any batch size and number of ranks, and without effect on training."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distributed import World, rng_state, set_rng_state
from state import Batch, LossFn, Run, UsageError

PredictFn = Callable[[nn.Module, Batch], Tensor]   # (model, micro-batch) -> predictions (B, ...)


def model_outputs(model: nn.Module, batch: Batch) -> Tensor:
    """The default prediction: what the model gives for everything in the batch but the labels, or its .logits."""
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    return getattr(output, "logits", output)


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


def evaluate(run: Run, loader, loss_fn: LossFn, compute_metrics: Callable[[Tensor, Tensor], dict] | None = None,
             predict_fn: PredictFn = model_outputs, prefix: str = "eval") -> dict[str, float]:
    """Loss and metrics over the whole data set, logged, and given to on_evaluate. {prefix}_loss is the sum of losses over the sum of
    label items, over all ranks: no batching can change it. compute_metrics(predictions, labels) gets the CPU tensors (n, ...) of all
    ranks in data order, on every rank."""
    start, world = time.perf_counter(), run.world
    loss_sum = torch.zeros((), dtype=torch.float64)
    num_items = num_samples = num_batches = 0
    outputs: list[list[Tensor]] = []        # predictions and labels of each batch
    with evaluating(run) as model:
        for batch in loader.epoch():
            inputs = to_device(batch, world.device)
            with run.precision.autocast():
                loss = loss_fn(model, inputs)
                predictions = None if compute_metrics is None else predict_fn(model, inputs)
            if batch["num_samples"]:        # filler has no weight
                loss_sum = loss_sum + loss.double()     # on the device: no sync per batch
            if compute_metrics is not None:
                outputs.append([gather_rows(world, rows, batch["num_samples"]) for rows in (predictions, inputs["labels"])])
            num_items += batch["num_items"]
            num_samples += batch["num_samples"]
            num_batches += 1
            run.callbacks.fire("on_prediction_step", run)
        num_items, num_samples = world.sum(num_items, num_samples)
        if num_samples == 0:
            raise UsageError("the data set to evaluate is empty: it gave no sample")
        total = float(world.gather(loss_sum).sum())
        metrics = {f"{prefix}_loss": total / num_items if num_items else float("nan")}
        if compute_metrics is not None:
            for key, value in compute_metrics(*map(join_rows, zip(*outputs))).items():
                metrics[key if key.startswith(f"{prefix}_") else f"{prefix}_{key}"] = value.item() if hasattr(value, "item") else value
    seconds = time.perf_counter() - start
    metrics |= {f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": num_samples / seconds,
                f"{prefix}_steps_per_second": num_batches / seconds}
    run.callbacks.log(run, metrics)
    run.callbacks.fire("on_evaluate", run, metrics=metrics)
    return metrics


def predict(run: Run, loader, predict_fn: PredictFn = model_outputs) -> Tensor:
    """Predictions (n, ...) for the whole data set in data order, as one CPU tensor on every rank."""
    outputs = []
    with evaluating(run) as model:
        for batch in loader.epoch():
            with run.precision.autocast():
                predictions = predict_fn(model, to_device(batch, run.world.device))
            outputs.append(gather_rows(run.world, predictions, batch["num_samples"]))
            run.callbacks.fire("on_prediction_step", run)
    if not outputs:
        raise UsageError("the data set to predict is empty: it gave no sample")
    run.callbacks.fire("on_predict", run, metrics={})
    return join_rows(outputs)


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """A micro-batch with its tensors on `device` and without its counts, as losses and models get it."""
    def move(value):
        if isinstance(value, dict):
            return {key: move(part) for key, part in value.items()}
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
    return {key: move(value) for key, value in batch.items() if key not in ("num_items", "num_samples")}


def gather_rows(world: World, rows: Tensor, num_samples: int) -> Tensor:
    """Rows (B, ...) of all ranks in rank order, that is in data order, without filler: (sum of num_samples, ...). Ranks may
    differ in every size; shorter rows are filled with -100 as in the HF Trainer."""
    rows = rows.detach().cpu()
    if world.world_size == 1:
        return rows
    shapes = world.gather(torch.tensor([num_samples, *rows.shape]))                      # (world, 1 + ndim)
    padded = pad_to(rows, shapes[:, 1:].amax(0).tolist())
    return torch.cat([part[:n] for part, n in zip(world.gather(padded), shapes[:, 0].tolist())])


def join_rows(parts) -> Tensor:
    """Rows of several batches as one tensor, shorter ones filled with -100."""
    sizes = [max(lengths) for lengths in zip(*(part.shape[1:] for part in parts))]
    return torch.cat([pad_to(part, [len(part), *sizes]) for part in parts])


def pad_to(tensor: Tensor, shape: list[int]) -> Tensor:
    if list(tensor.shape) == shape:
        return tensor
    padded = tensor.new_full(shape, -100)
    padded[tuple(slice(n) for n in tensor.shape)] = tensor
    return padded
