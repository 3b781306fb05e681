"""What is put around a model to train it: low-rank adapters (LoRA) on a frozen, perhaps quantized base, noise on its embeddings,
recomputed activations, compilation.

All of it is applied in place before the model is wrapped, and leaves the names of parameters as they are. Adapters are hooks on the
layers that they change, which get two layers more, lora_A and lora_B: the names PEFT gives to them in its files.
"""
from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optim import HIDDEN
from state import UsageError
from zero import plain

PEFT_PREFIX = "base_model.model."       # of every name in PEFT's files


def adapt(model: nn.Module, args) -> None:
    """Applies what the flags ask for: --lora_rank and the like, --neftune_noise_alpha, --activation_checkpointing, --torch_compile."""
    if args.lora_adapter is not None:
        from tools.formats import lora_from_peft
        add_lora(model, lora_from_peft(args.lora_adapter), args.lora_base)
    elif args.lora_rank is not None:
        lora, names = Lora.from_args(args), [name for name, _ in model.named_modules()]
        targets = lora.target_modules if isinstance(lora.target_modules, list) else []
        if unknown := [end for end in targets if not any(matches(name, [end]) for name in names)]:
            raise UsageError(f"--lora_target_modules {args.lora_target_modules}: no module has a name that ends in {', '.join(unknown)}; "
                             f"{linear_ends(model)}")
        add_lora(model, lora, args.lora_base)
    if args.neftune_noise_alpha is not None:
        add_neftune(model, args.neftune_noise_alpha)
    if args.activation_checkpointing:
        checkpoint_activations(model)
    if args.torch_compile:
        model.compile(backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)   # in place: no _orig_mod


# ---------------------------------------------------------------------------------------------------- LoRA
@dataclass(frozen=True)
class Lora:
    """The settings of low-rank adapters, by PEFT's names: y = W x + b + scale * B A dropout(x), with A (r, in) and B (out, r).
    Hu et al. 2021, section 4.1. With use_rslora the scale is alpha / sqrt(r) in place of alpha / r (Kalajdzievski 2023)."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None       # ends of names, or a pattern of whole names; None: linear layers inside numbered ones
    modules_to_save: list[str] | None = None            # ends of names of what is trained as a whole, such as a new classifier
    bias: str = "none"                                  # biases to train: none, all, or lora_only, those of the layers that have adapters
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @classmethod
    def from_args(cls, args) -> Lora:
        targets = args.lora_target_modules
        pattern = targets is not None and not re.fullmatch(r"[\w., -]+", targets)
        return cls(args.lora_rank, args.lora_rank if args.lora_alpha is None else args.lora_alpha, args.lora_dropout,
                   targets if pattern else names_in(targets), names_in(args.lora_modules_to_save), args.lora_bias, args.use_rslora)


def names_in(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def matches(name: str, wanted: list[str] | str) -> bool:
    """Whether a module is meant: by a pattern of its whole name, or by the end of it, as in PEFT."""
    return re.fullmatch(wanted, name) is not None if isinstance(wanted, str) else any(name == end or name.endswith(f".{end}") for end in wanted)


def is_saved_whole(name: str, lora: Lora) -> bool:
    """Whether a module is trained as a whole. PEFT goes by the last letters here: norm means input_layernorm too."""
    return name.endswith(tuple(lora.modules_to_save or ()))


def is_transposed(module: nn.Module) -> bool:
    """transformers' Conv1D of GPT-2, a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_transposed(module)}


def uses_of(model: nn.Module) -> Counter[Tensor]:
    """How many names each parameter has: a tied one several."""
    return Counter(p for _, p in model.named_parameters(remove_duplicate=False))


def linear_ends(model: nn.Module) -> str:
    ends = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    return f"its linear layers are called {', '.join(ends)}" if ends else "it has no linear layers"


def find_targets(model: nn.Module, lora: Lora) -> dict[str, nn.Module]:
    """The layers that get adapters, by name. UsageError for those that cannot have one, which would train nothing, or break a merge."""
    try:
        matches("", lora.target_modules or [])
    except re.error as error:
        raise UsageError(f"--lora_target_modules {lora.target_modules}: it is no regular expression: {error}") from None
    linear = linear_layers(model)
    uncalled = {*getattr(model, "uncalled", ()), *(f"{name}.out_proj" for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))}
    if lora.target_modules is None:
        found = {name: module for name, module in linear.items() if HIDDEN.search(name) and name not in uncalled}
    else:
        found = {name: module for name, module in model.named_modules() if matches(name, lora.target_modules)}
    found = {name: module for name, module in found.items() if not is_saved_whole(name, lora)}
    uses = uses_of(model)
    for name, module in found.items():
        problem = f"is a {type(module).__name__}, and adapters are for linear layers" if name not in linear else \
            "is not called in the forward pass, which uses its weight directly" if name in uncalled else \
            "shares its weight with another layer" if uses[module.weight] > 1 else ""
        if problem:
            raise UsageError(f"an adapter is wanted for {name}, which {problem}: name other layers by --lora_target_modules")
    if not found:
        raise UsageError(f"adapters are wanted for {lora.target_modules or 'linear layers inside numbered ones'}, and the model has none such; "
                         f"{linear_ends(model)}")
    return found


def add_lora(model: nn.Module, lora: Lora, base: str = "float") -> None:
    """Freezes the model and gives its target layers adapters, which start at nothing: A as PEFT draws it, B zero. base: "nf4" or "int8"
    keep the frozen weights of these layers quantized (`quantize`)."""
    targets = find_targets(model, lora)
    model.requires_grad_(False)
    for name, layer in targets.items():
        rows, columns = reversed(layer.weight.shape) if is_transposed(layer) else layer.weight.shape
        dtype, device = torch.promote_types(layer.weight.dtype, torch.float32), layer.weight.device
        layer.lora_A = nn.Linear(columns, lora.r, bias=False, dtype=dtype, device=device)
        layer.lora_B = nn.Linear(lora.r, rows, bias=False, dtype=dtype, device=device)
        nn.init.zeros_(layer.lora_B.weight)
        layer.lora = lora
        layer.register_forward_hook(add_update)
        if lora.bias == "lora_only" and layer.bias is not None:
            layer.bias.requires_grad_(True)
        if base != "float":
            quantize(layer, name, base)
    for name, p in model.named_parameters():
        if lora.bias == "all" and "bias" in name:       # as in PEFT
            p.requires_grad_(True)
    train_whole(model, lora)
    model.lora = lora


def train_whole(model: nn.Module, lora: Lora) -> None:
    """Has modules_to_save trained. UsageError for what an adapter's file could not bring back."""
    names, uses = [name for name, _ in model.named_modules()], uses_of(model)
    if missing := [end for end in lora.modules_to_save or () if not any(name.endswith(end) for name in names)]:
        raise UsageError(f"--lora_modules_to_save: the model has no module with a name that ends in {', '.join(missing)}")
    whole = {name: model.get_submodule(name) for name in names if is_saved_whole(name, lora)}
    for name, module in whole.items():
        if any(uses[p] > 1 for p in module.parameters()):
            raise UsageError(f"--lora_modules_to_save: {name} shares a weight with another module, which would be trained too: leave it away")
        module.requires_grad_(True)
    kept = {module for saved in whole.values() for module in saved.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats and module not in kept:
            raise UsageError(f"{name} is a BatchNorm, whose statistics change in training, and an adapter would not keep them: "
                             f"give --lora_modules_to_save {name}")


def add_update(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """What an adapter adds to the output of its layer."""
    x = F.dropout(inputs[0].to(layer.lora_A.weight.dtype), layer.lora.lora_dropout, layer.training)
    return output + (layer.lora_B(layer.lora_A(x)) * layer.lora.scale).to(output.dtype)


@torch.no_grad()
def remove_lora(model: nn.Module) -> None:
    """Adds the adapters into the weights of their layers, and leaves the model as if it had never had them; what is frozen stays so. It
    must be whole (not split by fsdp) and its base not quantized."""
    for name, layer in [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]:
        if len(plain(layer.weight)) > 1:
            raise UsageError(f"{name}.weight is quantized: merge into the model as it was before (--lora_base float)")
        update = layer.lora_B.weight @ layer.lora_A.weight * layer.lora.scale
        layer.weight += (update.T if is_transposed(layer) else update).to(layer.weight.dtype)
        del layer.lora_A, layer.lora_B, layer.lora
        for key in [key for key, hook in layer._forward_hooks.items() if hook is add_update]:
            del layer._forward_hooks[key]
    del model.lora


def lora_of(model: nn.Module) -> Lora | None:
    """The settings of the adapters of a model, if it has any."""
    lora = getattr(model, "lora", None)     # a model of one's own may have something else of that name
    return lora if isinstance(lora, Lora) else None


def adapter_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all weights and buffers of a model with adapters, by name, what a checkpoint holds, by PEFT's names: what is trained, and
    whatever belongs to modules_to_save. The base stays where it was."""
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    whole = [name for name, _ in model.named_modules() if is_saved_whole(name, model.lora)]
    kept = {}
    for name, tensor in weights.items():
        module, _, key = name.rpartition(".")
        if tensor.requires_grad or any(module == end or module.startswith(f"{end}.") for end in whole):
            kept[PEFT_PREFIX + (f"{module}.base_layer.{key}" if module in adapted else name)] = tensor
    return kept


def quantize(layer: nn.Module, name: str, kind: str) -> None:
    """Keeps a frozen weight in 4-bit NormalFloat, in blocks of 64 with a scale each that is quantized too (Dettmers et al. 2023, QLoRA,
    section 3), or in 8 bits with a scale per row; by torchao. Scales are quantized by 16 and not by 256, so that shards can be cut there."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.workflows import to_nf4
    problem = "a transposed layer" if is_transposed(layer) else "on the meta device, without numbers yet" if layer.weight.is_meta else \
        f"of {layer.weight.numel()} numbers, no multiple of 64" if kind == "nf4" and layer.weight.numel() % 64 else ""
    if problem:
        raise UsageError(f"--lora_base {kind}: {name}.weight is {problem}: name other layers in --lora_target_modules, or use --lora_base float")
    if kind == "nf4":
        layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), 64, math.gcd(layer.weight.numel() // 64, 16)), requires_grad=False)
    else:
        quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))       # it is that of the whole process
        layer.weight.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- other changes to a model
def add_neftune(model: nn.Module, alpha: float) -> None:
    """Uniform noise in +-alpha / sqrt(T * C) on the embeddings (B, T, C) while training: on what a transformers model names, or
    on the first nn.Embedding. Jain et al. 2023, algorithm 1."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else \
        next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise UsageError("--neftune_noise_alpha adds noise to token embeddings, and this model has no nn.Embedding: leave it away")

    def add_noise(module: nn.Module, inputs, output: Tensor) -> Tensor:
        if not module.training:
            return output
        size = alpha / torch.sqrt(torch.tensor(output.size(1) * output.size(2)))
        return output + torch.zeros_like(output).uniform_(-size, size)
    embedding.register_forward_hook(add_noise)


def checkpoint_activations(model: nn.Module) -> None:
    """Keeps only the inputs of each block and computes it again in backward. Chen et al. 2016, section 4."""
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif hasattr(model, "blocks"):
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    else:
        raise UsageError("--activation_checkpointing needs a model with .blocks, a list of modules, or a transformers model")
