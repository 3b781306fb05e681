"""A task of milliseconds for the tests of tools/find_batch.py: fit a line, where a sample takes as much memory as the environment says."""
import os
import sys

import torch

from data import Data
from state import run_main
from train import main

FLAGS = "--max_steps 6 --per_device_train_batch_size 9 --optim sgd --learning_rate 0.1 --logging_steps 1 --max_grad_norm 0 --eval_strategy steps"
MB = "FINDER_TEST_MB"       # megabytes per sample


def loss(model, batch):
    if MB in os.environ:
        torch.empty(len(batch["input"]), int(os.environ[MB]) * 10**6, dtype=torch.uint8)
    return (model(batch["input"]) - batch["labels"]).square().sum()


def run(argv, **parts):
    points = [{"input": x[None], "labels": 2 * x[None] - 1} for x in torch.linspace(-1, 1, 50)]
    return main(argv, lambda args: Data(points, points[:2], "a line"), lambda args: torch.nn.Linear(1, 1), loss_fn=loss, flags=FLAGS, **parts)


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
