"""The criteria: one file each, with its formula, paper, scaling and cost."""
