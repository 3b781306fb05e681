"""The comparison with other trainers compares equal work, and its intervals are right."""
import numpy as np
import pytest

from bench.contestants import BARE, OURS, run
from bench.speed import TOLERANCE, Limit, check_losses, interval


def test_contestants_come_to_the_same_loss(monkeypatch):
    losses = {name: run(name, updates=12).last_loss for name in (BARE, OURS, "HF Trainer", "Accelerate")}
    assert [*losses.values()] == pytest.approx([losses[BARE]] * 4, rel=TOLERANCE)
    monkeypatch.setattr("bench.contestants.PEAK", 1.1e-3)
    assert run(BARE, updates=12).last_loss != pytest.approx(losses[BARE], rel=TOLERANCE)     # the updates made a difference


def test_the_loss_of_all_logits_is_that_of_the_chunked_one():
    losses = [run(BARE, updates=2, vocab=40_000, batch=16, all_logits=both).last_loss for both in (False, True)]     # above CHUNK_ELEMENTS
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)


def test_an_update_is_a_reading_of_the_clock():
    counts = iter(range(100))
    for name in (BARE, OURS):
        job = run(name, updates=5, clock=lambda: float(next(counts)))
        assert np.diff(job.ticks).tolist() == [1] * 4, name


def test_other_work_is_refused():
    check_losses({"a": 2.0, "b": 2.0 + 1e-6})
    with pytest.raises(SystemExit, match="not the same work"):
        check_losses({"a": 2.0, "b": 2.0 + 1e-4})


def test_interval_of_the_median():
    """For normal values it is 1.96 standard errors wide, sqrt(pi / 2) of the mean's; equal values have none."""
    values = np.random.default_rng(1).normal(1.0, 0.1, 400)
    middle, low, high = interval(values.tolist())
    assert middle == np.median(values) and low < middle < high
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(np.pi / 2) * 0.1 / np.sqrt(400), rel=0.3)
    assert interval([0.9] * 7) == (0.9, 0.9, 0.9)


def test_intervals_cover_the_median():
    generator = np.random.default_rng(2)
    found = [interval(generator.normal(1.0, 0.1, 15).tolist()) for _ in range(60)]
    assert 50 <= sum(low <= 1.0 <= high for _, low, high in found) <= 60


def test_a_limit_holds_inside_of_the_interval_or_beyond_it():
    at_most, at_least = Limit("a", "b", "<=", 1.0), Limit("a", "b", ">=", 1.0)
    for low, high, below, above in ((0.8, 0.9, True, False), (0.9, 1.1, True, True), (1.1, 1.2, False, True)):
        assert (at_most.holds(low, high, 0.0), at_least.holds(low, high, 0.0)) == (below, above)
    assert Limit("a", "b", "<=", 1.0, 30).holds(1.1, 1.2, 29.0) and not Limit("a", "b", "<=", 1.0, 30).holds(1.1, 1.2, 31.0)

