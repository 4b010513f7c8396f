"""Makes a vLLM decoder layer run several blocks of rows, the target's and the streams', through its own weights: low-
rank deltas after its linear layers, and attention that knows whose rows are whose. Called by the model. Knows no
profile's name, and no rule.

Shapes: G blocks, T rows of each, N = G * T rows, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from vllm.config import CacheConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.llama import LlamaDecoderLayer

from uld_serve.engine.streams import StreamPlan
from uld_serve.errors import ModelUnsupported
from uld_serve.profiles.adapter import LoraAdapter
from uld_serve.vllm_plugin.deltas import JOINED, BlockDeltas


class BlockAttention(nn.Module):
    """The target's attention over its block, and one of each stream's over its own.

    A stream that borrows shares the target's cache of the same layer: vLLM then drops the keys and values that the
    layer has computed for its rows. One that keeps its own is a layer with a cache to vLLM.
    """

    def __init__(self, target: Attention, streams: Sequence[Attention]) -> None:
        super().__init__()
        self.target = target
        self.streams = nn.ModuleList(streams)

    def forward(self, q_NO: torch.Tensor, k_NO: torch.Tensor, v_NO: torch.Tensor) -> torch.Tensor:
        num_blocks = 1 + len(self.streams)
        q, k, v = (one.view(num_blocks, -1, one.shape[1]).unbind(0) for one in (q_NO, k_NO, v_NO))
        # The target first: it writes what the others read.
        outs = [self.target(q[0], k[0], v[0])]
        for block, attention in enumerate(self.streams, start=1):
            outs.append(attention(q[block], k[block], v[block]))
        return torch.cat(outs)


def add_streams(
    layer: LlamaDecoderLayer, streams: Sequence[StreamPlan], names: Sequence[str], cache_config: CacheConfig
) -> None:
    """Attention for the streams that run in this layer, under names that vLLM knows no other layer by."""
    attention = layer.self_attn.attn
    if type(attention) is not Attention or attention.sliding_window is not None:
        raise ModelUnsupported("vLLM serves profiles on layers with full attention only")
    added = [
        Attention(
            attention.num_heads,
            attention.head_size,
            attention.impl.scale,
            num_kv_heads=attention.num_kv_heads,
            cache_config=cache_config,
            prefix=name,
            kv_sharing_target_layer_name=attention.layer_name if stream.borrows else None,
        )
        for stream, name in zip(streams, names, strict=True)
    ]
    layer.self_attn.attn = BlockAttention(attention, added)


def add_deltas(
    layer: LlamaDecoderLayer,
    number: int,
    adapters: Mapping[int, LoraAdapter],
    *,
    num_blocks: int,
    dtype: torch.dtype,
) -> int:
    """Deltas of the adapters, by block, after this layer's linear layers; of how many layers' weights."""
    attention, count = layer.self_attn, 0
    for name, modules in JOINED.items():
        linear = layer.get_submodule(name)
        sizes = [linear.output_size_per_partition]
        if name == "self_attn.qkv_proj":
            sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        elif len(modules) > 1:
            sizes = list(linear.output_partition_sizes)
        deltas = BlockDeltas(
            adapters, number, modules, sizes, num_blocks=num_blocks, dtype=dtype, device=linear.weight.device
        )
        if deltas.parts:
            linear.uld_deltas = deltas
            linear.register_forward_hook(_after)
            count += len(deltas.parts)
    return count


def _after(
    linear: LinearBase, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, nn.Parameter | None]
) -> tuple[torch.Tensor, nn.Parameter | None]:
    """vLLM's linear layers give their output and a bias that is added later."""
    y_NO, bias = output
    deltas: BlockDeltas = linear.uld_deltas
    return deltas(y_NO, inputs[0]), bias
