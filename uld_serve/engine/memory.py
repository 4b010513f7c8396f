"""Who gets how much of a device's memory: settings resolved once at start, and the cache that they leave room for.
Called by Engine.of, and by ranks that follow another.

Knows what must be there beside keys and values: one workspace for the samplers of all recorded steps. A shape that
needs more is not recorded, so nothing grows later.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from uld_kernels import SampleShape, Workspace

from uld_serve.config import EngineConfig, EngineSettings
from uld_serve.engine.ranks import Ranks
from uld_serve.engine.runner import Runner
from uld_serve.engine.seating import padded_size
from uld_serve.errors import InvalidRequest
from uld_serve.model.attention_backends import choose
from uld_serve.model.decoder import Decoder
from uld_serve.model.loading import Base

# Terms of a request that a workspace has room for when every row of the largest batch has all else there is. Smaller
# batches may have more.
MAX_TERMS = 2


def resolved(settings: EngineSettings, decoder: Decoder) -> EngineConfig:
    """Raises InvalidRequest for settings that leave no room for keys and values."""
    base = decoder.base
    free = torch.cuda.mem_get_info(base.device)[0] if base.device.type == "cuda" else None
    return settings.resolve(
        max_positions=decoder.max_positions,
        bytes_per_token=decoder.cache_bytes_per_token(base.num_layers),
        free_device_bytes=free,
        sampler_bytes=sampler_bytes(settings.max_num_seqs, base.vocab_size),
    )


def runner_of(
    base: Base, settings: EngineSettings, ranks: Ranks | None = None
) -> tuple[Runner, EngineConfig]:
    """The base's decoder with its cache, and the settings resolved for it. With `ranks`, every one of them must come
    here at once. Raises ModelUnsupported, InvalidRequest."""
    if ranks is not None:
        settings = _shared(settings)
    decoder = Decoder.of(base)
    config = resolved(settings, decoder)
    decoder.attention = choose(
        base.device, base.dtype, block_size=config.block_size, head_dim=decoder.head_dim
    )
    decoder.bank.budget_bytes = config.adapter_bytes
    return Runner.of(decoder, config), config


def _shared(settings: EngineSettings) -> EngineSettings:
    """A step of several ranks is not recorded, and none is launched before the one before has ended."""
    for name in ("cuda_graphs", "overlap"):
        if getattr(settings, name):
            raise InvalidRequest(
                f"{name} is not for a model that several processes share: leave it out", param=name
            )
    return replace(settings, cuda_graphs=False, overlap=False)


def sampler_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """What the samplers of recorded steps share: enough for the largest batch with bans or penalties in every row, and
    composed profiles of any rules."""
    rows = padded_size(max_num_seqs)
    largest = SampleShape(
        rows, max_terms=MAX_TERMS, num_special=rows, needs_normalizers=True, needs_ranks=True
    )
    return Workspace.bytes_for(largest, vocab_size)
