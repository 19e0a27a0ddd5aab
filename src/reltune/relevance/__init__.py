"""Relevance: one number per unit, how much the unit matters for the task."""
