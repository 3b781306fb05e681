"""Recipes of sequence-to-sequence tasks, question answering, pre-training, distillation and an own update, for a few updates each."""
import functools
import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from state import UsageError
from tests.test_recipes_a import READERS
from tests.toy import rows
from tools import corpora

ROOT = Path(__file__).parent.parent
NAMES = ["phonemes", "translation", "summarization", "question_answering", "pretraining", "distillation", "own_training_step"]
WITH_TRANSFORMERS = NAMES[:4]
QUICK = ["--disable_tqdm", "--seed", "1", "--max_steps", "40", "--warmup_steps", "4", "--logging_steps", "5", "--eval_strategy", "no"]


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """All tests here read the same part of the sources, which is nobody else's."""
    yield
    for module in [sys.modules[name] for name in map("recipes.{}".format, NAMES) if name in sys.modules]:
        for cached in {"read", "baseline"} & vars(module).keys():
            getattr(module, cached).cache_clear()


@pytest.fixture
def recipe(request, monkeypatch, tmp_path):
    """A recipe with little to read and to evaluate, that writes nothing outside of tmp_path."""
    if request.param in WITH_TRANSFORMERS:
        pytest.importorskip("transformers")
    module, every = import_module(f"recipes.{request.param}"), corpora.source_files
    monkeypatch.setattr(corpora, "source_files", lambda root: every(root)[::8])
    if hasattr(module, "read") and hasattr(module, "build_data"):
        monkeypatch.setattr(module, "build_data", lambda args, build=module.build_data: build(args)._replace(eval=build(args).eval[:32]))
    if request.param == "pretraining":
        monkeypatch.setattr(module, "movie_reviews", lambda source: corpora.movie_reviews())        # the short ones
    monkeypatch.chdir(tmp_path)
    return module


def run(recipe, *argv: str):
    try:
        return recipe.run([*QUICK, "--output_dir", "run", *argv])
    except UsageError as error:
        if "pip install --no-deps" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("recipe", NAMES, indirect=True)
def test_a_recipe_learns_and_writes_its_metric_beside_its_baseline(recipe, tmp_path):
    run(recipe, "--save_strategy", "no", "--do_train", "--do_eval", "--do_predict")
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    results = json.loads((tmp_path / "run/eval_results.json").read_text())
    assert math.isfinite(results[recipe.METRIC]) and results["eval_baseline"] > 0
    predictions = np.load(tmp_path / "run/test_predictions.npy")
    if hasattr(recipe, "Seq2SeqCollator"):
        assert predictions.shape[0] == 32 and (predictions[:, 0] == corpora.Vocabulary.START).all() and len(np.unique(predictions)) > 3
    elif hasattr(recipe, "best_span"):
        for (first, last), row in zip(predictions, recipe.build_data(None).eval, strict=True):
            assert first <= last < first + recipe.LONGEST_ANSWER and row["token_type_ids"][first] == row["token_type_ids"][last] == 1
    else:
        assert predictions.shape == np.load(tmp_path / "run/test_labels.npy").shape


@pytest.mark.parametrize("recipe", ["translation", "summarization"], indirect=True)
def test_copies_are_probabilities_that_generation_gives_as_the_loss_does(recipe):
    """What a step of generation with a cache says is what the loss saw of the same tokens; one softmax adds up to 1."""
    model = run(recipe, "--max_steps", "20", "--save_strategy", "no").model.eval()
    batch = recipe.Seq2SeqCollator(0, decoder_start_id=2)(recipe.build_data(None).eval[:4])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        written = model.generate(**inputs, source_ids=batch["input_ids"], max_new_tokens=6, num_beams=1, output_logits=True,
                                 return_dict_in_generate=True)
        whole = model(**inputs, decoder_input_ids=written.sequences[:, :-1]).logits
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(whole.shape[:2]))
    open_ = ~(written.sequences[:, :-1] == corpora.Vocabulary.END).cumsum(1).bool()
    torch.testing.assert_close(torch.stack(written.logits, 1)[open_], whole[open_], rtol=1e-3, atol=1e-3)


def test_the_best_span_is_legal():
    from recipes.question_answering import LONGEST_ANSWER, best_span
    scores = torch.tensor([[[9.0, 9.0], [0, 5], [4, 1], [3, 2]]]).repeat(2, 1, 1)
    scores[0, 0] = -torch.inf           # the question
    scores[1, 3, 1] = 9.5
    assert best_span(scores, None).tolist() == [[2, 3], [0, 3]]     # of the first row (2, 1) would have the largest sum
    far = torch.zeros(1, LONGEST_ANSWER + 1, 2)
    far[0, 0, 0], far[0, -1, 1], far[0, -2, 1] = 9.0, 9.0, 1.0
    assert best_span(far, None).tolist() == [[0, LONGEST_ANSWER - 1]]


@pytest.mark.parametrize("recipe", ["pretraining"], indirect=True)
def test_a_stream_goes_on_where_it_was(recipe, tmp_path):
    short = ["--max_steps", "6", "--save_steps", "3", "--n_embd", "32"]
    run(recipe, *short)
    run(recipe, *short, "--output_dir", "part", "--resume_from_checkpoint", "run/checkpoint-3")
    first, second = ((tmp_path / folder / "checkpoint-6/model.safetensors").read_bytes() for folder in ("run", "part"))
    assert first == second
    assert json.loads((tmp_path / "run/checkpoint-6/state.json").read_text())["stream"] is not None


digits_once = functools.cache(corpora.digits)      # which each of many runs would parse


def losses_of(folder, strategy: str, *argv: str) -> list[float]:
    from recipes import own_training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_training_step, "digits", digits_once)
        own_training_step.run([*QUICK, "--output_dir", str(folder), "--max_steps", "6", "--logging_steps", "1", "--strategy", strategy,
                               "--save_strategy", "no", *argv])
    return [row.get("loss", row.get("eval_loss")) for row in rows(folder) if "loss" in row or "eval_loss" in row]


def test_a_sharpness_aware_update_is_the_same_however_it_is_split(ranks, tmp_path, monkeypatch):
    from recipes import own_training_step
    try:
        whole = losses_of(tmp_path / "whole", "ddp", "--per_device_train_batch_size", "32")
    except UsageError as error:
        pytest.skip(str(error))
    assert len(whole) == 7
    parts = losses_of(tmp_path / "parts", "ddp", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4")
    assert parts == pytest.approx(whole, abs=1e-5)
    for strategy in ("ddp", "zero1", "zero2", "fsdp"):
        for found in ranks.run(2, losses_of, tmp_path / strategy, strategy, "--per_device_train_batch_size", "16"):
            assert found == pytest.approx(whole, abs=1e-5)
    saving = ["--save_strategy", "steps", "--save_steps", "3", "--per_device_train_batch_size", "32"]
    assert losses_of(tmp_path / "saved", "ddp", *saving) == whole
    resumed = losses_of(tmp_path / "resumed", "ddp", *saving, "--resume_from_checkpoint", str(tmp_path / "saved/checkpoint-3"))
    assert resumed[-4:] == whole[-4:]
    monkeypatch.setattr(own_training_step, "RHO", 0.0)
    assert losses_of(tmp_path / "plain", "ddp", "--per_device_train_batch_size", "32") != pytest.approx(whole, abs=1e-4)


def test_help_needs_no_package():
    """Of all recipes of this file and of test_recipes_a.py."""
    names = [*NAMES, *READERS]
    code = f"""import sys
for name in ("transformers", "datasets", "plotnine", "mlxtend", "movie_reviews"):
    sys.modules[name] = None
from importlib import import_module
for name in {names}:
    print("RECIPE", name)
    try:
        import_module("recipes." + name).run(["--help"])
    except SystemExit as end:
        assert not end.code
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("RECIPE ")[1:]
    assert len(parts) == len(names)
    assert all(f"python -m recipes.{name}" in part and "--learning_rate" in part for name, part in zip(names, parts))
