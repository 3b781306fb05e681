"""What does a function do? From its source to the first paragraph of its docstring: 3,900 functions of Python's standard library, a BART
that can copy words, from scratch.

    python -m recipes.summarization

Rouge-L 31.0 on 457 held-out functions (3 seeds: 30.6 to 31.5; always "return the <name of the function> .": 28.4), 55 s on one thread of
2 cores, 8 of them to read the data. Most of what it learns in this time is to make a sentence of the name.
Needs: pip install transformers. The data is the source code of Python itself; another version has other functions.
"""
from __future__ import annotations

import re
import sys
from functools import cache

import torch

from args import TrainArgs
from collators import Seq2SeqCollator
from data import Data
from loss import logits_loss
from state import run_main
from tools.corpora import Vocabulary, docstrings
from tools.metrics import RougeL
from train import main

FLAGS = """--output_dir runs/summarization --max_steps 900 --per_device_train_batch_size 16 --per_device_eval_batch_size 64
 --learning_rate 4e-3 --warmup_steps 70 --weight_decay 0.05 --adam_beta2 0.98 --train_sampling_strategy group_by_length --logging_steps 100
 --save_steps 900 --do_train --do_eval"""
METRIC = "eval_rouge_l"
LONGEST_SOURCE, LONGEST_SUMMARY = 120, 24
SPECIAL = {"end": Vocabulary.END, "skip": (Vocabulary.PAD, Vocabulary.START), "unknown": Vocabulary.UNKNOWN}


def pieces(text: str) -> str:
    """copyTree, copy_tree and "Copy tree" are the same two words."""
    return " ".join(re.findall(r"[A-Za-z][a-z]*|\d|[^\w\s]", text)).lower()


@cache
def read() -> tuple[Vocabulary, list[dict], list[dict]]:
    parts = [[(pieces(source), pieces(summary)) for source, summary in part] for part in docstrings(max_chars=400)]
    words = Vocabulary((text for pair in parts[0] for text in pair), 1500, buckets=500)
    return words, *([{"input_ids": words.encode(source)[:LONGEST_SOURCE], "labels": [*words.encode(summary)[:LONGEST_SUMMARY], words.END]}
                     for source, summary in part] for part in parts)


def build_data(args: TrainArgs) -> Data:
    _, train, held_out = read()
    return Data(train, held_out, "functions of the standard library, as words, and what their docstrings say")


def build_model(args: TrainArgs):
    from transformers import BartConfig

    from tools.copying import CopyingBart
    return CopyingBart(BartConfig(
        vocab_size=len(read()[0]), d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=LONGEST_SOURCE, dropout=0.1, init_std=0.1,
        pad_token_id=Vocabulary.PAD, bos_token_id=Vocabulary.START, eos_token_id=Vocabulary.END, decoder_start_token_id=Vocabulary.START,
        forced_eos_token_id=None))


def summarize(model, batch: dict) -> torch.Tensor:
    """generate encodes input_ids once, and repeats what else it is given for each beam."""
    ids = batch["input_ids"]
    return model.generate(ids, source_ids=ids, attention_mask=batch["attention_mask"], max_new_tokens=LONGEST_SUMMARY,
                          num_beams=4, no_repeat_ngram_size=2)


class RougeBesideTemplate(RougeL):
    def compute(self) -> dict[str, float]:
        return {**super().compute(), "baseline": baseline()}


@cache
def baseline() -> float:
    """For every function: return the <name of the function>."""
    words, _, held_out = read()
    metric = RougeL(**SPECIAL)
    for row in held_out:
        source = row["input_ids"]
        name = source[source.index(words.id("def")) + 1:source.index(words.id("("), source.index(words.id("def")))]
        metric.update(torch.tensor([[*words.encode("return the"), *name, words.id(".")]]), torch.tensor([row["labels"]]))
    return metric.compute()["rouge_l"]


def run(argv: list[str], **parts):
    collate = Seq2SeqCollator(Vocabulary.PAD, decoder_start_id=Vocabulary.START)
    return main(argv, build_data, build_model, collate, logits_loss,
                RougeBesideTemplate(**SPECIAL), summarize, flags=FLAGS, description=__doc__, **parts)


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
