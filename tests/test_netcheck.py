"""The check of the network: real ranks on real hosts (network namespaces), what it measures, and who is named when some do not answer."""
import ctypes
import os
import re
import signal
import socket
import subprocess
import uuid

import pytest
import torch.distributed as dist

from state import UsageError
from tests.test_hosts import ip
from tests.toy import arguments, as_program
from tools.chaos import any_ended, exit_codes, said, send, start, until
from tools.ledger import Ledger
from tools.netcheck import FACTORS, collective, main, partner
from world import open_world

QUICK = ["--use_cpu", "--seconds", "0.001", "--timeout", "20"]


def check(folder: str, ranks: int, *flags: str) -> tuple[list[int], str]:
    """Exit codes of the ranks of one host, and all that they say."""
    return exit_codes(start(f"{folder}/log", ranks, main, [*QUICK, *flags]), folder), said(f"{folder}/log")


def test_ranks_of_one_host_see_each_other_and_every_collective_is_measured(fresh, tmp_path):
    codes, printed = fresh(check, str(tmp_path), 3, "--sizes", "1kB,100kB")
    assert codes == [0, 0, 0], printed
    table = [line.split() for line in printed.partition("rank to rank\n")[2].splitlines()[1:4]]
    assert [line[0] for line in table] == ["0", "1", "2"] and all(len(line) == 4 and float(ms) > 0 for line in table for ms in line[1:])
    lines = re.findall(r"^all ranks +(\S+) +([\d,]+) +([\d,.]+) +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert [(name, size) for name, size, *_ in lines] == [(name, size) for name in FACTORS for size in (("1,000", "100,000") if name == "send/recv" else ("996", "99,996"))]
    for name, size, microseconds, algorithm, bus in lines:
        number = int(size.replace(",", ""))
        assert float(algorithm) == pytest.approx(number / float(microseconds.replace(",", "")) / 1e3, rel=0.02)     # of rounded figures
        assert float(bus) / float(algorithm) == pytest.approx({"all-reduce": 4 / 3, "broadcast": 1, "send/recv": 1}.get(name, 2 / 3), rel=1e-3)
    assert re.search(r"slowest link of all ranks: rank \d .* and rank \d .* at 100,000 bytes; the median of 3 is", printed)


def sent_by(names: list[str]) -> list[float]:
    """Bytes that each of them sends from a rank, where n ranks in a ring send as few as can be."""
    found = []
    with open_world(arguments("none")) as world:
        for name in names:
            with Ledger(world.clock, ranks_per_node=3) as ledger:
                collective(name, 1200, (0, 1, 2), dist.group.WORLD, world.device)()
            found.append(sum(traffic.inside for traffic in ledger.traffic.values()))
    return found


def test_the_bus_bandwidth_is_that_of_the_bytes_that_a_ring_sends(ranks):
    names = [name for name in FACTORS if name not in ("broadcast", "send/recv")]
    for found in ranks.run(3, sent_by, names):
        assert found == pytest.approx([1200 * FACTORS[name](3) for name in names])


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
def test_every_pair_meets_once_in_as_few_turns_as_there_can_be(n):
    turns = [[partner(me, n, turn) for me in range(n)] for turn in range(n - 1 + n % 2)]
    for met in turns:
        assert all(met[other] == me != other for me, other in enumerate(met) if other is not None) and met.count(None) == n % 2
    assert sorted((me, other) for met in turns for me, other in enumerate(met) if other is not None) == [(a, b) for a in range(n) for b in range(n) if a != b]
    assert partner(0, n, len(turns)) is None


def test_one_rank_alone_is_told_to_use_torchrun():
    code, told = as_program("tools.netcheck")
    assert code == 2 and told.startswith("error: one rank alone has nobody to reach") and "torchrun" in told


@pytest.mark.parametrize("flags", [["--sizes", "1kB,"], ["--sizes", "0B"], ["--sizes", "1 kB"], ["--sizes", "64"], ["--timeout", "0"], ["--seconds", "nan"]])
def test_a_mistake_is_one_message(flags):
    with pytest.raises(UsageError, match="expected sizes as 1kB,64MB and positive numbers"):
        main(flags)


# ---- ranks that do not answer

def stop_at(point: str, stopped: int) -> None:
    if int(os.environ["RANK"]) == stopped and point == "start":
        os.kill(os.getpid(), signal.SIGSTOP)
    main([*QUICK, "--timeout", "5", "--seconds", "600"])        # longer than it takes to stop


def codes_of_the_others(folder: str, point: str, stopped: int) -> tuple[list[int], str]:
    """Exit codes of two healthy ranks of three, and all that they say."""
    log = f"{folder}/log"
    pids = start(log, 3, stop_at, point, stopped)
    others = [pid for rank, pid in enumerate(pids) if rank != stopped]
    if point == "collectives":
        until(lambda: "all-reduce" in said(log) or any_ended(others), "the first collective")     # before it gloo connects, for 30 s if need be
        os.kill(pids[stopped], signal.SIGSTOP)
    codes = exit_codes(others, log)
    send([pids[stopped]], signal.SIGKILL)
    return codes, said(log)


@pytest.mark.parametrize("point", ["start", "collectives"])
def test_a_rank_that_does_not_answer_is_named(fresh, tmp_path, point):
    codes, told = fresh(codes_of_the_others, str(tmp_path), point, 1)
    assert codes == [6, 6], told
    assert re.search(r"^error: .*rank 1 .*did not answer", told, re.MULTILINE) and "Traceback" not in told
    assert ("(rank 1: node 0, " in told) == (point == "collectives")        # where it is has been told by then


# ---- hosts

@pytest.fixture(scope="module")
def star():
    """Names of three network namespaces and the interface of each that the check uses: a has a cable to b and one to c, and passes nothing on."""
    tag = uuid.uuid4().hex[:6]
    a, b, c = names = [f"{name}{tag}" for name in "abc"]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for number, other in ((1, b), (2, c)):
            ip("link", "add", f"v{number}{tag}", "netns", a, "type", "veth", "peer", "name", "eth", "netns", other)
            for name, link, last in ((a, f"v{number}{tag}", 1), (other, "eth", 2)):
                ip("-n", name, "addr", "add", f"10.78.{number}.{last}/24", "dev", link)
                ip("-n", name, "link", "set", link, "up")
        ip("-n", c, "route", "add", "10.78.1.0/24", "via", "10.78.2.1")
        yield [(a, f"v1{tag}"), (b, "eth"), (c, "eth")]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not allowed here: {error} {getattr(error, 'stderr', '')}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def on_hosts(hosts: list[tuple[str, str]], per_host: int, flags: list[str]) -> None:
    """What a rank runs: it moves to its host, and takes the host's name."""
    rank, libc = int(os.environ["RANK"]), ctypes.CDLL(None, use_errno=True)
    name, link = hosts[rank // per_host]
    with open(f"/var/run/netns/{name}") as namespace:
        assert libc.setns(namespace.fileno(), 0x40000000) == 0 and libc.unshare(0x04000000) == 0        # CLONE_NEWNET, CLONE_NEWUTS
    socket.sethostname(f"host-{name[0]}")
    os.environ.update({"LOCAL_RANK": str(rank % per_host), "LOCAL_WORLD_SIZE": str(per_host), "GROUP_RANK": str(rank // per_host),
                       "MASTER_ADDR": "10.78.1.1", "GLOO_SOCKET_IFNAME": link})
    main(flags)


def check_hosts(folder: str, hosts: list[tuple[str, str]], per_host: int, *flags: str) -> tuple[list[int], str]:
    log = f"{folder}/log"
    return exit_codes(start(log, len(hosts) * per_host, on_hosts, hosts, per_host, [*QUICK, *flags]), log), said(log)


def test_two_hosts_are_measured_within_and_between(fresh, star, tmp_path):
    codes, printed = fresh(check_hosts, str(tmp_path), star[:2], 2, "--sizes", "10kB")
    assert codes == [0] * 4, printed
    assert "node 0, host-a, 10.78.1.1: ranks 0, 1\nnode 1, host-b, 10.78.1.2: ranks 2, 3\n" in printed and "FAILS" not in printed
    for scope, n in (("all ranks", 4), ("within nodes", 2), ("between nodes", 2)):
        found = re.findall(rf"^{scope} +(\S+) .* (\S+) +(\S+)$", printed, re.MULTILINE)
        assert [name for name, *_ in found] == [name for name in FACTORS if name != "send/recv" or n == 2]
        assert float(found[0][2]) / float(found[0][1]) == pytest.approx(2 * (n - 1) / n, rel=1e-3)
    assert "slowest link of between nodes: rank 0 (node 0, host-a, 10.78.1.1) and rank 2 (node 1, host-b, 10.78.1.2)" in printed
    assert re.search(r"slowest link of within nodes: rank (0 .* and rank 1|2 .* and rank 3) .* the median of 2 is", printed)


def test_hosts_that_do_not_reach_each_other_are_named_and_no_others(fresh, star, tmp_path):
    """b has no route to c, and what c sends to b is lost at a."""
    codes, told = fresh(check_hosts, str(tmp_path), star, 1, "--timeout", "2")
    assert codes == [6, 6, 6], told
    pairs = re.findall(r"rank (\d) \(node \d, host-(\w), .*\) does not reach rank (\d) \(node \d, host-(\w), .*\): (.*) \(", told)
    assert sorted(pair[:4] for pair in pairs) == [("1", "b", "2", "c"), ("2", "c", "1", "b")] and "2 of 6 connections fail" in told
    assert [line.split()[1:].count("FAILS") for line in told.partition("rank to rank\n")[2].splitlines()[1:4]] == [0, 1, 1]
