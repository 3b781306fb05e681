"""Where in a function is the answer? Extractive question answering: 3,100 questions about functions of Python's standard library, such as
"what is assigned to other ?", each answered by an expression of the source, a RoFormer of two layers from scratch
(a BERT with rotary positions: it has to find what stands beside a name. With BERT's learned positions it got to 0.23 in as many updates).

    python -m recipes.question_answering

Exact match 0.530 on 299 held-out questions (3 seeds: 0.505 to 0.555; always the first expression that is asked about: 0.324), 45 s on one
thread of 2 cores, 8 of them to read the data.
Needs: pip install transformers. The data is the source code of Python itself; another version has other functions.
"""
from __future__ import annotations

import sys
from functools import cache

import torch
import torch.nn.functional as F

from args import TrainArgs
from collators import PaddingCollator
from data import Data
from state import run_main
from tools.corpora import Vocabulary, extractive_qa
from tools.metrics import SpanMatch
from train import main

FLAGS = """--output_dir runs/question_answering --max_steps 700 --per_device_train_batch_size 16 --per_device_eval_batch_size 64
 --learning_rate 2e-3 --warmup_steps 70 --train_sampling_strategy group_by_length --logging_steps 100 --save_steps 700
 --do_train --do_eval"""
METRIC = "eval_exact_match"
LONGEST_ANSWER = 40     # tokens


@cache
def read() -> tuple[Vocabulary, list[dict], list[dict], float]:
    """Samples: START question END source; token_type_ids are 1 in the source, where the answer's first and last token are. Rare names get
    ids by their hash, so that the model sees that two are equal."""
    parts = extractive_qa(max_chars=400)
    words = Vocabulary((f"{question} {source}" for question, source, _, _ in parts[0]), 2000, buckets=500)

    def sample(question: str, source: str, start: int, end: int) -> dict:
        asked, tokens = [words.START, *words.encode(question), words.END], words.encode(source)
        inside = [len(asked) + i for i, (first, last) in enumerate(words.spans(source)) if first < end and last > start]
        return {"input_ids": asked + tokens, "token_type_ids": [0] * len(asked) + [1] * len(tokens),
                "start_positions": inside[0], "end_positions": inside[-1]}
    # the baseline: of each source the first expression that is asked about
    firsts: dict[str, int] = {}
    for _, source, start, _ in parts[1]:
        firsts[source] = min(start, firsts.get(source, start))
    baseline = sum(start == firsts[source] for _, source, start, _ in parts[1]) / len(parts[1])
    return words, *([sample(*row) for row in part] for part in parts), baseline


def build_data(args: TrainArgs) -> Data:
    _, train, held_out, _ = read()
    return Data(train, held_out, "questions about functions of the standard library")


def build_model(args: TrainArgs):
    from transformers import RoFormerConfig, RoFormerForQuestionAnswering
    return RoFormerForQuestionAnswering(RoFormerConfig(
        vocab_size=len(read()[0]), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=320, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, initializer_range=0.1))


def span_loss(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed over samples: the mean of the cross-entropies of the first and the last token (Devlin et al. 2019, section 4.2), among those
    of the source alone. And the scores (B, T, 2), from which evaluations take the answer."""
    output = model(**{key: value for key, value in batch.items() if not key.endswith("_positions")})
    scores = torch.stack([output.start_logits, output.end_logits], -1).float()
    scores = scores.masked_fill(batch["token_type_ids"][..., None] == 0, -torch.inf)
    losses = [F.cross_entropy(scores[..., i], batch[key], reduction="sum") for i, key in enumerate(("start_positions", "end_positions"))]
    return sum(losses) / 2, scores


def best_span(scores: torch.Tensor, labels) -> torch.Tensor:
    """The first and last token (B, 2) of the span with the largest sum of scores; it does not end before it starts, and is not too long."""
    sums = scores[:, :, None, 0] + scores[:, None, :, 1]                                    # (B, first, last)
    legal = torch.ones_like(sums[0], dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    best = sums.masked_fill(~legal, -torch.inf).flatten(1).argmax(-1)
    return torch.stack([best // scores.shape[1], best % scores.shape[1]], -1)


class SpanMatchBesideFirst(SpanMatch):
    """baseline: always the first of the expressions that a function is asked about, which does not look at the question."""

    def compute(self) -> dict[str, float]:
        return {**super().compute(), "baseline": read()[3]}


def run(argv: list[str], **parts):
    return main(argv, build_data, build_model, PaddingCollator(Vocabulary.PAD), span_loss, SpanMatchBesideFirst(),
                preprocess_logits_for_metrics=best_span, flags=FLAGS, description=__doc__, **parts)


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
