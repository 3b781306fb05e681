import os

import pytest
import torch

from tests.ranks import Ranks

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"        # before huggingface_hub is imported

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


@pytest.fixture(scope="session")
def fresh():
    """Calls a function in a process that has imported torch and computed nothing yet, so that it can fork ranks in no time (`start` in tools/chaos.py)."""
    pool = Ranks()
    yield lambda function, *args: pool.run(1, function, *args)[0]
    pool.close()
