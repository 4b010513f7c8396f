"""A Llama-built decoder layer in few operations, with adapters on assistant rows. Put in by the decoder at start in
place of the Hugging Face layers that it reproduces; a layer that it does not reproduce stays as it is.

Projections of one input are one product, residuals are added in the product, keys and values are rotated in place and
written in one go. A decode step of SmolLM2-135M at batch 1 calls 4,235 of torch's operations, inner ones and views
included, where joint projections within Hugging Face's layers call 7,616: on a CPU at few rows each is a few us.

Shapes: N rows, D model width, H query heads, K key/value heads, W head width, I intermediate width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from uld_serve.model.attention import attend
from uld_serve.model.geometry import Geometry, Heads
from uld_serve.model.joint_linear import JointLinear
from uld_serve.model.layer_steps import LayerSteps, RootMeanSquare
from uld_serve.model.lora import LoraDelta
from uld_serve.model.lora_rows import LoraRows

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
        rotates: bool,
        is_packed: bool,
        steps: LayerSteps,
    ) -> None:
        super().__init__()
        self.index, self.heads, self._rotation, self.rotates = index, heads, rotation, rotates
        joints = [
            JointLinear([linear(layer, name) for name in names], rows, is_packed=is_packed)
            for names in PROJECTIONS
        ]
        self.qkv, self.out, self.gate_up, self.down = joints
        self.sites: dict[str, tuple[LoraDelta, int]] = {
            name: (joint.delta, part)
            for names, joint in zip(PROJECTIONS, joints, strict=True)
            for part, name in enumerate(names)
        }
        self.attention_norm, self.mlp_norm = (
            steps.norm_of(_norm(layer.get_submodule(name))) for name in NORMS
        )
        self.head_norm = _head_norm(layer, heads)
        self._rotate, self._gate = steps.rotate_of(self.head_norm), steps.gate

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
        return self.down.added_into(hidden_ND, self._gate(self.gate_up(self.mlp_norm(hidden_ND))))[None]

    def _prepare(self, qkv_NX: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Norm and rotate queries and keys in place (arXiv 2104.09864, Eq. 34, in Hugging Face's half-split order)."""
        heads = self.heads
        joint_NHW = qkv_NX.view(-1, heads.num_joint, heads.head_dim)[
            :, : heads.num_heads + heads.num_kv_heads
        ]
        if self.rotates:
            self._rotate(joint_NHW, *self._rotation.tables(*tables))
        elif self.head_norm is not None:
            joint_NHW.copy_(self.head_norm(joint_NHW))


def has_parts(layer: nn.Module) -> bool:
    """Whether all projections are plain linear layers and both norms have a weight and an epsilon."""
    try:
        linears = [layer.get_submodule(name) for names in PROJECTIONS for name in names]
        norms = [layer.get_submodule(name) for name in NORMS]
    except AttributeError:
        return False
    return all(type(linear) is nn.Linear for linear in linears) and all(
        _eps(norm) is not None and isinstance(getattr(norm, "weight", None), torch.Tensor) for norm in norms
    )


def linear(layer: nn.Module, name: str) -> nn.Linear:
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
