"""A step of TRL's SFTTrainer at the pace of the model's own: the loss by the model, and no waiting for the device.

TRL's own loss makes each block of logits twice, forward and backward, because it also serves output maps that are trained; and it
reads three numbers from the device in every step, which keeps it idle until the next operation is on its way. What the loss and
the attention mask would ask it, how many tokens have a label and whether any is padded, is counted where the batch is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from reltune.layers.deferred_logits import DeferredLogits, defer, undo
from reltune.losses import IGNORED
from reltune.tasks.output_map import OutputMapOnDevice

# In a whole batch: how many tokens are to be predicted, and, if it has a mask, whether none is padding.
COUNTED = "reltune_counted"


class Counting:
    """A collator that adds its batch's ``COUNTED``."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        batch = self.collate(items)
        mask = batch.get("attention_mask")
        predicted = int((batch["labels"][..., 1:] != IGNORED).sum())
        batch[COUNTED] = predicted, None if mask is None else bool(mask.all())
        return batch


@contextlib.contextmanager
def known_padding(attention: str, full: bool) -> Iterator[None]:
    """Attention of that name ("sdpa", say) does not look whether the mask of padding is ``full``, in which case it is not applied."""
    functions: Any = ALL_MASK_ATTENTION_FUNCTIONS
    if attention not in functions:  # it is given no mask
        yield
        return
    make, known = functions[attention], {"attention_mask": None} if full else {"allow_is_causal_skip": False}
    functions[attention] = lambda *args, **kwargs: make(*args, **{**kwargs, **known})
    try:
        yield
    finally:
        functions[attention] = make


class SFTStep(OutputMapOnDevice):
    """Comes before TRL's SFTTrainer among the bases of a class. Where the output map is trained, where its logits are capped or
    scaled, and in several processes, the step is TRL's."""

    looks_at_logits = False  # the model does, as was seen in a step
    _metrics: Any  # TRL's: mode -> metric -> the values that are to be logged next
    _total_train_tokens: Any

    def get_train_dataloader(self) -> DataLoader[Any]:
        several = self.accelerator.num_processes > 1 or isinstance(self.train_dataset, IterableDataset)
        if (
            several or self.args.torch_compile
        ):  # accelerate joins tensors alone; numbers of a batch would be compiled in
            return super().get_train_dataloader()
        collate = self.data_collator
        self.data_collator = Counting(collate)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        predicted, full = inputs.pop(COUNTED, (None, None))
        if return_outputs or self.looks_at_logits or not (model.training and self._has_plain_loss()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        base: Any = self.accelerator.unwrap_model(model)
        base = base.get_base_model() if isinstance(base, PeftModel) else base
        if not defer(base, inputs, predicted):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        attention = base.config.get_text_config()._attn_implementation
        try:
            own = {**inputs, "use_cache": False}
            with contextlib.nullcontext() if full is None else known_padding(attention, full):
                loss, outputs = Trainer.compute_loss(self, model, own, True, num_items_in_batch)
        finally:
            undo(base)
        logits = getattr(outputs, "logits", None)  # a kernel of the whole loss gives none
        if isinstance(logits, DeferredLogits) and logits.of_tokens is not None:
            self._note(inputs, logits)
        else:
            self.looks_at_logits = True
        return loss

    def _has_plain_loss(self) -> bool:
        of_trl = getattr(self.args, "loss_type", "nll") == "nll" and not getattr(self, "aux_loss_enabled", False)
        own = self.label_smoother is not None or self.compute_loss_func is not None
        return of_trl and not own and self.accelerator.num_processes == 1

    @torch.no_grad()
    def _note(self, inputs: dict[str, Any], logits: DeferredLogits) -> None:
        """TRL's metrics of a step, on the device until they are logged."""
        of_tokens, metrics = logits.of_tokens, self._metrics["train"]
        assert of_tokens is not None
        labelled = max(1, len(of_tokens.losses))
        metrics["entropy"].append(of_tokens.entropies.sum() / labelled)
        metrics["mean_token_accuracy"].append(of_tokens.guessed.sum() / labelled)
        mask = inputs.get("attention_mask")  # packed examples have none
        self._total_train_tokens += logits.shape[:-1].numel() if mask is None else mask.sum()
        metrics["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for of_mode in self._metrics.values():
            for name, values in of_mode.items():
                of_mode[name] = [float(value) for value in values]
        super().log(logs, *args, **kwargs)
