"""A sweep finds the better flags, and no kill makes it lose a trial or count one twice."""
import fcntl
import html
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from state import UsageError
from tests import sweep_task
from tests.toy import rows, timeless
from tools.sweep import CHILD, main, open_sweep, settle, suggested_words, take, train_trial

optuna = pytest.importorskip("optuna")
SPACE = """
def space(trial):
    return {"learning_rate": 10 ** trial.suggest_float("exponent", -3, -0.5), "weight_decay": trial.suggest_float("weight_decay", 0, 1e-6)}
"""


@pytest.fixture
def sweep(tmp_path):
    """The words of a command line; text is that of its space, and a name another folder."""
    def words(*more, text=SPACE, folder="sweep", train=()):
        (tmp_path / "space.py").write_text(text)
        return [str(tmp_path / "space.py"), "--folder", str(tmp_path / folder), "--task", "tests.sweep_task", *more, *(["--", *train] if train else [])]
    return words


def process_that(monkeypatch, folder: Path, does: str) -> None:
    """Processes of trials become a shell that does this, which takes no seconds to import torch."""
    (folder / "python").write_text(f"#!/bin/sh\n{does}\n")
    (folder / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))


def test_a_sweep_that_was_killed_twice_goes_on_and_finds_a_better_rate_than_the_default(sweep, tmp_path, capfd, monkeypatch):
    """Trial 1 kills all processes of the sweep after its third update, and the process that should go on with it dies at once. It is not started again, but
    resumed."""
    command, folder, marker = sweep("--trials", "2", "--workers", "2"), tmp_path / "sweep", tmp_path / "killed"
    monkeypatch.setenv(sweep_task.KILL, str(marker))
    killed = subprocess.run([sys.executable, "-m", "tools.sweep", *command], check=False, start_new_session=True)
    assert killed.returncode == -signal.SIGKILL and marker.exists()
    monkeypatch.delenv(sweep_task.KILL)
    command = sweep("--trials", "2")
    with monkeypatch.context() as context, pytest.raises(SystemExit, match="137"):
        process_that(context, tmp_path, "kill -KILL $$")
        main(command)
    assert "was stopped, ended by SIGKILL" in capfd.readouterr().err
    found = main(command)

    assert [(row["trial"], row["state"], row["reason"]) for row in found] == [(0, "complete", ""), (1, "complete", "")]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["trial-0", "trial-1"]
    best = max(found, key=lambda row: row["params"]["exponent"])        # with so few updates the loss falls with the rate
    written = json.loads((folder / "sweep.json").read_text())
    assert written["best"] == best["trial"] and written["trials"] == found
    assert best["command"] in (folder / "sweep.md").read_text() and best["command"] in capfd.readouterr().out

    assert "resuming from" in (folder / "trial-1.log").read_text()
    monkeypatch.chdir(tmp_path)
    sweep_task.run(shlex.split(found[1]["command"])[3:])     # as it is
    assert [*map(timeless, rows(found[1]["folder"]))] == [*map(timeless, rows("trainer_output"))]
    assert rows("trainer_output")[-2]["eval_loss"] == found[1]["value"]
    sweep_task.run(["--output_dir", "default"])
    assert best["value"] < rows("default")[-2]["eval_loss"]

    page = (folder / "report.html").read_text()
    assert all(html.escape(row["suggested"]) in page for row in found)      # the table of all trials
    shown = re.search(r"<th>learning_rate</th><td>(.*?)</td><td>(.*?)</td>", page.partition('<div id="differing">')[2].partition("</div>")[0])
    assert sorted(map(float, shown.groups())) == pytest.approx(sorted(10 ** row["params"]["exponent"] for row in found))


def test_a_trial_worse_than_the_median_of_the_others_is_pruned_and_stays_so_if_its_worker_was_killed(sweep, tmp_path):
    command = sweep("--trials", "6", "--no-report")
    flags, study = open_sweep(command)
    for _ in range(5):
        study.add_trial(optuna.trial.create_trial(value=1e-9, intermediate_values={2: 1e-9, 4: 1e-9}))
    trial, log = take(flags, study)
    words = [*flags.about["flags"], *suggested_words(flags.suggest, trial)]
    for _ in range(2):      # nobody told Optuna that it had ended
        train_trial(flags.folder, str(trial.number), *words)
        assert rows(tmp_path / "sweep/trial-5")[-1]["step"] == 2
    with log:
        settle(flags, study, trial, "")
    found = main(command)
    assert [row["state"] for row in found] == ["complete"] * 5 + ["pruned"]
    assert found[5]["value"] == rows(found[5]["folder"])[-2]["eval_loss"]       # of the evaluation that it was stopped after
    assert json.loads(Path(found[5]["folder"], "status.json").read_text())["state"] == "finished"


def test_a_process_of_a_trial_whose_worker_died_while_it_started_trains_nothing(sweep, tmp_path):
    flags, study = open_sweep(sweep())
    trial, log = take(flags, study)
    start = "import os, subprocess, sys; subprocess.Popen([*sys.argv[1:4], str(os.getpid()), *sys.argv[4:]], stdout=1); os._exit(0)"
    with log:
        subprocess.run([sys.executable, "-c", start, sys.executable, "-c", CHILD, flags.folder, str(trial.number), *flags.about["flags"]], check=True, stdout=log)
    with open(log.name, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)        # waits for its end
        assert file.read() == b""
    assert not (tmp_path / "sweep/trial-0").exists() and take(flags, study)[0].number == 0


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
    ("recipes.missing cannot be loaded: ModuleNotFoundError", SPACE, ("--task", "recipes.missing"), ()),
    ("space.py cannot be loaded: ZeroDivisionError", "1 / 0", (), ()),
    ("space.py, line 2: .* raised KeyError: 'rate'", "def space(trial):\n    return {}['rate']", (), ()),
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
    open_sweep(sweep("--trials", "30", "--workers", "2", "--no-report"))
    for name, words in (("flags", sweep(train=("--seed", "1"))), ("metric", sweep("--metric", "x")), ("pruner", sweep("--pruner", "none")),
                        ("seed", sweep("--seed", "1")), ("direction", sweep("--direction", "maximize"))):
        with pytest.raises(UsageError, match=f"another sweep, give a new one: .*{name} was"):
            open_sweep(words)


def test_a_space_that_fails_is_one_message_and_goes_on_where_it_was_when_it_is_corrected(sweep):
    def space(text):
        return f"""
def space(trial):
    rate = trial.suggest_categorical("rate", [0.1, 0.2])
    {text}
    return {{"learning_rate": rate}}
"""
    flags, study = open_sweep(sweep("--trials", "2", text=space("assert trial.number == 0, 'oh'")))
    first, log = take(flags, study)
    words = suggested_words(flags.suggest, first)
    second, second_log = take(flags, study)
    with pytest.raises(UsageError, match=r"space.py, line 4: space\(trial\) raised AssertionError: oh. When it is corrected the same command goes on"):
        suggested_words(flags.suggest, second)
    log.close(), second_log.close()

    flags, study = open_sweep(sweep("--trials", "2", text=space("pass")))
    taken = [take(flags, study), take(flags, study)]
    assert [trial.number for trial, _ in taken] == [0, 1] and suggested_words(flags.suggest, taken[0][0]) == words
    taken.clear()       # their logs are closed, and another worker may take them
    flags, study = open_sweep(sweep("--trials", "2", text=space("pass").replace("0.2", "0.3")))
    with pytest.raises(UsageError, match="raised ValueError: .*give a new --folder"):
        suggested_words(flags.suggest, take(flags, study)[0])


def test_the_table_names_the_best_and_why_others_failed_whatever_their_files_and_names_hold(sweep, tmp_path):
    flags, study = open_sweep(sweep("--trials", "5", "--metric", "accuracy", "--direction", "maximize"))
    logged = ('{"eval_accuracy": 0.5}\n{"eval_accu', '{"eval_accuracy": 0.75}\n{"eval_loss": 1}\n', '{"eval_accuracy": NaN}\n', "", '{"eval_accuracy": 1}\n')
    for text, failure in zip(logged, ("", "", "", "", "exit code 4: oh")):
        trial, log = take(flags, study)
        folder = tmp_path / "sweep" / f"trial-{trial.number}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(text)
        trial.set_user_attr("suggested", "--name 'a|b'")
        with log:
            settle(flags, study, trial, failure)
    written = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert written["best"] == 1 and [row["value"] for row in written["trials"]] == [0.5, 0.75, None, None, None]
    assert [row["reason"] for row in written["trials"]] == ["", "", "eval_accuracy is NaN", "no evaluation in metrics.jsonl gave eval_accuracy", "exit code 4: oh"]
    assert r"| 4 | fail |  | --name 'a\|b' | exit code 4: oh |" in (tmp_path / "sweep/sweep.md").read_text()


def test_a_metric_that_does_not_exist_ends_the_sweep_before_any_training(sweep, tmp_path, monkeypatch):
    """What the process of its trial would raise, and what the sweep makes of a process that ends so."""
    command = sweep("--metric", "accuracy", "--trials", "1")
    flags, study = open_sweep(command)
    trial, log = take(flags, study)
    with log, pytest.raises(UsageError, match="evaluations give eval_loss") as error:
        train_trial(flags.folder, "0", *flags.about["flags"], *suggested_words(flags.suggest, trial))
    assert error.value.exit_code == 2 and not rows(tmp_path / "sweep/trial-0")
    process_that(monkeypatch, tmp_path, "echo 'error: evaluations give eval_loss'; exit 2")
    with pytest.raises(UsageError, match="trial 0 was refused, and none has worked yet: evaluations give eval_loss"):
        main(command)
    assert [trial.state.name for trial in open_sweep(command)[1].trials] == ["RUNNING"]       # and is neither failed nor lost
