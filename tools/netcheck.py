"""Before a long run on many ranks: does every rank reach every other one, and how fast is the network between them?

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-id 1 -m tools.netcheck

is started on every machine, as the run will be. Each rank says where it is and connects to each other one by TCP, at the address that gloo takes, of the
interface GLOO_SOCKET_IFNAME or of the host's name: a table has the milliseconds until the other one has answered, and pairs that fail are named. Then it times
what training uses, between all ranks, within nodes (all at once; the slowest counts) and between nodes (the first rank of each). As in nccl-tests,
of a message of S bytes that takes the slowest of n ranks t seconds, with the factors of FACTORS,

    algorithm bandwidth = S / t
    bus bandwidth       = S / t x 2 (n - 1) / n    all-reduce
                          S / t x (n - 1) / n      all-gather, reduce-scatter, all-to-all; S is the whole array, and each rank's part S / n
                          S / t                    broadcast, send/recv

The bus bandwidth is what the hardware has to do, whatever n; the time of a small S is the latency. send/recv goes there and back between two ranks, and t
is half of that: every pair gets its turn, and the slowest is named. Exit code 6: some ranks do not answer within --timeout, or do not reach each other.
"""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import socket
import socketserver
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from args import TrainArgs
from state import UsageError, run_main
from world import World, open_store, open_world, print0

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
WIDEST_TABLE, MOST_CALLS, CONNECTIONS = 16, 200, 64
FACTORS = {"all-reduce": lambda n: 2 * (n - 1) / n, "all-gather": lambda n: (n - 1) / n, "reduce-scatter": lambda n: (n - 1) / n,
           "all-to-all": lambda n: (n - 1) / n, "broadcast": lambda n: 1, "send/recv": lambda n: 1}


def main(argv: list[str] | None = None) -> None:
    """Rank 0 prints what is found. Raises UsageError, with exit code 6 if ranks do not answer or do not reach each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--sizes", default="1kB,32kB,1MB,8MB,64MB", help="of messages, with commas [%(default)s]")
    parser.add_argument("--timeout", type=int, default=60, help="seconds that a rank waits for the others [%(default)s]")
    parser.add_argument("--seconds", type=float, default=0.3, help="that each line of the table is measured for, about [%(default)s]")
    parser.add_argument("--use_cpu", action="store_true", help="also where there are GPUs: from memory, by gloo")
    flags = parser.parse_args(argv)
    found = [re.fullmatch(r"([1-9]\d*)(B|kB|MB|GB)", size) for size in flags.sizes.split(",")]
    if not all(found) or flags.timeout < 1 or not flags.seconds > 0:
        raise UsageError(f"--sizes {flags.sizes} --timeout {flags.timeout} --seconds {flags.seconds}: expected sizes as 1kB,64MB and positive numbers")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        raise UsageError("one rank alone has nobody to reach: start the check by torchrun, on the machines and with the numbers of ranks of the run, "
                         "as torchrun --standalone --nproc-per-node 2 -m tools.netcheck")
    store = open_store(rank, world_size, flags.timeout)       # kept: it would be closed while others open it for the world
    names = meet(store, rank, world_size, flags.timeout)
    try:
        with contextlib.ExitStack() as stack:
            try:
                world = stack.enter_context(open_world(TrainArgs(output_dir="none", ddp_timeout=flags.timeout, use_cpu=flags.use_cpu)))
            except RuntimeError as error:
                raise UsageError(f"rank {rank} ({names[rank]}) reaches the others by TCP, but not by gloo: {str(error).splitlines()[0][:160]}", 6) from error
            measure_all(world, names, sorted(int(size[1]) * UNITS[size[2]] for size in found), flags)
    except UsageError as error:
        silent = re.search(r"ranks? ([\d, ]+) did not answer", str(error))
        hosts = "; ".join(f"rank {r}: {names[int(r)]}" for r in silent[1].split(", ")) if silent else f"rank {rank}: {names[rank]}"
        raise UsageError(f"{error} ({hosts})", error.exit_code) from error


# ---------------------------------------------------------------------------------------------------- who reaches whom

def meet(store: dist.Store, rank: int, world_size: int, timeout_s: int) -> list[str]:
    """The hosts of all ranks, after each has reached each. Raises UsageError with the ranks that do not answer, or the pairs that fail."""
    turns = 1 + world_size // CONNECTIONS
    watchdog = threading.Timer((4 + turns) * timeout_s, give_up, [rank])      # waiting for a store whose keeper is stopped or cut off cannot be interrupted
    watchdog.daemon = True
    watchdog.start()
    with socketserver.ThreadingTCPServer((own_address(), 0), Answer) as server, ThreadPoolExecutor(CONNECTIONS) as pool:
        server.rank, server.daemon_threads = rank, True
        server.socket.listen(world_size)        # they may all ask at once
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cards = exchange(store, "card", [os.environ.get("GROUP_RANK", "0"), socket.gethostname(), *server.server_address], rank, world_size, timeout_s)
        names = [f"node {node}, {host}, {address}" for node, host, address, _ in cards]
        row = list(pool.map(lambda r: reach(cards[r][2:], r, timeout_s), range(world_size)))
        rows = exchange(store, "row", row, rank, world_size, (1 + turns) * timeout_s, names)
        server.shutdown()       # every rank has asked
    watchdog.cancel()
    failed = [f"rank {a} ({names[a]}) does not reach rank {b} ({names[b]}): {cell}" for a, cells in enumerate(rows) for b, cell in enumerate(cells)
              if isinstance(cell, str)]
    if rank == 0:
        print_table(rows, names)
    if failed:
        told = "\n  ".join([":", *failed[:50], *[f"and {len(failed) - 50} more"] * (len(failed) > 50)])
        if len({*names}) > 1 and any(address.startswith("127.") for _, _, address, _ in cards):
            told += "\n127.0.0.1 is each host's own address: set GLOO_SOCKET_IFNAME to the interface that leads to the others"
        raise UsageError(f"{len(failed)} of {world_size * (world_size - 1)} connections fail{told if rank == 0 else f', as rank 0 ({names[0]}) tells'}", 6)
    return names


class Answer(socketserver.StreamRequestHandler):
    """Tells who asks which rank this is."""

    def handle(self):
        self.wfile.write(b"%d\n" % self.server.rank)


def give_up(rank: int) -> None:
    print(f"error: rank {rank} on {socket.gethostname()} waits in vain for {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, where ranks meet: the "
          f"process there is stopped, or its host is cut off", file=sys.stderr, flush=True)
    os._exit(6)


def own_address() -> str:
    """Where gloo listens: the IPv4 address of the interface GLOO_SOCKET_IFNAME, else of the host's name, else the loopback."""
    with socket.socket() as probe:
        if name := os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]:
            try:
                return socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))[20:24])       # SIOCGIFADDR of Linux
            except OSError as error:
                there = ", ".join(interface for _, interface in socket.if_nameindex())
                raise UsageError(f"GLOO_SOCKET_IFNAME={name} on {socket.gethostname()}: {error.strerror}; its interfaces are {there}") from None
        with contextlib.suppress(OSError):
            probe.bind((socket.gethostbyname(socket.gethostname()), 0))
            return probe.getsockname()[0]
    return "127.0.0.1"


def exchange(store: dist.Store, key: str, value, rank: int, world_size: int, timeout_s: float, names: list[str] | None = None) -> list:
    """JSON values of all ranks. Raises UsageError with the ranks that leave none in time."""
    keys = [f"{key}{r}" for r in range(world_size)]
    try:
        store.set(keys[rank], json.dumps(value))
        with contextlib.suppress(dist.DistStoreError):      # some are silent
            store.wait(keys, timedelta(seconds=timeout_s))
        silent = [f"rank {r} ({names[r] if names else 'it has not said where it is'})" for r in range(world_size) if not store.check([keys[r]])]
        if not silent:
            return [json.loads(store.get(key)) for key in keys]
    except dist.DistError:
        silent = [f"rank 0 ({names[0] if names else os.environ['MASTER_ADDR']}), or the torchrun that keeps the store for it,"]
    raise UsageError(f"{', '.join(silent)} did not answer rank {rank} ({names[rank] if names else socket.gethostname()}) within {timeout_s} s: dead, stopped "
                     f"or cut off from {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, where ranks meet", 6)


def reach(address: list, rank: int, timeout_s: float) -> float | str:
    """Milliseconds to connect and hear that it is this rank, or what went wrong."""
    begin = time.perf_counter()
    try:
        with socket.create_connection(tuple(address), timeout_s) as connection, connection.makefile() as answer:
            said = answer.readline().strip()
    except OSError as error:
        return f"{error.strerror or error} ({address[0]}:{address[1]})"
    return 1e3 * (time.perf_counter() - begin) if said == str(rank) else f"somebody else is at {address[0]}:{address[1]}, who said {said!r}"


def print_table(rows: list[list], names: list[str]) -> None:
    """Milliseconds from each rank (its line) to each; where ranks are too many, the slowest pair of each two hosts."""
    hosts = {name: [r for r, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    by_rank = len(names) <= WIDEST_TABLE
    places = [[r] for r in range(len(names))] if by_rank else [*hosts.values()]
    for number, (name, ranks) in enumerate(hosts.items()):
        print(f"{'' if by_rank else f'{number}: '}{name}: rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}")
    print(f"\nmilliseconds from {'rank to rank' if by_rank else 'host to host'}\n{'':>6}" + "".join(f"{number:>8}" for number in range(len(places))))
    for number, here in enumerate(places):
        cells = [[rows[a][b] for a in here for b in there] for there in places]
        print(f"{number:>6}" + "".join(f"{'FAILS' if any(isinstance(ms, str) for ms in cell) else f'{max(cell):.2f}':>8}" for cell in cells), flush=True)


# ---------------------------------------------------------------------------------------------------- how fast

def measure_all(world: World, names: list[str], sizes: list[int], flags: argparse.Namespace) -> None:
    """Every collective in every group of ranks, and every pair; a line of each as it comes."""
    nodes = [[r for r, other in enumerate(names) if other == name] for name in dict.fromkeys(names)]
    scopes = {"all ranks": [[*range(world.world_size)]]}
    if several := 1 < len(nodes) < world.world_size:
        scopes |= {"within nodes": [node for node in nodes if len(node) > 1], "between nodes": [[node[0] for node in nodes]]}
    print0(world, f"\n{'':<30}{'bytes':>12}{'microseconds':>14}{'algorithm GB/s':>16}{'bus GB/s':>10}")
    told = []
    for scope, teams in scopes.items():
        groups = {tuple(team): dist.new_group(team, timeout=timedelta(seconds=flags.timeout)) for team in teams}       # every rank makes all of them
        mine, n = next((team for team in groups if world.rank in team), ()), max(map(len, teams))
        for name in list(FACTORS)[:-1]:
            for size in sizes:
                call = collective(name, size, mine, groups[mine], world.device) if mine else None
                show(world, scope, name, max(1, size // (4 * n)) * 4 * n, timed(world, call, flags.seconds)[1], n)
        if several and scope == "all ranks":        # its pairs are those of the other two
            continue
        for size in sizes:
            links = measure_pairs(world, mine, n, size, flags.seconds)
            show(world, scope, "send/recv", size, max(links.values()), 2)
        (a, b), slowest = max(links.items(), key=lambda link: link[1])
        told.append(f"slowest link of {scope}: rank {a} ({names[a]}) and rank {b} ({names[b]}), {size / slowest / 1e9:.3g} GB/s at {size:,} bytes; "
                    f"the median of {len(links)} is {size / statistics.median(links.values()) / 1e9:.3g} GB/s")
    print0(world, "\n" + "\n".join(told))


def show(world: World, scope: str, name: str, size: int, seconds: float, n: int) -> None:
    speed = size / seconds / 1e9
    print0(world, f"{scope:<15}{name:<15}{size:>12,}{1e6 * seconds:>14,.1f}{speed:>16.4g}{speed * FACTORS[name](n):>10.4g}")


def collective(name: str, size: int, ranks: tuple[int, ...], group: dist.ProcessGroup, device: torch.device) -> Callable:
    """A call of it on float32 zeros, `size` bytes in all or, so that ranks have equal parts, up to one number per rank more or less."""
    part = torch.zeros(max(1, size // (4 * len(ranks))), device=device)
    whole, other = (torch.zeros(len(part) * len(ranks), device=device) for _ in range(2))
    return {"all-reduce": lambda: dist.all_reduce(whole, group=group), "all-gather": lambda: dist.all_gather_single(whole, part, group=group),
            "reduce-scatter": lambda: dist.reduce_scatter_single(part, whole, group=group),
            "all-to-all": lambda: dist.all_to_all_single(other, whole, group=group), "broadcast": lambda: dist.broadcast(whole, ranks[0], group=group)}[name]


def timed(world: World, call: Callable | None, seconds: float) -> tuple[float, float]:
    """Seconds that a call takes this rank and the slowest one, the mean of several; without one a rank only waits for the others."""
    def run(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times if call else 0):
            call()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times
    run(1)      # connects
    once, = world.max(int(1e9 * run(1)))
    own = run(max(1, min(MOST_CALLS, int(1e9 * seconds / once))))
    return own, world.max(int(1e9 * own))[0] / 1e9


def measure_pairs(world: World, ranks: tuple[int, ...], most: int, size: int, seconds: float) -> dict[tuple[int, int], float]:
    """Seconds from one rank to another of every pair in a group; disjoint pairs at once. ranks: of this rank's group; most: of the largest one."""
    message, turns, found = torch.zeros(size, dtype=torch.uint8, device=world.device), most - 1 + most % 2, []
    for turn in range(turns):
        place = partner(ranks.index(world.rank), len(ranks), turn) if ranks else None
        other = None if place is None else ranks[place]
        own, _ = timed(world, None if other is None else partial(there_and_back, message, other, world.rank < other), seconds / turns)
        found += [[world.rank, other, own / 2]] if other is not None and world.rank < other else []
    return {(a, b): each for some in world.gather_json(found) for a, b, each in some}


def there_and_back(message: torch.Tensor, other: int, first: bool) -> None:
    for move in (dist.send, dist.recv) if first else (dist.recv, dist.send):
        move(message, other)


def partner(me: int, n: int, turn: int) -> int | None:
    """Whom one of n players meets in a turn of a tournament: within n - 1 turns, n if it is odd, each meets each (the circle method)."""
    m = n - 1 + n % 2
    other = turn * (m + 1) // 2 % m if me == m else (turn - me) % m
    other = m if other == me else other
    return other if turn < m and other < n else None


if __name__ == "__main__":
    run_main(main)
