"""What a training step takes, counted before it is run: memory and time, from shapes alone."""
