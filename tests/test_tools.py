"""Tools that people run by hand give the right answer, and say so by their exit code."""
import json
import os

import pytest

from checkpoint import Saver
from model import GPT
from state import UsageError
from tests.toy import arguments, as_program, gpt, run_training, sequences, toy_run
from tools.inspect import main as inspect
from tools.strategies import BOUNDS, Case, run_case, show

PRECISIONS = ("float64", "float32")


@pytest.fixture(scope="module")
def one():
    return {precision: run_case(Case("ddp", 1, 2, precision), 3, True) for precision in PRECISIONS}


@pytest.mark.parametrize("world_size, strategy", [(2, "ddp"), (2, "zero1"), (2, "zero2"), (2, "fsdp"), (4, "hsdp")])
def test_every_strategy_holds_and_sends_what_the_formulas_say(ranks, one, world_size, strategy):
    results = {precision: ranks.run(world_size, run_case, Case(strategy, world_size, 2, precision), 3, True)[0] for precision in PRECISIONS}
    case = Case(strategy, world_size, 2)
    assert show(case, results, one)
    for change in ({"sent": results["float32"]["sent"] * 1.1}, {"reductions": 0}, {"held": {**results["float32"]["held"], "optimizer": 0}}, {"held": {**results["float32"]["held"], "gradients": 10**7}},
                   *([{"peak": 10**7}] if strategy in ("ddp", "zero1", "zero2") else []),
                   {"losses": [loss + 2 * BOUNDS["float32"] for loss in results["float32"]["losses"]]}):
        assert not show(case, {**results, "float32": {**results["float32"], **change}}, one)


SETTINGS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.5}


def test_inspect_tells_what_was_saved(tmp_path, capsys):
    run_training(arguments(tmp_path, **SETTINGS, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss"), eval_set=sequences(2))
    assert inspect([str(tmp_path)]) == inspect([str(tmp_path / "checkpoint-2")]) == 0        # a run stands for its newest
    shown, again = (text.strip() for text in capsys.readouterr().out.split(str(tmp_path / "checkpoint-2"))[1:])
    assert shown == again
    state = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())["state"]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir()}
    parameters = sum(p.numel() for p in gpt().parameters())
    for line in (f": update 2, epoch 0.5, mean loss {state['total_loss'] / 2:.6g}, best metric {state['best_metric']:.6g} at update",
                 "saved by 1 rank, AdamW, torch ", *(f" {size:,}  {name}" for name, size in sizes.items()),
                 f" {sum(sizes.values()):,}  in all, and every checksum holds", "--max_steps 2 (-1)", "--ema_decay 0.5 (None)",
                 f"weights: 15 tensors of {parameters:,} parameters, float32", f"averaged weights: 15 tensors of {parameters:,} elements",
                 f"optimizer state: 45 tensors of {2 * parameters + 15:,} elements"):
        assert line in f": {shown.removeprefix(': ')}", line
    assert "--seed" not in shown


def test_inspect_tells_how_two_checkpoints_of_a_run_differ(tmp_path, capsys):
    run = run_training(arguments(tmp_path, **SETTINGS), model=gpt())
    paths = [str(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    assert inspect(paths) == 1
    shown = capsys.readouterr().out
    assert "  state.global_step: 1, 2\n" in shown and "norm.weight.step: 1 of 1 elements differ, by up to 1\n" in shown
    assert "\nweights: 0 of 15 are bit-identical\n" in shown and shown.endswith("they differ\n") and "--" not in shown
    moved = (gpt().norm.weight - run.model.norm.weight).abs().max().item()      # in both updates, so by twice as much at most
    by = float(shown.partition("  norm.weight: 16 of 16 elements differ, by up to ")[2].partition("\n")[0])
    assert 0 < by < moved + 1e-6
    assert inspect([paths[1], paths[1]]) == 0
    assert "  " not in capsys.readouterr().out


def test_inspect_finds_what_only_one_of_two_checkpoints_has(tmp_path, capsys):
    run_training(arguments(tmp_path / "a", **SETTINGS))
    plain = arguments(tmp_path / "b", **{**SETTINGS, "ema_decay": None}, optim="sgd")
    run_training(plain, model=GPT(17, 8, n_layer=1, n_head=2, n_embd=16))
    assert inspect([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    shown = capsys.readouterr().out
    for line in ("--ema_decay: 0.5, None", "optimizer.class: AdamW, SGD", "blocks.1.up.weight: torch.float32 of shape (64, 16), missing",
                 "norm.weight.exp_avg: torch.float32 of shape (16,), missing", "averaged weights: 0 of 15 are"):
        assert f"{line}" in shown, line
    run_training(arguments(tmp_path / "c", **SETTINGS), model=GPT(17, 8, n_layer=2, n_head=2, n_embd=8))
    assert inspect([str(tmp_path / "c"), str(tmp_path / "a")]) == 1
    assert "  norm.weight: torch.float32 of shape (8,), torch.float32 of shape (16,)\n" in capsys.readouterr().out


def save_again(output_dir, strategy, resume=None) -> None:
    """Trains two updates under ddp; or saves these once more as another strategy keeps them."""
    args = arguments(output_dir, **SETTINGS, strategy=strategy, resume_from_checkpoint=resume)
    if resume is None:
        run_training(args, model=gpt(dropout=0.2))
        return
    with toy_run(args, model=gpt(dropout=0.2)) as (run, _, _):
        saver = Saver(run)
        saver.saved_step = None     # it would not save the update again that it starts from
        saver.save(last=True)


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_inspect_finds_a_state_the_same_however_ranks_cut_it(ranks, tmp_path, strategy, capsys):
    ranks.run(2, save_again, tmp_path / "ddp", "ddp")
    ranks.run(2, save_again, tmp_path / "cut", strategy, str(tmp_path / "ddp" / "checkpoint-2"))
    names = set(os.listdir(tmp_path / "cut" / "checkpoint-2"))
    assert {"optimizer-1.safetensors", "ema-1.safetensors"} <= names - set(os.listdir(tmp_path / "ddp" / "checkpoint-2"))
    assert inspect([str(tmp_path / "ddp"), str(tmp_path / "cut")]) == 0
    shown = capsys.readouterr().out
    assert f"--strategy: ddp, {strategy}" in shown and "optimizer state: 45 of 45 are bit-identical" in shown
    assert inspect([str(tmp_path / "ddp" / "checkpoint-1"), str(tmp_path / "cut")]) == 1
    assert "norm.weight.exp_avg: 16 of 16 elements differ" in capsys.readouterr().out


def test_inspect_names_a_damaged_file_and_ends_with_exit_code_3(tmp_path):
    run_training(arguments(tmp_path, **SETTINGS))
    path = tmp_path / "checkpoint-2" / "ema-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    for paths in ([path.parent], [path.parent.parent / "checkpoint-1", path.parent]):
        with pytest.raises(UsageError, match=r"checkpoint-2/ema-0.safetensors cannot be used: its content is not what was saved") as error:
            inspect(list(map(str, paths)))
        assert error.value.exit_code == 3
    code, told = as_program("tools.inspect", path.parent)
    assert code == 3 and told.startswith("error: ") and "ema-0.safetensors" in told
