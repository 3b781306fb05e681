"""Searches for the flags that train best: Optuna (Akiba et al. 2019) suggests them, and each trial is an ordinary run, in a folder and a process of its own.

    python -m tools.sweep SPACE.py --folder sweeps/a --trials 20 --workers 2 --task recipes.image_classification -- --max_steps 300

SPACE.py, or a module, has a function that suggests flags by name; the flags after -- are for all trials:

    def space(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)}

A trial's value is the last --metric in its metrics.jsonl. After a kill at any instant the same command goes on, and what was running is resumed from its
newest checkpoint; on a second terminal it is one more worker. Needs: pip install optuna
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from args import parse_args
from callbacks import Callback
from state import UsageError, run_main

PRUNERS = {"none": "NopPruner", "median": "MedianPruner", "halving": "SuccessiveHalvingPruner"}
CHILD = "import sys; from tools.sweep import end_with_parent, train_trial; end_with_parent(train_trial, *sys.argv[1:])"
STOPPED = (5, 75, 130, 138, 143, -signal.SIGINT, -signal.SIGTERM)      # a full disk, --max_time or a signal: nothing that a trial's flags did
POLL_S = 0.5


def main(argv: list[str] | None = None) -> list[dict]:
    """Runs or continues a sweep; the rows of its table. Raises UsageError for mistakes before any training, and (exit code 1) if no trial was completed."""
    argv = sys.argv[1:] if argv is None else argv
    flags, study = open_sweep(argv)
    start = multiprocessing.get_context("spawn").Process
    others = [start(target=end_with_parent, args=(work, argv)) for _ in range(flags.workers - 1)]
    for process in others:
        process.start()
    work(argv)
    for process in others:
        process.join()
    with locked(flags.folder):
        rows, best = write_table(flags, study)
    print(Path(flags.folder, "sweep.md").read_text())
    if not best:
        raise UsageError(f"none of {len(rows)} trials was completed; the first: {rows[0]['reason']}", 1)
    if flags.report:
        from tools.report import main as report
        report([*(row["folder"] for row in best[:3]), "--out", os.path.join(flags.folder, "report.html")])
    return rows


def read_command(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own flags, and those of all trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("space", help="file ending in .py, or module, with a function space(trial) that gives flags by name")
    parser.add_argument("--folder", required=True, help="of the sweep, with its trials as the runs trial-0, trial-1, ...; not on NFS")
    parser.add_argument("--trials", type=int, default=20, help="in all, those of earlier starts included [%(default)s]")
    parser.add_argument("--workers", type=int, default=1, help="trials that run at a time [%(default)s]")
    parser.add_argument("--task", default="train", help="module with a function run(argv, **parts), as recipes.image_classification [%(default)s]")
    parser.add_argument("--metric", default="eval_loss", help="of evaluations [%(default)s]")
    parser.add_argument("--direction", choices=("minimize", "maximize"), default="minimize", help="[%(default)s]")
    parser.add_argument("--pruner", choices=PRUNERS, default="median", help="stops trials that are worse than the median, or not of the best quarter [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the suggestions [%(default)s]")
    parser.add_argument("--report", action="store_true", help="compare the best three trials in report.html")
    end = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:end]), argv[end + 1:]


def check(flags: argparse.Namespace, given: list[str]) -> argparse.Namespace:
    """The flags with `suggest`, the function of the space, and `about`, what makes it this sweep and no other. Raises UsageError for what is wrong with
    them, with the flags given to all trials, and with suggestions as far as one of them shows it."""
    if min(flags.trials, flags.workers) < 1 or flags.seed < 0:
        raise UsageError(f"--trials {flags.trials} --workers {flags.workers} --seed {flags.seed}: expected at least one trial and worker, and no negative seed")
    try:
        found = vars(load_file(flags.space) if flags.space.endswith(".py") else importlib.import_module(flags.space))
        task = vars(importlib.import_module(flags.task))
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise UsageError(f"{flags.space} and --task {flags.task} have to be there: {error}") from None
    if "space" not in found or "run" not in task:
        raise UsageError(f"{flags.space} needs a function space(trial), and --task {flags.task} a function run(argv, **parts): one is missing")
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    flags.suggest, defaults = found["space"], task.get("FLAGS", "")
    words = suggested_words(flags.suggest, optuna.create_study(sampler=optuna.samplers.RandomSampler(flags.seed)).ask())
    names, own = [word.partition("=")[0] for word in given], ["--output_dir", "--resume_from_checkpoint"]
    if twice := sorted({*names} & {*own, *words[::2]} | {*own} & {*words[::2]}):
        raise UsageError(f"{', '.join(twice)} cannot be given: the sweep sets the folders of its trials, and the space what it suggests")
    metric = "eval_" + flags.metric.removeprefix("eval_")
    if "--metric_for_best_model" not in [*names, *defaults.split()]:        # by which the trainer looks, before it trains, whether there is such a metric
        given = [*given, "--metric_for_best_model", metric, "--greater_is_better", str(flags.direction == "maximize")]
    args = parse_args([*given, *words], defaults)
    if args.eval_strategy == "no" or not args.trains:
        raise UsageError("a sweep compares trials by evaluations while they train: give --eval_strategy steps or epoch after --")
    flags.about = {"space": Path(found["__file__"]).read_text(), "task": flags.task, "flags": given, "metric": metric,
                   "direction": flags.direction, "pruner": flags.pruner, "seed": flags.seed}
    return flags


def load_file(path: str):
    """The user's own program, as a module that nobody else imports by its name."""
    spec = importlib.util.spec_from_file_location("space_of_sweep", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def suggested_words(space: Callable, trial) -> list[str]:
    """What a space suggests, as --name, value, --name, value, ..."""
    values = space(trial)
    if not isinstance(values, dict):
        raise UsageError(f"space(trial) returned a {type(values).__name__}; expected a dict of flags, as {{'learning_rate': 0.001}}")
    return [word for name, value in values.items() for word in (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))]


def open_sweep(argv: list[str]):
    """(flags, study), which is made if the folder has none. Raises UsageError if it has another sweep's.

    In SQLite changes are transactions, and a lock goes with the process that held it. Optuna's journal file keeps the lock of a process that was killed for
    30 s, and half of its last line for ever, so that nobody can read on."""
    import optuna
    flags = check(*read_command(argv))
    os.makedirs(flags.folder, exist_ok=True)
    with locked(flags.folder):
        storage = optuna.storages.RDBStorage(f"sqlite:///{flags.folder}/study.db", engine_kwargs={"connect_args": {"timeout": 60}})
        study = optuna.create_study(storage=storage, study_name="sweep", direction=flags.direction, load_if_exists=True,
                                    pruner=getattr(optuna.pruners, PRUNERS[flags.pruner])())
        if "about" not in study.user_attrs:
            study.set_user_attr("about", flags.about)
    before = study.user_attrs["about"]
    if changed := [f"{name} was {before[name]!r} and is {value!r}" for name, value in flags.about.items() if before[name] != value]:
        raise UsageError(f"--folder {flags.folder} has another sweep, give a new one: {'; '.join(changed)}")
    return flags, study


@contextlib.contextmanager
def locked(folder: str):
    with open(os.path.join(folder, ".lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def claim(folder: str, number: int):
    """The log of a trial, locked; None if another process has it. A trial's own process inherits the lock, so nobody takes it over while that lives."""
    log = open(os.path.join(folder, f"trial-{number}.log"), "ab")       # noqa: SIM115
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return log
    except BlockingIOError:
        return log.close()


def take(flags: argparse.Namespace, study):
    """(trial, its log) of a trial whose worker is gone, else of a new one; None when all have ended. Waits while others run the last ones: they may be killed.
    What is suggested depends on --seed, the trial's number and the trials before it, so a sweep that was killed suggests what it would have."""
    import optuna
    from numpy.random import SeedSequence
    running = optuna.trial.TrialState.RUNNING

    def seed(number: int) -> None:
        study.sampler = optuna.samplers.TPESampler(seed=int(SeedSequence([flags.seed, number]).generate_state(1)[0]))
    while True:
        with locked(flags.folder):
            trials = study.get_trials()
            for found in trials:
                if found.state == running and (log := claim(flags.folder, found.number)):
                    seed(found.number)
                    return optuna.trial.Trial(study, found._trial_id), log
            if len(trials) < flags.trials:
                seed(len(trials))
                return (trial := study.ask()), claim(flags.folder, trial.number)
        if all(found.state != running for found in trials):
            return None
        time.sleep(POLL_S)


def end_with_parent(function: Callable, *args) -> None:
    """A process's main function. When its parent is gone, it gets SIGTERM, so that what trains saves first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG
    run_main(function, *args)


def work(argv: list[str]) -> None:
    """Takes trials and runs them, until there are as many as asked for and all have ended."""
    flags, study = open_sweep(argv)
    while (taken := take(flags, study)) is not None:
        with taken[1]:
            run_trial(flags, study, *taken)


def run_trial(flags: argparse.Namespace, study, trial, log) -> None:
    """Trains, and tells Optuna how it ended. Two ends leave the trial to be done: SystemExit if it was stopped, and UsageError if the trainer refuses its
    flags (exit code 2) and no trial has worked yet: then it is the command that is wrong, and not the suggestion."""
    from optuna.trial import TrialState
    metric, folder, words = flags.about["metric"], os.path.join(flags.folder, f"trial-{trial.number}"), suggested_words(flags.suggest, trial)
    argv = [*flags.about["flags"], *words, "--output_dir", folder]
    trial.set_user_attr("suggested", shlex.join(words))
    trial.set_user_attr("command", command := shlex.join(["python", "-m", flags.task, *argv]))
    print(f"trial {trial.number}: {command}", flush=True)
    code = train_in_process(trial, [metric, str("pruned" in trial.user_attrs), flags.task, *argv, "--resume_from_checkpoint", "auto"], log)
    last = next(filter(None, reversed(Path(log.name).read_text(errors="replace").split("\n"))), "")
    reason = f"exit code {code}: {last}" if code > 0 else f"ended by {signal.Signals(-code).name}" if code < 0 else ""
    if code in STOPPED:
        print(f"trial {trial.number} was stopped, exit code {code} (see {log.name}); the same command goes on with it", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)
    if code == 2 and not study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)):
        raise UsageError(f"trial {trial.number} was refused, and none has worked yet: {last.removeprefix('error: ')} (all of it: {log.name}); "
                         f"a corrected sweep needs a new --folder")
    value = last_value(folder, metric)
    if not reason and (value is None or math.isnan(value)):
        reason = f"no evaluation in {folder}/metrics.jsonl gave {metric}" if value is None else f"{metric} is NaN"
    state = TrialState.FAIL if reason else TrialState.PRUNED if "pruned" in trial.user_attrs else TrialState.COMPLETE
    with locked(flags.folder):
        trial.set_user_attr("reason", reason)
        study.tell(trial, value if state == TrialState.COMPLETE else None, state=state)
        write_table(flags, study)
    print(f"trial {trial.number}: {state.name.lower()}, {reason or f'{metric} {value:.6g}'}", flush=True)


def train_in_process(trial, words: list[str], log) -> int:
    """The exit code of a trial's process, which is answered after each of its evaluations whether to stop. Ctrl-C reaches it too, and it saves, so this one
    waits for it."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            child = subprocess.Popen([sys.executable, "-c", CHILD, str(theirs.fileno()), *words], stdout=log, stderr=log, pass_fds=[theirs.fileno()])
        with contextlib.suppress(ConnectionError), ours, ours.makefile("rw") as channel:      # if it is killed, its exit code tells
            for line in channel:
                value, step, last = json.loads(line)
                trial.report(value, step)
                if not last and trial.should_prune():
                    trial.set_user_attr("pruned", step)
                channel.write(json.dumps("pruned" in trial.user_attrs) + "\n")
                channel.flush()
        return child.wait()
    finally:
        signal.signal(signal.SIGINT, before)


def train_trial(channel: str, metric: str, pruned: str, task: str, *argv: str) -> None:
    """What a trial's process runs: the task's ordinary program, with one callback more."""
    pruning = Pruning(socket.socket(fileno=int(channel)).makefile("rw"), metric, pruned == "True")
    importlib.import_module(task).run(list(argv), callbacks=[pruning])


class Pruning(Callback):
    """Tells the worker the metric of each evaluation while training, and asks to stop if it answers that Optuna gives the trial up."""

    def __init__(self, channel, metric: str, pruned: bool = False):
        self.channel, self.metric, self.has_stopped = channel, metric, pruned

    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop |= self.has_stopped        # before its worker was killed

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.metric in metrics and state.in_training and state.is_world_process_zero:
            self.channel.write(json.dumps([metrics[self.metric], state.global_step, state.global_step >= state.max_steps]) + "\n")
            self.channel.flush()
            self.has_stopped = json.loads(self.channel.readline())
            control.should_training_stop |= self.has_stopped


def last_value(folder: str, metric: str) -> float | None:
    path = Path(folder, "metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return next((row[metric] for row in reversed(rows) if metric in row), None)


def write_table(flags: argparse.Namespace, study) -> tuple[list[dict], list[dict]]:
    """(all trials, completed ones with the best first), also written to sweep.json and, as a table, sweep.md."""
    rows = [{"trial": t.number, "state": t.state.name.lower(), "value": t.value, "suggested": t.user_attrs.get("suggested", ""), "params": t.params,
             "seconds": None if t.duration is None else t.duration.total_seconds(), "reason": t.user_attrs.get("reason", ""),
             "folder": os.path.join(flags.folder, f"trial-{t.number}"), "command": t.user_attrs.get("command", "")} for t in study.get_trials()]
    best = sorted((row for row in rows if row["state"] == "complete"), key=lambda row: row["value"], reverse=flags.direction == "maximize")
    lines = [f"| trial | state | {flags.about['metric']} | suggested | seconds | |", "|---|---|---|---|---|---|"]
    for row in rows:
        value, seconds = ("" if row[name] is None else format(row[name], digits) for name, digits in (("value", ".6g"), ("seconds", ".0f")))
        lines.append(f"| {row['trial']} | {row['state']} | {value} | {row['suggested']} | {seconds} | {row['reason'].replace('|', '/')} |")
    lines += ["", f"The best is trial {best[0]['trial']}:", "", f"    {best[0]['command']}"] if best else []
    summary = {**flags.about, "best": best[0]["trial"] if best else None, "trials": rows}
    for path, text in ((Path(flags.folder, "sweep.json"), json.dumps(summary, indent=1)), (Path(flags.folder, "sweep.md"), "\n".join(lines))):
        path.with_suffix(".tmp").write_text(text + "\n")
        path.with_suffix(".tmp").replace(path)
    return rows, best


if __name__ == "__main__":
    run_main(main)
