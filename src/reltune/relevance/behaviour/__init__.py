"""Relevance from trying: parts of the model are changed and the task is measured."""
