"""Talking to a tuned model, question after question, as training has asked it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from reltune.errors import InputError
from reltune.runs.asking import asked_in, prompt_of
from reltune.runs.directory import RunDirectory
from reltune.runs.tuned import Tuned
from reltune.tasks.generation import ends_of
from reltune.tasks.task import Task

LONGEST = 512  # tokens of an answer, where neither the user nor the model's generation_config.json says


class Conversation:
    """A conversation with a model; texts that it goes on from, and sources that it writes a target for, stand by themselves.

    Args:
        model, tokenizer: as ``Tuned.load`` gives them.
        form: how it is asked, as ``asked_in`` says.
        system: what the model is told before a chat begins.
        sampling: fields of ``GenerationConfig``; what is not given is as the model's own settings have it.
        base: whether the model without what was tuned answers.
    """

    def __init__(
        self,
        task: Task,
        model: Any,
        tokenizer: Any,
        form: str,
        system: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        base: bool = False,
    ) -> None:
        if system is not None and form == "text":
            raise InputError(
                "the model goes on from texts as they stand, which have no system prompt; leave --system_prompt out."
            )
        if base and not hasattr(model, "disable_adapter"):
            raise InputError("a merged model has no base beside it; name the run or its LoRA adapter.")
        self.task, self.model, self.tokenizer, self.form = task, model, tokenizer, form
        self.system, self.sampling, self.base = system, dict(sampling or {}), base
        self.turns: list[tuple[str, str]] = []  # questions with their answers

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []

    def answer(self, question: str) -> Iterator[str]:
        """The answer to a question, part by part as it is written. An answer that is not waited for to its end is stopped, and
        what there is of it is kept.

        Raises InputError for a question that is empty, that the chat template refuses or that leaves no room for an answer.
        """
        inputs, settings = self._asked(question)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped, failed = _Stopped(), []

        def write() -> None:
            try:
                with torch.no_grad():
                    self.model.generate(
                        **inputs,
                        generation_config=settings,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([stopped]),
                    )
            except Exception as error:
                failed.append(error)
                streamer.end()

        writer = threading.Thread(target=write, daemon=True)
        parts: list[str] = []
        with self.model.disable_adapter() if self.base else contextlib.nullcontext():
            writer.start()
            try:
                for part in streamer:
                    parts.append(part)
                    yield part
            finally:
                stopped.set()
                writer.join()
                if not failed:
                    self.turns.append((question, "".join(parts).strip()))
        if failed:
            raise failed[0]

    def _asked(self, question: str) -> tuple[dict[str, Any], GenerationConfig]:
        """What ``generate`` is given for a question, and its settings."""
        settings = GenerationConfig.from_dict({**self.model.generation_config.to_dict(), **self.sampling})
        settings.pad_token_id = self.tokenizer.pad_token_id
        ends = ends_of(self.model, self.tokenizer)
        if self.task.name == "seq2seq":
            ids, stop = self.tokenizer(question)["input_ids"], None
        else:
            prompt = prompt_of(self.form, question, self.tokenizer, self.system, self.turns)
            ids, stop = prompt.ids, prompt.stop
        room = self.tokenizer.model_max_length - (0 if self.task.name == "seq2seq" else len(ids))
        if room < 1:
            raise InputError(
                f"the conversation has {len(ids)} tokens, which leaves the model no room for an answer; begin anew."
            )
        settings.eos_token_id = sorted({*ends, *([] if stop is None else [stop])}) or None
        settings.max_length = None
        settings.max_new_tokens = min(settings.max_new_tokens or LONGEST, room)
        tokens = torch.tensor([ids], device=self.model.device)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, settings


class _Stopped(StoppingCriteria):
    """Stops an answer that nobody waits for any longer."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


def conversations(
    path: str | Path, compare: bool = False, system: str | None = None, sampling: Mapping[str, Any] | None = None
) -> dict[str, Conversation]:
    """A conversation with the tuned model of a run or an export, under "tuned"; to ``compare``, one with its base before it."""
    tuned = Tuned.open(path)
    model, tokenizer = tuned.load()
    run = RunDirectory(tuned.path) if tuned.kept_as == "run" else None
    form = tuned.asked_in or asked_in(tuned.task, tokenizer, run)
    whom = {"base": True, "tuned": False} if compare else {"tuned": False}
    return {
        name: Conversation(tuned.task, model, tokenizer, form, system, sampling, base) for name, base in whom.items()
    }
