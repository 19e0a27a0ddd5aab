"""Ways to train side by side: the same data, head start, steps and batches, each way at its own best learning rate."""
