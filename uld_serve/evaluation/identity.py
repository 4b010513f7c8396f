"""All of a loaded base that decides what an evaluation measures. Called by lineup. Knows no benchmark."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from uld_serve import __version__
from uld_serve.llm import LLM

# Where the model came from and who saved it say nothing of what it does.
NO_MATTER = ("_name_or_path", "transformers_version")


def identity(llm: LLM) -> dict[str, object]:
    """Weights as stored and how they are rounded, what config.json says of them, the dtype and device here, how texts
    become tokens and end, and the software. For JSON; equal where the same command would measure the same."""
    base = llm.base
    config = base.model.config.to_dict()
    return {
        "fingerprint": base.fingerprint,
        "config": {name: repr(value) for name, value in sorted(config.items()) if name not in NO_MATTER},
        "weights": base.weights,
        "dtype": str(base.dtype),
        "device": device_name(base.device),
        "tokenizer": base.tokenizer_hash,
        "chat_template": repr(base.tokenizer.chat_template),
        "eos_ids": list(base.eos_ids),
        "engine": engine(),
    }


def engine() -> dict[str, str]:
    """Versions of what computes."""
    return {"uld-serve": __version__, "torch": torch.__version__, "transformers": version("transformers")}


def device_name(device: torch.device) -> str:
    """The kind, not the number: two of a kind measure alike."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"
