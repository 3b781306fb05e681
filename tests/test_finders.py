"""The learning-rate test finds what is known of a parabola, and the batch finder the largest micro-batch that fits and changes nothing else."""
import contextlib
import io
import math
import os
import random
import shlex
import tempfile
from argparse import Namespace

import pytest
import torch

import tools.find_batch as batches
import train
from data import Data
from state import UsageError
from tests import finder_task
from tests.toy import rows
from tools.chaos import exit_codes, start
from tools.find_lr import Curve, main

CURVATURE = 5.0         # gradient descent on CURVATURE / 2 * x**2 multiplies x by 1 - rate * CURVATURE: it shrinks below 2 / CURVATURE, and grows above
FLAGS = """--per_device_train_batch_size 8 --optim sgd --max_grad_norm 0 --eval_strategy steps --eval_steps 1 --save_steps 1 --load_best_model_at_end
 --early_stopping_patience 1 --early_stopping_threshold 0.1 --lr_scheduler_type reduce_lr_on_plateau --lr_scheduler_kwargs {"factor":0.5} --do_train --do_eval"""


class Parabola(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, power):
        return CURVATURE / 2 * self.x.abs().pow(power)


def run(argv, **parts):
    """Eight equal samples: each batch has the same loss."""
    samples = [{"power": torch.tensor(2), "labels": torch.tensor(0)}] * 8
    return train.main(argv, lambda args: Data(samples, samples, "a parabola"), lambda args: Parabola(),
                      loss_fn=lambda model, batch: model(batch["power"]).sum(), flags=FLAGS, **parts)


TEST = ["--task", "tests.test_finders", "--low", "2e-3", "--high", "20", "--updates", "200"]
RATES = [2e-3 * 1e4 ** (i / 199) for i in range(200)]


def find(*words, train=()):
    """(answer, what was printed)"""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return main([*TEST, *words, "--", "--use_cpu", *train]), printed.getvalue()


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_loss_of_a_parabola_falls_up_to_its_largest_stable_rate_and_rises_from_the_next_one_on(temporary):
    found, printed = find("--smoothing", "0")
    assert found.lowest < 2 / CURVATURE < found.rising < 1.05 * found.lowest      # neighbours of the test
    losses = [1.0]
    for rate in RATES:
        losses.append(losses[-1] * (1 - rate * CURVATURE) ** 2)
    assert found.steepest == pytest.approx(max((before - after, rate) for before, after, rate in zip(losses, losses[1:], RATES))[1])
    assert found.steepest < found.lowest
    assert f"--learning_rate {found.steepest:.2g}   where the loss fell fastest" in printed
    assert f"--learning_rate {found.lowest / 10:.2g}   a tenth" in printed
    assert not [*temporary.glob("tmp*")]


def test_smoothing_moves_what_is_found_by_no_more_than_its_window(temporary):
    exact, smoothed = find("--smoothing", "0")[0], find("--smoothing", "5")[0]
    window = (RATES[1] / RATES[0]) ** 5.5
    for one, other in zip(exact, smoothed):
        assert 1 / window < one / other < window


def test_the_run_is_the_tasks_own_at_the_rates_of_the_test_and_does_nothing_but_train(tmp_path):
    """The task's flags ask for evaluations, checkpoints and a schedule."""
    find("--folder", str(tmp_path / "run"))
    logged = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["learning_rate"] for row in logged] == pytest.approx(RATES[:len(logged)]) and 100 < len(logged) < 200      # it stopped by itself
    assert not [row for row in rows(tmp_path / "run") if "eval_loss" in row] and not [*(tmp_path / "run").glob("*checkpoint*")]
    with pytest.raises(UsageError, match="already holds a run"):
        find("--folder", str(tmp_path / "run"))


def test_two_ranks_find_what_one_process_finds_and_one_of_them_prints_it(ranks, tmp_path, temporary):
    alone = find("--updates", "40")
    together = ranks.run(2, find_on_rank, str(tmp_path / "run"))
    assert [tuple(found) for found, _ in together] == [pytest.approx(alone[0])] * 2
    assert together[0][1].splitlines()[-2:] == alone[1].splitlines()[-2:] and together[1][1] == ""


def find_on_rank(folder):
    with pytest.raises(UsageError, match="give --folder"):
        find()
    found, printed = find("--updates", "40", "--folder", folder, train=["--per_device_train_batch_size", "4"])
    return tuple(found), printed


@pytest.mark.parametrize("said, words", [
    ("has not diverged at 0.3: give a higher --high", ("--high", "0.3")),
    ("never falls by more than its noise, and then diverges.* lower --low", ("--low", "1", "--high", "20")),
])
def test_a_curve_without_an_answer_gets_none(temporary, said, words):
    with pytest.raises(UsageError, match=said) as caught:
        find(*words)
    assert caught.value.exit_code == 1


def test_a_loss_that_is_not_finite_is_no_answer_if_it_comes_at_once_and_the_end_of_the_test_if_it_comes_later():
    curve, control = Curve(), Namespace(should_training_stop=False)

    def log(loss):
        curve.on_log(None, Namespace(is_world_process_zero=True), control, logs={"loss": loss, "learning_rate": 1.0 + len(curve.losses)})
    log(math.nan)
    assert control.should_training_stop
    with pytest.raises(UsageError, match="never falls"):
        curve.find()
    curve, control.should_training_stop = Curve(), False
    for loss in (5.0, 4.0, 2.0, 1.0):
        log(loss)
    assert not control.should_training_stop
    log(math.inf)
    assert control.should_training_stop and curve.find() == (2.0, 3.0, 4.0)


def noisy(generator, fall):
    """The curve of 100 updates, of which 40 to 70 lower the loss and the last ones raise it, with noise of standard deviation 0.1."""
    curve = Curve(5)
    for i in range(100):
        curve.losses.append(2 - fall * min(1, max(0, (i - 40) / 30)) + max(0, i - 85) + generator.gauss(0, 0.1))
        curve.rates.append(i)
    curve.diverged = True
    return curve


def test_noise_is_not_taken_for_a_fall_and_a_fall_is_found_in_noise():
    generator, answers = random.Random(0), 0
    for _ in range(100):
        with contextlib.suppress(UsageError):
            answers += bool(noisy(generator, 0.0).find())
        found = noisy(generator, 1.0).find()
        assert 35 <= found.steepest <= 75 and 60 <= found.lowest <= 90
    assert answers <= 5


@pytest.mark.parametrize("said, words, train", [
    ("--learning_rate, --output_dir cannot be given", (), ("--output_dir", "x", "--learning_rate=1")),
    *((f"{flag} cannot be given", (), (flag, "1")) for flag in ("--max_steps", "--warmup_steps", "--lr_scheduler_type", "--logging_steps", "--save_strategy")),
    *((f"{flag} cannot be given", (), (flag,)) for flag in ("--do_eval", "--load_best_model_at_end", "--resume_from_checkpoint")),
    ("did you mean --weight_decay", (), ("--weight_deca", "1")),
    ("expected 0 < low < high", ("--low", "30"), ()),
    ("at least 10 updates", ("--updates", "9", "--smoothing", "0"), ()),
    ("4 times the smoothing", ("--smoothing", "51"), ()),
    ("has to be a module with a function run", ("--task", "recipes.missing"), ()),
    ("has to be a module with a function run", ("--task", "tests.toy"), ()),
    ("has to be a module with a function run", ("--task", "recipes.quantize"), ()),       # its run takes no parts
])
def test_a_mistake_is_one_message(temporary, said, words, train):
    with pytest.raises(UsageError, match=said):
        find(*words, train=train)
    assert not [*temporary.glob("tmp*")]


def search(*argv: str) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):       # of a rank, which a user's process is not
        del os.environ[name]
    os.environ[finder_task.MB] = "200"
    batches.main([*argv])


def searched(folder: str) -> list[int]:
    words = ["--task", "tests.finder_task", "--memory_mb", "1500", "--run", "--", "--use_cpu", "--output_dir", f"{folder}/found"]
    return exit_codes(start(f"{folder}/log", 1, search, *words), folder)


def test_the_micro_batch_that_fits_trains_as_the_one_that_did_not(fresh, tmp_path):
    """9 samples of 200 MB do not fit into 1500 MB, 3 do. The processes of the two tries and of the training are those of users."""
    code, said = fresh(searched, str(tmp_path)), (tmp_path / "log").read_text()
    assert code == [0], said
    first, second, third, _, command = said.splitlines()[:5]
    assert "micro-batch 9 x accumulation 1: out of memory" in first and "9 cannot be halved" in second and "micro-batch 3 x accumulation 3: fits" in third
    assert "each of 9 samples = micro-batch 3 x accumulation 3" in said
    finder_task.run(["--use_cpu", "--output_dir", str(tmp_path / "whole")])
    finder_task.run([*shlex.split(command)[3:], "--output_dir", str(tmp_path / "printed")])
    whole, found, printed = ([row[key] for row in rows(tmp_path / name) for key in ("loss", "eval_loss") if key in row]
                             for name in ("whole", "found", "printed"))
    assert len(whole) == 12 and found == pytest.approx(whole, rel=1e-5) and printed == pytest.approx(whole, rel=1e-5)


KILLED = """
import os, signal
if os.environ.get("RANK", "1") == "1":
    os.kill(os.getpid(), signal.SIGKILL)
signal.pause()      # until torchrun ends this rank too
"""


@pytest.mark.parametrize("number", [1, 2])
def test_a_process_that_was_killed_counts_as_memory_that_ran_out_and_so_does_a_rank_of_torchrun(temporary, monkeypatch, number):
    (temporary / "killed.py").write_text(KILLED)
    monkeypatch.setenv("PYTHONPATH", str(temporary))
    assert "SIGKILL" in batches.attempt(Namespace(task="killed", ranks=number, updates=1, memory_mb=None), [])
    assert not [*temporary.glob("tmp*")]


def test_any_other_failure_ends_the_search_with_its_message_and_exit_code(temporary, capfd):
    """These tasks end before they have imported torch."""
    with pytest.raises(SystemExit) as caught:
        batches.main(["--task", "json.tool"])
    assert caught.value.code == 2 and "usage:" in capfd.readouterr().err
    with pytest.raises(UsageError, match="did not train"):
        batches.main(["--task", "this"])
    assert not [*temporary.glob("tmp*")]


def test_sizes_get_smaller_by_whole_numbers_and_take_the_place_of_those_given():
    assert [batches.largest_divisor(n) for n in (2, 3, 6, 9, 12, 35, 512)] == [1, 1, 3, 3, 6, 7, 256]
    given = ["--seed", "3", "--per_device_train_batch_size=8", "--gradient_accumulation_steps", "2", "--max_steps", "-1"]
    assert batches.with_sizes(given, 4, 4) == ["--seed", "3", "--max_steps", "-1", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"]


@pytest.mark.parametrize("said, words, train", [
    ("at least 1 of each", ("--ranks", "0"), ()), ("at least 1 of each", ("--updates", "0"), ()), ("at least 1 of each", ("--memory_mb", "0"), ()),
    ("has to be there", ("--task", "recipes.missing"), ()),
    ("train nothing", ("--task", "train"), ("--do_eval",)),
    ("did you mean --seed", ("--task", "train"), ("--see", "1")),
])
def test_a_mistake_starts_nothing(said, words, train):
    with pytest.raises(UsageError, match=said):
        batches.main([*words, "--", *train])
