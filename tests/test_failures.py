"""A rank that fails ends the job on all ranks with its own error, and one that hangs is named: real processes, real signals."""
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from loop import train
from loss import compute_loss
from state import UsageError
from tests.toy import arguments, gpt, sequences, toy_run
from tools.chaos import exit_codes, send, start, until
from world import meet


def job(folder: str, strategy: str, fault: str, faulty: int, timeout_s: int) -> None:
    """What a rank runs: a small training that goes wrong on one of them. What it says is in a file of its own."""
    rank, calls = int(os.environ["RANK"]), 0
    os.dup2(os.open(f"{folder}/rank-{rank}.log", os.O_WRONLY | os.O_CREAT), 2)

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if rank == faulty and (not model.training if fault == "evaluate" else calls == 4):
            if fault in ("raise", "evaluate"):
                raise UsageError(f"sample 7 of rank {rank} is broken")
            if fault == "bug":
                raise ZeroDivisionError("a bug in the user's loss")
            os.kill(os.getpid(), signal.SIGKILL if fault == "die" else signal.SIGSTOP)
        return compute_loss(model, batch)
    args = arguments(f"{folder}/run", strategy=strategy, max_steps=20, ddp_timeout=timeout_s, ema_decay=0.5, eval_strategy="steps", eval_steps=5)
    with toy_run(args, model=gpt(), train_set=sequences(8), eval_set=sequences(4)) as (run, loader, eval_loader):
        train(run, loader, eval_loader, loss)


def ends(folder: str, strategy: str, fault: str, faulty: int, timeout_s: int = 600) -> list[tuple[int, str]]:
    """Exit code and messages of each of two ranks, the healthy one first. A faulty one that hangs is killed when the other has ended."""
    pids = start(f"{folder}/log", 2, job, folder, strategy, fault, faulty, timeout_s)
    order = [1 - faulty, faulty]
    if fault == "hang":
        exit_codes([pids[1 - faulty]], f"{folder}/log")
        send(pids, signal.SIGKILL)
    codes = exit_codes(pids, f"{folder}/log")
    return [(codes[rank], Path(folder, f"rank-{rank}.log").read_text()) for rank in order]


@pytest.mark.parametrize("strategy, fault, faulty", [("ddp", "raise", 0), ("zero2", "raise", 1), ("fsdp", "bug", 1), ("zero1", "evaluate", 1)])
def test_a_rank_that_raises_ends_all_with_its_own_error(fresh, tmp_path, strategy, fault, faulty):
    (other_code, other_said), (code, said) = fresh(ends, str(tmp_path), strategy, fault, faulty)
    message = f"sample 7 of rank {faulty} is broken" if fault in ("raise", "evaluate") else "ZeroDivisionError: a bug in the user's loss"
    assert message in said and code == (1 if fault == "bug" else 2)
    assert "Traceback" not in other_said
    if faulty == 0:     # it kept the store in which ranks leave their last words; under torchrun the launcher does
        assert other_code == 6 and "rank 0 did not answer: dead (see its own message)" in other_said
    else:
        assert other_code == code and f"rank {faulty} failed with" in other_said and message in other_said


@pytest.mark.parametrize("strategy, faulty", [("ddp", 1), ("fsdp", 0)])
def test_a_rank_that_hangs_is_named_when_the_timeout_hits(fresh, tmp_path, strategy, faulty):
    """Gloo obeys --ddp_timeout. The message names the collective and the line that waited in it."""
    (code, said), (faulty_code, _) = fresh(ends, str(tmp_path), strategy, "hang", faulty, 3)
    assert code == 6, said
    assert f"rank {1 - faulty} lost touch in " in said and f"rank {faulty} did not answer" in said and "--ddp_timeout 3 s" in said and ".py:" in said
    assert "Traceback" not in said and faulty_code == -signal.SIGKILL


def test_a_rank_that_dies_is_named(fresh, tmp_path):
    (code, said), (faulty_code, _) = fresh(ends, str(tmp_path), "ddp", "die", 1)
    assert faulty_code == -signal.SIGKILL and code == 6 and "rank 1 did not answer" in said


def test_ranks_of_a_start_meet_each_other_and_nobody_of_an_earlier_one():
    """In a store that outlives them. The second time rank 0 is there before the others, and the third time after them."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=10)) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        for number, order in enumerate([(0, 1, 2), (0, 1, 2), (2, 1, 0)]):
            if number == 1:
                asked = server.get("asks1").decode()
                answer = server.get(asked)
            coming = {order[0]: threads.submit(meet, clients[order[0]], order[0], 3, 10)}
            if number == 1:
                until(lambda asked=asked, answer=answer: server.get(asked) != answer, "rank 0's answer to those who are gone")
            coming |= {rank: threads.submit(meet, clients[rank], rank, 3, 10) for rank in order[1:]}
            parts, hosts = zip(*(coming[rank].result() for rank in range(3)))
            assert not parts[0].check(["number"])
            parts[0].set("number", str(number))
            assert [part.get("number") for part in parts] == [b"%d" % number] * 3
            assert hosts[0] == hosts[1] == hosts[2] and len(hosts[0]) == 3
