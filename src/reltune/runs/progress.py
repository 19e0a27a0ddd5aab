"""Progress bars of transformers' Trainer: named, with the losses in the bar in place of a line for every log."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer


def show_progress(trainer: Trainer, description: str) -> None:
    """Name the trainer's bars. With ``disable_tqdm`` everything stays as transformers has it."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress(description))


class _Progress(ProgressCallback):
    training_bar: Any
    prediction_bar: Any

    def __init__(self, description: str) -> None:
        super().__init__()
        self.description = description
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.description)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.prediction_bar is None and state.is_world_process_zero:
            training = self.training_bar is not None
            self.prediction_bar = tqdm(
                total=len(eval_dataloader),
                desc="evaluate validation" if training else self.description,
                leave=not training,
                dynamic_ncols=True,
            )
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None:
            cost = ("_runtime", "_per_second", "_time")
            scores = [key for key in logs if key.startswith("eval_") and key != "eval_loss" and not key.endswith(cost)]
            shown = ("loss", "eval_loss", *scores[:1])  # a task names its main metric first
            self.shown.update({key: f"{logs[key]:.4g}" for key in shown if key in logs})
            self.training_bar.set_postfix(self.shown)
