"""A training that changes from this trainer to the HF Trainer in the middle, or the other way, ends with the same bits."""
import os

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments, set_seed

from args import TrainArgs
from loss import cross_entropy
from tests.parity import hf
from tests.toy import rows, run_training
from tools.convert import main, to_hf

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, CUT, TOTAL = 31, 3, 5      # two updates make an epoch: the cut is inside of the second, the end inside of the third


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))


def llama(tied=False):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16, attention_dropout=0.1,
        attn_implementation="eager", tie_word_embeddings=tied))


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16, num_labels=3))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, dropout_rate=0.1))


class Plain(nn.Module):
    """Not of transformers, with one weight under two names, and a second group of the optimizer."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.drop, self.norm, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, 16), nn.Dropout(0.1), nn.LayerNorm(16), nn.Linear(16, VOCAB)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"logits": self.head(self.norm(self.drop(self.hidden(self.embed(input_ids)))))}


def collate(samples, case: str, count: bool) -> dict:
    """The first label of each row is none: the HF Trainer counts it for some models, though their losses shift the labels over it."""
    batch = hf.collate(samples)
    batch["labels"][:, 0] = -100
    if case == "bert":
        batch["labels"] = batch["input_ids"][:, 0] % 3
    if case == "t5":
        batch["decoder_input_ids"] = batch["input_ids"]
    return {**batch, "num_items": int((batch["labels"] != -100).sum())} if count else batch


def cross_entropy_sum(model, batch):
    return cross_entropy(model(**{k: v for k, v in batch.items() if k not in ("num_items", "num_samples")})["logits"], batch["labels"])


def cross_entropy_mean(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs["logits"], labels) / num_items_in_batch


# model, accumulation, flags, our loss, the HF Trainer's if it is not the model's own: for these it would average the means of micro-batches,
# whose gradients differ from those of a sum in the last bit
CASES = {"gpt2": (gpt2, 2, {"optim": "adamw_torch_fused"}, hf.summed_loss, None),
         "llama": (llama, 2, {"optim": "adamw_torch"}, hf.summed_loss, None),
         "llama sgd": (llama, 1, {"optim": "sgd", "optim_args": "momentum=0.9"}, hf.summed_loss, None),
         "bert": (bert, 2, {"optim": "adamw_torch"}, cross_entropy_sum, cross_entropy_mean),
         "t5": (t5, 1, {"optim": "adamw_torch_fused"}, cross_entropy_sum, cross_entropy_mean),
         "plain": (Plain, 2, {"optim": "adamw_torch_fused"}, cross_entropy_sum, cross_entropy_mean)}


class SavesTied(hf.OwnGenerator):
    """The HF Trainer cannot save a plain module with tied weights; whoever trains one with it has to write both names."""

    def _save(self, output_dir=None, state_dict=None):
        os.makedirs(output_dir, exist_ok=True)
        save_file({name: p.detach().clone() for name, p in self.model.state_dict().items()}, os.path.join(output_dir, "model.safetensors"), {"format": "pt"})


def settings(case, output_dir, **changes) -> dict:
    return {"output_dir": str(output_dir), "max_steps": TOTAL, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1,
            "gradient_accumulation_steps": CASES[case][1], "save_strategy": "steps", "save_steps": CUT, "per_device_train_batch_size": 2, "logging_steps": 1,
            **CASES[case][2], **changes}


def data(case):
    return hf.samples()[:2 * CASES[case][1] + 1]      # the last micro-batch of an epoch is short, and so is its window


def build(case):
    set_seed(0)
    return CASES[case][0]()


def there(case, output_dir, resume=None, **changes):
    """Trained by the HF Trainer."""
    args = TrainingArguments(**settings(case, output_dir, **changes), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False)
    trainer = (SavesTied if case == "plain" else hf.OwnGenerator)(
        model=build(case), args=args, train_dataset=data(case), eval_dataset=hf.samples()[8:], compute_loss_func=CASES[case][4],
        data_collator=lambda samples: collate(samples, case, False))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def here(case, output_dir, resume=None, train_set=None, model=None, **changes):
    """Trained by this trainer."""
    args = TrainArgs(**{**settings(case, output_dir, **changes), "resume_from_checkpoint": None if resume is None else str(resume)})
    return run_training(args, CASES[case][3], model=build(case) if model is None else model, train_set=train_set or data(case), eval_set=hf.samples()[8:],
                        collate=lambda samples: collate(samples, case, True))


def same(one: nn.Module, other: nn.Module) -> None:
    for name, p in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], p), name


@pytest.mark.parametrize("case", CASES)
def test_a_training_may_change_trainers_in_the_middle(tmp_path, case):
    ours, theirs = here(case, tmp_path / "ours"), there(case, tmp_path / "theirs")
    same(ours.model, theirs.model)
    checkpoint = f"checkpoint-{CUT}"
    if case == "gpt2":
        main(["to-hf", str(tmp_path / "ours" / checkpoint), str(tmp_path / "to" / checkpoint)])
        main(["from-hf", str(tmp_path / "theirs" / checkpoint), str(tmp_path / "from"), "--num_samples", str(len(data(case)))])
        resumed = here(case, tmp_path / "from", "True")
    else:
        to_hf(tmp_path / "ours" / checkpoint, tmp_path / "to" / checkpoint)
        resumed = here(case, tmp_path / "from", tmp_path / "theirs" / checkpoint)
    back = there(case, tmp_path / "to", tmp_path / "to" / checkpoint)
    same(theirs.model, resumed.model)
    same(theirs.model, back.model)
    moments, others = ([{k: v for k, v in state.items()} for state in each.optimizer.state_dict()["state"].values()] for each in (resumed, back))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(moments, others, strict=True) for key in a) and len(moments) > 3
    assert resumed.state.epoch == back.state.epoch == 2 + (2 / 3 if CASES[case][1] == 2 else 1 / 2)
    logged = [[[row[key] for key in ("loss", "grad_norm", "learning_rate", "epoch", "step")] for row in each if "loss" in row]
              for each in (rows(tmp_path / "ours"), rows(tmp_path / "from"))]
    assert len(logged[0]) == TOTAL and logged[0][CUT:] == logged[1][CUT:]
