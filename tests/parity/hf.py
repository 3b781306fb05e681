"""The same tiny transformers model trained by the HF Trainer and here: the same data, flags and random numbers."""
from __future__ import annotations

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from args import TrainArgs
from loss import cross_entropy
from tests.toy import rows, run_training

SAMPLES, MICRO_BATCH = 13, 2     # the last micro-batch and the last window are short


def model() -> LlamaForCausalLM:
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                        max_position_embeddings=16, attention_dropout=0.1, attn_implementation="eager"))


def gpt2() -> GPT2LMHeadModel:
    set_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))


def samples() -> list[dict]:
    """Sequences of 4 to 12 tokens, so that micro-batches have unequal numbers of labels."""
    generator = torch.Generator().manual_seed(1)
    lengths = [4 + (5 * i) % 9 for i in range(SAMPLES)]
    return [{"input_ids": torch.randint(31, (n,), generator=generator)} for n in lengths]


def collate(batch: list[dict]) -> dict:
    ids = torch.nn.utils.rnn.pad_sequence([s["input_ids"] for s in batch], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s["input_ids"]) for s in batch], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def collate_counted(batch: list[dict]) -> dict:
    """The model shifts its labels by itself: the first of each row is no label."""
    batch = collate(batch)
    return {**batch, "num_items": int((batch["labels"][:, 1:] != -100).sum())}


def summed_loss(model, batch):
    return model(**batch, num_items_in_batch=1).loss


def smoothed_loss(epsilon: float):
    def loss(model, batch):
        return cross_entropy(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1],
                             batch["labels"][:, 1:], epsilon)
    return loss


class OwnGenerator(Trainer):
    """Its data loaders draw a seed from the global generator at each epoch's start and at each evaluation; ours do not."""

    def get_train_dataloader(self):
        return self.with_generator(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        return self.with_generator(super().get_eval_dataloader(eval_dataset))

    def with_generator(self, loader):
        loader.base_dataloader.generator = torch.Generator()
        return loader


class Unrounded(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append({**logs, "step": state.global_step})


def train_there(output_dir, model=model, data=None, collator=collate, batch=MICRO_BATCH, evaluation=False, **flags):
    """Rows and final weights of the HF Trainer; its first eval_loss if `evaluation`."""
    seen = Unrounded()
    args = TrainingArguments(output_dir=str(output_dir), use_cpu=True, save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
                             per_device_train_batch_size=batch, dataloader_pin_memory=False, **flags)
    trainer = OwnGenerator(model=model(), args=args, train_dataset=data or samples(), eval_dataset=samples()[:7], data_collator=collator,
                           callbacks=[seen])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return result(seen.rows, trainer.model, evaluation)


def train_here(output_dir, loss_fn=summed_loss, model=model, data=None, collator=collate_counted, batch=MICRO_BATCH, evaluation=False, **flags):
    args = TrainArgs(output_dir=str(output_dir), save_strategy="no", logging_steps=1, per_device_train_batch_size=batch, **flags)
    run = run_training(args, loss_fn, model=model(), train_set=data or samples(), eval_set=samples()[:7], collate=collator)
    return result(rows(output_dir), run.model, evaluation)


def result(rows: list[dict], model, evaluation: bool):
    if evaluation:
        return next(row["eval_loss"] for row in rows if "eval_loss" in row)
    return [row for row in rows if "loss" in row], {name: p.detach() for name, p in model.named_parameters()}
