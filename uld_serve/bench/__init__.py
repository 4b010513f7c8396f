"""Measures the engine and the server: `uld-serve bench`. Knows nothing of training or evaluation."""
