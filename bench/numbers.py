"""Final losses of 200 updates of the default job, for every optimizer, every schedule and every precision, as one table.

    python -m bench.numbers [--updates 200]

About ten minutes on two cores. The loss is the mean over the last 20 updates. Exits non-zero if a run fails, if a loss is
above that of single bytes (3.23 nats), or if bf16 or fp16 end more than 2% from float32.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time

from recipes.optimizers import run as run_recipe
from train import main as run_train

DEFAULT = ["--per_device_train_batch_size", "16", "--warmup_steps", "10", "--weight_decay", "0.1", "--adam_beta2", "0.95", "--logging_steps", "20",
           "--save_strategy", "no"]
RATES = {"adamw_torch_fused": "4e-3", "adamw_torch": "4e-3", "sgd": "0.3", "adafactor": "1e-2", "lion": "5e-4", "muon": "4e-3", "adamw_8bit": "4e-3",
         "schedule_free": "8e-3", "galore": "4e-3", "apollo": "4e-3"}
SCHEDULES = {"linear": {}, "cosine": {}, "cosine_with_restarts": {"num_cycles": 2}, "polynomial": {}, "constant": {}, "constant_with_warmup": {},
             "inverse_sqrt": {}, "reduce_lr_on_plateau": {"patience": 0}, "cosine_with_min_lr": {"min_lr_rate": 0.1},
             "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1}, "warmup_stable_decay": {"num_decay_steps": 60}}


def final_loss(program, flags: list[str]) -> tuple[float, float]:
    """(mean loss of the last 20 updates, seconds) of one run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        program([*flags, *DEFAULT, "--output_dir", folder, "--disable_tqdm"])
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            losses = [row["loss"] for row in map(json.loads, file) if "loss" in row]
    return losses[-1], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    steps = ["--max_steps", str(parser.parse_args().updates)]
    runs = []
    for name, rate in RATES.items():
        own = ["--optim_args", "momentum=0.9"] if name == "sgd" else []
        if name in ("adamw_8bit", "schedule_free", "galore", "apollo"):
            shape = ["--lr_scheduler_type", "constant_with_warmup"] if name == "schedule_free" else []
            runs.append((f"optimizer {name}, learning rate {rate}", run_recipe, [name, "--learning_rate", rate, *shape]))
        else:
            runs.append((f"optimizer {name}, learning rate {rate}", run_train, ["--optim", name, "--learning_rate", rate, *own]))
    for name, kwargs in SCHEDULES.items():
        evals = ["--eval_strategy", "steps", "--eval_steps", "50", "--per_device_eval_batch_size", "256"] if name == "reduce_lr_on_plateau" else []
        runs.append((f"schedule {name} {json.dumps(kwargs) if kwargs else ''}", run_train,
                     ["--learning_rate", "4e-3", "--lr_scheduler_type", name, "--lr_scheduler_kwargs", json.dumps(kwargs), *evals]))
    runs += [(f"precision {name}", run_train, ["--learning_rate", "4e-3", f"--{name}"]) for name in ("bf16", "fp16")]
    losses = {}
    print("| run | loss | seconds |\n|---|---|---|")
    for name, program, flags in runs:
        losses[name], seconds = final_loss(program, [*flags, *steps])
        print(f"| {name} | {losses[name]:.4f} | {seconds:.0f} |", flush=True)
    reference = losses[f"optimizer adamw_torch_fused, learning rate {RATES['adamw_torch_fused']}"]
    bad = [name for name, loss in losses.items() if not loss < 3.23 or name.startswith("precision") and abs(loss / reference - 1) > 0.02]
    if bad:
        sys.exit(f"out of bounds: {bad}")


if __name__ == "__main__":
    main()
