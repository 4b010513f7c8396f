"""Serves a set of profiles from inside vLLM, for all requests of one server. vLLM finds `register` by name."""
