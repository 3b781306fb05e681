"""Peak memory and time of evaluating a set and one ten times larger, here and with the HF Trainer, on the same model and data.

    python -m bench.evaluation [--samples 64] [--vocab 4000]

Each case is a process of its own: its peak resident memory, and the seconds of the evaluation. The data is made sample by sample, so that
nothing but what the evaluation keeps can grow. Ends with exit code 1 if a peak here grows by more than 5%.
"""
from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time

import torch
from torch import Tensor

LENGTH = 128


class Sequences(torch.utils.data.Dataset):
    def __init__(self, samples: int, vocab: int):
        self.samples, self.vocab = samples, vocab

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(self.vocab, (LENGTH,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def hf_metrics(prediction) -> dict[str, float]:
    ids = prediction.predictions if prediction.predictions.ndim == 2 else prediction.predictions.argmax(-1)
    return {"accuracy": float((ids == prediction.label_ids).mean())}


def measure(case: str, samples: int, vocab: int) -> None:
    """Prints peak memory in MB and the seconds of the evaluation."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from evalloop import evaluate, likeliest
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=2))
    data = Sequences(samples, vocab)
    with tempfile.TemporaryDirectory() as folder:
        if case.startswith("hf"):
            from transformers import Trainer, TrainingArguments
            trainer = Trainer(model, TrainingArguments(folder, per_device_eval_batch_size=8, disable_tqdm=True, use_cpu=True), eval_dataset=data,
                              compute_metrics=None if case == "hf loss" else hf_metrics,
                              preprocess_logits_for_metrics=likeliest if case == "hf argmax" else None)
            start = time.perf_counter()
            trainer.evaluate()
        else:
            from args import TrainArgs
            from loss import logits_loss
            from tools.metrics import Accuracy
            from train import assemble
            from world import open_world
            args = TrainArgs(output_dir=folder, per_device_eval_batch_size=8, max_steps=1, disable_tqdm=True)
            with open_world(args) as world:
                run, _, loader = assemble(args, world, model, data, data)
                run.callbacks.callbacks = []
                start = time.perf_counter()
                evaluate(run, loader, logits_loss, None if case == "loss" else Accuracy(), preprocess_logits_for_metrics=likeliest)
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} {time.perf_counter() - start:.2f}")


CASES = {"loss": "loss alone", "streamed": "loss and accuracy, streamed", "hf loss": "HF Trainer, loss alone",
         "hf argmax": "HF Trainer, accuracy with preprocess_logits_for_metrics", "hf logits": "HF Trainer, accuracy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=4000)
    parser.add_argument("--case", choices=CASES, help="measure one case in this process")
    flags = parser.parse_args()
    if flags.case is not None:
        measure(flags.case, flags.samples, flags.vocab)
        return
    print(f"| evaluation of {LENGTH} tokens, vocabulary {flags.vocab:,} | peak, {flags.samples} samples | peak, {10 * flags.samples} samples | growth | seconds |")
    print("|---|---|---|---|---|")
    grown = []
    for case, title in CASES.items():
        found = [subprocess.run([sys.executable, "-m", "bench.evaluation", "--case", case, "--samples", str(n), "--vocab", str(flags.vocab)],
                                check=True, capture_output=True, text=True).stdout.split()[-2:] for n in (flags.samples, 10 * flags.samples)]
        (small, _), (large, seconds) = found
        growth = float(large) / float(small) - 1
        grown += [title] if growth > 0.05 and not case.startswith("hf") else []
        print(f"| {title} | {small} MB | {large} MB | {growth:.1%} | {seconds} |", flush=True)
    if grown:
        sys.exit(f"memory grows with the data: {', '.join(grown)}")


if __name__ == "__main__":
    main()
