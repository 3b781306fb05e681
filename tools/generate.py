"""Writes text with a saved model, by its averaged weights if it has them:   python -m tools.generate runs/default --prompt 'def '"""
from __future__ import annotations

import argparse
import os

import torch

from args import TrainArgs
from checkpoint import PartFiles, list_checkpoints, load_model, read_json, verify
from model import build_model, generate
from state import UsageError, run_main


def main(argv: list[str] | None = None) -> str:
    """Prints and returns the prompt and its continuation; a zero byte, the end of a document, ends the text."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run, for its newest")
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument("--length", type=int, default=500, help="bytes to write [%(default)s]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest byte [%(default)s]")
    parser.add_argument("--top_k", type=int, help="only the so many likeliest bytes")
    parser.add_argument("--top_p", type=float, help="only the likeliest bytes that have this probability together")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    if steps := list_checkpoints(flags.checkpoint):       # the folder of a run: its newest
        flags.checkpoint = os.path.join(flags.checkpoint, f"checkpoint-{steps[0]}")
    verify(flags.checkpoint)
    known = TrainArgs().to_dict().keys()
    model = build_model(TrainArgs(**{k: v for k, v in read_json(flags.checkpoint, "args.json").items() if k in known}))
    load_model(model, flags.checkpoint)
    with PartFiles(flags.checkpoint, "ema") as averages:       # what evaluations saw, if there are any
        for name, p in model.named_parameters():
            if name in averages.found:
                averages.fill(name, 0, p.data)
    prompt = [*os.fsencode(flags.prompt)]
    if max(prompt, default=0) >= model.vocab_size:
        raise UsageError(f"--prompt has byte {max(prompt)}; the model knows 0..{model.vocab_size - 1}")
    new = generate(model, torch.tensor(prompt or [0]), flags.length, flags.temperature, flags.top_k, flags.top_p, [flags.seed], eos_id=0)
    tokens = [*prompt, *new[0].tolist(), 0]
    text = bytes(t for t in tokens[:tokens.index(0)] if t < 256).decode(errors="replace")
    print(text)
    return text


if __name__ == "__main__":
    run_main(main)
