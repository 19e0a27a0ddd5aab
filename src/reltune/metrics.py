"""The metrics that tasks are measured by: how each is called, in what unit it is shown, and which way is better."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        label: what people call it.
        short: what stands at the head of a narrow column; at most two lines of six or so letters.
        share: whether it is a share between 0 and 1, which is shown in percent.
        largest_is_best: whether more is better.
    """

    label: str
    short: str
    share: bool = False
    largest_is_best: bool = True


# Every name that a task's `metrics` may hold.
METRICS = {
    "accuracy": Metric("accuracy", "acc.", share=True),
    "f1_macro": Metric("macro F1", "macro\nF1", share=True),
    "matthews": Metric("Matthews correlation", "Matth.\ncorr."),
    "f1_micro": Metric("micro F1", "micro\nF1", share=True),
    "subset_accuracy": Metric("subset accuracy", "all\nright", share=True),
    "pearson": Metric("Pearson correlation", "Pearson"),
    "spearman": Metric("Spearman correlation", "Spear-\nman"),
    "mse": Metric("mean squared error", "MSE", largest_is_best=False),
    "f1": Metric("F1", "F1", share=True),
    "precision": Metric("precision", "prec.", share=True),
    "recall": Metric("recall", "recall", share=True),
    "token_accuracy": Metric("token accuracy", "token\nacc.", share=True),
    "exact_match": Metric("exact match", "exact\nmatch", share=True),
    "rougeL": Metric("ROUGE-L", "ROUGE\nL", share=True),
    "rouge1": Metric("ROUGE-1", "ROUGE\n1", share=True),
    "rouge2": Metric("ROUGE-2", "ROUGE\n2", share=True),
    "perplexity": Metric("perplexity", "perpl.", largest_is_best=False),
    "reward_accuracy": Metric("reward accuracy", "reward\nacc.", share=True),
    "reward_margin": Metric("reward margin", "reward\nmargin"),
    "chosen_likelier": Metric("chosen likelier", "chosen\nlikelier", share=True),
}


def metric_of(name: str) -> Metric | None:
    """The metric of a result such as ``test_before_f1_macro``: the one with the longest name that the result's ends with."""
    fitting = [metric for metric in METRICS if f"_{name}".endswith(f"_{metric}")]
    return METRICS[max(fitting, key=len)] if fitting else None


def largest_is_best(name: str) -> bool:
    """Whether the largest value of a result such as ``eval_loss`` is the best. Names that are not known count as gains,
    unless they end in "loss"."""
    metric = metric_of(name)
    return not name.endswith("loss") if metric is None else metric.largest_is_best
