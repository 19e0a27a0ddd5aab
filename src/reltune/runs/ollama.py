"""What Ollama needs beside a GGUF file: a Modelfile with the chat template in the language of Go.

Ollama's template writes one turn: the system message, the question, the answer. A chat is turn after turn. So what stands
around each part is read off chats that the model's own template (a Jinja program) has written, and is kept only where the
turns put together again are what that program writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from reltune.files import write_text
from reltune.tasks.causal_lm import INSTRUCTION
from reltune.tasks.chats import Chat, as_text, special_tokens
from reltune.tasks.generation import ends_of
from reltune.tasks.task import RowProblem

SYSTEM, QUESTIONS, ANSWER = "S0", ("Q1", "Q2", "Q3"), "A1"  # words that stand in no template
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclasses.dataclass
class Turn:
    """What stands around the parts of a turn.

    Attributes:
        system, question: what stands before and after each.
        end: what stands behind an answer.
        default: the system message of a chat that has none.
    """

    system: tuple[str, str] = ("", "")
    question: tuple[str, str] = ("", "")
    end: str = ""
    default: str = ""

    def written(self, system: str, questions: Sequence[str], answers: Sequence[str] = ()) -> str:
        """A chat as Ollama writes it, up to where the next answer begins."""
        text = "".join((self.system[0], system, self.system[1])) if (system := system or self.default) else ""
        for i, question in enumerate(questions):
            text += "".join((self.question[0], question, self.question[1]))
            text += "".join((answers[i], self.end)) if i < len(answers) else ""
        return text

    def template(self) -> str | None:
        """The same as a template of Ollama's; None where it cannot be written as one."""
        parts = (*self.system, *self.question, self.end)
        if any(mark in part for part in parts for mark in ("{{", "}}", '"""')):
            return None
        (before, after), (opens, closes) = self.system, self.question
        system = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ end }}}}" if any(self.system) else ""
        question = f"{{{{ if .Prompt }}}}{opens}{{{{ .Prompt }}}}{closes}{{{{ end }}}}"
        return f"{system}{question}{{{{ .Response }}}}{self.end}"


INSTRUCTIONS = Turn(("", "\n\n"), tuple(INSTRUCTION.split("{instruction}")), "\n\n")  # type: ignore[arg-type]


def turn_of(tokenizer: PreTrainedTokenizerBase) -> Turn | None:
    """What the tokenizer's chat template puts around the parts of a turn; None where that depends on more."""
    try:
        alone, named, long = (_written(tokenizer, *chat) for chat in (("", 1), (SYSTEM, 1), ("", 2)))
        opening, closes = alone.split(QUESTIONS[0])
        before, between, _ = _split(named, SYSTEM, QUESTIONS[0])
        _, _, then, _ = _split(long, QUESTIONS[0], ANSWER, QUESTIONS[1])
        if then.endswith(opening):  # a chat without a system message begins with a question
            opens, default = opening, ""
        else:
            mark = next((token for token in _specials(tokenizer) if before.startswith(token)), "")
            opens = opening[opening.rindex(mark) :] if mark and mark in opening else ""
            default = opening.removeprefix(before).removesuffix(between)
        turn = Turn((before, between.removesuffix(opens)), (opens, closes), then.removesuffix(opens), default)
        chats = [(system, count) for system in ("", SYSTEM) for count in (1, 2, 3)]
        same = all(
            turn.written(system, QUESTIONS[:count], [ANSWER] * (count - 1)) == _written(tokenizer, system, count)
            for system, count in chats
        )
    except (RowProblem, ValueError):
        return None
    return turn if same else None


def _written(tokenizer: PreTrainedTokenizerBase, system: str, questions: int) -> str:
    """A chat as the tokenizer's template writes it, without the token that the tokenizer puts before every text."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, question in enumerate(QUESTIONS[:questions]):
        messages += [{"role": "assistant", "content": ANSWER}] if i else []
        messages.append({"role": "user", "content": question})
    text = as_text(Chat(messages), tokenizer, prompt=True)
    adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(tokenizer.bos_token)) if adds else text


def _split(text: str, *marks: str) -> list[str]:
    """What stands before, between and behind marks, each of which stands there once. Raises ValueError where it does not."""
    parts = []
    for mark in marks:
        before, text = text.split(mark)
        parts.append(before)
    return [*parts, text]


def _specials(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return sorted(map(str, tokenizer.convert_ids_to_tokens(sorted(special_tokens(tokenizer)))), key=len, reverse=True)


def write_modelfile(folder: Path, file: str, model: Any, tokenizer: PreTrainedTokenizerBase, form: str) -> str:
    """Write the Modelfile for a GGUF file beside it; a sentence on what could not be translated, or "".

    ``form`` is how the model was asked in training: "chat", "instruction" or "text".
    """
    turn = turn_of(tokenizer) if form == "chat" else INSTRUCTIONS if form == "instruction" else Turn()
    template = turn.template() if turn is not None else None
    lines = [f"FROM ./{file}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    if turn is not None and template is not None and turn.default:
        lines.append(f'SYSTEM """{turn.default}"""')
    own = model.generation_config
    for name, parameter in SAMPLING.items():
        value = getattr(own, name, None)
        if value is not None and (own.do_sample or name == "repetition_penalty"):
            lines.append(f"PARAMETER {parameter} {value}")
    stops = dict.fromkeys(map(str, tokenizer.convert_ids_to_tokens(ends_of(model, tokenizer))))
    if turn is not None:
        stops |= dict.fromkeys(token for token in _specials(tokenizer) if turn.end.startswith(token))
        if form == "instruction":
            stops[turn.question[0].strip()] = None
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    write_text(folder / "Modelfile", "\n".join(lines) + "\n")
    if template is not None:
        return ""
    return (
        "The model's chat template could not be translated for Ollama, because what it writes is not the same turn after turn; the "
        "Modelfile has none, and Ollama goes by the file's own if it knows it. Look at what it makes of a chat before you rely on it."
    )
