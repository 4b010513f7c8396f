"""A Llama-built decoder layer in few operations, with adapters on assistant rows. Put in by the decoder at start in
place of the Hugging Face layers that it reproduces; a layer that it does not reproduce stays as it is.

Projections of one input are one product, residuals are added in the product, keys and values are rotated in place and
written in one go. On SmolLM2-135M a layer takes some 20 operations instead of 70: on a CPU at few rows, where each is a
few us, that is half of its time.

Shapes: N rows, D model width, H query heads, K key/value heads, W head width, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from uld_serve.errors import ModelUnsupported
from uld_serve.model.attention import ATTENTION_NAME, Heads, attend, paged_attention
from uld_serve.model.geometry import Geometry, SequenceGroup, Write
from uld_serve.model.joint_linear import JointLinear
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.lora import LoraDelta, LoraRows

PROBE_NAME = "uld_probe"
# Share of the largest value. A fused layer rounds less often: 0.7 % in bf16 on SmolLM2-135M.
TOLERANCE = {torch.float32: 1e-4}
TOLERANCE_HALF = 0.03
PROJECTIONS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(slots=True)
class Rotation:
    """A step's rotary tables in the form that layers need, made once for all of them: (N, 1, W) each, the sine of
    the first half negated."""

    _cos: torch.Tensor | None = None
    _tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def tables(self, cos_1NW: torch.Tensor, sin_1NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._cos is not cos_1NW or self._tables is None:
            half = sin_1NW.shape[-1] // 2
            signed_NW = torch.cat([-sin_1NW[0, :, :half], sin_1NW[0, :, half:]], dim=-1)
            self._cos, self._tables = cos_1NW, (cos_1NW[0, :, None], signed_NW[:, None])
        return self._tables


class RootMeanSquare:
    """x / sqrt(mean(x^2) + eps) * w in fp32, rounded once (arXiv 1910.07467). `weight` may have leading dimensions."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        width = weight.shape[-1]
        # sqrt(mean + eps) = hypot(|x|, sqrt(width * eps)) / sqrt(width): two operations less.
        self._weight = weight.detach().float() * width**0.5
        self._floor = torch.tensor((width * eps) ** 0.5, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).hypot_(self._floor)
        return torch.mul(x / norm, self._weight, out=torch.empty_like(x))


class FusedLayer(nn.Module):
    """Called like the layer that it replaces. `sites` says where an adapter's modules belong: product and part."""

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        heads: Heads,
        *,
        rows: LoraRows,
        rotation: Rotation,
        is_packed: bool,
    ) -> None:
        super().__init__()
        self.index, self.heads, self._rotation, self.rotates = index, heads, rotation, True
        joints = [
            JointLinear([_linear(layer, name) for name in names], rows, is_packed=is_packed)
            for names in PROJECTIONS
        ]
        self.qkv, self.out, self.gate_up, self.down = joints
        self.sites: dict[str, tuple[LoraDelta, int]] = {
            name: (joint.delta, part)
            for names, joint in zip(PROJECTIONS, joints, strict=True)
            for part, name in enumerate(names)
        }
        self.attention_norm, self.mlp_norm = (_norm(layer.get_submodule(name)) for name in NORMS)
        self.head_norm = _head_norm(layer, heads)

    def forward(
        self,
        hidden_1ND: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        geometry: Geometry,
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002 - geometry says what a row may see
        position_ids: torch.Tensor | None = None,  # noqa: ARG002 - already in position_embeddings
    ) -> torch.Tensor:
        hidden_ND = hidden_1ND[0]
        qkv_NX = self.qkv(self.attention_norm(hidden_ND))
        self._prepare(qkv_NX, position_embeddings)
        hidden_ND = self.out(attend(self.index, qkv_NX, geometry, self.heads), hidden_ND)
        gate_NI, up_NI = self.gate_up(self.mlp_norm(hidden_ND)).tensor_split(2, dim=-1)
        return self.down(F.silu(gate_NI).mul_(up_NI), hidden_ND)[None]

    def _prepare(self, qkv_NX: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Norm and rotate queries and keys in place (arXiv 2104.09864, Eq. 34, in Hugging Face's half-split order)."""
        heads = self.heads
        joint_NHW = qkv_NX.view(-1, heads.num_joint, heads.head_dim)[
            :, : heads.num_heads + heads.num_kv_heads
        ]
        if self.head_norm is not None:
            joint_NHW.copy_(self.head_norm(joint_NHW))
        if not self.rotates:
            return
        cos_N1W, sin_N1W = self._rotation.tables(*tables)
        swapped_NHW = joint_NHW.roll(heads.head_dim // 2, dims=-1)
        joint_NHW.mul_(cos_N1W).addcmul_(swapped_NHW, sin_N1W)


def fuse(
    layers: nn.ModuleList,
    model: PreTrainedModel,
    tables: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    rows: LoraRows,
    is_packed: bool,
) -> int:
    """Replace every layer whose outcome on random rows a fused one reproduces; how many were.

    `tables`: each layer's (cos, sin), (1, N, W), of N positions from 0 on. A model's name is not asked: what scales a
    residual, norms by 1 + w or gates another way is found out by its outcome.
    """
    AttentionInterface.register(PROBE_NAME, _probe)
    rotation = Rotation()
    fused = 0
    model.set_attn_implementation(PROBE_NAME)
    try:
        for index, layer in enumerate(layers):
            if not _has_parts(layer):
                continue
            trial = _Trial.of(layer, index, tables[index])
            heads, expected_ND = trial.run_original(layer)
            candidate = FusedLayer(layer, index, heads, rows=rows, rotation=rotation, is_packed=is_packed)
            for candidate.rotates in (True, False):  # some models have layers without positions
                if trial.is_met_by(candidate, expected_ND):
                    layers[index] = candidate
                    fused += 1
                    break
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    return fused


@dataclass(slots=True)
class _Seen:
    """What a layer handed to its attention; geometry carries it to and from `_probe`."""

    geometry: Geometry
    heads: Heads | None = None


@dataclass(frozen=True, slots=True)
class _Trial:
    """Random rows of one sequence, to be run through a layer and what may replace it."""

    index: int
    hidden_1ND: torch.Tensor
    tables: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, layer: nn.Module, index: int, tables: tuple[torch.Tensor, torch.Tensor]) -> _Trial:
        weight = _linear(layer, PROJECTIONS[0][0]).weight
        generator = torch.Generator().manual_seed(index)
        hidden_1ND = torch.randn(1, tables[0].shape[1], weight.shape[1], generator=generator)
        return cls(index, hidden_1ND.to(weight.device, weight.dtype), tables)

    def run_original(self, layer: nn.Module) -> tuple[Heads, torch.Tensor]:
        """Raises ModelUnsupported for attention that is not served."""
        seen = _Seen(self._geometry(layer))
        out = layer(
            self.hidden_1ND,
            attention_mask=None,
            position_ids=torch.arange(self.hidden_1ND.shape[1], device=self.hidden_1ND.device)[None],
            position_embeddings=self.tables,
            geometry=seen,
        )
        if seen.heads is None:
            raise ModelUnsupported(f"{type(layer).__name__} does not hand keyword arguments to its attention")
        return seen.heads, out[0] if isinstance(out, tuple) else out

    def is_met_by(self, candidate: FusedLayer, expected_1ND: torch.Tensor) -> bool:
        geometry = self._geometry_of(candidate.heads.num_kv_heads, candidate.heads.head_dim)
        found_1ND = candidate(self.hidden_1ND, position_embeddings=self.tables, geometry=geometry)
        gap = float((found_1ND.float() - expected_1ND.float()).abs().max() / expected_1ND.float().abs().max())
        return gap <= TOLERANCE.get(found_1ND.dtype, TOLERANCE_HALF)

    def _geometry(self, layer: nn.Module) -> Geometry:
        head_dim = self.tables[0].shape[-1]
        return self._geometry_of(_linear(layer, "self_attn.k_proj").out_features // head_dim, head_dim)

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


def _has_parts(layer: nn.Module) -> bool:
    """Whether all projections are plain linear layers and both norms have a weight and an epsilon."""
    try:
        linears = [layer.get_submodule(name) for names in PROJECTIONS for name in names]
        norms = [layer.get_submodule(name) for name in NORMS]
    except AttributeError:
        return False
    return all(type(linear) is nn.Linear for linear in linears) and all(
        _eps(norm) is not None and isinstance(getattr(norm, "weight", None), torch.Tensor) for norm in norms
    )


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, layer.get_submodule(name))


def _eps(norm: nn.Module) -> float | None:
    """Hugging Face's norms name it in two ways."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _norm(module: nn.Module) -> RootMeanSquare:
    return RootMeanSquare(cast(torch.Tensor, module.weight), cast(float, _eps(module)))


def _head_norm(layer: nn.Module, heads: Heads) -> RootMeanSquare | None:
    """Norm of every query and key head, where the layer has one (arXiv 2302.05442)."""
    attention = layer.get_submodule("self_attn")
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    if q_norm is None or k_norm is None or _eps(q_norm) is None or q_norm.weight.shape != (heads.head_dim,):
        return None  # if there is one of another kind, the outcome differs and the layer stays as it is
    weight_HW = torch.cat(
        [
            q_norm.weight.detach().expand(heads.num_heads, -1),
            k_norm.weight.detach().expand(heads.num_kv_heads, -1),
        ]
    )
    return RootMeanSquare(weight_HW, cast(float, _eps(q_norm)))
