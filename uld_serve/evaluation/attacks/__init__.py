"""Ways to get at what was forgotten, put to a base and its profiles through the engine that serves."""
