"""The evaluation: what a language model writes, and what lm-evaluation-harness measures."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from reltune.config.fields import Subject, Texts, about


@dataclasses.dataclass(kw_only=True)
class EvaluationConfig(Subject):
    """The evaluation: what a language model writes, and what lm-evaluation-harness measures."""

    max_new_tokens: int = field(
        default=64,
        metadata=about("In evaluation, a language model writes at most this many tokens per example.", "N", least=1),
    )
    generation_examples: int = field(
        default=64,
        metadata=about(
            "For causal_lm: the model writes answers for at most this many examples of each held-out data set.",
            "N",
            least=0,
        ),
    )
    report_examples: int = field(
        default=8,
        metadata=about(
            "For causal_lm and seq2seq: the report shows at most this many texts of the base and the tuned model, side by "
            "side.",
            "N",
            least=0,
        ),
    )
    sample_prompts: Texts = field(
        default_factory=list,
        metadata=about(
            "For causal_lm, preference and seq2seq: a prompt that the model answers before training and at each evaluation while it "
            "trains. Give it again for another, or name a file: .txt with one per line, or .jsonl with chats (messages) or texts "
            "(prompt). See docs/reports.md.",
            "TEXT or FILE",
        ),
    )
    lm_eval_tasks: list[str] = field(
        default_factory=list,
        metadata=about(
            "Also measure the base and the tuned language model on these tasks of lm-evaluation-harness: names, YAML files, "
            "or directories of YAML files.",
            "NAMES",
        ),
    )
    lm_eval_num_fewshot: int | None = field(
        default=None,
        metadata=about(
            "For lm_eval_tasks: how many solved examples a prompt shows, instead of the task's own number.",
            "N",
            least=0,
        ),
    )
    lm_eval_limit: int | None = field(
        default=None, metadata=about("For lm_eval_tasks: use at most this many examples of each task.", "N", least=1)
    )
    lm_eval_batch_size: int = field(
        default=8, metadata=about("For lm_eval_tasks: how many requests one forward pass answers.", "N", least=1)
    )
    lm_eval_apply_chat_template: bool = field(
        default=False, metadata=about("For lm_eval_tasks: give prompts to the model as turns of a chat.")
    )
