"""Real gloo ranks for tests: a pool of processes that serve every test, forked from one that has imported torch and nothing else."""
from __future__ import annotations

import multiprocessing
import os
import socket
import traceback

IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "tests.toy"]       # 4 s, which every rank would take
DEADLINE_S = float(os.environ.get("RANKS_DEADLINE_S", "180"))   # only a hang takes this long


class Ranks:
    """`run(n, function, *args)` calls a module-level function on n ranks and returns its results by rank."""

    def __init__(self):
        self.workers: list[tuple] = []

    def run(self, world_size: int, function, *args) -> list:
        while len(self.workers) < world_size:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(IMPORTED)
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            self.workers.append((process, ours))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        workers = self.workers[:world_size]
        for rank, (_, pipe) in enumerate(workers):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            pipe.send(({key: str(value) for key, value in env.items()}, function, args))
        results = []
        for rank, (_, pipe) in enumerate(workers):
            if not pipe.poll(DEADLINE_S):
                self.close()
                raise TimeoutError(f"rank {rank} of {world_size} hangs in {function.__name__}")
            results.append(pipe.recv())
        if errors := [f"--- rank {rank}\n{value}" for rank, (ok, value) in enumerate(results) if not ok]:
            raise AssertionError("\n".join(errors))
        return [value for _, value in results]

    def close(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join()
            pipe.close()
        self.workers = []


def serve(pipe) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            env, function, args = pipe.recv()
        except EOFError:
            return
        os.environ.update(env)
        try:
            pipe.send((True, function(*args)))
        except BaseException:   # noqa: BLE001  whatever it is, the test has to see it
            pipe.send((False, traceback.format_exc()))
