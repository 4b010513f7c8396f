"""uld-serve: forgetting at decode time. `from uld_serve.llm import LLM` is the offline API."""

__version__ = "0.1.0"
