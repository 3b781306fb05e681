"""Tools that people run by hand give the right answer, and say so by their exit code."""
import pytest

from tools.strategies import BOUNDS, Case, run_case, show

PRECISIONS = ("float64", "float32")


@pytest.fixture(scope="module")
def one():
    return {precision: run_case(Case("ddp", 1, 2, precision), 3, True) for precision in PRECISIONS}


@pytest.mark.parametrize("world_size, strategy", [(2, "ddp"), (2, "zero1"), (2, "zero2"), (2, "fsdp"), (4, "hsdp")])
def test_every_strategy_holds_and_sends_what_the_formulas_say(ranks, one, world_size, strategy):
    results = {precision: ranks.run(world_size, run_case, Case(strategy, world_size, 2, precision), 3, True)[0] for precision in PRECISIONS}
    case = Case(strategy, world_size, 2)
    assert show(case, results, one)
    for change in ({"sent": results["float32"]["sent"] * 1.1}, {"reductions": 0}, {"held": {**results["float32"]["held"], "optimizer": 0}}, {"held": {**results["float32"]["held"], "gradients": 10**7}},
                   *([{"peak": 10**7}] if strategy in ("ddp", "zero1", "zero2") else []),
                   {"losses": [loss + 2 * BOUNDS["float32"] for loss in results["float32"]["losses"]]}):
        assert not show(case, {**results, "float32": {**results["float32"], **change}}, one)
