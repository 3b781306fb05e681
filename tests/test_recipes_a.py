"""The recipes of classification, regression and masked words, for a few updates on a few real samples, which they must learn by heart."""
import functools
import importlib
import json
import statistics

import numpy as np
import pytest

from state import UsageError
from tests.toy import rows
from tools import corpora

READERS = {"text_classification": "movie_reviews", "token_classification": "treebank",
           "sentence_pairs": "sentence_pairs", "multiple_choice": "multiple_choice",
           "regression": "diamonds", "image_classification": "digits", "masked_lm": "verses"}
SHORT = ["--max_steps", "32", "--logging_steps", "8", "--eval_strategy", "no", "--save_strategy", "no",
         "--warmup_steps", "4", "--do_train", "--do_eval", "--do_predict", "--disable_tqdm"]


@pytest.fixture(scope="module", autouse=True)
def verses_once():
    patch = pytest.MonkeyPatch()
    patch.setattr(corpora, "verses", functools.cache(corpora.verses))      # 5 s
    yield
    patch.undo()


@pytest.fixture
def recipe(request, monkeypatch):
    """The module of a recipe, which reads 64 samples to train and 40 held-out ones."""
    if request.param != "regression":
        pytest.importorskip("transformers")
    module, reader = importlib.import_module(f"recipes.{request.param}"), READERS[request.param]
    try:
        train, held_out = getattr(corpora, reader)()
    except UsageError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(module, reader, lambda: (train[:64], held_out[:40]))
    caches = [value for value in vars(module).values() if hasattr(value, "cache_clear")]
    for cached in caches:
        cached.cache_clear()
    yield module
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("recipe", READERS, indirect=True)
def test_each_learns_its_samples_and_measures_and_predicts(recipe, tmp_path):
    recipe.run([*SHORT, "--output_dir", str(tmp_path)])
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert len(losses) == 4 and losses[-1] < 0.97 * losses[0]
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert {type(results[recipe.METRIC]), type(results["eval_baseline"])} == {float}
    assert 0 < results["eval_baseline"] < float("inf") and "eval_loss" in results
    predictions, labels = (np.load(tmp_path / f"test_{kind}.npy") for kind in ("predictions", "labels"))
    assert predictions.shape == labels.shape and len(labels) == 40
    measured = labels != -100
    if recipe.METRIC == "eval_mae":
        assert np.abs(np.exp(predictions) - np.exp(labels)).mean() == pytest.approx(results["eval_mae"], rel=1e-5)
    else:
        assert (predictions == labels)[measured].mean() == pytest.approx(results["eval_accuracy"])


@pytest.mark.parametrize("recipe", ["masked_lm"], indirect=True)
def test_the_words_that_are_hidden_do_not_depend_on_batches(recipe, tmp_path):
    hidden = []
    for size in ("7", "40"):
        recipe.run([*SHORT, "--max_steps", "1", "--per_device_eval_batch_size", size, "--output_dir", str(tmp_path / size)])
        hidden.append(np.load(tmp_path / size / "test_labels.npy"))
    assert (hidden[0] == hidden[1]).all()
    words = sum(word not in corpora.Vocabulary.SPECIAL for row in recipe.read()[1] for word in row["input_ids"])
    assert 0.12 < (hidden[0] != -100).sum() / words < 0.18


@pytest.mark.parametrize("recipe", ["token_classification"], indirect=True)
def test_the_baseline_of_tags_is_that_of_a_word_by_word_count(recipe):
    train, held_out = recipe.treebank()
    seen: dict = {}
    for words, tags in train:
        for word, tag in zip(words, tags):
            seen.setdefault(word.lower(), []).append(tag)
    new = statistics.mode(tag for tags in seen.values() for tag in tags)
    right = [statistics.mode(seen.get(word.lower(), [new])) == tag for words, tags in held_out for word, tag in zip(words, tags)]
    assert recipe.read().baseline == pytest.approx(np.mean(right), abs=1e-9)
