"""Saving and loading an AdamW state: seconds and memory of this trainer, torch.save, torch.distributed.checkpoint (dcp) and the HF Trainer.

    python -m bench.saving [--millions 100] [--ranks 4] [--rounds 3] [--dir FOLDER] [--only WORD]

Several ranks shard the built-in GPT with --strategy fsdp; one process has a GPT-2 of transformers, the same for all rows. In each round each
row in turn gets fresh processes that save three times, and fresh ones that load the last save. Before a save the disk is made idle (os.sync),
the checkpoint before it is deleted, and free memory is given back. What is read is in the page cache. Seconds are the slowest rank's, medians
over rounds, of the first save of a process / of later ones:

    blocked   until training may go on; with --save_async also what the next update's optimizer step waits after 64 tokens
    complete  until the save is over: this trainer has then hashed its files and forced them to the disk, dcp forced them, others neither
    on disk   until it is over and every file has been forced to the disk (fsync), again if need be

MB are the most that the peak of any rank grew over what was resident just before, in any save. The peak is the kernel's own (VmHWM, which
/proc/self/clear_refs resets), so nothing is missed; but mapped pages of files count in it, which are page cache, and which the kernel can take
back. Anonymous memory is what only the process can give back (RssAnon, looked at from outside every 5 ms). No rank of this trainer may grow by more
than its shard (the weights and optimizer state it holds in the end) and a bucket (25 MB, or the largest parameter): by its peak when saving,
where nothing is mapped, by anonymous memory when loading. Exits with 1 and names the row if one does.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import io
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from os import fsync
from types import SimpleNamespace

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict, set_optimizer_state_dict

from args import TrainArgs
from checkpoint import Saver, load_checkpoint
from data import Blocks
from distributed import build_on, local_part, parallelize
from model import GPT
from rundir import find_damage
from tests import ranks as pool
from train import assemble
from world import open_world

SAVES, SAMPLE_S, BUCKET = 3, 0.005, 25 * 2**20


class Subject:
    def finish(self) -> float:
        """Waits until the save is over, where it is not when `save` returns; the seconds for which training is blocked meanwhile."""
        return 0.0


class Ours(Subject):
    def __init__(self, args, world, millions):
        data = Blocks(torch.zeros(100, dtype=torch.uint8), torch.arange(0, 90, 10), 10)
        self.run, _, _ = assemble(args, world, build(world, millions), data)
        self.model, self.optimizer, self.saver = self.run.model, self.run.optimizer, Saver(self.run)
        self.compute()      # what is loaded for it is no memory of a save

    def compute(self) -> None:
        """About as long as a forward and a backward pass of 64 tokens, and without the memory of gradients."""
        with torch.no_grad():
            for _ in range(3):
                self.model(torch.zeros(1, 64, dtype=torch.long))

    def save(self, path: str, step: int) -> None:
        self.run.state.global_step = step
        self.saver.save()

    def finish(self) -> float:
        blocked = 0.0
        if self.run.args.save_async:        # the next update needs no copy up to its optimizer's step, which then waits
            self.compute()
            begin = time.monotonic()
            self.saver.free.wait()
            blocked = time.monotonic() - begin
        while self.saver.step is not None:      # as the training loop asks after each update
            time.sleep(0.02)
            begin = time.monotonic()
            self.saver.poll()
            blocked += time.monotonic() - begin
        return blocked

    def load(self, path: str) -> None:
        assert find_damage(path, self.run.world, False) == (None, False)       # all hashes are right
        load_checkpoint(self.run, path)


class OursBare(Ours):
    """Without fsync and hashes, which others do not have."""

    def __init__(self, args, world, millions):
        super().__init__(args, world, millions)
        os.fsync = os.fdatasync = lambda descriptor: None
        hashlib.sha256 = hashlib.file_digest = lambda *_, **__: SimpleNamespace(update=lambda data: None, hexdigest=lambda: "")


class TorchSave(Subject):
    """Rank 0 gathers everything and writes it; later it reads everything and hands it out."""

    def __init__(self, args, world, millions):
        self.world, self.model = world, build(world, millions)
        parallelize(self.model, args, world)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def state(self, **options) -> dict:
        return dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer, options=StateDictOptions(**options))))

    def adopt(self, state: dict, **options) -> None:
        set_model_state_dict(self.model, state["model"], options=StateDictOptions(**options))
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=StateDictOptions(**options))

    def save(self, path: str, step: int) -> None:
        state = self.state(full_state_dict=True, cpu_offload=True)
        if self.world.is_main:
            os.makedirs(path)
            torch.save(state, os.path.join(path, "state.pt"))

    def load(self, path: str) -> None:
        state = {"model": {}, "optimizer": {}}
        if self.world.is_main:
            state = torch.load(os.path.join(path, "state.pt"), mmap=False, weights_only=True)
        self.adopt(state, full_state_dict=True, broadcast_from_rank0=self.world.world_size > 1)


class Dcp(TorchSave):
    def save(self, path: str, step: int) -> None:
        dcp.save(self.state(), checkpoint_id=path)

    def load(self, path: str) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=path)
        self.adopt(state)


class DcpAsync(Dcp):
    stager = DefaultStager(StagingOptions(False, False, False, False))      # it keeps its copy on the host from save to save

    def save(self, path: str, step: int) -> None:
        self.future = dcp.async_save(self.state(), checkpoint_id=path, async_stager=self.stager)

    def finish(self) -> float:
        self.future.result()
        return 0.0


class HF(Subject):
    def __init__(self, args, world, millions):
        from transformers import Trainer, TrainingArguments, logging
        logging.disable_progress_bar()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):       # or accelerate opens a process group
            os.environ.pop(name)
        self.trainer = Trainer(build(world, millions), TrainingArguments(args.output_dir, use_cpu=True, report_to="none", disable_tqdm=True))
        self.trainer.create_optimizer_and_scheduler(100)
        self.model, self.optimizer = self.trainer.model, self.trainer.optimizer

    def save(self, path: str, step: int) -> None:
        self.trainer.state.global_step = step
        self.trainer._save_checkpoint(self.model, None)

    def load(self, path: str) -> None:
        self.trainer._load_from_checkpoint(path)
        self.trainer._load_optimizer_and_scheduler(path)
        self.trainer._load_rng_state(path)


OURS, ASYNC, BARE, HF_ROW = "this trainer", "this trainer, --save_async", "this trainer, no fsync, no hashes", "HF Trainer"
ROWS = {OURS: Ours, ASYNC: Ours, BARE: OursBare, "torch.save": TorchSave, "dcp.save": Dcp, "dcp.async_save": DcpAsync, HF_ROW: HF}
LOADED = (OURS, "torch.save", "dcp.save", HF_ROW)      # the others write the same files


def build(world, millions: int) -> torch.nn.Module:
    """A model of so many million parameters, most of them in 12 blocks."""
    width = 64 * max(1, int(12 * (millions / 100) ** 0.5))
    vocab = int(millions * 1e6 - 144 * width**2) // (2 * width)
    if world.world_size > 1:
        return build_on(world, lambda: GPT(vocab, 64, n_layer=12, n_head=width // 64, n_embd=width), meta_init=True)
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=64, n_embd=width, n_layer=12, n_head=width // 64, tie_word_embeddings=False,
                                      bos_token_id=0, eos_token_id=0))


def measure(row: str, millions: int, folder: str, loading: bool) -> dict:
    """Seconds and growth of memory of the saves, or of the load, of one rank in a fresh process."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")      # what dcp says to one process
    args = TrainArgs(output_dir=os.path.join(folder, "loading" if loading else "saving"), strategy="fsdp", max_steps=100, save_strategy="no",
                     disable_tqdm=True, save_async=row == ASYNC)
    with contextlib.redirect_stdout(io.StringIO()), open_world(args) as world:
        subject, found = ROWS[row](args, world, millions), []
        if loading:
            with watched(world) as seen, torch.no_grad():
                subject.load(os.path.join(folder, "saving", f"checkpoint-{SAVES}"))
                for tensor in held(subject):      # what is only mapped so far is read, and made the process's own, by its first change
                    tensor.mul_(1)
            found.append(seen)
        else:
            for p in [p for group in subject.optimizer.param_groups for p in group["params"]]:
                p.grad = p.detach() + 1
            subject.optimizer.step()
            subject.optimizer.zero_grad()
        for step in () if loading else range(1, SAVES + 1):
            path = os.path.join(args.output_dir, f"checkpoint-{step}")
            with watched(world) as seen:
                subject.save(path, step)
                seen["blocked"] = time.monotonic() - seen["begin"]
                seen["blocked"] += subject.finish()
            world.max(0)        # all ranks are here
            begin = time.monotonic()
            if world.is_main:
                force(path)
                shutil.rmtree(os.path.join(args.output_dir, f"checkpoint-{step - 1}"), ignore_errors=True)
            seen["on disk"] = seen["complete"] + time.monotonic() - begin
            found.append(seen)
        sizes = [p.numel() for p in subject.model.parameters()]
        return {"found": found, "shard": sum(t.nbytes for t in held(subject)), "parameters": sum(sizes), "bucket": max(BUCKET, 4 * max(sizes)),
                "sum": sum(t.sum(dtype=torch.float64).item() for t in held(subject))}


def held(subject) -> list[torch.Tensor]:
    """What this rank has of weights and optimizer state."""
    states = [value for state in subject.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return [local_part(t)[0] for t in [*subject.model.parameters(), *states]]


@contextlib.contextmanager
def watched(world):
    """Seconds, and growth of the peak of resident memory, of what all ranks do inside."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if world.is_main:
        os.sync()
    world.max(0)
    time.sleep(10 * SAMPLE_S)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, seen = status("self", "VmRSS"), {"begin": time.monotonic()}
    yield seen
    seen["end"] = time.monotonic()
    seen |= {"complete": seen["end"] - seen["begin"], "peak": status("self", "VmHWM") - before}


def status(pid: int | str, field: str) -> int:
    """Bytes, as the kernel tells them of a process."""
    with open(f"/proc/{pid}/status") as file:
        return 1024 * int(file.read().partition(f"\n{field}:")[2].split(maxsplit=1)[0])


def force(path: str) -> None:
    for folder, _, files in os.walk(path):
        for name in [*files, "."]:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            fsync(descriptor)       # the real one; OursBare replaces os.fsync
            os.close(descriptor)


def on_ranks(world_size: int, *case) -> list[dict]:
    """measure(*case) of each rank, all in fresh processes, with the growth of anonymous memory."""
    ranks, samples, done = pool.Ranks(), [], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_S):
            with contextlib.suppress(OSError, IndexError, ValueError):      # of processes that begin or end
                samples.append((time.monotonic(), [status(process.pid, "RssAnon") for process, _ in ranks.workers]))
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        results = ranks.run(world_size, measure, *case)
    finally:
        done.set()
        sampler.join()
        for process, pipe in ranks.workers:
            pipe.close()        # at which it ends
            process.join(10)
        ranks.close()
    for rank, result in enumerate(results):
        for seen in result["found"]:
            before = [sizes[rank] for at, sizes in samples if at < seen["begin"] and len(sizes) == world_size][-1]
            seen["anonymous"] = max([sizes[rank] for at, sizes in samples if seen["begin"] <= at <= seen["end"]], default=before) - before
    return results


def table(results: dict, rows: list[tuple[str, int]]) -> list[str]:
    """Prints what was measured; returns what must not be."""
    def seconds(row: str, n: int, field: str) -> tuple[float, float]:
        slowest = [[max(rank["found"][i][field] for rank in ranks) for i in range(SAVES)] for ranks in results[row, n, False]]
        return statistics.median(times[0] for times in slowest), statistics.median(time for times in slowest for time in times[1:])

    def most(row: str, n: int, loading: bool) -> str:
        found = [seen for ranks in results[row, n, loading] for rank in ranks for seen in rank["found"]]
        return " (".join(f"{max(seen[field] for seen in found) / 1e6:.0f}" for field in ("peak", "anonymous")) + ")"
    print("| | ranks | blocked, s | complete, s | on disk, s | saving: peak (anonymous) grew, MB | load, s | loading: peak (anonymous) grew, MB "
          "| shard + bucket, MB |\n" + "|---" * 9 + "|")
    broken = []
    for row, n in rows:
        for saved, loaded in zip(results[row, n, False], results[row, n, True]):
            if not all(math.isclose(a["sum"], b["sum"], rel_tol=1e-9) for a, b in zip(saved, loaded)):
                broken.append(f"{row}, ranks {n}: what was loaded is not what was saved")
        cells = [row, str(n), *("{:.2f} / {:.2f}".format(*seconds(row, n, field)) for field in ("blocked", "complete", "on disk")), most(row, n, False)]
        if row in LOADED:
            cells.append(f"{statistics.median(max(rank['found'][0]['complete'] for rank in ranks) for ranks in results[row, n, True]):.2f}")
        cells += [most(row, n, True)] if row in LOADED else ["", ""]
        bound = max(rank["shard"] + rank["bucket"] for rank in results[row, n, False][0])
        print("| " + " | ".join([*cells, f"{bound / 1e6:.0f}"]) + " |")
        for loading, field in ((False, "peak"), (True, "anonymous")):
            excess = [seen[field] - rank["shard"] - rank["bucket"] for ranks in results[row, n, loading] for rank in ranks for seen in rank["found"]]
            if issubclass(ROWS[row], Ours) and max(excess, default=0) > 0:
                broken.append(f"{row}, ranks {n}: {'loading' if loading else 'saving'} took {max(excess) / 1e6:.0f} MB more than a shard and a bucket")
    if {(OURS, 1), (BARE, 1), (HF_ROW, 1)} <= set(rows):
        theirs, forced = seconds(HF_ROW, 1, "complete"), seconds(HF_ROW, 1, "on disk")
        for row, field, base, what in ((ASYNC, "blocked", theirs, "complete"), (BARE, "complete", theirs, "complete"), (OURS, "complete", forced, "on disk")):
            if (row, 1) in rows:
                first, later = (mine / its for mine, its in zip(seconds(row, 1, field), base))
                print(f"{row}, one process: {field} in {first:.2f} / {later:.2f} of the time in which the HF Trainer's save is {what}")
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=100, help="parameters of the model")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="where to write (default: the temporary folder of the system)")
    parser.add_argument("--only", default="", help="rows with this in their name")
    flags = parser.parse_args()
    pool.DEADLINE_S = 900.0
    rows = [(row, n) for n in dict.fromkeys((flags.ranks, 1)) for row in ROWS if flags.only in row and (n == 1 or row != HF_ROW)]
    results = {(*row, loading): [] for row in rows for loading in (False, True)}
    with tempfile.TemporaryDirectory(dir=flags.dir) as top:
        for number in range(flags.rounds):
            for row, n in rows:
                for loading in (False, True)[:1 + (row in LOADED)]:
                    results[row, n, loading].append(found := on_ranks(n, row, flags.millions, os.path.join(top, "run"), loading))
                    times = [f"{max(rank['found'][i]['complete'] for rank in found):.2f} s" for i in range(len(found[0]["found"]))]
                    print(f"round {number + 1}: {row}, ranks {n}, {'load' if loading else 'saves'}", *times, file=sys.stderr, flush=True)
                shutil.rmtree(os.path.join(top, "run"))
    sizes = results[*rows[0], False][0][0]
    print(f"{sizes['parameters']:,} parameters, bucket {sizes['bucket'] / 1e6:.0f} MB, {flags.rounds} rounds of {SAVES} saves, torch {torch.__version__}")
    if broken := table(results, rows):
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
