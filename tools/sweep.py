"""Searches for the flags that train best: Optuna (Akiba et al. 2019) suggests them, and each trial is an ordinary run, in a folder and a process of its own.

    python -m tools.sweep SPACE.py --folder sweeps/a --trials 20 --workers 2 --task recipes.image_classification -- --max_steps 300 --eval_strategy steps --eval_steps 100

SPACE.py, or a module, has a function that suggests flags by name; the flags after -- are for all trials:

    def space(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)}

A trial's value is the last --metric in its metrics.jsonl. At the end the folder has a table, sweep.md, the same as sweep.json, and report.html, which
compares the best trials. After a kill at any instant, of the sweep or of one trial, the same command goes on, and what was running is resumed from its
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
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from args import parse_args
from callbacks import Callback
from state import TrainState, UsageError, run_main

PRUNERS = {"none": "NopPruner", "median": "MedianPruner", "halving": "SuccessiveHalvingPruner"}
CHILD = "import sys; from tools.sweep import end_with_parent, train_trial; end_with_parent(int(sys.argv[1]), train_trial, *sys.argv[2:])"
# a full disk, --max_time or a signal: nothing that a trial's flags did, though with SIGKILL the kernel ends what takes too much memory, too
STOPPED = (5, 75, 130, 138, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)
POLL_S = 0.5


def main(argv: list[str] | None = None) -> list[dict]:
    """Runs or continues a sweep; a dict of each trial. Raises UsageError for mistakes before any training, and (exit code 1) if no trial was completed."""
    argv = sys.argv[1:] if argv is None else argv
    flags, study = open_sweep(argv)
    start = multiprocessing.get_context("spawn").Process
    others = [start(target=end_with_parent, args=(os.getpid(), work, argv)) for _ in range(flags.workers - 1)]
    with contextlib.ExitStack() as stack:
        for process in others:
            process.start()
            stack.callback(process.join)
        work(argv)
    if codes := [process.exitcode for process in others if process.exitcode]:
        print(f"warning: {len(codes)} of {flags.workers} workers ended early, exit code {codes[0]}, as told above; the others did its trials", file=sys.stderr)
    with locked(flags.folder):
        trials, best = write_table(flags, study)
    print(Path(flags.folder, "sweep.md").read_text())
    if not best:
        raise UsageError(f"none of {len(trials)} trials was completed; the first: {trials[0]['reason']}", 1)
    if flags.report:
        from tools.report import main as report
        with locked(flags.folder):
            report([*(trial["folder"] for trial in best[:4]), "--out", os.path.join(flags.folder, "report.html")], lay_out(flags, trials))
    return trials


def read_command(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own flags, and those of all trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("space", help="file ending in .py, or module, with a function space(trial) that gives flags by name")
    parser.add_argument("--folder", required=True, help="of the sweep, with its trials as the runs trial-0, trial-1, ...; not on NFS")
    parser.add_argument("--trials", type=int, default=20, help="in all, those of earlier starts included [%(default)s]")
    parser.add_argument("--workers", type=int, default=1, help="trials that run at a time [%(default)s]")
    parser.add_argument("--task", default="train", help="module with a function run(argv, **parts), as recipes.image_classification [%(default)s]")
    parser.add_argument("--metric", default="eval_loss", help="of evaluations [%(default)s]")
    parser.add_argument("--direction", choices=("minimize", "maximize"), help="(default: maximize, unless the metric's name ends in loss)")
    parser.add_argument("--pruner", choices=PRUNERS, default="median", help="stops trials that are worse than the median, or not of the best quarter [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the suggestions [%(default)s]")
    parser.add_argument("--report", action=argparse.BooleanOptionalAction, default=True, help="at the end compare the best four trials in report.html")
    end = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:end]), argv[end + 1:]


def check(flags: argparse.Namespace, given: list[str]) -> argparse.Namespace:
    """The flags with `suggest`, the function of the space, and `about`, what makes it this sweep and no other. Raises UsageError for what is wrong with
    them, with the flags given to all trials, and with suggestions as far as one of them shows it."""
    if min(flags.trials, flags.workers) < 1 or flags.seed < 0:
        raise UsageError(f"--trials {flags.trials} --workers {flags.workers} --seed {flags.seed}: expected at least one trial and worker, and no negative seed")
    space, task = load(flags.space), load(flags.task)
    if "space" not in space or "run" not in task:
        raise UsageError(f"{flags.space} needs a function space(trial), and --task {flags.task} a function run(argv, **parts): one is missing")
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    flags.direction = flags.direction or ("minimize" if flags.metric.endswith("loss") else "maximize")      # as --greater_is_better
    flags.suggest, metric = space["space"], "eval_" + flags.metric.removeprefix("eval_")
    words = suggested_words(flags.suggest, optuna.create_study(sampler=optuna.samplers.RandomSampler(flags.seed)).ask())
    flags.about = {"space": Path(space["__file__"]).read_text(), "task": flags.task, "flags": complete(given, words, task, metric, flags.direction),
                   "metric": metric, "direction": flags.direction, "pruner": flags.pruner, "seed": flags.seed}
    return flags


def load(name: str) -> dict:
    """What a module has, by its name or as the path of a file ending in .py. Raises UsageError for whatever the user's program raises."""
    try:
        if not name.endswith(".py"):
            return vars(importlib.import_module(name))
        spec = importlib.util.spec_from_file_location("space_of_sweep", name)
        caches, sys.dont_write_bytecode = sys.dont_write_bytecode, True     # or a correction of the same second and length would not be seen
        try:
            spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        finally:
            sys.dont_write_bytecode = caches
        return vars(module)
    except Exception as error:
        raise UsageError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error


def suggested_words(space: Callable, trial) -> list[str]:
    """What a space suggests, as --name, value, --name, value, ... Raises UsageError for whatever the user's function raises."""
    try:
        values = space(trial)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[:2][-1]       # in the function, or its call
        raise UsageError(f"{place.filename}, line {place.lineno}: space(trial) raised {type(error).__name__}: {error}. When it is corrected the same command "
                         f"goes on, if names, kinds and choices are still those of the trials before; else give a new --folder") from error
    if not isinstance(values, dict):
        raise UsageError(f"space(trial) returned a {type(values).__name__}; expected a dict of flags, as {{'learning_rate': 0.001}}")
    return [word for name, value in values.items() for word in (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))]


def complete(given: list[str], words: list[str], task: dict, metric: str, direction: str) -> list[str]:
    """The flags of all trials: those given, and the metric if they do not say one. Raises UsageError if they, with some suggested words, are no command of
    the task for a sweep."""
    defaults = task.get("FLAGS", "")
    names, own = [word.partition("=")[0] for word in given], ["--output_dir", "--resume_from_checkpoint"]
    if twice := sorted({*names} & {*own, *words[::2]} | {*own} & {*words[::2]}):
        raise UsageError(f"{', '.join(twice)} cannot be given: the sweep sets the folders of its trials, and the space what it suggests")
    if "--metric_for_best_model" not in [*names, *defaults.split()]:        # by which the trainer looks, before it trains, whether there is such a metric
        given = [*given, "--metric_for_best_model", metric, "--greater_is_better", str(direction == "maximize")]
    args = parse_args([*given, *words], defaults)
    if args.eval_strategy == "no" or not args.trains:
        raise UsageError("a sweep compares trials by evaluations while they train: give --eval_strategy steps or epoch after --")
    return given


def open_sweep(argv: list[str]):
    """(flags, study), which is made if the folder has none. Raises UsageError if it has another sweep's. A space may have been corrected."""
    import optuna
    flags = check(*read_command(argv))
    os.makedirs(flags.folder, exist_ok=True)
    with locked(flags.folder):
        study = optuna.create_study(storage=open_storage(flags.folder), study_name="sweep", direction=flags.direction, load_if_exists=True)
        before = study.user_attrs.get("about", flags.about)
        if changed := [f"{name} was {before[name]!r} and is {value!r}" for name, value in flags.about.items() if before[name] != value and name != "space"]:
            raise UsageError(f"--folder {flags.folder} has another sweep, give a new one: {'; '.join(changed)}")
        if before["space"] != flags.about["space"]:
            print(f"note: {flags.space} has changed; trials that have begun keep their flags", file=sys.stderr)
        study.set_user_attr("about", flags.about)
    return flags, study


def open_storage(folder: str):
    """In SQLite changes are transactions, and a lock goes with the process that held it. Optuna's journal file keeps the lock of a process that was killed
    for 30 s, and half of its last line for ever, so that nobody can read on."""
    import optuna
    return optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db", engine_kwargs={"connect_args": {"timeout": 60}})


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


def end_with_parent(parent: int, function: Callable, *args) -> None:
    """A process's main function. parent: the id of the process that started it. When that is gone, this one gets SIGTERM, so that what trains saves first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG
    if os.getppid() != parent:      # it was gone before that
        sys.exit(128 + signal.SIGTERM)
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
    number, begun = trial.number, trial.user_attrs.get("suggested")
    words = suggested_words(flags.suggest, trial) if begun is None else shlex.split(begun)
    argv = [*flags.about["flags"], *words]
    trial.set_user_attr("suggested", shlex.join(words))
    trial.set_user_attr("command", command := shlex.join(["python", "-m", flags.task, *argv]))
    print(f"trial {number}: {command}", flush=True)
    code = train_in_process(flags.folder, number, argv, log)
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code in STOPPED:
        give_up = f"; or, if it takes too much memory each time, give it up: optuna tell --storage sqlite:///{flags.folder}/study.db --study-name sweep " \
                  f"--trial-number {number} --state fail"
        print(f"trial {number} was stopped, {how} (see {log.name}); the same command goes on with it{give_up * (code == -signal.SIGKILL)}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)
    last = next(filter(None, reversed(Path(log.name).read_text(errors="replace").split("\n"))), "")
    if code == 2 and not study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)):
        raise UsageError(f"trial {number} was refused, and none has worked yet: {last.removeprefix('error: ')} (all of it: {log.name}); "
                         f"a corrected sweep needs a new --folder")
    settle(flags, study, trial, f"{how}: {last}" if code > 0 else how if code else "")


def settle(flags: argparse.Namespace, study, trial, reason: str) -> None:
    """Tells Optuna the value of a trial that has ended, or the reason why it failed."""
    from optuna.trial import TrialState
    number, metric = trial.number, flags.about["metric"]
    rows = TrainState(log_path=os.path.join(flags.folder, f"trial-{number}", "metrics.jsonl")).log_history
    value = next((row[metric] for row in reversed(rows) if metric in row), None)
    reason = reason or (f"no evaluation in metrics.jsonl gave {metric}" if value is None else f"{metric} is NaN" if math.isnan(value) else "")
    pruned = "pruned" in study.get_trials()[number].user_attrs      # which the trial's own process has set
    state = TrialState.FAIL if reason else TrialState.PRUNED if pruned else TrialState.COMPLETE
    with locked(flags.folder):
        trial.set_user_attr("reason", reason)
        study.tell(number, value if state == TrialState.COMPLETE else None, state=state)
        write_table(flags, study)
    print(f"trial {number}: {state.name.lower()}, {reason or f'{metric} {value:.6g}'}", flush=True)


def train_in_process(folder: str, number: int, argv: list[str], log) -> int:
    """The exit code of a trial's process. Ctrl-C reaches it too, and it saves, so this one waits for it."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.call([sys.executable, "-c", CHILD, str(os.getpid()), folder, str(number), *argv], stdout=log, stderr=log)
    finally:
        signal.signal(signal.SIGINT, before)


def train_trial(folder: str, number: str, *argv: str) -> None:
    """What a trial's process runs: the task's ordinary program, with one callback more."""
    import optuna
    study = optuna.load_study(study_name="sweep", storage=open_storage(folder))
    about = study.user_attrs["about"]
    study.pruner = getattr(optuna.pruners, PRUNERS[about["pruner"]])()
    trial = optuna.trial.Trial(study, study.get_trials()[int(number)]._trial_id)
    own = ["--output_dir", os.path.join(folder, f"trial-{number}"), "--resume_from_checkpoint", "auto"]
    importlib.import_module(about["task"]).run([*argv, *own], callbacks=[Pruning(trial, about["metric"])])


class Pruning(Callback):
    """Reports the metric of each evaluation while training to Optuna, and asks to stop if it gives the trial up."""

    def __init__(self, trial, metric: str):
        self.trial, self.metric = trial, metric

    @property
    def has_stopped(self) -> bool:
        return "pruned" in self.trial.user_attrs

    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop |= self.has_stopped        # before it was started again

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        from optuna.exceptions import StorageInternalError
        if self.metric not in metrics or not state.in_training:
            return
        try:
            self.trial.report(metrics[self.metric], state.global_step)
            if state.global_step < state.max_steps and self.trial.should_prune():
                self.trial.set_user_attr("pruned", state.global_step)
        except StorageInternalError as error:
            raise UsageError(f"the sweep's study.db cannot be written: {error.__cause__}", 5) from error
        control.should_training_stop |= self.has_stopped


def write_table(flags: argparse.Namespace, study) -> tuple[list[dict], list[dict]]:
    """(all trials, completed ones with the best first), also written to sweep.json and, as a table, sweep.md."""
    trials = [{"trial": t.number, "state": t.state.name.lower(), "value": t.value, "params": t.params, "folder": os.path.join(flags.folder, f"trial-{t.number}"),
               **{name: t.user_attrs.get(name, "") for name in ("suggested", "reason", "command")}} for t in study.get_trials()]
    best = sorted((trial for trial in trials if trial["state"] == "complete"), key=lambda trial: trial["value"], reverse=flags.direction == "maximize")
    head, *rows = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in lay_out(flags, trials))
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    lines += ["", f"The best is trial {best[0]['trial']}. To train it again, in a folder of its own (--output_dir):", "", f"    {best[0]['command']}"] if best else []
    summary = {**flags.about, "best": best[0]["trial"] if best else None, "trials": trials}
    for path, text in ((Path(flags.folder, "sweep.json"), json.dumps(summary, indent=1)), (Path(flags.folder, "sweep.md"), "\n".join(lines))):
        path.with_suffix(".tmp").write_text(text + "\n")
        path.with_suffix(".tmp").replace(path)
    return trials, best


def lay_out(flags: argparse.Namespace, trials: list[dict]) -> list[list[str]]:
    """The table of a sweep, its head first."""
    return [["trial", "state", flags.about["metric"], "suggested", "why"],
            *([str(t["trial"]), t["state"], "" if t["value"] is None else f"{t['value']:.6g}", t["suggested"], t["reason"]] for t in trials)]


if __name__ == "__main__":
    run_main(main)
