"""Relevance along a path: weights that move from batch to batch, and stand where they stood afterwards."""
