"""Metrics give the numbers of hand calculations and of direct formulas over the whole set, however the samples are batched."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from state import UsageError
from tools.metrics import Accuracy, Bleu, EditDistance, MacroF1, Regression, RougeL, SpanMatch

ids = torch.tensor


def value(metric, predictions, labels):
    metric.reset()
    metric.update(predictions, labels)
    return metric.compute()


def test_accuracy_leaves_out_ignored_labels_and_knows_the_majority():
    assert value(Accuracy(), ids([[1, 2, 0], [1, 1, 9]]), ids([[1, 2, -100], [1, 2, -100]])) == {"accuracy": 0.75, "baseline": 0.5}
    assert value(Accuracy(), ids([0, 0, 0, 0]), ids([1, 1, 1, 0])) == {"accuracy": 0.25, "baseline": 0.75}


def test_macro_f1_by_hand():
    """Class 0: 1 hit of 2 predicted and 1 actual; class 1: 1 hit of 1 and 2; class 2: not there; class 3: 0 hits of 1 predicted."""
    got = value(MacroF1(4), ids([0, 0, 1, 3]), ids([0, 1, 1, -100]))
    assert got == pytest.approx({"macro_f1": 2 / 3, "f1_0": 2 / 3, "f1_1": 2 / 3})
    assert value(MacroF1(4), ids([0, 0, 1, 3]), ids([0, 1, 1, 1])) == pytest.approx({"macro_f1": (2 / 3 + 1 / 2 + 0) / 3, "f1_0": 2 / 3, "f1_1": 1 / 2, "f1_3": 0})


def test_regression_by_hand():
    assert value(Regression(), ids([1., 2., 6.]), ids([1., 3., 5.])) == pytest.approx(
        {"mse": 2 / 3, "mae": 2 / 3, "r2": 1 - 2 / 8, "pearson": 10 / math.sqrt(14 * 8)})
    got = value(Regression(), ids([1., 1.]), ids([2., 2.]))
    assert got["mse"] == 1 and math.isnan(got["r2"]) and math.isnan(got["pearson"])


def test_spans_by_hand():
    """The same; 2 of 3 and 4 tokens shared; apart; both empty; one empty."""
    predictions, labels = ids([[3, 5], [1, 3], [0, 1], [4, 3], [4, 3]]), ids([[3, 5], [2, 5], [4, 5], [4, 3], [4, 4]])
    expected = {"exact_match": 2 / 5, "f1": (1 + 4 / 7 + 0 + 1 + 0) / 5}
    assert value(SpanMatch(), predictions, labels) == pytest.approx(expected)
    assert value(SpanMatch(), (predictions[:, 0], predictions[:, 1]), (labels[:, 0], labels[:, 1])) == pytest.approx(expected)


def test_edit_distance_by_hand():
    """kitten - sitting: 3; then what follows the end does not count; then the closest of two pronunciations."""
    kitten, sitting = ids([[11, 9, 20, 20, 5, 14]]), ids([[19, 9, 20, 20, 9, 14, 7]])
    assert value(EditDistance(), kitten, sitting) == {"exact_match": 0, "error_rate": 3 / 7}
    assert value(EditDistance(end=3, skip=(0,)), ids([[0, 5, 6, 3, 8], [5, 7, 7, 3, 0]]), ids([[5, 6, 3, -100], [5, 6, 3, -100]])) == {"exact_match": 0.5, "error_rate": 0.5}
    several = ids([[[5, 6, 7, 8], [5, 6, -100, -100]], [[5, 6, -100, -100], [-100, -100, -100, -100]]])
    assert value(EditDistance(), ids([[5, 6, -100], [5, 6, 7]]), several) == {"exact_match": 0.5, "error_rate": 1 / 4}
    assert value(EditDistance(), ids([[-100]]), several[1:]) == {"exact_match": 0, "error_rate": 1}


def test_bleu_by_hand():
    """Example 2 of Papineni et al.: the the the the the the the has 2 of 7 unigrams right. Then all but the first of 6 words right."""
    repeated, reference = ids([[1] * 7]), ids([[1, 2, 3, 4, 1, 5]])
    metric = Bleu()
    assert value(metric, repeated, reference) == {"bleu": 0.0} and metric["hits", 1] == 2
    assert value(metric, reference, reference) == {"bleu": pytest.approx(100)}
    expected = 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** (1 / 4)
    assert value(metric, ids([[9, 2, 3, 4, 1, 5]]), reference) == {"bleu": pytest.approx(expected)}
    assert value(metric, reference[:, 1:], reference) == {"bleu": pytest.approx(100 * math.exp(1 - 6 / 5))}        # short
    assert value(metric, reference, reference[:, 1:]) == {"bleu": pytest.approx(expected)}                         # long: no penalty


def test_bleu_clips_by_each_reference_and_takes_the_nearest_length():
    metric = Bleu()
    value(metric, ids([[1, 1, 1, 2]]), ids([[[1, 1, 3, 4, 5, -100, -100], [1, 2, -100, -100, -100, -100, -100], [3, 4, 5, 6, 7, 8, 9]]]))
    assert metric["hits", 1] == 3 and metric["reference"] == 5


def test_words_outside_the_vocabulary_are_never_right():
    assert value(Bleu(unknown=1), ids([[5, 6, 7, 8, 1]]), ids([[5, 6, 7, 8, 1]])) == {"bleu": pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))}


def test_rouge_l_by_hand():
    """Lin 2004, section 3.1: police killed the gunman - police kill the gunman and the gunman kill police: 3 and 2 of 4 in common."""
    reference = [1, 2, 3, 4]
    assert value(RougeL(), ids([[1, 5, 3, 4]]), ids([reference])) == {"rouge_l": 75}
    assert value(RougeL(), ids([[3, 4, 5, 1]]), ids([reference])) == {"rouge_l": 50}
    assert value(RougeL(), ids([[1, 2, -100, -100], [7, 7, 7, 7]]), ids([reference, reference])) == {"rouge_l": pytest.approx(100 / 3)}


METRICS = [Accuracy(), MacroF1(4), Regression(), SpanMatch(), EditDistance(end=3), Bleu(end=3), RougeL(end=3)]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_batching_changes_nothing(metric, data):
    n, width = data.draw(st.integers(2, 8)), 2 if isinstance(metric, SpanMatch) else 5
    seed, cut = data.draw(st.integers(0, 2**16)), data.draw(st.integers(0, n))
    generator = torch.Generator().manual_seed(seed)
    predictions, labels = torch.randint(0, 4, (2, n, width), generator=generator)
    if isinstance(metric, Regression):
        predictions, labels = predictions[:, 0] + 1e6, labels[:, 0] + 1e6
    whole = value(metric, predictions, labels)
    metric.reset()
    for part in (slice(0, cut), slice(cut, n)):
        metric.update(predictions[part], labels[part])
    assert metric.compute() == pytest.approx(whole, rel=1e-12, nan_ok=True)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=20), st.sampled_from([0, 1e7]))
def test_regression_is_what_the_whole_set_gives(pairs, offset):
    p, y = ids(pairs).double().T + offset
    got = value(Regression(), p, y)
    assert got["mse"] == pytest.approx(((p - y) ** 2).mean().item(), rel=1e-12)
    if y.std() > 0:
        assert got["r2"] == pytest.approx((1 - ((p - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()).item(), rel=1e-9, abs=1e-9)
        if p.std() > 0:
            assert got["pearson"] == pytest.approx(torch.corrcoef(torch.stack([p, y]))[0, 1].item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)
def test_nothing_to_measure_is_said(metric):
    metric.reset()
    with pytest.raises(UsageError, match="before update"):
        metric.compute()


def test_logits_are_refused():
    with pytest.raises(UsageError, match="argmax"):
        Accuracy().update(torch.zeros(2, 5), ids([1, 2]))
