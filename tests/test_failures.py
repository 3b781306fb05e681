"""A rank that fails ends the job on all ranks with its own error, and one that hangs is named: real processes, real signals."""
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import os, signal, sys
import torch
from loss import compute_loss
from state import UsageError
from tests.toy import arguments, gpt, sequences, toy_run
from loop import train
from train import run_main

def loss(model, batch):
    loss.calls += 1
    when = loss.calls == 4 if sys.argv[3] != "evaluate" else not model.training
    if when and os.environ["RANK"] == os.environ["FAULTY"]:
        fault = sys.argv[3]
        if fault in ("raise", "evaluate"):
            raise UsageError("sample 7 of rank " + os.environ["RANK"] + " is broken")
        if fault == "bug":
            raise ZeroDivisionError("a bug in the user's loss")
        os.kill(os.getpid(), signal.SIGKILL if fault == "die" else signal.SIGSTOP)
    return compute_loss(model, batch)
loss.calls = 0

def main():
    args = arguments(sys.argv[1], strategy=sys.argv[2], max_steps=20, per_device_train_batch_size=2, ddp_timeout=int(sys.argv[4]),
                     ema_decay=0.5, eval_strategy="steps", eval_steps=5)
    with toy_run(args, model=gpt(), train_set=sequences(8), eval_set=sequences(4)) as (run, loader, eval_loader):
        train(run, loader, eval_loader, loss)
run_main(main)
"""


def start(tmp_path, strategy: str, fault: str, faulty: int, timeout_s: int = 600):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FAULTY": str(faulty), "PYTHONPATH": str(ROOT)}
    return [subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), strategy, fault, str(timeout_s)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                             env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]


def ends(process) -> tuple[int, str]:
    """Exit code and messages; only a hang takes three minutes."""
    _, stderr = process.communicate(timeout=180)
    return process.returncode, stderr


@pytest.mark.parametrize("strategy, fault, faulty", [("ddp", "raise", 0), ("zero2", "raise", 1), ("fsdp", "bug", 1), ("zero1", "evaluate", 1)])
def test_a_rank_that_raises_ends_all_with_its_own_error(tmp_path, strategy, fault, faulty):
    processes = start(tmp_path, strategy, fault, faulty)
    code, said = ends(processes[faulty])
    other_code, other_said = ends(processes[1 - faulty])
    message = f"sample 7 of rank {faulty} is broken" if fault in ("raise", "evaluate") else "ZeroDivisionError: a bug in the user's loss"
    assert message in said and code == (1 if fault == "bug" else 2)
    assert "Traceback" not in other_said
    if faulty == 0:     # it kept the store in which ranks leave their last words; under torchrun the launcher does
        assert other_code == 6 and "rank 0 did not answer: dead (see its own message)" in other_said
    else:
        assert other_code == code and f"rank {faulty} failed with" in other_said and message in other_said


@pytest.mark.parametrize("strategy, faulty", [("ddp", 1), ("fsdp", 0)])
def test_a_rank_that_hangs_is_named_when_the_timeout_hits(tmp_path, strategy, faulty):
    """Gloo obeys --ddp_timeout. The message names the collective and the line that waited in it."""
    processes = start(tmp_path, strategy, "hang", faulty, timeout_s=4)
    code, said = ends(processes[1 - faulty])
    processes[faulty].send_signal(signal.SIGKILL)
    ends(processes[faulty])
    assert code == 6, said
    assert f"rank {1 - faulty} lost touch in " in said and f"rank {faulty} did not answer" in said and "--ddp_timeout 4 s" in said and ".py:" in said
    assert "Traceback" not in said


def test_a_rank_that_dies_is_named(tmp_path):
    processes = start(tmp_path, "ddp", "die", 1)
    assert ends(processes[1])[0] == -signal.SIGKILL
    code, said = ends(processes[0])
    assert code == 6 and "rank 1 did not answer" in said
