"""Writes text with a saved model, by its averaged weights if it has them:   python -m tools.generate runs/default --prompt 'def '"""
from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters import add_lora
from args import TrainArgs
from callbacks import Callback
from checkpoint import load_model
from evalloop import evaluating
from model import GPT, Cache, build_model
from rundir import verify
from state import UsageError, run_main
from storage import PartFiles, read_json
from tools.formats import lora_from_peft
from tools.inspect import newest


def main(argv: list[str] | None = None) -> str:
    """Prints and returns the prompt and its continuation."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run, for its newest")
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument("--length", type=int, default=500, help="bytes to write [%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest byte [%(default)s]")
    parser.add_argument("--top_k", type=int, help="only the so many likeliest bytes")
    parser.add_argument("--top_p", type=float, help="only the likeliest bytes that have this probability together")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    flags.checkpoint = newest(flags.checkpoint)
    verify(flags.checkpoint)
    known = TrainArgs().to_dict().keys()
    args = TrainArgs(**{k: v for k, v in read_json(flags.checkpoint, "args.json").items() if k in known})
    model = build_model(args)
    if os.path.exists(os.path.join(flags.checkpoint, "adapter_config.json")):
        add_lora(model, lora_from_peft(flags.checkpoint), args.lora_base)
    load_model(model, flags.checkpoint)
    with PartFiles(flags.checkpoint, "ema") as averages:       # what evaluations saw, if there are any
        for name, p in model.named_parameters():
            if name in averages.found:
                averages.fill(name, 0, p.data)
    text = write(model, flags.prompt, flags.length, flags.temperature, flags.top_k, flags.top_p, flags.seed)
    print(text)
    return text


def write(model: GPT, prompt: str, length: int, temperature: float = 0.8, top_k: int | None = None, top_p: float | None = None, seed: int = 0) -> str:
    """A prompt and its continuation by a model of bytes, as `generate`; a zero byte, the end of a document, ends it."""
    given = encode(model, prompt)
    new = generate(model, torch.tensor(given or [0], device=next(model.parameters()).device), length, temperature, top_k, top_p, [seed], eos_id=0)
    tokens = [*given, *new[0].tolist(), 0]
    return bytes(t for t in tokens[:tokens.index(0)] if t < 256).decode(errors="replace")


def encode(model: GPT, prompt: str) -> list[int]:
    given = [*os.fsencode(prompt)]
    if max(given, default=0) >= model.vocab_size:
        raise UsageError(f"the prompt {prompt!r} has byte {max(given)}; the model knows 0..{model.vocab_size - 1}")
    return given


class SampleCallback(Callback):
    """After each evaluation while training, what the model makes of a prompt, as a row of metrics.jsonl, for --sample_prompt. It is on every
    rank: a sharded model is called by all of them."""

    def __init__(self, prompt: str, length: int = 200):
        self.prompt, self.length, self.sampled_step = prompt, length, -1

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        encode(model, self.prompt)      # a mistake is told now

    def on_evaluate(self, args, state, control, run=None, **kwargs):
        if state.in_training and self.sampled_step != state.global_step:     # of several data sets once
            self.sampled_step = state.global_step
            with evaluating(run) as model:
                text = write(model, self.prompt, self.length)
            run.callbacks.log(run, {"sample": text})


@torch.no_grad()
def generate(model: GPT, prompts: Tensor | list[Tensor], length: int, temperature: float = 0.8, top_k: int | None = None,
             top_p: float | None = None, seeds: list[int] | None = None, eos_id: int | None = None, pad_id: int = 0,
             agree: Callable[[bool], bool] = bool) -> Tensor:
    """`length` new tokens for each of the prompts ((T,), (B, T), or a list of (T,) of different lengths): (B, length). A row is filled up
    with pad_id after its eos_id, and writing ends when all rows have; of ranks whose weights are sharded, and that have to call the model
    equally often, when `agree` (own rows have ended) says so. Each row sees the last block_size tokens.

    temperature 0 takes the likeliest token. top_k: of that many likeliest tokens only; top_p: of the fewest likeliest ones that have this
    probability together, of those of top_k (Holtzman et al. 2020, section 3.1). Each row draws by its own seed (default: 0, 1, ...): what
    it writes does not depend on the others, and no global generator moves."""
    rows = [torch.as_tensor(row) for row in (prompts[None] if isinstance(prompts, Tensor) and prompts.dim() < 2 else prompts)]
    seeds = list(range(len(rows))) if seeds is None else seeds
    if not rows or any(row.dim() != 1 or not len(row) for row in rows) or len(seeds) != len(rows):
        raise UsageError(f"generate was given prompts of shapes {[tuple(row.shape) for row in rows]} and {len(seeds)} seeds; it needs one "
                         f"prompt or more, each a row of at least one token, and a seed for each")
    if length < 1 or not 0 <= temperature < math.inf or top_k is not None and top_k < 1 or top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"generate was given length={length}, temperature={temperature}, top_k={top_k}, top_p={top_p}; it needs "
                         f"length >= 1, temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
    rows, device = [row[-model.block_size:] for row in rows], rows[0].device
    T = max(len(row) for row in rows)
    tokens = torch.stack([F.pad(row, (T - len(row), 0), value=pad_id) for row in rows])                     # (B, T)
    pads = torch.tensor([[T - len(row)] for row in rows], device=device)
    columns = torch.arange(T, device=device)
    positions = torch.where(columns < pads, columns, columns - pads)            # padding is a document of its own
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = torch.stack([torch.rand(length, dtype=torch.float64, generator=generator) for generator in generators]).to(device)
    written = torch.full((len(rows), length), pad_id, device=device)
    finite = torch.tensor(True, device=device)
    ended, cache = torch.zeros(len(rows), dtype=torch.bool, device=device), Cache(model.block_size - 1)
    training = [module for module in model.modules() if module.training]
    model.eval()
    # caches grow, and torch.compile would make a graph for each length
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        for at in range(length):
            with eager:
                logits = model(tokens, position_ids=positions, cache=cache)[:, -1].float()              # (B, V)
            finite &= logits.amax(-1).isfinite().all()          # -inf is a token that cannot come
            new = logits.argmax(-1) if temperature == 0 else sample(logits / temperature, draws[:, at, None], top_k, top_p)
            written[:, at] = torch.where(ended, pad_id, new)
            ended |= new == eos_id
            if eos_id is not None and agree(bool(ended.all())):
                break
            tokens, positions = new[:, None], None
    finally:
        for module in training:
            module.training = True
    if not finite:
        raise UsageError("the model cannot write: its outputs are not finite, so its training has diverged")
    return written


def sample(logits: Tensor, draws: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """The token (B,) of each row of logits (B, V) at which the cumulative probability passes draws (B, 1), uniform in [0, 1)."""
    probabilities = F.softmax(logits.double(), dim=-1)
    if top_k is not None or top_p is not None:
        likeliest, order = probabilities.sort(descending=True, stable=True)
        likeliest[:, top_k or len(likeliest[0]):] = 0
        before = likeliest.cumsum(-1) - likeliest
        likeliest[before >= (top_p or 1) * likeliest.sum(-1, keepdim=True)] = 0
        probabilities = torch.zeros_like(likeliest).scatter(-1, order, likeliest)
    reached = probabilities.cumsum(-1)
    return (reached <= draws * reached[:, -1:]).sum(-1)


if __name__ == "__main__":
    run_main(main)
