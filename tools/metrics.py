"""Metrics that hold a few sums, whatever the size of the data set.

Each has reset(), update(predictions, labels) and compute() -> {name: number}. update takes the CPU tensors of some samples in data order;
rows are independent, so that the result does not depend on how they were batched. A label of -100 is ignored.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from collators import IGNORE
from state import UsageError


class Metric:
    """Sums of numbers by name: whole numbers or float64, which add up alike in any batching."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.sums: Counter = Counter()

    def __getitem__(self, name: str) -> float:
        """One of the sums. UsageError before the first update."""
        if not self.sums:
            raise UsageError(f"{type(self).__name__}.compute() before update(): there is nothing to measure")
        return self.sums[name]


class Accuracy(Metric):
    """Share of labels (n,) or (n, T) that predictions, ids of the same shape, give: accuracy; and baseline, what always saying the most
    frequent label would reach."""

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        predictions, labels = kept(predictions, labels)
        self.sums["hits"] += int((predictions == labels).sum())
        self.sums.update({("label", label): count for label, count in Counter(labels.tolist()).items()})

    def compute(self) -> dict[str, float]:
        hits = self["hits"]
        counts = [count for name, count in self.sums.items() if name[0] == "label"]
        total = sum(counts)
        return {"accuracy": ratio(hits, total), "baseline": ratio(max(counts, default=0), total)}


class MacroF1(Metric):
    """F1 averaged over the classes that occur as a prediction or label, and of each such class as f1_<class>: harmonic mean of precision and
    recall, 2 hits / (predicted + actual). Sokolova and Lapalme 2009, table 3, except that F1 is averaged, not computed from averages."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        super().__init__()

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        predictions, labels = kept(predictions, labels)
        for name, values in (("hit", labels[predictions == labels]), ("predicted", predictions), ("actual", labels)):
            for label, count in enumerate(torch.bincount(values, minlength=self.num_classes).tolist()):
                self.sums[name, label] += count

    def compute(self) -> dict[str, float]:
        sizes = {label: self["predicted", label] + self["actual", label] for label in range(self.num_classes)}
        scores = {label: 2 * self["hit", label] / size for label, size in sizes.items() if size}
        return {"macro_f1": ratio(sum(scores.values()), len(scores)), **{f"f1_{label}": score for label, score in scores.items()}}


class Regression(Metric):
    """Mean squared error and mean absolute error of predictions (n,), in the labels' units; r2 = 1 - squared error / that of always saying the mean
    label; pearson, the correlation of the two. r2 and pearson are nan where the labels (for pearson the predictions too) are all the same."""

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        p, y = predictions.double().flatten(), labels.double().flatten()
        if not len(y):
            return
        if not self.sums:
            self.origin = y[0].item()       # sums of squares of large numbers with a small spread would cancel
        p, y = p - self.origin, y - self.origin
        for name, terms in (("n", torch.ones_like(y)), ("p", p), ("y", y), ("pp", p * p), ("yy", y * y), ("py", p * y), ("absolute", (p - y).abs()),
                            ("squared", (p - y) ** 2)):
            self.sums[name] += terms.sum().item()

    def compute(self) -> dict[str, float]:
        n = self["n"]
        of_p, of_y, of_both = (self[a + b] - self[a] * self[b] / n for a, b in ("pp", "yy", "py"))     # n times the (co)variances
        return {"mse": self["squared"] / n, "mae": self["absolute"] / n, "r2": 1 - ratio(self["squared"], max(of_y, 0.0)),
                "pearson": ratio(of_both, math.sqrt(max(of_p, 0.0) * max(of_y, 0.0)))}


class SpanMatch(Metric):
    """Answers as (first, last) token, (n, 2) or a pair of (n,): exact_match, the share of spans that are the label's, and f1, the mean over
    samples of the harmonic mean of precision and recall over tokens (Rajpurkar et al. 2016, section 6.1, but of positions instead of words: the
    same words elsewhere do not count). A span whose last token is before its first is empty."""

    def update(self, predictions: Tensor | tuple, labels: Tensor | tuple) -> None:
        p, y = (torch.stack(tuple(x), -1) if isinstance(x, (tuple, list)) else x for x in (predictions, labels))
        both = torch.stack([torch.maximum(p[:, 0], y[:, 0]), torch.minimum(p[:, 1], y[:, 1])], -1)
        for same, shared, size in zip((p == y).all(-1).tolist(), lengths(both), (a + b for a, b in zip(lengths(p), lengths(y)))):
            self.sums["exact"] += same
            self.sums["f1"] += 2 * shared / size if size else float(same)
            self.sums["n"] += 1

    def compute(self) -> dict[str, float]:
        n = self["n"]
        return {"exact_match": self["exact"] / n, "f1": self["f1"] / n}


class SequenceMetric(Metric):
    """Of sequences of ids, predictions (n, T) and labels (n, L), or (n, K, L) where any of K labels is right; an empty one is none. Each ends before
    the first `end`; -100 and the ids of `skip`, such as padding and start, are left out. `unknown`: an id which, in labels, nothing equals."""

    def __init__(self, end: int | None = None, skip: Sequence[int] = (), unknown: int | None = None):
        self.end, self.skip, self.unknown = end, {IGNORE, *skip}, unknown
        super().__init__()

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        for prediction, row in zip(predictions.tolist(), labels.tolist()):
            rows = [self.clean(r) for r in (row if labels.dim() == 3 else [row])]
            references = [[-1 if i == self.unknown else i for i in r] for r in rows if r] or [[]]
            self.add(self.clean(prediction), references)
            self.sums["n"] += 1

    def clean(self, row: list[int]) -> list[int]:
        row = row[:row.index(self.end)] if self.end in row else row
        return [i for i in row if i not in self.skip]


class EditDistance(SequenceMetric):
    """exact_match, the share of sequences without an error; error_rate, insertions, deletions and substitutions per id of the labels (Levenshtein
    1966), which is the phoneme error rate if ids are phonemes and the word error rate if they are words. Of several labels the closest counts."""

    def add(self, prediction: list[int], references: list[list[int]]) -> None:
        distance, length = min((levenshtein(prediction, reference), len(reference)) for reference in references)
        self.sums["exact"] += distance == 0
        self.sums["distance"] += distance
        self.sums["length"] += length

    def compute(self) -> dict[str, float]:
        return {"exact_match": self["exact"] / self["n"], "error_rate": ratio(self["distance"], self["length"])}


class Bleu(SequenceMetric):
    """bleu of the corpus in [0, 100]: geometric mean of the shares of n-grams, n = 1 to 4, that the references have as well, times the brevity
    penalty; of several references, counts are clipped by the most, and the nearest length counts. Without smoothing. Papineni et al. 2002, section 2.3."""

    def add(self, prediction: list[int], references: list[list[int]]) -> None:
        self.sums["length"] += len(prediction)
        self.sums["reference"] += min((abs(len(r) - len(prediction)), len(r)) for r in references)[1]
        for n in range(1, 5):
            allowed: Counter = Counter()
            for reference in references:
                allowed |= ngrams(reference, n)
            found = ngrams(prediction, n)
            self.sums["hits", n] += (found & allowed).total()
            self.sums["ngrams", n] += found.total()

    def compute(self) -> dict[str, float]:
        length, reference = self["length"], self["reference"]
        hits, found = [self["hits", n] for n in range(1, 5)], [self["ngrams", n] for n in range(1, 5)]
        if not all(hits):
            return {"bleu": 0.0}
        precision = math.exp(sum(math.log(h / f) for h, f in zip(hits, found)) / 4)
        return {"bleu": 100 * precision * math.exp(min(0.0, 1 - reference / length))}


class RougeL(SequenceMetric):
    """rouge_l in [0, 100]: mean over samples of the F1 of the longest common subsequence; of several labels the best counts. Lin 2004, section 3.1,
    with beta = 1."""

    def add(self, prediction: list[int], references: list[list[int]]) -> None:
        self.sums["f1"] += max(ratio(2 * common_subsequence(prediction, r), len(prediction) + len(r), 1.0) for r in references)

    def compute(self) -> dict[str, float]:
        return {"rouge_l": 100 * self["f1"] / self["n"]}


# ---------------------------------------------------------------------------------------------------- what they count
def kept(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels that count, and what was predicted for them: (k,) each."""
    if predictions.shape != labels.shape:
        raise UsageError(f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} differ in shape: give the argmax, not logits")
    return predictions[labels != IGNORE], labels[labels != IGNORE]


def ratio(part: float, whole: float, empty: float = math.nan) -> float:
    return part / whole if whole else empty


def lengths(spans: Tensor) -> list[int]:
    return (spans[:, 1] - spans[:, 0] + 1).clamp(min=0).tolist()


def ngrams(row: list[int], n: int) -> Counter:
    return Counter(zip(*(row[i:] for i in range(n))))


def table(a: list[int], b: list[int], first: Callable, cell: Callable) -> int:
    """The last cell of a table over the prefixes of a and b, row by row: cell(above, left, diagonal, equal)."""
    row = [first(j) for j in range(len(b) + 1)]
    for i, x in enumerate(a, 1):
        new = [first(i)]
        for j, y in enumerate(b):
            new.append(cell(row[j + 1], new[j], row[j], x == y))
        row = new
    return row[-1]


def levenshtein(a: list[int], b: list[int]) -> int:
    return table(a, b, lambda n: n, lambda above, left, diagonal, equal: min(above + 1, left + 1, diagonal + (not equal)))


def common_subsequence(a: list[int], b: list[int]) -> int:
    return table(a, b, lambda n: 0, lambda above, left, diagonal, equal: diagonal + 1 if equal else max(above, left))
