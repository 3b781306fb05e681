"""Fewer bits for the weights of the built-in GPT, with torchao, on the CPU: after training, or trained for it.

    python -m recipes.quantize                                          the three below, one after the other, in one table
    python -m recipes.quantize after ...                                trains, then quantizes in each way of `after_training`
    python -m recipes.quantize 32,32,32,2 ...                           trains, the last quarter of the updates with weights rounded to 2 bits
    python -m recipes.quantize 32,32,4,2 ...                            the same, and the quarter before with 4 bits
    python -m recipes.quantize after --do_eval --n_layer 4 --output_dir runs/a      quantizes what train.py has saved, and trains nothing

Every flag of train.py follows. Quantized are the linear layers in the blocks; embedding, norms and output head stay. int8 has a scale per
row, int8-dynamic rounds inputs too, by a scale per token, int8-static by one that some batches of training show to be needed; int2 to int7
have one per 32 weights, which torchao keeps a byte each. int4-packed has two in a byte, and the rest of the model in bfloat16, as the row before
it; the other 4-bit formats of torchao 0.18 do not run on CPUs. Training rounds in forward and lets gradients through (Jacob et al. 2018, section 3),
so its checkpoints, in OUTPUT_DIR/aware-32-32-4-2, are whole. MB: of tensors in memory. Models are saved for `load`, int4-packed ones cannot be.
Loss on 510 held-out samples 1.634, int8 1.635, int8-static 1.636, int4 1.646, int4-packed 1.641; int2 2.088, trained for 2 bits 1.766, by way of
4 bits 1.761. With 4 bits 32,32,32,4 is no better than rounding afterwards, 1.645, and 4 from the first update on worse, 1.691 (one seed each).
Needs: pip install torchao==0.18.0 (it prints some lines about kernels for GPUs)
"""
from __future__ import annotations

import json
import os
import sys
import timeit
from copy import deepcopy
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Subset

import train
from args import TrainArgs, parse_args
from callbacks import Callback, Callbacks
from collators import default_collator
from data import Data, build_data
from evalloop import evaluating, measure
from loss import compute_loss
from model import GPT
from state import Run, UsageError, run_main

FLAGS = """--output_dir runs/quantize --use_cpu --n_layer 2 --max_steps 250 --per_device_train_batch_size 16 --per_device_eval_batch_size 16
 --optim muon --learning_rate 8e-3 --warmup_steps 20 --weight_decay 0.1 --adam_beta2 0.95 --logging_steps 50 --save_steps 250 --do_train"""
GROUP, CALIBRATION, HELD_OUT = 32, 8, 500       # weights with one scale; micro-batches for int8-static; samples for the loss, or up to twice as many


def weight_only(bits: int, step: str | None = None):
    """torchao's name for rounding to so many bits; step: "prepare" to train with them, "convert" after that."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from torchao.quantization.qat import QATConfig
    config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(GROUP))
    return QATConfig(config, step=step) if step else config


def after_training() -> dict:
    """Ways to quantize a model. They leave inductor's settings, which are those of the whole process, as they are."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    return {"float32": None, "int8": Int8WeightOnlyConfig(set_inductor_config=False),
            "int8-dynamic": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), "int8-static": quantize_static,
            "int4": weight_only(4), "int2": weight_only(2), "bfloat16": None, "int4-packed": PrototypeInt4WeightOnlyConfig(GROUP, set_inductor_config=False)}


def quantize_static(model: GPT, batches: list[Tensor]) -> None:
    """Inputs of a layer get one scale and zero point, so that all from the least to the largest in the batches (B, T) fit into 8 bits."""
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, MappingType, PerRow, PerTensor, quantize_
    from torchao.quantization.observer import AffineQuantizedMinMaxObserver
    seen = {layer: AffineQuantizedMinMaxObserver(MappingType.ASYMMETRIC, torch.int8, PerTensor(), eps=1e-9, scale_dtype=torch.float32,
            zero_point_dtype=torch.int8, keepdim=True) for layer in model.blocks.modules() if isinstance(layer, nn.Linear)}
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: seen[layer](*inputs)) for layer in seen]
    for input_ids in batches:
        model(input_ids)
    for hook, (layer, observer) in zip(hooks, seen.items()):
        hook.remove()
        quantize_(layer, Int8StaticActivationInt8WeightConfig(*observer.calculate_qparams(), [PerTensor(), PerRow()], MappingType.ASYMMETRIC, False))


class Aware(Callback):
    """Training with rounded weights: as many bits as `widths` say, each for an equal share of the updates; when not training, the last."""

    def __init__(self, widths: list[int]):
        self.widths = widths

    def on_init_end(self, args, state, control, model, **kwargs):
        from torchao.quantization import quantize_
        quantize_(model.blocks, weight_only(self.widths[-1], "prepare"))      # other layers, with the same parameters under the same names

    def on_step_begin(self, args, state, control, model, **kwargs):
        bits = self.widths[state.global_step * len(self.widths) // state.max_steps]
        for rounding in (layer.weight_fake_quantizer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)):
            rounding.enabled, rounding.config.dtype = bits < 32, getattr(torch, f"int{min(bits, 8)}")


def compare(run: Run, data: Data, ways: dict, prefix: str = "") -> list[dict]:
    """A row of the table for each way, on a run that is over. Saves the models that torchao can save."""
    from torchao.quantization import quantize_
    from torchao.utils import get_model_size_in_bytes
    rows, some = [], Subset(data.eval, range(0, len(data.eval), max(1, len(data.eval) // HELD_OUT)))
    training, held_out = (train.make_loader(run.args, run.world, run.model, part, default_collator, train=part is data.train) for part in (data.train, some))
    batches = [batch["input_ids"] for batch in islice(training.epoch(), CALIBRATION)]
    for way, config in ways.items():
        with evaluating(run) as trained:        # with averaged weights, if there are
            model = deepcopy(trained).requires_grad_(False)
        if way in ("bfloat16", "int4-packed"):      # in float32 the packed kernel is 40 times slower
            model.bfloat16()
        if config is quantize_static:
            quantize_static(model, batches)
        elif config is not None:
            quantize_(model.blocks, config)
        seconds = median(timeit.repeat(lambda model=model: model(batches[0]), number=1, repeat=9))
        loss = measure(replace(run, model=model, ema=None, callbacks=Callbacks([])), held_out, compute_loss, None, None, None, "eval")["eval_loss"]
        blocks, whole = (round(get_model_size_in_bytes(part) / 1e6, 3) for part in (model.blocks, model))
        rows.append({"weights": prefix + way, "MB of the blocks": blocks, "MB": whole, "tokens/s": round(batches[0].numel() / seconds), "held-out loss": round(loss, 5)})
        if config is not None and way != "int4-packed":
            save(model, f"{run.args.output_dir}/model-{way}.safetensors")
    return rows


def save(model: GPT, path: str) -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, path, metadata)


def load(model: GPT, path: str) -> GPT:
    """Gives a model of the same shape the weights that `save` has written, and returns it."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    with safe_open(path, "pt") as file:
        weights, _ = unflatten_tensor_state_dict({name: file.get_tensor(name) for name in file.keys()}, file.metadata())     # noqa: SIM118
    model.requires_grad_(False).load_state_dict(weights, assign=True)
    return model


def widths_of(word: str, args: TrainArgs) -> list[int]:
    """32, 4, 2 of "32,4,2", and none of "after". Raises UsageError for what makes no sense with them, before anything is trained."""
    widths = [] if word == "after" else [int(part) if part.isdecimal() else 0 for part in word.split(",")]
    for wrong, wanted in (
            (not {*widths} <= {32, *range(2, 9)} or widths != sorted(widths)[::-1] or 32 in widths[-1:],
             "expected after, or bits that do not rise, 32 (not rounded) or 8 to 2 and not 32 at the end, as 4 or 32,8,4"),
            (0 < args.max_steps < len(widths), f"has {len(widths)} parts: give at least as many updates"),
            (len({*widths}) > 1 and (args.load_best_model_at_end or args.early_stopping_patience is not None),
             "the best update is one with more bits: leave --load_best_model_at_end and --early_stopping_patience away"),
            (args.n_embd % GROUP, f"{GROUP} weights have one scale: give an --n_embd that it divides"),
            (args.streaming, "samples are taken by number: leave --streaming away"),
            (args.bf16_full_eval or args.fp16_full_eval, "rows have types of their own: leave --bf16_full_eval and --fp16_full_eval away"),
            (os.environ.get("WORLD_SIZE", "1") != "1", "is for one process: train with train.py over ranks, and then give after --do_eval"),
            (not args.use_cpu, "is for CPUs: leave --use_cpu as it is")):
        if wrong:
            raise UsageError(f"{word}: {wanted}")
    return widths


def run(argv: list[str]) -> list[dict]:
    words = [*takewhile(lambda word: not word.startswith("-"), argv)]
    flags, args = argv[len(words):], parse_args(argv[len(words):], FLAGS, __doc__)
    widths, rows = {word: widths_of(word, args) for word in words or ("after", "32,32,32,2", "32,32,4,2")}, []
    data, ways = build_data(replace(args, do_eval=True)), after_training()       # before training: there may be no held-out data, or no torchao
    for word, bits in widths.items():
        folder = args.output_dir + f"/aware-{word.replace(',', '-')}" * bool(bits)
        done = train.run([*flags, "--output_dir", folder], callbacks=[Aware(bits)] if bits else (), flags=FLAGS, description=__doc__)
        rows += compare(done, data, {"simulated": None, f"int{bits[-1]}": weight_only(bits[-1], "convert")} if bits else ways, f"{word}: " * bool(bits))
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    table = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    Path(args.output_dir, "quantization.md").write_text(table)
    Path(args.output_dir, "quantization.json").write_text(json.dumps(rows, indent=4))
    print(table)
    return rows


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
