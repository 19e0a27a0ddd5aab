"""Relevance from a checkpoint's weights alone, read tensor by tensor."""
