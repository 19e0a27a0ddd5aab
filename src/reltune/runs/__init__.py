"""The stages of a run, what they work on, and the directory that they write."""
