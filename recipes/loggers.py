"""Loggers over their own libraries: --report_to tensorboard, wandb, mlflow. Copy one to send rows somewhere else, and pass it to `main` as a callback.

They tell what metrics.jsonl has, on rank 0. For wandb and mlflow each start of a training is a run of its own, which begins with the rows before, so
none is missing or twice, whatever a kill has left. Where to is set in the environment, as their libraries have it: WANDB_PROJECT, WANDB_MODE=offline,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_ALLOW_FILE_STORE=true for plain folders.
Needs: pip install tensorboard, or wandb, or mlflow
"""
from __future__ import annotations

import os

from callbacks import Callback
from zero import plain


def title(args) -> str:
    return args.run_name or os.path.basename(os.path.abspath(args.output_dir))


def numbers(logs: dict) -> dict[str, float]:
    return {key: value for key, value in logs.items() if isinstance(value, (int, float))}


class TensorBoardCallback(Callback):
    """Every row as curves, train/loss, eval/loss and so on, and the settings, in output_dir/tensorboard; with histograms, every logging_steps
    the weights and their gradients too, of what this rank holds whole. A resumed run takes back what had been written after its checkpoint. Rank 0 only."""

    def __init__(self, histograms: bool = False):
        self.histograms, self.writer = histograms, None

    def on_train_begin(self, args, state, control, run=None, **kwargs):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(os.path.join(args.output_dir, "tensorboard"), purge_step=state.global_step)
        run.world.on_exit.callback(self.writer.close)
        if state.global_step == 0:
            self.writer.add_text("settings", "\n".join(f"    {key}: {value!r}" for key, value in args.to_dict().items()))
        for row in state.log_history:
            if row["step"] == state.global_step:        # some of them were written after the checkpoint, so all were purged
                self.write(row, state.global_step)

    def on_pre_optimizer_step(self, args, state, control, run=None, **kwargs):
        step = state.global_step        # updates that made these weights
        if self.histograms and step % state.logging_steps == 0:
            with run.world.clock.within("log"):
                for name, p in run.model.named_parameters():
                    if len(plain(p)) == 1 and not hasattr(p, "to_local"):
                        self.writer.add_histogram(f"weights/{name}", p.detach(), step)
                        if p.grad is not None:
                            self.writer.add_histogram(f"gradients/{name}", p.grad, step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.writer is not None:
            self.write(logs, state.global_step)
            self.writer.flush()

    def write(self, row: dict, step: int) -> None:
        for key, value in row.items():
            part, _, name = key.partition("_")
            tag = f"{part}/{name}" if part in ("eval", "test", "time", "memory") and name else f"train/{key}"
            if isinstance(value, (int, float)) and key != "step":
                self.writer.add_scalar(tag, value, step)
            elif isinstance(value, str):
                self.writer.add_text(tag, value, step)


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
