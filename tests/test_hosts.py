"""Two hosts: two torchrun agents in two network namespaces with a cable (veth) between them."""
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

from tests.test_strategies import finish

ROOT = Path(__file__).parent.parent
STRATEGIES = ("fsdp", "hsdp")
PROGRAM = """
import pathlib, sys
import numpy as np, os
from tests.test_hosts import STRATEGIES
from tests.test_strategies import finish
for strategy in STRATEGIES:
    weights, losses = finish(pathlib.Path(sys.argv[1]) / strategy, 4, strategy, hsdp_shard_size=None, max_steps=4)
    if os.environ["RANK"] == "0":
        np.savez(pathlib.Path(sys.argv[1]) / f"{strategy}.npz", **weights, losses=losses)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts():
    """Names of two namespaces, of the network interface in each, and their addresses."""
    tag = uuid.uuid4().hex[:6]
    names, links, addresses = [f"a{tag}", f"b{tag}"], [f"va{tag}", f"vb{tag}"], ["10.77.0.1", "10.77.0.2"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(names, links, addresses):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, links, addresses))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not allowed here: {error} {getattr(error, 'stderr', '')}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_hosts_get_the_weights_of_one(hosts, tmp_path):
    """hsdp shards within a host by default and replicates between the hosts. The processes train one after the other, as starting them takes longest."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    agents = []
    for node, (name, link, address) in enumerate(hosts):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
                   "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0][2]}:29400", "--rdzv-id", "1", "--rdzv-conf", f"is_host={int(node == 0)}",
                   "--local-addr", address, str(program), str(tmp_path)]
        agents.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                       env={**os.environ, "GLOO_SOCKET_IFNAME": link, "PYTHONPATH": str(ROOT)}))
    try:
        for agent in agents:
            said, _ = agent.communicate(timeout=240)
            assert agent.returncode == 0, said
    finally:
        for agent in agents:
            agent.kill()
    expected, losses = finish(tmp_path / "one", 1, max_steps=4)
    for strategy in STRATEGIES:
        with np.load(tmp_path / f"{strategy}.npz") as got:
            assert set(got.files) == {*expected, "losses"}
            for key, value in {**expected, "losses": losses}.items():
                np.testing.assert_allclose(got[key], value, rtol=0, atol=1e-11, err_msg=f"{strategy} {key}")
