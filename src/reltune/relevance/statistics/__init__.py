"""Relevance from statistics of gradients and inputs, in one pass over the data."""
