"""Loggers over their own libraries: --report_to wandb, mlflow. Copy one to send rows somewhere else, and pass it to `main` as a callback.

They tell what metrics.jsonl has, on rank 0, and go on where they were when a run is resumed. Where to is set in the environment, as their
libraries have it: WANDB_PROJECT, WANDB_MODE=offline, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
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
    """Weights & Biases: a run named by --run_name. Its id is kept in checkpoints."""

    def __init__(self):
        self.run, self.run_id = None, ""

    def on_train_begin(self, args, state, control, **kwargs):
        import wandb
        os.makedirs(args.output_dir, exist_ok=True)
        self.run = wandb.init(dir=args.output_dir, name=title(args), config=args.to_dict(),
                              id=self.run_id or None, resume="allow" if self.run_id else None)
        self.run_id = self.run.id

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.run is not None:
            self.run.log({**numbers(logs), "update": state.global_step})

    def on_train_end(self, args, state, control, **kwargs):
        self.run.finish()
        self.run = None

    def state(self) -> dict:
        return {"args": {}, "attributes": {"run_id": self.run_id}}


class MlflowCallback(Callback):
    """MLflow: a run named by --run_name, with its settings as parameters. Its id is kept in checkpoints."""

    def __init__(self):
        self.client, self.run_id = None, ""

    def on_train_begin(self, args, state, control, **kwargs):
        import mlflow
        self.client = mlflow.MlflowClient()
        if not self.run_id:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
            found = self.client.get_experiment_by_name(name)
            experiment = self.client.create_experiment(name) if found is None else found.experiment_id
            self.run_id = self.client.create_run(experiment, run_name=title(args)).info.run_id
            for key, value in args.to_dict().items():
                self.client.log_param(self.run_id, key, str(value)[:500])

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key, value in numbers(logs).items() if self.client is not None else ():
            self.client.log_metric(self.run_id, key, value, step=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.client.set_terminated(self.run_id)

    def state(self) -> dict:
        return {"args": {}, "attributes": {"run_id": self.run_id}}
