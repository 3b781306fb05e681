"""Two hosts: two torchrun agents in two network namespaces with a cable (veth) between them, which is pulled out in the middle of a training."""
import ctypes
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import uuid
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.launcher.api import launch_agent
from torch.distributed.run import config_from_args, parse_args

from tests import test_pipeline, test_strategies
from tests.toy import rows
from tools.chaos import AUTO, JOB, TEXT, any_ended, exit_codes, newest, outcome, said, send, start, until
from train import main, run_main

STEPS = 30


def flags(folder, run: str, *more: str) -> list[str]:
    """Of a job with dropout. One pipeline is ranks 0 and 2, the other one 1 and 3: each has a stage on each host."""
    return [*JOB.split(), "--n_layer", "2", "--pp", "2", "--max_steps", str(STEPS), "--dataset", f"{folder}/text.txt", "--output_dir", f"{folder}/{run}", *more]


def first(folder: str) -> None:
    """What a rank of the first launch runs: one training after the other, and the last of them is cut."""
    for name, (weights, losses, *_) in {
            "fsdp": test_strategies.finish(f"{folder}/fsdp", 4, "fsdp", max_steps=4),
            "hsdp": test_strategies.finish(f"{folder}/hsdp", 4, "hsdp", hsdp_shard_size=None, max_steps=4),
            "pp": test_pipeline.finish(f"{folder}/pp", 4, pp=2, max_steps=5)}.items():
        np.savez(f"{folder}/{name}-{os.environ['RANK']}.npz", **weights, losses=losses)
    for run in ("whole", "cut"):
        run_main(main, flags(folder, run, "--ddp_timeout", "10"))


def second(folder: str) -> None:
    run_main(main, flags(folder, "cut", *AUTO))


def agent(hosts, node: int, function: str, folder: str) -> None:
    """What a host runs: torchrun, with a function of this file as its program, whose processes are forked from torchrun's."""
    (name, link, address), libc = hosts[node], ctypes.CDLL(None)
    with open(f"/var/run/netns/{name}") as namespace:
        assert libc.setns(namespace.fileno(), 0x40000000) == 0 and libc.unshare(0x04000000) == 0        # CLONE_NEWNET, CLONE_NEWUTS
    socket.sethostname(f"host-{name[0]}")
    os.environ["GLOO_SOCKET_IFNAME"] = link
    multiprocessing.current_process().daemon = False        # as its parent, and may have children
    options = parse_args(["--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", str(int(function == "second")), "--start-method", "fork",
                          "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0][2]}:29400", "--rdzv-id", "1",
                          "--rdzv-conf", f"is_host={int(node == 0)}", "--local-addr", address, function, folder])
    launch_agent(config_from_args(options)[0], globals()[function], [folder])


def launch(hosts, folder: str, function: str) -> list[int]:
    """Process ids of the agents of both hosts; what is said on them is in the files `function`-0 and `function`-1."""
    return [start(f"{folder}/{function}-{node}", 1, agent, hosts, node, function, folder)[0] for node in (0, 1)]


def wait_for_checkpoint(folder: str, step: int, agents: list[int]) -> None:
    until(lambda: newest(f"{folder}/cut") >= step or any_ended(agents), f"checkpoint-{step}")


def lose_host(hosts, folder: str) -> list[int]:
    """The first launch: in its last training the cable of host b is pulled out, and is back when all has ended. Exit codes of the agents."""
    agents, (name, link, _) = launch(hosts, folder, "first"), hosts[1]
    try:
        wait_for_checkpoint(folder, 6, agents)
        ip("-n", name, "link", "set", link, "down")
        return exit_codes(agents, f"{folder}/first")
    finally:
        send(agents, signal.SIGKILL)        # their ranks die with them
        ip("-n", name, "link", "set", link, "up")


def lose_rank(hosts, folder: str) -> list[int]:
    """The second launch goes on with that training; then a rank of host b is killed."""
    step, agents = newest(f"{folder}/cut"), launch(hosts, folder, "second")
    try:
        wait_for_checkpoint(folder, step + 2, agents)
        os.kill(int(Path(f"/proc/{agents[1]}/task/{agents[1]}/children").read_text().split()[0]), signal.SIGKILL)
        return exit_codes(agents, f"{folder}/second")
    finally:
        send(agents, signal.SIGKILL)


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
            ip("netns", "exec", name, "sh", "-c", "echo 6 > /proc/sys/net/ipv4/tcp_retries2")      # a lost connection is known to be lost after 25 s, not 15 minutes
        yield list(zip(names, links, addresses))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not allowed here: {error} {getattr(error, 'stderr', '')}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def cut(hosts, fresh, tmp_path_factory):
    """The folder of the first launch."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "text.txt").write_text(TEXT)
    codes = fresh(lose_host, hosts, str(folder))
    assert all(codes) and 6 <= newest(f"{folder}/cut") < STEPS, said(f"{folder}/first-0") + said(f"{folder}/first-1")
    return folder


def test_two_hosts_get_the_weights_of_one(cut, tmp_path):
    """hsdp shards within a host by default and replicates between the hosts; pp has a stage on each."""
    whole = test_strategies.finish(tmp_path / "one", 1, max_steps=4)
    for name, (weights, losses, *_) in {"fsdp": whole, "hsdp": whole, "pp": test_pipeline.finish(tmp_path / "pp", 1, max_steps=5)}.items():
        ranks = [dict(np.load(cut / f"{name}-{rank}.npz")) for rank in range(4)]
        assert {key for got in ranks for key in got} == {*weights, "losses"}
        for rank, got in enumerate(ranks):
            for key, value in got.items():
                np.testing.assert_allclose(value, {**weights, "losses": losses}[key], rtol=0, atol=1e-11, err_msg=f"{name} {rank} {key}")


def test_a_host_that_is_cut_off_is_named_by_the_others_and_names_them(cut):
    for node, silent in ((0, "on host host-b (node 1) ranks 2, 3"), (1, "on host host-a (node 0) ranks 0, 1")):
        words = said(f"{cut}/first-{node}")
        assert re.search(rf"error: rank \d lost touch in \w+ \(\w+\.py:\d+\): {re.escape(silent)} did not answer: .*cut off.* --ddp_timeout 10 s", words), words


def test_a_run_that_lost_a_host_and_then_a_rank_ends_with_the_bits_of_one_that_did_not(hosts, fresh, cut):
    """It goes on from the newest checkpoint, the second time by itself, as torchrun starts all ranks again."""
    run, step = f"{cut}/cut", newest(f"{cut}/cut")
    codes, words = fresh(lose_rank, hosts, str(cut)), said(f"{cut}/second-0")
    assert codes == [0, 0], words + said(f"{cut}/second-1")
    resumed = [int(number) for number in re.findall(r"resuming from .*checkpoint-(\d+)", words)]
    assert len(resumed) == 2 and resumed[0] == step < resumed[1] and rows(run)[-1]["step"] == STEPS
    assert outcome(run) == outcome(f"{cut}/whole")
