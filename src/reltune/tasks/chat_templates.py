"""Chat templates for models that come without one, or with another: a user's own, or one of a few that are well known.

Light to import: what a template says is checked before any model is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from reltune.errors import InputError, first_line, nearest
from reltune.names import CHAT_TEMPLATES

MESSAGES = "{% for message in messages %}"
ANSWER = "{% if add_generation_prompt %}"
TEMPLATES = {
    "chatml": (
        f"{MESSAGES}<|im_start|>{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}<|im_end|>\n{{% endfor %}}"
        f"{ANSWER}<|im_start|>assistant\n{{% endif %}}"
    ),
    "llama3": (
        f"{{{{ bos_token }}}}{MESSAGES}<|start_header_id|>{{{{ message['role'] }}}}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        f"{ANSWER}<|start_header_id|>assistant<|end_header_id|>\n\n{{% endif %}}"
    ),
    "zephyr": (
        f"{MESSAGES}<|{{{{ message['role'] }}}}|>\n{{{{ message['content'] }}}}{{{{ eos_token }}}}\n{{% endfor %}}"
        f"{ANSWER}<|assistant|>\n{{% endif %}}"
    ),
    "alpaca": (  # Taori et al. 2023; a turn ends with the end of sequence, so that the model learns to stop
        f"{MESSAGES}{{% if message['role'] == 'system' %}}{{{{ message['content'] }}}}\n\n"
        "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
        "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        f"{ANSWER}### Response:\n{{% endif %}}"
    ),
}
assert tuple(TEMPLATES) == CHAT_TEMPLATES


def text_of(template: str | None) -> str | None:
    """The text of a template that is named: one of ``TEMPLATES`` by its name, a file, or a text as it is.

    Raises InputError for a name that is neither, and for a text that Jinja cannot read, with the line.
    """
    if template is None:
        return None
    text, place = TEMPLATES.get(template), template
    if text is None and os.path.isfile(template):
        try:
            text = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"chat_template {template} cannot be read ({first_line(error)}); name a text file."
            ) from error
    elif text is None and ("{{" in template or "{%" in template):
        text, place = template, "as it is given"
    if text is None:
        raise InputError(
            f"chat_template {template!r} is neither a file nor a template that is known; {nearest(template, TEMPLATES)}"
        )
    _check(text, place)
    return text


def _check(text: str, place: str) -> None:
    import jinja2
    from jinja2.ext import loopcontrols

    class Generation(jinja2.ext.Extension):
        """Transformers' own tag, which marks what the assistant writes."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        jinja2.Environment(extensions=[loopcontrols, Generation]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"chat_template {place} line {error.lineno} is no Jinja template: {error.message}.") from error
    if "messages" not in text:
        raise InputError(f"chat_template {place} shows no messages; it is to write the list `messages` of a chat.")


def with_chat_template(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer with this template in place of its own, if there is one."""
    if template is not None:
        tokenizer.chat_template = text_of(template)
    return tokenizer
