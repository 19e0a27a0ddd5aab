"""Rows of linear maps, convolutions and embeddings, chosen by relevance."""

from reltune.methods.columns import Columns


class Rows(Columns):
    """docs/learning_rates.md: "fisher row" was best at 1e-3 on one task and at 8e-3 on the other; it takes that of columns."""

    name = "rows"
