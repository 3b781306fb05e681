"""train.py and its tools as a user runs them: exit codes, one message and no traceback, real torchrun."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import main as launch

from data import build_data
from state import UsageError
from tests.toy import as_program, rows
from tools.chaos import exit_codes, start
from train import main

ROOT = Path(__file__).parent.parent
TINY = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--block_size", "16", "--max_steps", "4", "--logging_steps", "2"]


def run_python(*command, **env):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, **env})


def test_a_run_says_what_it_does_and_ends_with_where_everything_is(tmp_path, capsys):
    run = main([*TINY, "--output_dir", str(tmp_path)])
    out = capsys.readouterr().out
    for said in ("standard library", "sha256", "samples: ", "updates: 4", "micro-batch 8 x accumulation 1 x ranks 1", "trainable parameters",
                 "step 4/4", f"saved in {tmp_path}: metrics.jsonl, checkpoint-4", "tools.generate"):
        assert said in out, said
    parameters = sum(p.numel() for p in run.model.parameters())
    assert f"{parameters:,} trainable parameters" in out
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 4]


def test_run_twice_it_says_that_it_is_finished_and_how_to_start_another(tmp_path, capsys):
    command = [*TINY, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"]
    main(command)
    capsys.readouterr()
    main(command)
    out = capsys.readouterr().out
    assert "is finished: 4 updates are done, and 4 were asked for" in out and "give a new --output_dir" in out
    assert len(rows(tmp_path)) == 3


def test_the_loss_of_the_default_model_falls_on_real_text(tmp_path):
    main(["--output_dir", str(tmp_path), "--n_layer", "2", "--n_embd", "32", "--max_steps", "60", "--learning_rate", "1e-2", "--logging_steps", "10",
          "--block_size", "32"])
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert losses[0] > 3.3 and losses[-1] < 2.9      # 3.23 nats: the entropy of single bytes


def code_of_torchrun(folder: str, argv: list[str]) -> list[int]:
    return exit_codes(start(f"{folder}/log", 1, launch, ["--standalone", "--nproc-per-node", "2", f"{ROOT}/train.py", *argv]), folder)


def test_torchrun_trains_on_two_real_ranks_and_gets_what_one_gets(fresh, tmp_path):
    """Under fsdp the model is built on the meta device."""
    settings = [*TINY, "--learning_rate", "1e-3"]
    code = fresh(code_of_torchrun, str(tmp_path), [*settings, "--output_dir", f"{tmp_path}/two", "--per_device_train_batch_size", "4", "--strategy", "fsdp"])
    said = (tmp_path / "log").read_text()
    assert code == [0], said
    assert said.count("micro-batch 4 x accumulation 1 x ranks 2, fsdp") == 1      # rank 0 alone prints
    main([*settings, "--output_dir", str(tmp_path / "one")])
    two, one = ([row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("two", "one"))
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("flags, code, said", [
    (["--learning_rat", "1"], 2, "did you mean --learning_rate?"),
    (["--max_steps", "x"], 2, "expected a whole number"),
    (["--per_device_train_batch_size", "0"], 2, "per_device_train_batch_size=0"),
    (["--dataset", "missing.txt"], 2, "no such file: missing.txt"),
    (["--dataset", "requirements.txt", "--block_size", "100000"], 2, "not one block"),
    (["--resume_from_checkpoint", "True"], 3, "no checkpoint in"),
    (["--resume_from_checkpoint", "nowhere/checkpoint-1"], 3, "no such folder"),
])
def test_a_users_mistake_is_one_message_and_an_exit_code(tmp_path, flags, code, said):
    found, told = as_program("train", "--output_dir", tmp_path / "run", *flags)
    assert found == code, told
    assert said in told and "Traceback" not in told and told.splitlines()[-1].startswith("error: ")      # the bars of datasets may be before it


def test_an_output_dir_that_cannot_be_written_is_exit_code_5_before_training(tmp_path):
    """A process of its own: what the program itself ends with."""
    (tmp_path / "file").write_text("")
    done = run_python("train.py", *TINY, "--output_dir", tmp_path / "file" / "run")
    assert done.returncode == 5 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert "step" not in done.stdout


def codes_of_ranks(folder: str) -> list[int]:
    return exit_codes(start(f"{folder}/log", 2, main, [*TINY, "--output_dir", f"{folder}/run", "--resume_from_checkpoint", "True"]), folder)


def test_a_mistake_ends_all_ranks_with_one_message_each(fresh, tmp_path):
    assert fresh(codes_of_ranks, str(tmp_path)) == [3, 3]
    said = (tmp_path / "log").read_text()
    assert said.count("error: ") == said.count("no checkpoint in") == 2 and "Traceback" not in said


def test_generate_writes_with_a_saved_model(tmp_path, capsys):
    main([*TINY, "--output_dir", str(tmp_path)])
    from tools.generate import main as generate
    capsys.readouterr()
    text = generate([str(tmp_path / "checkpoint-4"), "--prompt", "def f", "--length", "30"])
    assert text.startswith("def f") and capsys.readouterr().out == text + "\n"
    assert text == generate([str(tmp_path), "--prompt", "def f", "--length", "30"])
    assert text != generate([str(tmp_path / "checkpoint-4"), "--prompt", "def f", "--length", "30", "--seed", "1"])
    likeliest = [generate([str(tmp_path), "--length", "30", *flags]) for flags in (["--temperature", "0"], ["--top_k", "1"], ["--top_p", "1e-9"])]
    assert len(set(likeliest)) == 1
    with pytest.raises(UsageError, match="no such folder") as error:
        generate([str(tmp_path / "checkpoint-5")])
    assert error.value.exit_code == 3


def test_a_users_own_text_is_trained_on_and_streamed(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = f"{ROOT}/*.py"
    main([*TINY, "--output_dir", str(tmp_path / "whole"), "--dataset", files, "--eval_strategy", "steps", "--eval_steps", "2"])
    main([*TINY, "--output_dir", str(tmp_path / "lazy"), "--dataset", files, "--streaming", "--eval_dataset", str(ROOT / "loop.py"),
          "--eval_strategy", "steps"])
    assert sum("eval_loss" in row for row in rows(tmp_path / "whole")) == 2
    assert all(row["epoch"] == row["step"] / 4 for row in rows(tmp_path / "lazy"))


def test_held_out_data_that_does_not_exist_is_an_error_only_where_it_is_needed(tmp_path):
    from args import TrainArgs
    (tmp_path / "one.txt").write_text("x" * 20)
    import datasets
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    assert build_data(TrainArgs(dataset=str(tmp_path / "one.txt"), block_size=16)).eval is None
    with pytest.raises(ValueError, match="--eval_dataset"):
        build_data(TrainArgs(dataset=str(tmp_path / "one.txt"), block_size=16, eval_strategy="steps"))


def test_a_model_that_has_diverged_is_said_to_have(tmp_path):
    main([*TINY, "--output_dir", str(tmp_path), "--max_steps", "8", "--learning_rate", "1e6", "--optim", "sgd", "--max_grad_norm", "0",
          "--lr_scheduler_type", "constant", "--on_nonfinite", "skip"])
    code, told = as_program("tools.generate", tmp_path)
    assert code == 2 and "its training has diverged" in told
