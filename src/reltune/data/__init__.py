"""Rows of data: where they come from, what their columns mean, which of them are bad."""
