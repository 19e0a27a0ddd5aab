"""A few fixed prompts that a model answers while it trains: before the first step, and at each evaluation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from reltune.data.prompts import Asked, read_prompts
from reltune.data.rows import Row, Rows
from reltune.errors import InputError
from reltune.files import write_text
from reltune.report.record import Sample
from reltune.runs.asking import asked_in, prompt_of
from reltune.runs.directory import RunDirectory
from reltune.tasks.causal_lm import Prompt
from reltune.tasks.generation import continuations
from reltune.tasks.texts import encode_texts

if TYPE_CHECKING:
    from reltune.runs.materials import Materials

HEADS = ("step", "prompt", "answer")


class Samples:
    """The prompts of a run, made ready to be answered. An answer is what evaluation would have the model write: by decoders the
    likeliest token each time.

    Attributes:
        texts: the prompts, to read.
    """

    def __init__(self, materials: Materials) -> None:
        """Raises InputError for prompts that cannot be asked."""
        self.task, self.tokenizer = materials.task, materials.tokenizer
        self.longest, self.max_new_tokens = materials.longest, materials.config.max_new_tokens
        asked = read_prompts(materials.config.sample_prompts)
        self.prompts: list[Prompt] = []
        self.rows: list[Row] = []
        if self.task.name == "seq2seq":
            self.rows = self._sources(asked)
            self.texts = [self.task.content(row) for row in self.rows]
        else:
            form = asked_in(self.task, self.tokenizer, rows=materials.splits.test)
            self.prompts = [self._prompt(form, one, place) for place, one in enumerate(asked, start=1)]
            self.texts = [prompt.text for prompt in self.prompts]

    def _sources(self, asked: Sequence[Asked]) -> list[Row]:
        for place, one in enumerate(asked, start=1):
            if not isinstance(one, str):
                raise InputError(f"sample_prompts: prompt {place} is a chat, and a model for seq2seq reads texts.")
        column = self.task.columns["source"]
        rows = list(Rows([{column: one} for one in asked], "sample_prompts"))
        lost = encode_texts(rows, [(str(one),) for one in asked], self.tokenizer, self.longest).lost
        for problem, places in lost.items():
            raise InputError(f"sample_prompts: prompt {places[0]} is {problem}.")
        return [self.task.untold(row) for row in rows]

    def _prompt(self, form: str, asked: Asked, place: int) -> Prompt:
        try:
            prompt = prompt_of(form, asked, self.tokenizer)
        except InputError as error:
            raise InputError(f"sample_prompts, prompt {place}: {error}") from error
        if len(prompt.ids) >= (most := self.tokenizer.model_max_length):
            raise InputError(
                f"sample_prompts: prompt {place} has {len(prompt.ids):,} tokens, and the model reads at most {most:,} with its answer."
            )
        return prompt

    def answers(self, model: nn.Module, batch_size: int) -> list[str]:
        """What the model writes for each prompt. Leaves it in the mode that it is in; draws no random numbers. Of several processes
        each with the whole model calls this."""
        if self.rows:
            records = self.task.predict(
                model, self.rows, self.tokenizer, self.longest, batch_size, self.max_new_tokens
            ).records
            return [records[row.line]["prediction"] for row in self.rows]
        stops = {prompt.stop for prompt in self.prompts if prompt.stop is not None}
        ids = [prompt.ids for prompt in self.prompts]
        return continuations(model, self.tokenizer, ids, self.max_new_tokens, batch_size, stops, progress=False)

    def asked_in(self, run: RunDirectory) -> Callable[[Trainer], None]:
        """What has a Trainer ask its model, and keep the answers in the run's directory."""
        return lambda trainer: trainer.add_callback(_Asking(self, trainer, run))


class _Asking(TrainerCallback):
    """Writes the answers of all evaluations at each of them, so that the file is whole at any moment. A training that goes on from
    a checkpoint keeps what was answered up to there."""

    def __init__(self, samples: Samples, trainer: Trainer, run: RunDirectory) -> None:
        self.samples, self.trainer, self.run = samples, trainer, run
        self.kept: list[Sample] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            if state.is_world_process_zero:
                self.kept = [sample for sample in self.run.read_samples() if sample.step <= state.global_step]
                self._write()
        else:
            self._ask(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask(args, state)

    def _ask(self, args: Any, state: Any) -> None:
        answers = self.samples.answers(self.trainer.model, args.per_device_eval_batch_size)  # type: ignore[arg-type]
        if not state.is_world_process_zero:
            return
        step, texts = state.global_step, self.samples.texts
        found = [Sample(step, state.epoch or 0.0, *both) for both in zip(texts, answers, strict=True)]
        self.kept = [*(sample for sample in self.kept if sample.step < step), *found]
        self._write()
        self._tell(step, found)

    def _write(self) -> None:
        lines = [json.dumps(dataclasses.asdict(sample), ensure_ascii=False) + "\n" for sample in self.kept]
        write_text(self.run.samples, "".join(lines))

    def _tell(self, step: int, found: Sequence[Sample]) -> None:
        """Hand the answers to where the Trainer reports to. TensorBoard has the new ones, the others a table of all."""
        rows = [[sample.step, sample.prompt, sample.answer] for sample in self.kept]
        for logger in self.trainer.callback_handler.callbacks:
            if isinstance(logger, TensorBoardCallback) and logger.tb_writer is not None:
                for place, sample in enumerate(found, start=1):
                    text = f"{_as_it_is(sample.prompt)}\n\n---\n\n{_as_it_is(sample.answer)}"
                    logger.tb_writer.add_text(f"samples/{place}", text, step)
                logger.tb_writer.flush()
            elif isinstance(logger, WandbCallback) and getattr(logger._wandb, "run", None) is not None:
                table = logger._wandb.Table(columns=list(HEADS), data=rows)
                logger._wandb.log({"samples": table, "train/global_step": step})
            elif isinstance(logger, TrackioCallback):
                import pandas as pd

                table = logger._trackio.Table(dataframe=pd.DataFrame(rows, columns=list(HEADS)))
                logger._trackio.log({"samples": table, "train/global_step": step})


def _as_it_is(text: str) -> str:
    """A text as Markdown shows it to the letter: as code."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
