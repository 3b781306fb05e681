"""Loggers over their own libraries: --report_to wandb, mlflow. Copy one to send rows somewhere else, and pass it to `main` as a callback.

They tell what metrics.jsonl has, on rank 0. Each start of a training is a run of its own there, which begins with the rows before, so none is
missing or twice, whatever a kill has left. Where to is set in the environment, as their libraries have it: WANDB_PROJECT, WANDB_MODE=offline,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_ALLOW_FILE_STORE=true for plain folders.
Needs: pip install wandb, or pip install mlflow
"""
from __future__ import annotations

import os

from callbacks import Callback


def title(args) -> str:
    return args.run_name or os.path.basename(os.path.abspath(args.output_dir))


def numbers(logs: dict) -> dict[str, float]:
    return {key: value for key, value in logs.items() if isinstance(value, (int, float))}


class WandbCallback(Callback):
    """Weights & Biases: a run named by --run_name."""

    def __init__(self):
        self.run = None

    def on_train_begin(self, args, state, control, run=None, **kwargs):
        import wandb
        self.run = wandb.init(dir=args.output_dir, name=title(args), config=args.to_dict())
        run.world.on_exit.push(lambda error, *_: self.run.finish(exit_code=int(error is not None)))
        for row in state.log_history:
            self.tell(row)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.run is not None:
            self.tell({**logs, "step": state.global_step})

    def tell(self, row: dict) -> None:
        self.run.log({"update" if key == "step" else key: value for key, value in numbers(row).items()})


class MlflowCallback(Callback):
    """MLflow: a run named by --run_name, with its settings as parameters."""

    def __init__(self):
        self.client = None

    def on_train_begin(self, args, state, control, run=None, **kwargs):
        import mlflow
        self.client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        found = self.client.get_experiment_by_name(name)
        experiment = self.client.create_experiment(name) if found is None else found.experiment_id
        self.run_id = self.client.create_run(experiment, run_name=title(args)).info.run_id
        run.world.on_exit.push(lambda error, *_: self.client.set_terminated(self.run_id, "FINISHED" if error is None else "FAILED"))
        for key, value in args.to_dict().items():
            self.client.log_param(self.run_id, key, str(value)[:500])
        for row in state.log_history:
            self.tell(row)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.client is not None:
            self.tell({**logs, "step": state.global_step})

    def tell(self, row: dict) -> None:
        for key, value in numbers(row).items():
            self.client.log_metric(self.run_id, key, value, step=row["step"])
