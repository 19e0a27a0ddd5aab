"""Stops a training at the first loss or gradient that is not a finite number, or at the start where nothing gets a gradient.

The batch is kept for a look. On an accelerator numbers are read when it is through with them, so that nothing waits for it: then the run
stops some steps later, but before anything of it is saved.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from reltune.errors import InputError, first_line
from reltune.relevance.statistics.not_finite import where_not_finite
from reltune.runs.kept_batch import keep_batch

BEHIND = 8  # numbers that may wait to be read
LOWER = "try a lower --learning_rate"
CHECKPOINTING = (
    "pass --gradient_checkpointing_kwargs '{\"use_reentrant\": false}', or leave --gradient_checkpointing out: layers that are run again "
    "that way give no gradient where their inputs need none"
)


def watch(trainer: Trainer, model: nn.Module, processor: Any) -> None:
    """Have a Trainer stop where its numbers are none."""
    watching = _Watch(trainer, model, processor)
    trainer.training_step = watching.step(trainer.training_step)  # type: ignore[method-assign]
    trainer._get_grad_norm = watching.norm(trainer._get_grad_norm)  # type: ignore[method-assign]
    trainer._save_checkpoint = watching.before(trainer._save_checkpoint)  # type: ignore[method-assign]
    trainer.evaluate = watching.before(trainer.evaluate)  # type: ignore[method-assign]
    trainer.train = watching.after(trainer.train)  # type: ignore[method-assign]


class _Watch:
    def __init__(self, trainer: Trainer, model: nn.Module, processor: Any) -> None:
        self.trainer, self.model, self.processor = trainer, model, processor
        self.waiting: collections.deque[tuple[str, int, Any, Tensor, Any]] = collections.deque()
        self.batch: Any = None
        # An optimizer that scales its loss skips steps whose gradients are infinite, which is how it finds its scale.
        self.scaled = bool(trainer.args.fp16) or bool(trainer.args.deepspeed)
        self.norms = 0

    # -- what is wrapped --------------------------------------------------------------------------------------------

    def step(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(step)
        def watched(model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Tensor:
            self.batch = dict(inputs)
            try:
                loss = step(model, inputs, *rest, **options)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                raise InputError(self._why_no_gradient()) from error
            self._note("loss", loss.detach())
            return loss

        return watched

    def norm(self, norm: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(norm)
        def watched(*given: Any, **options: Any) -> Any:
            found = norm(*given, **options)
            if not self.scaled:
                value = found.detach() if isinstance(found, Tensor) else torch.tensor(float(found))
                if not self.norms and not self.trainer.args.fsdp and float(value) == 0:
                    self._check_reached()
                self.norms += 1
                self._note("gradient", value)
            return found

        return watched

    def before(self, act: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(act)
        def watched(*given: Any, **options: Any) -> Any:
            self._read(0)
            return act(*given, **options)

        return watched

    def after(self, act: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(act)
        def watched(*given: Any, **options: Any) -> Any:
            done = act(*given, **options)
            self._read(0)
            return done

        return watched

    # -- numbers ----------------------------------------------------------------------------------------------------

    def _note(self, what: str, value: Tensor) -> None:
        finite = torch.isfinite(value).all()
        event = None
        if finite.is_cuda:
            finite = finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((what, self.trainer.state.global_step, self.batch, finite, event))
        self._read(BEHIND if event is not None and self.trainer.state.global_step else 0)

    def _read(self, left: int) -> None:
        while len(self.waiting) > left:
            what, step, batch, finite, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            if not bool(finite):
                self.waiting.clear()
                self._stop(what, step, batch)

    def _stop(self, what: str, step: int, batch: Any) -> None:
        """Raise ArithmeticError, with the place of the number and of the batch."""
        now = step == self.trainer.state.global_step
        where = self._where(batch) if now and what == "loss" else ""
        where = f": {where}" if where else ""
        place = keep_batch(
            Path(str(self.trainer.args.output_dir)), batch, self.processor, f"{what} of step {step + 1}{where}"
        )
        kept = f"; its batch is in {place}" if place else ""
        name = "the loss" if what == "loss" else "the gradient"
        if step:
            raise ArithmeticError(f"training diverged, {name} of step {step + 1} is not finite{where}{kept}; {LOWER}.")
        raise ArithmeticError(f"{name} of the first step, before any weight has changed, is not finite{where}{kept}.")

    def _where(self, batch: Any) -> str:
        device = next(self.model.parameters()).device
        moved = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        try:
            return where_not_finite(self.model, moved)
        except Exception as error:  # a batch that the task's own Trainer hands on in another form
            return f"no module could be named ({first_line(error)})"

    # -- gradients at the start -------------------------------------------------------------------------------------

    def _check_reached(self) -> None:
        """Raise InputError where all gradients of the first step are zero, and its loss is not."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if any(p.grad is not None and bool((p.grad != 0).any()) for p in trained):
            return  # too small to square
        if float(self.trainer._tr_loss) == 0:
            return  # all is learned already
        raise InputError(self._why_no_gradient())

    def _why_no_gradient(self) -> str:
        args = self.trainer.args
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        what = f"nothing that is trained gets a gradient in the first step ({len(trained)} tensors, {trained[0][0]} among them)"
        checkpointing = getattr(args, "gradient_checkpointing", False) or getattr(
            args, "activation_checkpointing", False
        )
        kwargs = getattr(args, "gradient_checkpointing_kwargs", None) or {}
        if checkpointing and kwargs.get("use_reentrant", False):
            return f"{what}; {CHECKPOINTING}."
        missing = [name for name, p in trained if p.grad is None]
        if missing:
            return f"{what}: the loss does not depend on them, because the graph ends above them or the model does not use them; choose others."
        return f"{what}: the loss does not change with them; check the labels and --max_length, or choose other parts of the model."
