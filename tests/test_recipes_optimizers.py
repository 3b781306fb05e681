"""The recipes run for real, with the packages they are about."""
import pytest

from recipes.optimizers import OPTIMIZERS, run
from state import UsageError
from tests.toy import rows

SMALL = ["--n_layer", "2", "--n_embd", "64", "--block_size", "32", "--logging_steps", "10", "--dropout", "0.1"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_the_recipe_lowers_the_loss(tmp_path, name):
    pytest.importorskip({"adamw_8bit": "bitsandbytes", "schedule_free": "schedulefree", "galore": "galore_torch", "apollo": "apollo_torch"}[name])
    run([name, *SMALL, "--output_dir", str(tmp_path), "--max_steps", "60", "--learning_rate", "3e-3", "--save_strategy", "no"])
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert losses[-1] < min(losses[0] - 0.3, 3.4)


@pytest.mark.parametrize("name", ["adamw_8bit", "schedule_free"])
def test_they_resume_bit_for_bit(tmp_path, name):
    pytest.importorskip({"adamw_8bit": "bitsandbytes", "schedule_free": "schedulefree"}[name])
    command = [name, *SMALL, "--max_steps", "6", "--save_steps", "3", "--lr_scheduler_type", "constant", "--learning_rate", "1e-3"]
    run([*command, "--output_dir", str(tmp_path / "whole")])
    run([*command, "--output_dir", str(tmp_path / "part"), "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-3")])
    for file in ("model.safetensors", "optimizer-0.safetensors"):
        assert (tmp_path / "part/checkpoint-6" / file).read_bytes() == (tmp_path / "whole/checkpoint-6" / file).read_bytes()


def test_optimizers_that_cannot_be_saved_say_so_before_training(tmp_path):
    pytest.importorskip("galore_torch")
    with pytest.raises(UsageError, match="--save_strategy no"):
        run(["galore", *SMALL, "--output_dir", str(tmp_path), "--max_steps", "2"])


def test_help_and_wrong_names_need_no_package(capsys):
    run(["--help"])
    assert "schedule_free" in capsys.readouterr().out
    with pytest.raises(UsageError, match="expected one of adamw_8bit"):
        run(["adam"])


def losses_of(output_dir, name: str, strategy: str, batch_size: int) -> list[float]:
    run([name, *SMALL[:-2], "--output_dir", str(output_dir), "--max_steps", "5", "--logging_steps", "1", "--learning_rate", "1e-3", "--save_strategy", "no",
         "--lr_scheduler_type", "constant", "--strategy", strategy, "--per_device_train_batch_size", str(batch_size), "--eval_strategy", "steps",
         "--eval_steps", "100", "--dataset", str(output_dir.parent / "text.txt"), "--disable_tqdm"])
    return [row.get("loss", row.get("eval_loss")) for row in rows(output_dir) if "loss" in row or "eval_loss" in row]


def refusal(output_dir, name: str, strategy: str) -> str:
    with pytest.raises(UsageError) as error:
        losses_of(output_dir, name, strategy, 4)
    return str(error.value)


def test_apollo_is_refused_where_its_state_would_have_to_be_split(ranks, tmp_path):
    pytest.importorskip("apollo_torch")
    (tmp_path / "text.txt").write_text("".join(f"line {i * i}\n" for i in range(2000)))
    for said in ranks.run(2, refusal, tmp_path / "two", "apollo", "zero1"):
        assert "apollo_torch" in said and "makes its state before training" in said


@pytest.mark.parametrize("name", ["adamw_8bit", "schedule_free", "galore"])
@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_they_train_as_one_process_does_under_strategies_that_split(ranks, tmp_path, name, strategy):
    """8-bit AdamW and GaLore look at more than one element; schedule-free AdamW swaps its weights for evaluations."""
    pytest.importorskip({"adamw_8bit": "bitsandbytes", "schedule_free": "schedulefree", "galore": "galore_torch"}[name])
    (tmp_path / "text.txt").write_text("".join(f"line {i * i}\n" for i in range(2000)))
    one = losses_of(tmp_path / "one", name, "ddp", 8)
    assert len(one) == 6
    for got in ranks.run(2, losses_of, tmp_path / "two", name, strategy, 4):
        assert got == pytest.approx(one, abs=2e-5)
