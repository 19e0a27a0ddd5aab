"""What a model is made of: layer types, their units, their per-example statistics."""
