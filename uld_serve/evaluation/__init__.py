"""Measurements of what is served; talks to the engine only through LLM."""
