"""Slow, obvious computations that the library must agree with. Nothing here imports reltune."""
