"""What is put around a model to train it: noise on its embeddings, recomputed activations, compilation.

All of it is applied in place before the model is wrapped, and leaves the names of parameters as they are.
"""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from state import UsageError


def adapt(model: nn.Module, args) -> None:
    """Applies what the flags ask for: --neftune_noise_alpha, --activation_checkpointing, --torch_compile."""
    if args.neftune_noise_alpha is not None:
        add_neftune(model, args.neftune_noise_alpha)
    if args.activation_checkpointing:
        checkpoint_activations(model)
    if args.torch_compile:
        model.compile(backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)   # in place: no _orig_mod


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
