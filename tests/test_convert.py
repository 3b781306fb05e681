"""A training that changes from this trainer to the HF Trainer in the middle, or the other way, ends with the same bits."""
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments, set_seed

from args import TrainArgs
from checkpoint import load_model
from loss import cross_entropy
from rundir import list_checkpoints
from state import UsageError
from storage import read_json
from tests.parity import hf
from tests.toy import flat, rows, run_training, train_and
from tools.convert import from_hf, main, to_hf
from world import rng_state

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


def here(case, output_dir, resume=None, look=lambda run: run, model=None, train_set=None, **changes):
    """Trained by this trainer; what `look` sees of the run at its end."""
    args = TrainArgs(**{**settings(case, output_dir, **changes), "resume_from_checkpoint": None if resume is None else str(resume)})
    return train_and(args, look, CASES[case][3], model=build(case) if model is None else model, train_set=train_set or data(case), eval_set=hf.samples()[8:],
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


# the worst evaluation counts as the best: then that is not the newest
WORST = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """A run's folder, of which checkpoint-3 is in the middle; no test writes into it."""
    folder = tmp_path_factory.mktemp("ours")
    here("llama", folder, **WORST)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    there("llama", folder, **WORST, save_steps=1)
    return folder


def copied(theirs, tmp_path) -> Path:
    return Path(shutil.copytree(theirs / f"checkpoint-{CUT}", tmp_path / "theirs" / f"checkpoint-{CUT}"))


def refusal(function, *args, code=3) -> str:
    with pytest.raises(UsageError) as error:
        function(*args)
    assert error.value.exit_code == code
    return str(error.value)


def take_over(folder, output_dir) -> str:
    return from_hf(str(folder), str(output_dir), None, len(data("llama")))


# ---------------------------------------------------------------------------------------------------- ranks

def cut_by_ranks(output_dir, source, strategy) -> None:
    """What was saved at the end of a run, saved again by ranks that split it."""
    here("llama", output_dir, source, strategy=strategy, per_device_train_batch_size=1)


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_what_ranks_have_split_becomes_the_same_files(ranks, ours, tmp_path, strategy):
    ranks.run(2, cut_by_ranks, tmp_path / "cut", ours / f"checkpoint-{TOTAL}", strategy)
    folders = []
    for name, run in (("whole", ours), ("split", tmp_path / "cut")):
        to_hf(str(run / f"checkpoint-{TOTAL}"), str(tmp_path / name))
        folders.append(tmp_path / name)
    whole, split = folders
    assert {*os.listdir(split)} - {*os.listdir(whole)} == {"rng_state_0.pth", "rng_state_1.pth"} and (whole / "rng_state.pth").exists()
    assert any(name.startswith("optimizer-1") for name in os.listdir(tmp_path / "cut" / f"checkpoint-{TOTAL}"))
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (whole / name).read_bytes() == (split / name).read_bytes()
    for name in ("optimizer.pt", "scheduler.pt"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in folders)
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def resume_on_ranks(output_dir, source, strategy):
    return here("llama", output_dir, source, lambda run: [flat(run).tobytes(), run.state.global_step, run.state.total_samples], strategy=strategy,
                per_device_train_batch_size=1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_checkpoint_of_theirs_goes_on_on_two_ranks(ranks, theirs, tmp_path, strategy):
    """With two ranks random numbers start anew, so that dropout differs from that of one process."""
    one, other = ranks.run(2, resume_on_ranks, tmp_path / "run", str(theirs / f"checkpoint-{CUT}"), strategy)
    assert one == other and one[1:] == [TOTAL, 5 + 5 + 4]
    assert {TOTAL, CUT} <= {*list_checkpoints(tmp_path / "run")}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{TOTAL}")
    assert type(model).__name__ == read_json(tmp_path / "run" / f"checkpoint-{TOTAL}", "config.json")["architectures"][0]
    assert b"".join(p.detach().numpy().tobytes() for p in model.parameters()) == one[0]


def train_on_ranks(output_dir, resume=None):
    return here("llama", output_dir, resume, lambda run: [flat(run).tobytes(), rng_state(), run.state.to_dict()["samples_seen"]], per_device_train_batch_size=1)


def test_random_numbers_of_every_rank_go_there_and_back(ranks, tmp_path):
    whole = ranks.run(2, train_on_ranks, tmp_path / "whole")
    to_hf(str(tmp_path / "whole" / f"checkpoint-{CUT}"), str(tmp_path / "hf" / f"checkpoint-{CUT}"))
    assert ranks.run(2, train_on_ranks, tmp_path / "back", str(tmp_path / "hf" / f"checkpoint-{CUT}")) == whole
    assert whole[0][1] != whole[1][1]


def refused_on_ranks(output_dir, source) -> str:
    return refusal(here, "llama", output_dir, source)


def test_a_damaged_one_is_refused_on_all_ranks(ranks, theirs, tmp_path):
    folder = copied(theirs, tmp_path)
    (folder / "optimizer.pt").write_bytes(b"PK")
    messages = ranks.run(2, refused_on_ranks, tmp_path / "run", str(folder))
    assert all("optimizer.pt cannot be used" in message for message in messages) and not list_checkpoints(tmp_path / "run")


# ---------------------------------------------------------------------------------------------------- weights

def test_sharded_weights_are_taken_over(theirs, tmp_path):
    folder = copied(theirs, tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    os.remove(folder / "model.safetensors")
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    fresh = build("llama")
    load_model(fresh, take_over(folder, tmp_path / "run"))
    same(model, fresh)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "absent.safetensors"])
def test_an_index_names_only_files_beside_it(theirs, tmp_path, name):
    folder = copied(theirs, tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    shutil.copy(folder / "model.safetensors", tmp_path / "theirs" / "x")
    assert f"it names {name}" in refusal(take_over, folder, tmp_path / "run")


def lose(weights):
    del weights["model.layers.0.mlp.up_proj.weight"]


def rename(weights):
    weights["model.layers.0.mlp.upper.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")


def reshape(weights):
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"][:3].clone()


@pytest.mark.parametrize("change", [lose, rename, reshape])
def test_weights_that_do_not_fit_are_refused_by_name(theirs, tmp_path, change):
    folder = copied(theirs, tmp_path)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = refusal(take_over, folder, tmp_path / "run")
    assert "model.layers.0.mlp.up_proj.weight" in message and ("upper" in message) == (change is rename)
    assert not os.path.exists(tmp_path / "run" / "metrics.jsonl") and not list_checkpoints(tmp_path / "run")
    run = here("llama", tmp_path / "anyway", folder, allow_change="weights", learning_rate=0.0)
    made, theirs_read = (load_file(path / "model.safetensors") for path in (tmp_path / "anyway" / f"checkpoint-{CUT}", folder))
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(made[key], value) for key, value in theirs_read.items() if key in made and key != name) and made[name].isfinite().all()
    steps = {part.name: run.optimizer.state[part.piece]["step"].item() for part in run.parallel.parts}
    assert steps.pop(name) == TOTAL - CUT and set(steps.values()) == {TOTAL}


@pytest.mark.parametrize("change", [lambda weights: weights.pop("hidden.bias"), lambda weights: weights["head.weight"].zero_()])
def test_weights_of_a_plain_module_that_do_not_fit_are_refused_by_name(tmp_path, change):
    there("plain", tmp_path / "theirs")
    folder = tmp_path / "theirs" / f"checkpoint-{CUT}"
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = refusal(from_hf, str(folder), str(tmp_path / "run"), Plain(), 5)
    assert "hidden.bias" in message or "head.weight and embed.weight are one weight" in message
    assert "give that one --resume_from_checkpoint" in refusal(from_hf, str(folder), str(tmp_path / "run"), None, 5, code=2)


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2))


def qwen():
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1))


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_a_model_whose_weights_have_other_names_in_files_makes_the_round_trip(tmp_path, make):
    run = here("llama", tmp_path / "run", model=make(), max_steps=1, save_steps=1)
    to_hf(str(tmp_path / "run"  / "checkpoint-1"), str(tmp_path / "hf" / "checkpoint-1"))
    assert load_file(tmp_path / "hf" / "checkpoint-1" / "model.safetensors").keys() != run.model.state_dict().keys()
    again = take_over(tmp_path / "hf" / "checkpoint-1", tmp_path / "again")
    fresh = make()
    load_model(fresh, again)
    same(run.model, fresh)
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "hf" / "checkpoint-1", again):
        same(run.model, type(fresh).from_pretrained(folder))


@pytest.mark.parametrize("case", ["gpt2", "bert", "t5"])
def test_from_pretrained_takes_a_checkpoint_as_it_is(tmp_path, case):
    from tokenizers import Tokenizer, models
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?")), unk_token="?")
    args = TrainArgs(**settings(case, tmp_path, max_steps=1, save_steps=1))
    run = run_training(args, CASES[case][3], model=build(case), train_set=data(case), collate=lambda s: collate(s, case, True), processing_class=words)
    auto = {"gpt2": transformers.AutoModelForCausalLM, "bert": transformers.AutoModelForSequenceClassification, "t5": transformers.AutoModelForSeq2SeqLM}[case]
    same(run.model, auto.from_pretrained(tmp_path / "checkpoint-1"))
    body = transformers.AutoModel.from_pretrained(tmp_path / "checkpoint-1")
    same(body, getattr(run.model, run.model.base_model_prefix, None) or run.model) if case != "t5" else same(body.encoder, run.model.encoder)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint-1")(["b", "a", "c"], is_split_into_words=True)["input_ids"] == [1, 0, 2]
    run.model.save_pretrained(tmp_path / "own")
    for name in ("config.json", *(["generation_config.json"] if run.model.can_generate() else [])):
        assert read_json(tmp_path / "own", name) == read_json(tmp_path / "checkpoint-1", name)
    to_hf(str(tmp_path / "checkpoint-1"), str(tmp_path / "hf"))
    assert {"tokenizer.json", "tokenizer_config.json"} <= {*os.listdir(tmp_path / "hf")}


def test_a_processing_class_that_makes_folders_is_refused(tmp_path):
    class Deep:
        def save_pretrained(self, folder):
            os.mkdir(os.path.join(folder, "templates"))
    with pytest.raises(UsageError, match="a checkpoint holds only plain files"):
        run_training(TrainArgs(**settings("plain", tmp_path)), cross_entropy_sum, model=Plain(), train_set=data("plain"),
                     collate=lambda samples: collate(samples, "plain", True), processing_class=Deep())
    assert not list_checkpoints(tmp_path)


# ---------------------------------------------------------------------------------------------------- progress

def test_the_log_and_the_best_model_go_there(ours, tmp_path, capsys):
    to_hf(str(ours / f"checkpoint-{CUT}"), str(tmp_path / f"checkpoint-{CUT}"))
    state = transformers.trainer_callback.TrainerState.load_from_json(tmp_path / f"checkpoint-{CUT}" / "trainer_state.json")
    assert state.log_history == [row for row in rows(ours) if row["step"] <= CUT] and len(state.log_history) == 2 * CUT
    assert vars(state).keys() == vars(transformers.trainer_callback.TrainerState()).keys()
    best = state.best_global_step
    assert state.best_metric == max(row["eval_loss"] for row in rows(ours) if "eval_loss" in row) and best < CUT
    assert state.best_model_checkpoint is None and f"checkpoint-{best}, the best update, is not there" in capsys.readouterr().out
    os.mkdir(tmp_path / f"checkpoint-{best}")
    to_hf(str(ours / f"checkpoint-{TOTAL}"), str(tmp_path / f"checkpoint-{TOTAL}"))
    assert read_json(tmp_path / f"checkpoint-{TOTAL}", "trainer_state.json")["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")


def test_the_log_and_the_best_model_come_here(theirs, tmp_path):
    cut = read_json(theirs / f"checkpoint-{CUT}", "trainer_state.json")
    run = here("llama", tmp_path / "run", theirs / f"checkpoint-{CUT}", **WORST, save_steps=1, save_total_limit=1, load_best_model_at_end=True)
    assert rows(tmp_path / "run")[:len(cut["log_history"])] == cut["log_history"]
    best = run.state.best_global_step
    assert best == read_json(theirs / f"checkpoint-{TOTAL}", "trainer_state.json")["best_global_step"] < CUT
    assert list_checkpoints(tmp_path / "run") == [TOTAL, best]
    same(transformers.LlamaForCausalLM.from_pretrained(theirs / f"checkpoint-{best}"), run.model)


def test_updates_that_fp16_skipped_do_not_advance_the_schedule(theirs, tmp_path):
    folder = copied(theirs, tmp_path)
    schedule = torch.load(folder / "scheduler.pt", weights_only=True)
    torch.save(schedule | {"last_epoch": CUT - 1}, folder / "scheduler.pt")
    scaler = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 2}
    torch.save(scaler, folder / "scaler.pt")
    made = take_over(folder, tmp_path / "run")
    assert read_json(made, "state.json")["state"]["skipped_steps"] == 1 and read_json(made, "state.json")["scaler"] == scaler
    to_hf(made, str(tmp_path / "back"))
    assert torch.load(tmp_path / "back" / "scheduler.pt", weights_only=True)["last_epoch"] == CUT - 1
    assert torch.load(tmp_path / "back" / "scaler.pt", weights_only=True) == scaler
    run = here("llama", tmp_path / "run", "True")
    used = [row["learning_rate"] for row in rows(tmp_path / "run") if "loss" in row]
    assert used[CUT] == run.schedule(CUT - 1) != run.schedule(CUT) and len(used) == TOTAL


def test_what_was_taken_over_goes_back_as_it_was(theirs, tmp_path):
    folder = theirs / f"checkpoint-{CUT}"
    to_hf(take_over(folder, tmp_path / "run"), str(tmp_path / "theirs" / f"checkpoint-{CUT}"))
    back = tmp_path / "theirs" / f"checkpoint-{CUT}"
    assert {*os.listdir(folder)} - {*os.listdir(back)} == {"training_args.bin"}
    for name in ("optimizer.pt", "scheduler.pt"):
        one, other = (torch.load(each / name, weights_only=True) for each in (folder, back))
        assert json.dumps(one, default=torch.Tensor.tolist, sort_keys=True) == json.dumps(other, default=torch.Tensor.tolist, sort_keys=True)
    same_state = [{**read_json(each, "trainer_state.json"), "stateful_callbacks": None, "best_model_checkpoint": None} for each in (folder, back)]
    assert same_state[0] == same_state[1]


# ---------------------------------------------------------------------------------------------------- refused

class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(theirs, tmp_path, name):
    folder = copied(theirs, tmp_path)
    torch.save({"state": Harm(tmp_path / "ran")}, folder / name)
    assert f"{name} cannot be used" in refusal(take_over, folder, tmp_path / "run")
    (folder / "training_args.bin").write_bytes((folder / name).read_bytes())
    shutil.copy(theirs / f"checkpoint-{CUT}" / name, folder / name)
    take_over(folder, tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_a_place_in_the_data_is_exact_or_refused(theirs, tmp_path):
    folder, out = str(theirs / f"checkpoint-{CUT}"), str(tmp_path / "run")
    assert "give --num_samples" in refusal(from_hf, folder, out, None, None, code=2)
    assert "7 samples are 4 rounds of 2" in refusal(from_hf, folder, out, None, 7, code=2)
    from_hf(str(theirs / "checkpoint-2"), out)      # between two epochs the number is not needed
    state = read_json(f"{out}/checkpoint-2", "state.json")["state"]
    assert (state["epochs_done"], state["samples_seen"]) == (1, 0)
    assert "already holds a run" in refusal(take_over, folder, out, code=2)
    assert "gives no place" in refusal(from_hf, str(endless(copied(theirs, tmp_path))), str(tmp_path / "other"), None, 5, code=2)


def endless(folder):
    state = read_json(folder, "trainer_state.json")
    (folder / "trainer_state.json").write_text(json.dumps({**state, "num_train_epochs": 2**63 - 1}))
    return folder


def test_an_optimizer_without_a_like_is_refused_by_name(theirs, tmp_path, capsys):
    here("llama", tmp_path / "muon", optim="muon", optim_args=None)
    source = str(tmp_path / "muon" / f"checkpoint-{CUT}")
    message = refusal(to_hf, source, str(tmp_path / "hf"), code=2)
    assert "MuonAdamW" in message and "--only_model" in message and not list(tmp_path.glob("*hf*"))
    main(["to-hf", str(tmp_path / "muon"), str(tmp_path / "hf"), "--only_model"])
    assert not {"optimizer.pt", "rng_state.pth"} & {*os.listdir(tmp_path / "hf")} and (tmp_path / "hf" / "trainer_state.json").exists()
    folder = copied(theirs, tmp_path)
    packed = torch.load(folder / "optimizer.pt", weights_only=True)
    packed["state"] = {number: {"exp_avg_sq_row": state["step"]} for number, state in packed["state"].items()}
    torch.save(packed, folder / "optimizer.pt")
    assert "exp_avg_sq_row" in refusal(take_over, folder, tmp_path / "run")


@pytest.mark.parametrize("changes", [{"per_device_train_batch_size": 1}, {"gradient_accumulation_steps": 1}])
def test_a_place_that_the_hf_trainer_would_not_find_is_refused(ours, tmp_path, changes):
    """It takes the number of updates for the place, which another batch size before has made wrong."""
    here("llama", tmp_path / "run", ours / f"checkpoint-{CUT}", max_steps=CUT + 1, save_steps=1, **changes)
    assert "at another sample" in refusal(to_hf, str(tmp_path / "run" / f"checkpoint-{CUT + 1}"), str(tmp_path / "hf"), code=2)
    to_hf(str(tmp_path / "run" / f"checkpoint-{CUT + 1}"), str(tmp_path / "hf"), True)


def test_an_order_that_is_drawn_in_another_way_is_refused_inside_of_an_epoch(theirs, tmp_path, capsys):
    here("llama", tmp_path / "run", train_sampling_strategy="group_by_length")
    assert "group_by_length" in refusal(to_hf, str(tmp_path / "run" / f"checkpoint-{CUT}"), str(tmp_path / "hf"), code=2)
    here("llama", tmp_path / "other", theirs / f"checkpoint-{CUT}", train_sampling_strategy="group_by_length")
    assert "note: the HF Trainer draws the order" in capsys.readouterr().out


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(data("llama"))


def test_streams_are_refused_both_ways(theirs, tmp_path):
    with pytest.raises(UsageError, match="does not tell a place in a stream"):
        here("llama", tmp_path / "a", theirs / f"checkpoint-{CUT}", train_set=Stream())
    here("llama", tmp_path / "b", train_set=Stream())
    assert "its training data is a stream" in refusal(to_hf, str(tmp_path / "b" / f"checkpoint-{CUT}"), str(tmp_path / "hf"), code=2)


def test_other_data_is_refused_and_adapters_are_told_what_to_do_with(theirs, tmp_path):
    folder = copied(theirs, tmp_path)
    assert main(["from-hf", str(folder), str(tmp_path / "run"), "--num_samples", str(len(data("llama")))]) is None
    with pytest.raises(UsageError, match="the training data"):
        here("llama", tmp_path / "run", True, train_set=data("llama")[:-1])
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/etc"}')
    assert "--lora_adapter" in refusal(take_over, folder, tmp_path / "other")


def test_to_evaluate_a_checkpoint_of_theirs_it_is_converted_first(theirs, tmp_path):
    with pytest.raises(UsageError, match="tools.convert from-hf"):
        here("llama", tmp_path, theirs / f"checkpoint-{CUT}", do_eval=True)


@pytest.mark.parametrize(("name", "value"), [("best_global_step", "1/../../x"), ("best_global_step", 99), ("global_step", -1), ("train_batch_size", 0),
                                             ("epoch", -0.5), ("epoch", None), ("log_history", [1]), ("stateful_callbacks", [1]), ("train_batch_size", None)])
def test_impossible_values_are_refused(theirs, tmp_path, name, value):
    folder = copied(theirs, tmp_path)
    (folder / "trainer_state.json").write_text(json.dumps({**read_json(folder, "trainer_state.json"), name: value}))
    assert "trainer_state.json cannot be used" in refusal(take_over, folder, tmp_path / "run")


@pytest.mark.parametrize("name", ["optimizer.pt", "config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_not_followed(theirs, tmp_path, name):
    folder = copied(theirs, tmp_path)
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refusal(take_over, folder, tmp_path / "run")


def test_weights_alone_stay_weights_alone(tmp_path, capsys):
    here("llama", tmp_path / "run", save_only_model=True)
    to_hf(str(tmp_path / "run" / f"checkpoint-{CUT}"), str(tmp_path / "hf"))
    assert "holds weights alone" in capsys.readouterr().out and not (tmp_path / "hf" / "optimizer.pt").exists()
    same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{CUT}"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    assert "holds weights alone" in refusal(take_over, tmp_path / "hf", tmp_path / "again")


def test_a_checkpoint_of_version_4_with_other_fields_and_names_is_taken_over(theirs, tmp_path):
    folder = copied(theirs, tmp_path)
    with zipfile.ZipFile(theirs / f"checkpoint-{CUT}" / "rng_state.pth") as old, zipfile.ZipFile(folder / "rng_state.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"numpy._core.", b"numpy.core."))
    assert (folder / "rng_state.pth").read_bytes().count(b"numpy.core.")
    state = read_json(folder, "trainer_state.json")
    for name in ("best_global_step", "trial_name", "trial_params", "stateful_callbacks"):
        del state[name]
    (folder / "trainer_state.json").write_text(json.dumps({**state, "a_field_of_its_own": [1]}))
    assert read_json(take_over(folder, tmp_path / "run"), "state.json")["state"]["best_global_step"] == 0
