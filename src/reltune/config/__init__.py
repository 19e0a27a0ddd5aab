"""A run's configuration: its fields, and how they are read from YAML and flags."""
