"""Columns of linear maps, convolutions and embeddings, chosen by relevance."""

from reltune.methods.planned import Planned


class Columns(Planned):
    """docs/learning_rates.md: "fisher column, without pooler" on two tasks; a decoder wants half of it (tasks/causal_lm.py)."""

    name = "columns"
    rates = "selection"
    rate = 2e-3
