"""A page in the browser over a directory of runs: the same files and functions as the commands, and nothing of its own."""
