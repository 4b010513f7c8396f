"""Which attention runs, chosen once at start by name: what can run here is probed, what cannot is refused. Called by
engine construction; its functions are called by attention. Knows no request.

Shapes: N rows active in the layer, H query heads, K key/value heads, D head width, S sequences of a group.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from uld_kernels.attention import LARGEST_WIDTH, decode_attention, reference

from uld_serve.errors import InvalidRequest
from uld_serve.model.geometry import Decode, Heads, SequenceGroup

logger = logging.getLogger(__name__)

# Share of the largest value.
TOLERANCE = {torch.float32: 1e-4}
TOLERANCE_HALF = 0.02

BackendName = Literal["torch-sdpa", "triton"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """`decode` serves groups of rows that stand at one position; None: torch's own attention does. Prompts always
    run on torch's."""

    name: BackendName
    decode: Decode | None


TORCH = AttentionBackend("torch-sdpa", None)


def choose(
    device: torch.device, dtype: torch.dtype, *, block_size: int, head_dim: int, name: str = "auto"
) -> AttentionBackend:
    """The backend `name`, or with "auto" the fastest that can run here and gives what it should: ours is run on a few
    contexts first, which compiles it. Raises InvalidRequest for a name that does not exist or cannot run, with the
    reason.

    >>> choose(torch.device("cpu"), torch.float32, block_size=16, head_dim=64).name
    'torch-sdpa'
    """
    if name not in (*NAMES, "auto"):
        raise InvalidRequest(
            f"there is no attention backend '{name}'; known: auto, {', '.join(NAMES)}", param="attention"
        )
    obstacle = why_not_triton(device, dtype, block_size=block_size, head_dim=head_dim)
    if name == "triton" and obstacle is not None:
        raise InvalidRequest(f"attention backend 'triton' cannot run here: {obstacle}", param="attention")
    if name == "torch-sdpa" or obstacle is not None:
        if obstacle is not None and device.type == "cuda" and name == "auto":
            logger.warning("decode attention is torch's own: %s", obstacle)
        return TORCH
    return AttentionBackend("triton", paged_decode)


def why_not_triton(device: torch.device, dtype: torch.dtype, *, block_size: int, head_dim: int) -> str | None:
    """What keeps our kernel from running here, or None."""
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
    try:
        gap = _gap(device, dtype, block_size, head_dim)
    except (RuntimeError, ImportError) as error:
        logger.exception("our decode attention does not run on %s", device)
        return f"a trial of it failed ({type(error).__name__})"
    if not gap <= TOLERANCE.get(dtype, TOLERANCE_HALF):
        return f"a trial of it was off by {gap:.1e} of the largest value"
    return None


def _gap(device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int) -> float:
    """Between our kernel and the definition in fp32, as a share of the largest value, on random contexts: of one
    token, of a block and one more, and of more than one chunk."""
    lengths = (1, block_size + 1, 300)
    num_blocks = -(-max(lengths) // block_size)
    generator = torch.Generator().manual_seed(0)
    pool_P2KD = torch.randn(3 * num_blocks * block_size, 2, 2, head_dim, generator=generator).to(
        device, dtype
    )
    query_NHD = torch.randn(2 * len(lengths), 8, head_dim, generator=generator).to(device, dtype)
    rows_SQ = torch.arange(2 * len(lengths), device=device).view(len(lengths), 2)
    blocks_SB = torch.randperm(3 * num_blocks, generator=generator).view(3, num_blocks).to(device)
    lengths_S = torch.tensor(lengths, device=device)
    keys_PKD, values_PKD = pool_P2KD.unbind(1)
    found_NHD = decode_attention(
        query_NHD,
        keys_PKD,
        values_PKD,
        rows_SQ=rows_SQ,
        blocks_SB=blocks_SB,
        lengths_S=lengths_S,
        block_size=block_size,
    )
    exact_NHD = torch.zeros_like(query_NHD, dtype=torch.float32)
    reference(
        query_NHD.float(),
        keys_PKD.float(),
        values_PKD.float(),
        rows_SQ=rows_SQ,
        blocks_SB=blocks_SB,
        lengths_S=lengths_S,
        block_size=block_size,
        scale=head_dim**-0.5,
        window=None,
        out_NHD=exact_NHD,
    )
    return float((found_NHD.float() - exact_NHD).abs().max() / exact_NHD.abs().max())


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
        lengths_S=group.positions_SQ[:, 0] + 1,
        block_size=group.cache.block_size,
        scale=heads.scaling,
        window=heads.window,
        out_NHD=out_NX.view(-1, heads.num_heads, heads.head_dim),
    )
