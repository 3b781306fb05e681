"""A sweep finds the better flags, and no kill makes it lose a trial or count one twice."""
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from state import UsageError
from tests import sweep_task
from tests.toy import arguments, rows, run_training, sequences, timeless
from tools.sweep import Pruning, main, open_sweep, suggested_words, take

optuna = pytest.importorskip("optuna")
SPACE = """
def space(trial):
    rate = 10 ** trial.suggest_float("exponent", -3, -0.5)
    return {"learning_rate": 1e6 if trial.number == 2 else rate, "weight_decay": trial.suggest_float("weight_decay", 0, 1e-6)}
"""


@pytest.fixture
def sweep(tmp_path):
    """The words of a command line; text is that of its space, and a name another folder."""
    def words(*more, text=SPACE, folder="sweep", train=()):
        (tmp_path / "space.py").write_text(text)
        return [str(tmp_path / "space.py"), "--folder", str(tmp_path / folder), "--task", "tests.sweep_task", *more, *(["--", *train] if train else [])]
    return words


def test_a_sweep_of_two_workers_that_was_killed_goes_on_and_finds_the_best_of_all_trials_but_the_one_that_diverges(sweep, tmp_path, capfd):
    """Trial 1 kills all processes of the sweep after its third update. It is not started again, but resumed."""
    command, marker = sweep("--trials", "4", "--workers", "2"), tmp_path / "killed"
    killed = subprocess.run([sys.executable, "-m", "tools.sweep", *command], check=False, start_new_session=True, env={**os.environ, sweep_task.KILL: str(marker)})
    assert killed.returncode == -signal.SIGKILL and marker.exists()
    found = main(command)

    assert [row["trial"] for row in found] == [0, 1, 2, 3]
    assert [row["state"] for row in found] == ["complete", "complete", "fail", "complete"] and "exit code 4" in found[2]["reason"]
    assert sorted(path.name for path in Path(tmp_path, "sweep").iterdir() if path.is_dir()) == [f"trial-{n}" for n in range(4)]
    for row in found:
        status = json.loads(Path(row["folder"], "status.json").read_text())
        assert (status["state"], status["exit"]) == (("failed", 4) if row["trial"] == 2 else ("finished", 0))
        assert sum("eval_loss" in each for each in rows(row["folder"])) <= 3
    whole = [row for row in found if row["trial"] != 2]
    best = max(whole, key=lambda row: row["params"]["exponent"])        # with so few updates the loss falls with the rate
    assert best["value"] == min(row["value"] for row in whole)
    written = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert written["best"] == best["trial"] and written["trials"] == found
    assert best["command"] in (tmp_path / "sweep/sweep.md").read_text() and best["command"] in capfd.readouterr().out

    assert "resuming from" in (tmp_path / "sweep/trial-1.log").read_text()
    by_hand = shlex.split(found[1]["command"])[3:]
    sweep_task.run([*by_hand, "--output_dir", str(tmp_path / "again")])
    assert [*map(timeless, rows(found[1]["folder"]))] == [*map(timeless, rows(tmp_path / "again"))]
    assert rows(tmp_path / "again")[-2]["eval_loss"] == found[1]["value"]


def test_a_trial_worse_than_the_median_of_the_others_is_pruned_and_stays_so(sweep, tmp_path):
    command = sweep("--trials", "6")
    _, study = open_sweep(command)
    for _ in range(5):
        study.add_trial(optuna.trial.create_trial(value=1e-9, intermediate_values={2: 1e-9, 4: 1e-9}))
    found = main(command)
    assert [row["state"] for row in found] == ["complete"] * 5 + ["pruned"]
    assert found[5]["value"] == rows(found[5]["folder"])[-2]["eval_loss"]       # of the evaluation that it was stopped after
    assert rows(found[5]["folder"])[-1]["step"] == 2 and json.loads(Path(found[5]["folder"], "status.json").read_text())["state"] == "finished"
    assert main(command) == found


def test_a_run_whose_trial_was_pruned_does_not_train_on_if_its_worker_was_killed_before_it_ended(tmp_path):
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "auto"}
    run_training(arguments(tmp_path, max_steps=2, **settings), eval_set=sequences(4))
    run = run_training(arguments(tmp_path, max_steps=4, **settings), eval_set=sequences(4), callbacks=[Pruning(None, "eval_loss", pruned=True)])
    assert run.state.global_step == 2


def test_trials_are_shared_and_one_whose_worker_is_gone_is_taken_over(sweep):
    flags, study = open_sweep(sweep("--trials", "3"))
    _, other = open_sweep(sweep("--trials", "3"))
    taken = [take(flags, study), take(flags, other)]
    assert [trial.number for trial, _ in taken] == [0, 1]
    suggested = suggested_words(flags.suggest, taken[0][0])
    taken[0][1].close()     # as when a process dies
    again, log = take(flags, other)
    assert again.number == 0 and suggested_words(flags.suggest, again) == suggested
    last, last_log = take(flags, study)
    assert last.number == 2
    for trial, held in ((again, log), taken[1], (last, last_log)):
        study.tell(trial.number, 1.0)
        held.close()
    assert take(flags, study) is None and len(study.trials) == 3


def test_suggestions_depend_on_the_seed_and_the_trials_before_and_on_no_restart(sweep):
    """After ten trials Optuna's sampler goes by what it has seen."""
    def suggestions(folder, seed="0", value=1.0, restart=False):
        command, found = sweep("--trials", "13", "--seed", seed, folder=folder), []
        flags, study = open_sweep(command)
        kinds = {"exponent": optuna.distributions.FloatDistribution(-3, -0.5), "weight_decay": optuna.distributions.FloatDistribution(0, 1e-6)}
        for n in range(10):
            study.add_trial(optuna.trial.create_trial(value=n * value, params={"exponent": -1 - n / 10, "weight_decay": n / 1e7}, distributions=kinds))
        while taken := take(flags, study):
            with taken[1]:
                found += suggested_words(flags.suggest, taken[0])
            study.tell(taken[0], taken[0].params["exponent"])
            flags, study = open_sweep(command) if restart else (flags, study)
        return found
    first = suggestions("a")
    assert len(first) == 12 == len({*first}) + 4        # three trials, of which none repeats another; the names of two flags do
    assert first == suggestions("b", restart=True)
    assert first[1] != suggestions("c", seed="1")[1] and first[1] != suggestions("d", value=-1.0)[1]


@pytest.mark.parametrize("said, text, more, train", [
    ("did you mean --learning_rate", "def space(trial):\n    return {'learning_rat': 1}", (), ()),
    ("learning_rate=-1", "def space(trial):\n    return {'learning_rate': -1}", (), ()),
    ("expected a dict of flags", "def space(trial):\n    return [1]", (), ()),
    ("needs a function space", "spaces = 1", (), ()),
    ("have to be there", SPACE, ("--task", "recipes.missing"), ()),
    ("a function run", SPACE, ("--task", "tests.toy"), ()),
    ("at least one trial", SPACE, ("--trials", "0"), ()),
    ("give --eval_strategy", SPACE, (), ("--eval_strategy", "no")),
    ("--learning_rate cannot be given", SPACE, (), ("--learning_rate", "1")),
    ("--output_dir cannot be given", SPACE, (), ("--output_dir", "x")),
    ("--output_dir cannot be given", "def space(trial):\n    return {'output_dir': 'x'}", (), ()),
])
def test_a_mistake_is_one_message_before_there_is_a_sweep(sweep, tmp_path, said, text, more, train):
    with pytest.raises(UsageError, match=said):
        main(sweep(*more, text=text, train=train))
    assert not (tmp_path / "sweep").exists()


def test_a_folder_goes_on_with_its_own_sweep_alone(sweep):
    open_sweep(sweep())
    open_sweep(sweep("--trials", "30", "--workers", "2"))
    for name, words in (("space", sweep(text=SPACE + "\n")), ("flags", sweep(train=("--seed", "1"))), ("metric", sweep("--metric", "x")),
                        ("pruner", sweep("--pruner", "none")), ("seed", sweep("--seed", "1")), ("direction", sweep("--direction", "maximize"))):
        Path(words[0]).write_text(SPACE + "\n" * (name == "space"))
        with pytest.raises(UsageError, match=f"another sweep, give a new one: .*{name} was"):
            open_sweep(words)


def test_a_metric_that_does_not_exist_ends_the_sweep_before_any_training(sweep, tmp_path):
    command = sweep("--metric", "accuracy", "--trials", "2")
    with pytest.raises(UsageError, match="evaluations give eval_loss"):
        main(command)
    assert not rows(tmp_path / "sweep/trial-0")
    assert [trial.state.name for trial in open_sweep(command)[1].trials] == ["RUNNING"]       # and is neither failed nor lost
