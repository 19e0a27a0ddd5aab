"""Learning rates in steps of half a decade around a method's default, by their number of steps from there."""

from __future__ import annotations

from collections.abc import Mapping

HALF_DECADE = 10**0.5
WIDENINGS = 2  # rates that are tried beside the first ones, where the best lies on an edge


def rate_at(default: float, steps: int) -> float:
    """The rate so many half-decades from the default, in three digits."""
    return float(f"{default * HALF_DECADE**steps:.3g}")


def first_steps(trials: int) -> list[int]:
    """Where the first trials lie, from the default outwards: 0, -1, 1, -2, …"""
    return [(-1) ** i * ((i + 1) // 2) for i in range(trials)]


def best(tried: Mapping[int, float | None], largest: bool) -> int | None:
    """The best of the rates tried by their metric, None where all failed; of equal ones the one tried first, which is nearer to
    the default."""
    known = {steps: value for steps, value in tried.items() if value is not None}
    if not known:
        return None
    return max(known, key=lambda steps: known[steps] if largest else -known[steps])


def on_edge(tried: Mapping[int, float | None], largest: bool) -> bool:
    """Whether the best rate is the smallest or the largest of several tried."""
    return len(tried) > 1 and best(tried, largest) in (min(tried), max(tried))


def wider(tried: Mapping[int, float | None], trials: int, largest: bool) -> int | None:
    """The rate to try next: beyond the edge on which the best lies, after the first ``trials`` and at most ``WIDENINGS`` times;
    else None."""
    if len(tried) >= trials + WIDENINGS or not on_edge(tried, largest):
        return None
    return max(tried) + 1 if best(tried, largest) == max(tried) else min(tried) - 1
