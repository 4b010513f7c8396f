"""Borrowed KV in plain transformers modules: a target pass that lends its keys and values, and an assistant
pass that attends over them. Called by training and by tests as an oracle; serving has attention.py.
Knows no adapter, profile, rule or request: whoever calls decides which adapters are on.

Shapes: B sequences, Q positions computed now, T positions attended over, N rows of a packing, D hidden width,
K key/value heads, W head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from uld_serve.errors import ModelUnsupported
from uld_serve.model.packing import Packing

ATTENTION_NAME = "uld_borrowed"

KeysValues = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> (keys, values), each (B, K, T, W), keys already rotated."""


@dataclass(frozen=True, slots=True)
class TargetStates:
    """What one pass of the target leaves for its assistants: the stream's input and its keys and values."""

    fork_BQD: torch.Tensor
    final_BQD: torch.Tensor
    keys_values: KeysValues


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """The modules of a decoder-only Hugging Face model that a layer loop needs."""

    embed: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary: nn.Module
    head: nn.Linear


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """The parts of `model`. Raises ModelUnsupported for a model of another build than Llama's."""
    body = model.get_decoder()
    found = {name: getattr(body, name, None) for name in ("embed_tokens", "layers", "norm", "rotary_emb")}
    head = model.get_output_embeddings()
    missing = [name for name, part in found.items() if part is None]
    if missing or not isinstance(head, nn.Linear):
        what = ", ".join(missing) or "a linear LM head"
        raise ModelUnsupported(f"{type(model).__name__} has no {what}; assistants with borrowed KV need it")
    return DecoderParts(
        embed=cast(nn.Module, found["embed_tokens"]),
        layers=cast(nn.ModuleList, found["layers"]),
        norm=cast(nn.Module, found["norm"]),
        rotary=cast(nn.Module, found["rotary_emb"]),
        head=head,
    )


def use_borrowed_attention(model: PreTrainedModel) -> None:
    """Make `model`'s layers call `borrowed_attention`. Without its keywords it is transformers' SDPA."""
    AttentionInterface.register(ATTENTION_NAME, borrowed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    model.set_attn_implementation(ATTENTION_NAME)


def borrowed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    lend: KeysValues | None = None,
    borrow: KeysValues | None = None,
    packing: Packing | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' AttentionInterface. `lend` receives this layer's keys and values; `borrow`
    replaces them (the layer's own are dropped, so no gradient reaches its k and v projections). With `packing` the
    rows are one sequence to all but attention, which sees each of them whole, without a mask: padding is on the right.
    """
    layer = cast(int, module.layer_idx)
    if borrow is not None:
        keys, values = borrow[layer]
        key, value = keys.to(query.dtype), values.to(query.dtype)
    if packing is not None:
        query, key, value = packing.spread(query), packing.spread(key), packing.spread(value)
    if lend is not None:
        lend[layer] = (key, value)
    if _learns_on_cpu(query) and not dropout:
        out_BTHW = grouped_attention(query, key, value, attention_mask, scaling=scaling)
    else:
        out_BTHW, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return (out_BTHW if packing is None else packing.rows(out_BTHW)), None


def _learns_on_cpu(query: torch.Tensor) -> bool:
    """There the gradient of torch's fused attention takes four times as long in bfloat16: 63 ms a layer for 12 examples
    of 111 tokens, 16 ms by products of matrices (one thread of AMD EPYC, AVX-512 BF16)."""
    return query.requires_grad and query.device.type == "cpu"


def grouped_attention(
    query_BHQW: torch.Tensor,
    key_BKTW: torch.Tensor,
    value_BKTW: torch.Tensor,
    mask_B1QT: torch.Tensor | None,
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """(B, Q, H, W): attention by products of matrices, the H query heads of a key/value head side by side. Without a
    mask position q sees the first q + 1."""
    B, H, Q, W = query_BHQW.shape
    K, T = key_BKTW.shape[1:3]
    query = (query_BHQW * (W**-0.5 if scaling is None else scaling)).reshape(B, K, H // K * Q, W)
    scores = (query @ key_BKTW.transpose(-1, -2)).view(B, K, H // K, Q, T)
    visible = torch.ones(Q, T, dtype=torch.bool, device=scores.device).tril()
    if mask_B1QT is not None:
        visible = mask_B1QT[:, :, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).view(B, K, H // K * Q, T)
    return (weights @ value_BKTW).view(B, H, Q, W).transpose(1, 2)


def causal_mask(is_real_BT: torch.Tensor, positions_BQ: torch.Tensor) -> torch.Tensor:
    """(B, 1, Q, T) bool: query at position p sees the real tokens at positions <= p.

    Positions count real tokens from 0, on whichever side the padding is. A padding query (position -1 or one
    that repeats) sees the first real token, so that no softmax is over nothing.
    """
    position_of_BT = (is_real_BT.long().cumsum(-1) - 1).clamp_min(0)
    visible_BQT = position_of_BT[:, None, :] <= positions_BQ.clamp_min(0)[:, :, None]
    return (visible_BQT & is_real_BT.bool()[:, None, :])[:, None]


def target_pass(
    model: PreTrainedModel,
    input_ids_BQ: torch.Tensor,
    *,
    positions_BQ: torch.Tensor,
    mask_B1QT: torch.Tensor | None,
    fork: int,
    exit: int,
    cache: Cache | None = None,
    packing: Packing | None = None,
) -> TargetStates:
    """Run the whole model and keep what a stream (fork, exit) needs. `cache` holds earlier positions.

    With `packing` B is 1 and Q is N, there is no mask and no cache, and what is lent is each sequence's.
    """
    assert packing is None or _knows_packing(model), "this attention would read all rows as one sequence"
    parts = decoder_parts(model)
    hidden = parts.embed(input_ids_BQ)
    rotary = parts.rotary(hidden, position_ids=positions_BQ.clamp_min(0))
    keys_values: KeysValues = {}
    entering = hidden
    for index, layer in enumerate(parts.layers):
        if index == fork:
            entering = hidden
        lend = keys_values if fork <= index < exit else None
        hidden = _hidden_of(
            layer(
                hidden,
                attention_mask=mask_B1QT,
                position_embeddings=rotary,
                position_ids=positions_BQ,
                past_key_values=cache,
                use_cache=cache is not None,
                lend=lend,
                packing=packing,
            )
        )
    return TargetStates(fork_BQD=entering, final_BQD=parts.norm(hidden), keys_values=keys_values)


def assistant_pass(
    model: PreTrainedModel,
    hidden_BQD: torch.Tensor,
    keys_values: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    *,
    positions_BQ: torch.Tensor,
    mask_B1QT: torch.Tensor,
    layers: Iterable[int],
) -> torch.Tensor:
    """Run rows that enter at the first of `layers`; returns (B, Q, D) after the model's final norm.

    With zero adapters and every layer up to the last, this is exactly the target's own output.
    """
    parts = decoder_parts(model)
    rotary = parts.rotary(hidden_BQD, position_ids=positions_BQ.clamp_min(0))
    borrow = dict(keys_values)
    hidden = hidden_BQD
    for index in layers:
        hidden = _hidden_of(
            parts.layers[index](
                hidden,
                attention_mask=mask_B1QT,
                position_embeddings=rotary,
                position_ids=positions_BQ,
                borrow=borrow,
            )
        )
    return cast(torch.Tensor, parts.norm(hidden))


def own_pass(
    model: PreTrainedModel, hidden_1ND: torch.Tensor, *, packing: Packing, layers: Iterable[int]
) -> torch.Tensor:
    """Run rows at every position through `layers` with keys and values of their own; (1, N, D) after the final norm.

    From the embedding through all layers this is the model itself, with whatever adapter is on.
    """
    assert _knows_packing(model), "this attention would read all rows as one sequence"
    parts = decoder_parts(model)
    rotary = parts.rotary(hidden_1ND, position_ids=packing.positions_1N)
    hidden = hidden_1ND
    for index in layers:
        hidden = _hidden_of(
            parts.layers[index](
                hidden,
                attention_mask=None,
                position_embeddings=rotary,
                position_ids=packing.positions_1N,
                packing=packing,
            )
        )
    return cast(torch.Tensor, parts.norm(hidden))


def _knows_packing(model: PreTrainedModel) -> bool:
    return bool(model.config._attn_implementation == ATTENTION_NAME)


def _hidden_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
