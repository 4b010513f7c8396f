"""Puts fused layers in the place of Hugging Face layers that they reproduce. Called by the decoder at start. Knows no
model by name: a layer is run beside what may replace it.

Shapes: N rows of one sequence, D model width, W head width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from uld_serve.errors import ModelUnsupported
from uld_serve.model.attention import ATTENTION_NAME, paged_attention
from uld_serve.model.fused_layer import PROJECTIONS, FusedLayer, Rotation, has_parts, linear
from uld_serve.model.geometry import Geometry, Heads, SequenceGroup, Write
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.layer_steps import LayerSteps
from uld_serve.model.lora_rows import LoraRows

PROBE_NAME = "uld_probe"
TOLERANCE = 1e-4
"""Share of the largest value that a layer adds, in fp32."""


@dataclass(frozen=True, slots=True)
class Place:
    """Positions of N rows of one sequence, and their rotary tables (cos, sin), (1, N, W) each."""

    positions_N: torch.Tensor
    tables: tuple[torch.Tensor, torch.Tensor]


def fuse(
    layers: nn.ModuleList,
    model: PreTrainedModel,
    places: Sequence[Sequence[Place]],
    *,
    rows: LoraRows,
    is_packed: bool,
    steps: LayerSteps,
) -> None:
    """Replace every layer whose outcome on random rows a fused one reproduces, at all of the layer's `places`.

    A model's name is not asked: what scales a residual, norms by 1 + w or gates another way is found out by its
    outcome, and so is what does something else far from the first position.
    """
    AttentionInterface.register(PROBE_NAME, _probe)
    rotation = Rotation()
    model.set_attn_implementation(PROBE_NAME)
    try:
        for index, layer in enumerate(layers):
            found = _build(layer, index, places[index], rows, steps) if has_parts(layer) else None
            if found is not None:
                heads, rotates = found
                layers[index] = FusedLayer(
                    layer,
                    index,
                    heads,
                    rows=rows,
                    rotation=rotation,
                    rotates=rotates,
                    is_packed=is_packed,
                    steps=steps,
                )
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def _build(
    layer: nn.Module, index: int, places: Sequence[Place], rows: LoraRows, steps: LayerSteps
) -> tuple[Heads, bool] | None:
    """How the layer attends and whether it rotates, if a fused one so made gives what it gives."""
    trials = [_Trial.of(layer, index, place) for place in places]
    layer = copy.deepcopy(layer).float()
    originals = [trial.run_original(layer) for trial in trials]
    heads = originals[0][0]
    for rotates in (True, False):  # some models have layers without positions
        candidate = FusedLayer(
            layer,
            index,
            heads,
            rows=rows,
            rotation=Rotation(),
            rotates=rotates,
            is_packed=False,
            steps=steps,
        )
        pairs = zip(trials, originals, strict=True)
        if all(own == heads and trial.is_met_by(candidate, expected) for trial, (own, expected) in pairs):
            return heads, rotates
    return None


@dataclass(slots=True)
class _Seen:
    """What a layer handed to its attention; geometry carries it to and from `_probe`."""

    geometry: Geometry
    heads: Heads | None = None


@dataclass(frozen=True, slots=True)
class _Trial:
    """Random rows of one sequence, to be run through a layer and what may replace it, both in fp32: in bf16 rounding
    would hide a small difference and show one where there is none."""

    index: int
    hidden_1ND: torch.Tensor
    positions_N: torch.Tensor
    tables: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, layer: nn.Module, index: int, place: Place) -> _Trial:
        weight = linear(layer, PROJECTIONS[0][0]).weight
        generator = torch.Generator().manual_seed(index)
        cos, sin = place.tables
        hidden_1ND = torch.randn(1, cos.shape[1], weight.shape[1], generator=generator)
        return cls(index, hidden_1ND.to(weight.device), place.positions_N, (cos.float(), sin.float()))

    def run_original(self, layer: nn.Module) -> tuple[Heads, torch.Tensor]:
        """Raises ModelUnsupported for attention that is not served."""
        seen = _Seen(self._geometry(layer))
        out = layer(
            self.hidden_1ND,
            attention_mask=None,
            position_ids=self.positions_N[None],
            position_embeddings=self.tables,
            geometry=seen,
        )
        if seen.heads is None:
            raise ModelUnsupported(f"{type(layer).__name__} does not hand keyword arguments to its attention")
        return seen.heads, out[0] if isinstance(out, tuple) else out

    def is_met_by(self, candidate: FusedLayer, expected_1ND: torch.Tensor) -> bool:
        """What a layer adds to its input is compared, not its sum."""
        geometry = self._geometry_of(candidate.heads.num_kv_heads, candidate.heads.head_dim)
        found_1ND = candidate(self.hidden_1ND, position_embeddings=self.tables, geometry=geometry)
        added_1ND = expected_1ND - self.hidden_1ND
        return float((found_1ND - expected_1ND).abs().max()) <= TOLERANCE * float(added_1ND.abs().max())

    def _geometry(self, layer: nn.Module) -> Geometry:
        head_dim = self.tables[0].shape[-1]
        return self._geometry_of(linear(layer, "self_attn.k_proj").out_features // head_dim, head_dim)

    def _geometry_of(self, num_kv_heads: int, head_dim: int) -> Geometry:
        N, device = self.hidden_1ND.shape[1], self.hidden_1ND.device
        cache = KVCache.allocate(
            1,
            1,
            block_size=N,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=self.hidden_1ND.dtype,
            device=device,
        )
        rows_N = torch.arange(N, device=device)
        group = SequenceGroup(
            cache=cache,
            first_layer=self.index,
            rows_SQ=rows_N[None],
            positions_SQ=rows_N[None],
            blocks_SB=torch.zeros(1, 1, dtype=torch.long, device=device),
            moves=None,
            first=0,
            same_position=False,
        )
        return Geometry((Write(cache, self.index, 0, N, rows_N),), (group,))


def _probe(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    geometry: _Seen | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention that writes down what it is asked."""
    if geometry is None:
        raise ModelUnsupported(f"{type(module).__name__} does not hand keyword arguments to its attention")
    geometry.heads = Heads(query.shape[1], key.shape[1], query.shape[3], scaling, sliding_window)
    return paged_attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        sliding_window=sliding_window,
        geometry=geometry.geometry,
        **kwargs,  # type: ignore[arg-type]
    )
