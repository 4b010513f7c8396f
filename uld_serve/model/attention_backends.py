"""Which attention runs, chosen once at start by name: what can run here is tried, what cannot is refused. Called by
engine construction; its functions are called by attention. Knows no request.

Shapes: N rows active in the layer, H query heads, K key/value heads, D head width, S sequences of a group.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from uld_kernels.attention import LARGEST_WIDTH, decode_attention, prefill_attention

from uld_serve.errors import InvalidRequest
from uld_serve.model import varlen_prefill as varlen
from uld_serve.model.attention_trial import Trial
from uld_serve.model.geometry import Attend, Heads, SequenceGroup
from uld_serve.model.varlen_prefill import varlen_prefill

logger = logging.getLogger(__name__)

# Of the prompt on which attentions that are all right are timed.
TIMED_TOKENS = 2048

BackendName = Literal["torch-sdpa", "triton", "torch-varlen"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """`decode` serves groups of rows that stand at one position, `prefill` prompts, all of a step in one call; None:
    torch's own attention over gathered contexts does."""

    name: BackendName
    decode: Attend | None
    prefill: Attend | None = None


TORCH = AttentionBackend("torch-sdpa", None)


def choose(
    device: torch.device, dtype: torch.dtype, *, block_size: int, head_dim: int, name: str = "auto"
) -> AttentionBackend:
    """The backend `name`, or with "auto" the fastest of those that can run here and give what they should: each is run
    on a few contexts first, which compiles it. Decode steps are always ours where ours can run. Raises InvalidRequest
    for a name that does not exist or cannot run, with the reason.

    >>> choose(torch.device("cpu"), torch.float32, block_size=16, head_dim=64).name
    'torch-sdpa'
    """
    if name not in (*NAMES, "auto"):
        raise InvalidRequest(
            f"there is no attention backend '{name}'; known: auto, {', '.join(NAMES)}", param="attention"
        )
    if name == "torch-sdpa":
        return TORCH
    obstacles = {
        "triton": why_not_triton(device, dtype, block_size=block_size, head_dim=head_dim),
        "torch-varlen": why_not_varlen(device, dtype, block_size=block_size, head_dim=head_dim),
    }
    if name != "auto" and obstacles[name] is not None:
        raise InvalidRequest(
            f"attention backend '{name}' cannot run here: {obstacles[name]}", param="attention"
        )
    decode = None if obstacles["triton"] else paged_decode
    able = {
        "triton": AttentionBackend("triton", decode, paged_prefill),
        "torch-varlen": AttentionBackend("torch-varlen", decode, varlen_prefill),
    }
    if name != "auto":
        return able[name]
    found = [backend for key, backend in able.items() if obstacles[key] is None]
    if not found and device.type == "cuda":
        logger.warning("attention is torch's own over gathered contexts: %s", obstacles["triton"])
    if len(found) < 2:
        return found[0] if found else TORCH
    trial = Trial.prefill(device, dtype, block_size=block_size, head_dim=head_dim, num_tokens=TIMED_TOKENS)
    return min(found, key=lambda backend: _seconds(trial, backend))


def _seconds(trial: Trial, backend: AttentionBackend) -> float:
    assert backend.prefill is not None
    seconds = trial.seconds(backend.prefill)
    logger.info("attention of a prompt on %s: %.0f us", backend.name, seconds * 1e6)
    return seconds


def why_not_triton(device: torch.device, dtype: torch.dtype, *, block_size: int, head_dim: int) -> str | None:
    """What keeps our kernels from running here, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bfloat16, float16 and float32, not {dtype}"
    if block_size < 16 or block_size & (block_size - 1):
        return f"blocks must hold a power of two of tokens, 16 or more, not {block_size}"
    if head_dim > LARGEST_WIDTH:
        return f"heads may be {LARGEST_WIDTH} wide, not {head_dim}"
    return _tried("triton", paged_decode, paged_prefill, device, dtype, block_size, head_dim)


def why_not_varlen(device: torch.device, dtype: torch.dtype, *, block_size: int, head_dim: int) -> str | None:
    """What keeps torch's variable-length attention from running here, or None."""
    obstacle = varlen.why_not_here(device, dtype, block_size=block_size, head_dim=head_dim)
    return obstacle or _tried("torch-varlen", None, varlen_prefill, device, dtype, block_size, head_dim)


def _tried(
    name: BackendName,
    decode: Attend | None,
    prefill: Attend,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    head_dim: int,
) -> str | None:
    """What a trial of both has shown to be wrong, or None."""
    try:
        trial = Trial.prefill(device, dtype, block_size=block_size, head_dim=head_dim)
        obstacle = trial.obstacle(prefill)
        if obstacle is None and decode is not None:
            trial = Trial.decode(device, dtype, block_size=block_size, head_dim=head_dim)
            obstacle = trial.obstacle(decode)
        return obstacle
    except (RuntimeError, ImportError) as error:
        logger.exception("attention '%s' does not run on %s", name, device)
        return f"a trial of it failed ({type(error).__name__})"


def paged_decode(
    layer: int, qkv_NX: torch.Tensor, group: SequenceGroup, heads: Heads, out_NX: torch.Tensor
) -> None:
    """Decode attention over the block table itself: no context is gathered and no mask is made."""
    keys_SHD, values_SHD = group.cache.views(layer - group.first_layer)
    joint_NHD = qkv_NX.view(-1, heads.num_joint, heads.head_dim)
    decode_attention(
        joint_NHD[:, : heads.num_heads],
        keys_SHD,
        values_SHD,
        # Where a sequence has fewer rows than others its first is repeated: it is computed twice, to the same bits.
        rows_SQ=group.rows_SQ,
        blocks_SB=group.blocks_SB,
        lengths_S=_lengths(group),
        block_size=group.cache.block_size,
        scale=heads.scaling,
        window=heads.window,
        out_NHD=out_NX.view(-1, heads.num_heads, heads.head_dim),
    )


def _lengths(group: SequenceGroup) -> torch.Tensor:
    """Tokens of each context, its own rows' included; made once for all layers."""
    if "lengths" not in group.tables:
        group.tables["lengths"] = (group.positions_SQ[:, 0] + 1,)
    return group.tables["lengths"][0]


def paged_prefill(
    layer: int, qkv_NX: torch.Tensor, group: SequenceGroup, heads: Heads, out_NX: torch.Tensor
) -> None:
    """Attention of prompts over the block table itself, all of a step in one launch."""
    keys_SHD, values_SHD = group.cache.views(layer - group.first_layer)
    joint_NHD = qkv_NX.view(-1, heads.num_joint, heads.head_dim)
    prefill_attention(
        joint_NHD[:, : heads.num_heads],
        keys_SHD,
        values_SHD,
        rows_SQ=group.rows_SQ,
        positions_SQ=group.positions_SQ,
        blocks_SB=group.blocks_SB,
        block_size=group.cache.block_size,
        scale=heads.scaling,
        window=heads.window,
        out_NHD=out_NX.view(-1, heads.num_heads, heads.head_dim),
    )
