"""Fixed directions of the inputs of linear maps, found by relevance: LoRA-shaped adapters whose A stays."""

from reltune.config.recipes import DIRECTIONS_RATE
from reltune.methods.planned import Planned


class Directions(Planned):
    """config/recipes.py says from which records the rate is."""

    name = "directions"
    rates = "directions"
    rate = DIRECTIONS_RATE
