"""What vLLM calls in each of its processes: the entry point `vllm.general_plugins`. Knows names only, so that nothing
of ours is imported before a server asks for it."""

from __future__ import annotations

# What a checkpoint calls itself -> what it is called when it must forget. The second name is nobody else's: a process
# in which this plugin is missing fails at it, and does not serve the base.
ARCHITECTURES = {"LlamaForCausalLM": "UldLlamaForCausalLM"}
GUARD = "uld_serve.vllm_plugin.guard:ForgettingGuard"


def register() -> None:
    from vllm import ModelRegistry

    for name in ARCHITECTURES.values():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"uld_serve.vllm_plugin.llama:{name}")
