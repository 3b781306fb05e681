import pytest
import torch

from tests.ranks import Ranks

torch.set_num_threads(1)

SLOWEST = ("test_strategies", "test_failures", "test_chaos", "test_main", "test_hosts", "test_convert", "test_sweep", "test_fuzz", "test_finetune", "test_recipes_b", "test_resume", "test_lora")


def pytest_collection_modifyitems(items):
    """Files that take longest first: of several processes that each run whole files, none is left alone with one of them at the end."""
    order = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()
