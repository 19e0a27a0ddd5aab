"""Tasks: what rows of data mean to a model (columns, loss per example, collator, metric), one file each."""
