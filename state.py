"""What a run is made of (`Run`), what it remembers over a restart (`TrainState`), and the one error for users' mistakes.

Every other file may import this one, and it imports none: that keeps the import graph free of cycles.
"""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from args import TrainArgs
    from callbacks import Callbacks
    from optim import EMA
    from precision import Precision
    from world import World
    from zero import Parallel

Batch = dict[str, Any]      # tensors for the model, and the ints num_items and num_samples for the loop
LossFn = Callable[["torch.nn.Module", Batch], Any]      # (model, micro-batch) -> summed loss (), or (summed loss, predictions)
runtime = partial(field, metadata={"runtime": True})            # a field that is worked out at each start and not saved


class UsageError(ValueError):
    """A mistake of the user's, told in one message without a traceback. exit_code: 1 memory ran out,
    2 wrong arguments or data, 3 no usable checkpoint, 4 an update is not finite, 5 output_dir cannot be written, 6 a rank was lost."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


class SampleError(UsageError):
    """What a collator finds wrong with one of its samples. row: the sample's place in the list; the loader says which sample that is."""

    def __init__(self, row: int, message: str):
        super().__init__(message)
        self.row = row


@dataclass
class TrainState:
    """Progress of a run. Names are those of the HF Trainer's state, so its callbacks can read them. `to_dict` is what a
    checkpoint stores."""

    global_step: int = 0            # updates attempted over the whole run
    skipped_steps: int = 0          # of these, the ones not applied; the schedule reads global_step - skipped_steps
    empty_steps: int = 0            # of the skipped ones, those whose window held no label item
    nan_steps: int = 0              # updates not applied since their loss or gradient was NaN or infinite
    epochs_done: int = 0            # finished passes over the data
    samples_seen: int = 0           # in this pass, over all ranks: a position that holds at any world or batch size
    epoch: float = 0.0              # passes over the data, counted in micro-batches: what logs show
    total_samples: int = 0          # over the whole run and all ranks
    num_input_tokens_seen: int = 0  # elements of input_ids, over the whole run and all ranks
    total_flos: float = 0.0         # 6 x tokens x parameters outside embeddings (Kaplan et al. 2020, section 2.1)
    learning_rate: float = 0.0      # of the last update
    grad_norm: float | None = None  # of the last update, before clipping
    total_loss: float = 0.0         # sum of the finite losses of all updates, and how many they are, for train_loss
    num_losses: int = 0
    recent_losses: list[float] = field(default_factory=list)   # of each update since the last log
    recent_nan_steps: int = 0       # nan_steps, empty_steps and skipped_steps when the last row was logged
    recent_empty_steps: int = 0
    recent_skipped_steps: int = 0
    last_nonfinite: int = -1        # global_step after the last update that was not finite, and how many came in a row
    nonfinite_in_a_row: int = 0
    last_logged_step: int = 0
    samples_per_update: int = 0     # batch geometry: of all ranks, over one window
    epoch_open: bool = False        # a pass has begun whose end has not been handled yet
    log_bytes: int = 0              # length of metrics.jsonl, which is the history; resume truncates to it
    data: str = ""                  # what identifies the training data: other data would make positions meaningless
    best_metric: float | None = None    # best value of --metric_for_best_model so far, and the update it was evaluated after
    best_global_step: int = 0
    best_saved_step: int = 0        # the best update that has a checkpoint
    stream: dict | None = runtime(default=None)     # noqa: RUF009  where a stream of training data stood at the last save, saved beside this
    max_steps: int = runtime(default=0)
    num_train_epochs: int = runtime(default=0)
    logging_steps: int = runtime(default=0)         # intervals in updates, ratios resolved
    eval_steps: int = runtime(default=0)
    save_steps: int = runtime(default=0)
    train_batch_size: int = runtime(default=0)
    is_local_process_zero: bool = runtime(default=True)
    is_world_process_zero: bool = runtime(default=True)
    is_hyper_param_search: bool = runtime(default=False)        # these three are for callbacks of the HF Trainer
    trial_name: str | None = runtime(default=None)
    trial_params: dict | None = runtime(default=None)       # noqa: RUF009
    log_path: str = runtime(default="")
    flops_per_token: float = runtime(default=0.0)     # forward and backward, with --peak_flops
    in_training: bool = runtime(default=False)       # train() is at work
    finished: bool = runtime(default=False)         # nothing was left to do when this start found the run

    def to_dict(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self) if "runtime" not in f.metadata}

    @property
    def best_model_checkpoint(self) -> str | None:
        """Folder of the best update that was saved."""
        path = os.path.join(os.path.dirname(self.log_path), f"checkpoint-{self.best_saved_step}")
        return path if os.path.isdir(path) else None

    @property
    def log_history(self) -> list[dict]:
        """Every row logged so far, read from metrics.jsonl."""
        if not os.path.exists(self.log_path):
            return []
        with open(self.log_path) as file:
            return [json.loads(line) for line in file if line.endswith("\n")]


class Update(NamedTuple):
    """What one update left on the device: nothing here has been waited for."""

    loss: torch.Tensor         # () mean over the label items of the window and all ranks
    share: torch.Tensor        # () this rank's part of it
    grad_norm: torch.Tensor    # () before clipping
    failed: bool | torch.Tensor     # loss or gradient is NaN or infinite, and no lower loss scale would cure it; () where the host has not waited for it


@dataclass(repr=False)      # it would be pages of weights in a notebook
class Run:
    """Everything a training run works on. Functions that need one or two of these take those instead."""

    args: TrainArgs
    world: World
    model: torch.nn.Module                   # the user's own: what losses, callbacks and checkpoints see
    parallel: Parallel                       # how its training is spread over ranks
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]         # finished updates -> learning rate
    precision: Precision
    state: TrainState
    callbacks: Callbacks
    ema: EMA | None = None
    processing_class: Any = None             # a tokenizer or the like, whose files go into checkpoints


def run_main(function, *args) -> None:
    """Calls a program's main function; a user's mistake becomes one message and its exit code, without a traceback."""
    try:
        function(*args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped at once; nothing was saved since the last checkpoint", file=sys.stderr)
        sys.exit(130)
