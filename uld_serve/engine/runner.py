"""Runs one step's rows through the base and hands back their scores. Owns the decoder and the cache; knows
no request, text or profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uld_serve.config import EngineConfig
from uld_serve.model.decoder import Decoder
from uld_serve.model.head import Scores
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.row_batch import RowBatch


@dataclass(slots=True)
class Runner:
    decoder: Decoder
    cache: KVCache

    @classmethod
    def of(cls, decoder: Decoder, config: EngineConfig) -> Runner:
        cache = KVCache.allocate(
            decoder.base.num_layers,
            config.num_blocks,
            block_size=config.block_size,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            dtype=decoder.base.dtype,
            device=decoder.base.device,
        )
        return cls(decoder, cache)

    def run(self, rows: RowBatch) -> Scores:
        """Scores of the batch's head rows, then of its assistants. Raises what the model raises."""
        return self.decoder.forward(rows, self.cache)

    def clear(self, block_ids: Sequence[int]) -> None:
        """Zeros in these blocks, before anybody reads what an earlier request left there."""
        self.cache.clear(block_ids)
