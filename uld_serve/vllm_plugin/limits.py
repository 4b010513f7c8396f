"""What a vLLM server may not have switched on when it must forget: features that would draw from other logits than the
fused ones, change weights under the profile, or need what this plugin does not do. Called by the model before it is
built. Reads vLLM's configuration; a field that a later vLLM has renamed ends the start as well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from uld_serve.errors import ModelUnsupported
from uld_serve.vllm_plugin.register import GUARD

if TYPE_CHECKING:  # so that the tests need no vLLM
    from vllm.config import VllmConfig

_LOAD_FORMATS = ("auto", "safetensors")


def check_limits(config: VllmConfig) -> Path:
    """The checkpoint's directory. Raises ModelUnsupported naming what must be left out, all of it at once."""
    model, parallel = config.model_config, config.parallel_config
    found = {
        # Not yet compared with our engine: a compiler that moved a read of the cache before its write would show there.
        "compilation (start with --enforce-eager)": bool(config.compilation_config.mode),
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "LoRA of vLLM's own (--enable-lora)": config.lora_config is not None,
        "speculative decoding": config.speculative_config is not None,
        "keys and values from elsewhere (--kv-transfer-config)": config.kv_transfer_config is not None,
        "new weights at run time (--weight-transfer-config)": config.weight_transfer_config is not None,
        "quantization": config.quant_config is not None,
        "sleep mode": bool(model.enable_sleep_mode),
        "--kv-sharing-fast-prefill": bool(config.cache_config.kv_sharing_fast_prefill),
        f"--load-format {config.load_config.load_format}": config.load_config.load_format
        not in _LOAD_FORMATS,
        f"--runner {model.runner_type}": model.runner_type != "generate",
        f"another tokenizer ({model.tokenizer})": str(model.tokenizer) != str(model.model),
        "a model by id: name its directory": not Path(model.model).is_dir(),
        f"a server without --logits-processors {GUARD}": GUARD not in (model.logits_processors or []),
    }
    wrong = [what for what, is_so in found.items() if is_so]
    if wrong:
        raise ModelUnsupported(
            f"profiles are not served by vLLM with {'; '.join(wrong)}. `uld-serve vllm` gives the arguments that work"
        )
    return Path(model.model)
