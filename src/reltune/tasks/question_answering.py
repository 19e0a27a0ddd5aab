"""Extractive question answering: where in a context the answer stands; exact match and F1 as SQuAD defines them.

Contexts longer than the model are read in windows that overlap by a quarter; each window is an example, whose answer is
its first token where it holds none.
"""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from reltune.data.rows import Row, text_problem
from reltune.errors import InputError
from reltune.losses import LOSSES
from reltune.notes import note
from reltune.pretrained import load_model
from reltune.tasks.prediction import Predictions, check_outputs, not_numbers, outputs_of, rounded
from reltune.tasks.task import Columns, Examples, RowProblem, Seen, Task
from reltune.tasks.texts import limit_of, read

MAX_ANSWER = 30  # tokens of an answer, at most, as in the baselines for SQuAD


class Window(NamedTuple):
    """What is needed to read an answer off a window: the row it is of, and where its tokens stand in the context."""

    row: int
    offsets: list[tuple[int, int] | None]  # None for tokens that are no part of the context
    context: str
    answers: list[str]


class Found(NamedTuple):
    """An answer in a context: its logits' sum, its text, the character at which it begins, and its probability."""

    score: float
    text: str
    start: int | None
    probability: float


class SpanTrainer(Trainer):
    """Trains by the loss in ``LOSSES``, for which padding is no place for an answer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which accumulation divides

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        loss = LOSSES["question_answering"].per_example(outputs, inputs).mean()
        return (loss, outputs) if return_outputs else loss


@dataclass
class QuestionAnswering(Task):
    """The task of finding the answer to a question in a context.

    Answers are SQuAD's ``{"text": [...], "answer_start": [...]}`` (none: the context does not answer it), or texts that stand
    somewhere in the context.

    Attributes:
        unanswerable: whether some questions of training have no answer, so that the model may give none.
    """

    columns: Columns = field(
        default_factory=lambda: {"question": "question", "context": "context", "answers": "answers"}
    )
    unanswerable: bool = False

    name: ClassVar[str] = "question_answering"
    loss: ClassVar[str] = "question_answering"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match")
    peft_task_type: ClassVar[str] = "QUESTION_ANS"
    unit: ClassVar[str] = "window"
    told: ClassVar[tuple[str, ...]] = ("answers",)
    predicts: ClassVar[tuple[str, ...]] = ("prediction", "score", "answer_start")
    trainer_class: ClassVar[type[Trainer]] = SpanTrainer
    padding_sides: ClassVar[tuple[str, ...]] = ("right",)  # labels are places of tokens

    def problem(self, row: Row) -> str | None:
        column = self.columns["answers"]
        context, answers = row.values.get(self.columns["context"]), row.values.get(column)
        for role in ("question", "context"):
            if problem := text_problem(row.values, self.columns[role]):
                return problem
        if answers is None or answers == "":
            return f"an empty {column!r} (where the context has no answer, write an empty list)"
        if isinstance(answers, str) or _texts_alone(answers):
            held = all(text.strip() and text in str(context) for text in _texts(answers))
            return None if held else f"a {column!r} that the context does not hold"
        if not isinstance(answers, Mapping):
            return f"a {column!r} that is neither a text nor has a text and an answer_start"
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            return f"a {column!r} without equally many text and answer_start"
        for text, start in zip(texts, starts, strict=True):
            if not isinstance(text, str) or not text or not isinstance(start, int) or start < 0:
                return f"a {column!r} with an empty text or a wrong answer_start"
            if str(context)[start : start + len(text)] != text:
                return f"a {column!r} that does not stand in the context where answer_start says"
        return None

    def content(self, row: Row) -> str:
        return f"{row.values[self.columns['question']]} {row.values[self.columns['context']]}"

    def answers(self, row: Row) -> list[tuple[str, int]]:
        """Each answer with the character at which it begins."""
        answers = row.values[self.columns["answers"]]
        if isinstance(answers, str) or _texts_alone(answers):
            return [(text, row.values[self.columns["context"]].index(text)) for text in _texts(answers)]
        return list(zip(answers["text"], answers["answer_start"], strict=True))

    def fitted(self, rows: Iterable[Row]) -> QuestionAnswering:
        answered = unanswered = several = 0
        for row in rows:
            answers, context = self.answers(row), row.values[self.columns["context"]]
            answered, unanswered = answered + bool(answers), unanswered + (not answers)
            if not isinstance(row.values[self.columns["answers"]], Mapping):
                several += any(context.count(text) > 1 for text, _ in answers)
        if not answered:
            raise InputError(f"No training row has an answer in {self.columns['answers']!r}; check the column.")
        if several:
            note(
                f"{several} of {answered + unanswered} answers stand in their contexts several times; the first place is learned. An "
                "answer_start says which is meant."
            )
        return replace(self, unanswerable=unanswered > 0)

    def load_model(
        self, model_name_or_path: str | os.PathLike, dtype: torch.dtype | str | None = None, **options: Any
    ) -> tuple[PreTrainedModel, list[str]]:
        return load_model(
            os.fspath(model_name_or_path),
            AutoModelForQuestionAnswering,
            MODEL_FOR_QUESTION_ANSWERING_MAPPING,
            "question answering head",
            self.adapt,
            dtype,
            **options,
        )

    def load_tokenizer(self, model_name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = super().load_tokenizer(model_name_or_path)
        if not tokenizer.is_fast:
            raise InputError(
                f"The tokenizer of {os.fspath(model_name_or_path)} cannot tell where in the text its tokens stand; "
                "question_answering needs a model with a fast tokenizer (tokenizer.json)."
            )
        return tokenizer

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, max_length: int) -> Examples:
        """One example per window: token ids of the question and a part of the context, and as labels the first and
        last token of the answer. A question is cut to half the limit."""
        limit = limit_of(processor, max_length, least=8)
        items: list[dict[str, Any]] = []
        sources: list[Window] = []
        lost: dict[str, list[int]] = {}
        n_truncated = 0
        for number, row in enumerate(rows):
            try:
                encoded, cut = self._windows(row, processor, limit)
            except RowProblem as problem:
                lost.setdefault(str(problem), []).append(row.line)
                continue
            n_truncated += cut
            context, answers = str(row.values[self.columns["context"]]), self.answers(row)
            offsets_of, _ = encoded.pop("offset_mapping"), encoded.pop("overflow_to_sample_mapping", None)
            for i, all_offsets in enumerate(offsets_of):
                inside = [part == 1 for part in encoded.sequence_ids(i)]
                offsets = [tuple(at) if held else None for at, held in zip(all_offsets, inside, strict=True)]
                item = {key: values[i] for key, values in encoded.items()}
                item["labels"] = _place(offsets, answers, _nowhere(item["input_ids"], processor))
                items.append(item)
                sources.append(Window(number, offsets, context, [text for text, _ in answers]))
        return Examples(items, n_truncated, sources, lost)

    def _windows(self, row: Row, tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[Any, bool]:
        """The tokenizer's output for the windows of a row, and whether its question was cut."""
        question, cut = _cut(str(row.values[self.columns["question"]]), tokenizer, limit // 2)
        return read(
            tokenizer,
            question,
            str(row.values[self.columns["context"]]),
            truncation="only_second",
            max_length=limit,
            stride=limit // 8,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        ), cut

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pads a batch to its longest window; labels are (B, 2)."""
        return DataCollatorWithPadding(processor)

    def seen(self, item: Mapping[str, Any], processor: Any) -> list[Seen]:
        """The tokens of the answer are marked, of which the first and the last are learned."""
        first, last = item["labels"]
        return [Seen("input", item["input_ids"], [first <= i <= last for i in range(len(item["input_ids"]))])]

    def wanted(self, item: Mapping[str, Any], processor: Any) -> str:
        first, last = item["labels"]
        if first == last == _nowhere(item["input_ids"], processor):
            return f"no answer here, which is token {first}"
        return f"the answer from token {first} to token {last}"

    def make_arguments(self, **values: Any) -> TrainingArguments:
        return TrainingArguments(label_names=["labels"], **values)

    def reduced(self, logits: Any, labels: Tensor) -> Tensor:
        """Scores of each token as the first and as the last of the answer (B, T, 2)."""
        return torch.stack(logits[:2], -1)

    def spoilt(self, prediction: EvalPrediction, examples: Examples) -> Any:
        """Without what padding gives."""
        scores: Any = prediction.predictions
        own = (of[: len(item["input_ids"])] for of, item in zip(scores, examples.items, strict=True))
        return [bool(not_numbers(of).any()) for of in own]

    def compute_metrics(
        self, prediction: EvalPrediction, examples: Examples | None = None, processor: Any = None
    ) -> dict[str, float]:
        """Means over questions of the best exact match and F1 of words with any of the answers (Rajpurkar et al. 2016);
        a question without an answer asks for none."""
        assert examples is not None and examples.sources is not None
        scores: Any = prediction.predictions
        found = self._found(scores, examples, processor)
        answers: dict[int, list[str]] = {window.row: window.answers for window in examples.sources}
        exact, f1 = [], []
        for row, wanted in answers.items():
            text = found[row].text
            exact.append(max(float(plain(one) == plain(text)) for one in wanted or [""]))
            f1.append(max(shared_words(one, text) for one in wanted or [""]))
        return {"f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}

    def _found(self, scores: Sequence[np.ndarray], examples: Examples, processor: Any) -> dict[int, Found]:
        """The answer to each row's question: the best one of all its windows, or none where that is likelier in each of them.

        ``scores``: for each window (T, 2) or longer, of each token as the first and as the last of the answer.
        """
        best: dict[int, Found] = {}
        nothing: dict[int, Found] = {}
        for item, window, of_tokens in zip(examples.items, examples.sources or (), scores, strict=True):
            own = of_tokens[: len(item["input_ids"])].astype(np.float64)
            all_pairs = np.logaddexp.reduce(own).sum()
            none = own[_nowhere(item["input_ids"], processor)].sum()
            span = best_span(own, window.offsets)
            before = best.setdefault(window.row, Found(-np.inf, "", None, 0.0))
            if span is not None and span[0] > before.score:
                text = window.context[span[1] : span[2]]
                best[window.row] = Found(span[0], text, span[1], np.exp(span[0] - all_pairs))
            if window.row not in nothing or none < nothing[window.row].score:
                nothing[window.row] = Found(none, "", None, np.exp(none - all_pairs))
        if self.unanswerable:
            return {row: nothing[row] if nothing[row].score >= one.score else one for row, one in best.items()}
        return best

    def untold(self, row: Row) -> Row:
        return replace(row, values={**row.values, self.columns["answers"]: {"text": [], "answer_start": []}})

    def predict(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        batch_size: int,
        max_new_tokens: int = 64,
    ) -> Predictions:
        """The answer as it stands in the context ("" for none), its probability within the window that has it, and the character
        at which it begins."""
        examples = self.encode([self.untold(row) for row in rows], processor, max_length)
        outputs = outputs_of(model, examples, self.collator(processor), batch_size)
        check_outputs(outputs, self.unit)
        scores = [torch.stack((one["start_logits"], one["end_logits"]), -1).numpy() for one in outputs]
        found = self._found(scores, examples, processor)
        records = {
            rows[row].line: dict(zip(self.predicts, (one.text, rounded(one.probability), one.start), strict=True))
            for row, one in found.items()
        }
        return Predictions(records, examples.lost)


def plain(text: str) -> str:
    """A text as SQuAD compares it: without case, punctuation, articles and further space."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _texts_alone(answers: Any) -> bool:
    """Whether answers are a list of texts without their places."""
    return isinstance(answers, list) and bool(answers) and all(isinstance(text, str) for text in answers)


def _texts(answers: str | list[str]) -> list[str]:
    return [answers] if isinstance(answers, str) else answers


def shared_words(one: str, other: str) -> float:
    """F1 of the words that two answers share, each as often as both have it; 1 where both are empty."""
    a, b = (Counter(plain(text).split()) for text in (one, other))
    if not a or not b:
        return float(a == b)
    return 2 * sum((a & b).values()) / (a.total() + b.total())


def best_span(scores: np.ndarray, offsets: Sequence[tuple[int, int] | None]) -> tuple[float, int, int] | None:
    """The likeliest answer in a window: its score, first character and the one after its last.

    ``scores``: (T, 2) or longer, as the first and as the last token. None where the window holds no part of a context.
    """
    inside = np.array([at is not None for at in offsets])
    if not inside.any():
        return None
    first, last = (np.where(inside, scores[: len(inside), side].astype(np.float64), -np.inf) for side in (0, 1))
    pairs = first[:, None] + last[None, :]
    distance = np.arange(len(inside))[None, :] - np.arange(len(inside))[:, None]
    pairs[(distance < 0) | (distance >= MAX_ANSWER)] = -np.inf
    start, end = np.unravel_index(pairs.argmax(), pairs.shape)
    begins, ends = offsets[int(start)], offsets[int(end)]
    assert begins is not None and ends is not None
    return float(pairs[start, end]), begins[0], ends[1]


def _place(offsets: Sequence[tuple[int, int] | None], answers: Sequence[tuple[str, int]], nowhere: int) -> list[int]:
    """The first and last token of the first answer that the window holds whole; else ``nowhere`` twice."""
    for text, start in answers:
        stop = start + len(text)
        touched = [i for i, at in enumerate(offsets) if at is not None and at[0] < stop and at[1] > start]
        if touched and offsets[touched[0]][0] <= start and offsets[touched[-1]][1] >= stop:  # type: ignore[index]
            return [touched[0], touched[-1]]
    return [nowhere, nowhere]


def _nowhere(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The place that stands for "no answer here": [CLS], or the first token."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def _cut(question: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[str, bool]:
    """The question's first tokens as text, and whether something was cut."""
    offsets = read(tokenizer, question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    if len(offsets) <= tokens:
        return question, False
    return question[: offsets[tokens - 1][1]], True
