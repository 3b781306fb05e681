"""--do_eval and --do_predict: at the end of training, or with a checkpoint and without training."""
import json

import numpy as np
import pytest
import torch

from data import Data
from rundir import list_checkpoints, lock
from state import UsageError
from tests.test_main import TINY
from tests.toy import arguments, rows
from train import run as main
from world import open_world

TRAIN = [*TINY, "--learning_rate", "1e-2", "--per_device_eval_batch_size", "64", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("".join(f"line {i * i}\n" for i in range(400)))
    (folder / "test.txt").write_text("".join(f"line {i * i}\n" for i in range(1000, 1020)))
    return ["--dataset", str(folder / "train.txt"), "--test_dataset", str(folder / "test.txt")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def results(folder, split="eval") -> dict:
    return json.loads((folder / f"{split}_results.json").read_text())


def test_evaluating_a_checkpoint_gives_what_training_saw_and_leaves_the_run_as_it_is(tmp_path, text):
    main([*TRAIN, *text, "--output_dir", str(tmp_path), "--do_train", "--do_eval", "--ema_decay", "0.5"])
    logged = [row["eval_loss"] for row in rows(tmp_path) if "eval_loss" in row]
    assert logged[-1] == logged[-2] == results(tmp_path)["eval_loss"] and results(tmp_path, "train")["train_loss"] > 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "results" not in path.name and "cache" not in path.parts}
    with open_world(arguments(tmp_path)) as world:
        lock(str(tmp_path), world.on_exit)       # as if it were still going on
        main([*TRAIN, *text, "--output_dir", str(tmp_path), "--do_eval"])         # the averages, although no flag says so
        assert results(tmp_path)["eval_loss"] == pytest.approx(logged[-1], abs=1e-6)
        main([*TRAIN, *text, "--output_dir", str(tmp_path), "--do_eval", "--resume_from_checkpoint", str(tmp_path / "checkpoint-2"), "--ema_decay", "0.5"])
        assert results(tmp_path)["eval_loss"] == pytest.approx(logged[0], abs=1e-6) and results(tmp_path)["epoch"] == pytest.approx(rows(tmp_path)[0]["epoch"])
    after = {path: path.read_bytes() for path in before if path.name != ".lock"}
    assert all(before[path] == content for path, content in after.items())


def call(argv):
    main(argv)


def test_it_is_exact_on_two_ranks_whatever_they_split(ranks, tmp_path, text):
    flags = [*TRAIN, *text, "--output_dir", str(tmp_path), "--optim", "muon"]
    main(flags)
    logged = [row["eval_loss"] for row in rows(tmp_path) if "eval_loss" in row]
    for strategy in ("zero2", "fsdp"):
        ranks.run(2, call, [*flags, "--do_eval", "--strategy", strategy])
        assert results(tmp_path)["eval_loss"] == pytest.approx(logged[-1], abs=1e-6)
        (tmp_path / "eval_results.json").unlink()


def test_the_best_checkpoint_is_used_if_asked_for(tmp_path, text):
    flags = [*TRAIN, *text, "--output_dir", str(tmp_path), "--load_best_model_at_end", "--greater_is_better", "True"]     # the worst, so it is not the last
    run = main([*flags, "--do_train", "--do_eval"])
    best = max(row["eval_loss"] for row in rows(tmp_path) if "eval_loss" in row)
    assert run.state.best_global_step == 2 and results(tmp_path)["eval_loss"] == best
    main([*flags, "--do_eval"])
    assert results(tmp_path)["eval_loss"] == best
    history = [row.keys() for row in rows(tmp_path)]
    for again in range(1, 3):       # finished: it has the best weights too, and the evaluation is one more row
        main([*flags, "--do_train", "--do_eval", "--resume_from_checkpoint", "auto"])
        assert results(tmp_path)["eval_loss"] == best
        assert [row.keys() for row in rows(tmp_path)] == [*history, *[history[-1]] * again]


def test_predictions_for_the_test_set_are_in_a_file_in_order(tmp_path, text):
    main([*TINY, *text, "--output_dir", str(tmp_path), "--do_train", "--do_predict"])
    predictions, labels = (np.load(tmp_path / f"test_{name}.npy") for name in ("predictions", "labels"))
    written = bytes(labels[labels != -100].astype(np.uint8).tolist())
    assert written == "".join(f"line {i * i}\n" for i in range(1000, 1020)).encode()[1:]
    assert predictions.shape == labels.shape and 0 <= predictions.min() and predictions.max() < 256
    assert results(tmp_path, "test")["test_loss"] > 0 and "test_loss" in results(tmp_path, "all")


def test_weights_alone_will_do_but_not_damaged_or_missing_ones(tmp_path, text):
    main([*TINY, *text, "--output_dir", str(tmp_path), "--save_only_model", "--save_steps", "2"])
    main([*TINY, *text, "--output_dir", str(tmp_path), "--do_eval"])
    assert list_checkpoints(tmp_path) == [4, 2]
    path = tmp_path / "checkpoint-4" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match="checkpoint-4 cannot be evaluated: model.safetensors") as error:
        main([*TINY, *text, "--output_dir", str(tmp_path), "--do_eval"])
    assert error.value.exit_code == 3
    with pytest.raises(UsageError, match="there is none in .*or --do_train to train first"):
        main([*TINY, *text, "--output_dir", str(tmp_path / "none"), "--do_predict"])
    assert not (tmp_path / "none").exists()


def test_schedule_free_weights_are_evaluated_as_in_training(tmp_path, text):
    pytest.importorskip("schedulefree")
    from recipes.optimizers import run
    flags = ["schedule_free", *TRAIN, *text, "--output_dir", str(tmp_path), "--lr_scheduler_type", "constant", "--load_best_model_at_end"]
    run([*flags, "--do_train", "--do_eval"])
    best = min(row["eval_loss"] for row in rows(tmp_path) if "eval_loss" in row)
    assert results(tmp_path)["eval_loss"] == best
    run([*flags, "--do_eval"])
    assert results(tmp_path)["eval_loss"] == best


def few(args) -> Data:
    held_out = [{"input_ids": torch.tensor([i, i + 1])} for i in range(3)]
    return Data([{**sample, "labels": torch.tensor([1, -100])} for sample in held_out], None, "few", {"a": held_out, "b": held_out[:1]})


def test_predictions_need_no_labels_and_may_be_for_several_sets(tmp_path):
    main([*TINY, "--output_dir", str(tmp_path), "--do_train", "--do_predict"], build_data=few)
    assert results(tmp_path, "test").keys() == {f"test_{name}_{what}" for name in "ab" for what in ("runtime", "samples_per_second", "steps_per_second")}
    assert np.load(tmp_path / "test_a_predictions.npy").shape == (3, 2) and not (tmp_path / "test_a_labels.npy").exists()
    with pytest.raises(UsageError, match="needs held-out data"):
        main([*TINY, "--output_dir", str(tmp_path), "--do_eval"], build_data=few)


def test_results_go_into_a_new_folder_if_that_is_asked_for(tmp_path, text):
    main([*TINY, *text, "--output_dir", str(tmp_path / "run")])
    main([*TINY, *text, "--output_dir", str(tmp_path / "new"), "--do_eval", "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4")])
    assert results(tmp_path / "new")["eval_loss"] > 0 and not (tmp_path / "new" / "metrics.jsonl").exists()


def test_a_checkpoint_evaluated_on_other_data_than_it_was_trained_with_says_so(tmp_path, text, capsys):
    main([*TINY, *text, "--output_dir", str(tmp_path)])
    capsys.readouterr()
    main([*TINY, "--output_dir", str(tmp_path), "--do_eval", "--dataset", text[3], "--test_dataset", text[3]])
    out = capsys.readouterr().out
    assert f"note: it was trained with --dataset {text[1]}, and this is {text[3]}" in out and f"data: {text[3]}" in out


def test_a_run_that_was_stopped_early_is_finished_until_its_patience_is_raised(tmp_path, text, capsys):
    flags = [*TRAIN, *text, "--output_dir", str(tmp_path), "--greater_is_better", "True", "--resume_from_checkpoint", "auto", "--max_steps", "8"]
    main([*flags, "--early_stopping_patience", "1"])
    history = rows(tmp_path)
    assert history[-1]["step"] == 4 and "stopped early, after update 4 of 8" in capsys.readouterr().out
    before = (tmp_path / "train_results.json").read_bytes()
    main([*flags, "--early_stopping_patience", "1"])
    assert rows(tmp_path) == history and (tmp_path / "train_results.json").read_bytes() == before
    assert "to go on, raise --early_stopping_patience" in capsys.readouterr().out
    main([*flags, "--early_stopping_patience", "3"])
    assert rows(tmp_path)[-1]["step"] == 8
