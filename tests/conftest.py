import os

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

from tests.ranks import Ranks

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"        # before huggingface_hub is imported

LAUNCHING = {f"test_{name}.py" for name in ["strategies", "pipeline", "parallel", "chaos", "hosts", "dryrun", "netcheck", "experts", "tools", "failures"]}     # ranks, nearly all the time


class Apart(LoadFileScheduling):
    """Of two processes that run tests one takes what launches ranks, since more of them than cores slow each other down, and the other one the rest, by files."""

    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.partition("::")[0].rpartition("/")[2]
        return "ranks" if name in LAUNCHING else name


def pytest_xdist_make_scheduler(config, log):
    return Apart(config, log)


def pytest_collection_modifyitems(items):
    """What takes longest begins."""
    items.sort(key=lambda item: item.path.name not in LAUNCHING)


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
