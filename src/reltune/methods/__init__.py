"""The ways to train: one file each, with its default learning rate and the record that the rate is from."""
