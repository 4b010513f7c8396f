"""Runs one step's rows through the base, and through separate models, and hands back their scores. Owns decoders
and caches; knows no request, text or profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from uld_serve.config import EngineConfig
from uld_serve.model.decoder import Decoder
from uld_serve.model.head import Scores
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.row_batch import RowBatch


@dataclass(slots=True)
class Runner:
    """`own` holds the keys and values of assistants that keep theirs; `separate` are other models, by name. Both
    are there only where a profile needs them."""

    decoder: Decoder
    cache: KVCache
    own: KVCache | None = None
    separate: dict[str, Runner] = field(default_factory=dict)

    @classmethod
    def of(cls, decoder: Decoder, config: EngineConfig, *, num_blocks: int | None = None) -> Runner:
        """With a cache of the configured number of blocks, or of `num_blocks`."""
        cache = decoder.allocate_cache(
            decoder.base.num_layers, num_blocks or config.num_blocks, block_size=config.block_size
        )
        return cls(decoder, cache)

    @property
    def keeps_state(self) -> bool:
        """Whether assistants may keep keys and values of their own here, or models be run beside the base."""
        return True

    def run(self, rows: RowBatch) -> Scores:
        """Scores of the batch's head rows, then of its assistants on the base, then of separate models in the
        batch's order, then of late assistants. Raises what a model raises."""
        scores = self.decoder.forward(rows, self.cache, self.own)
        if not rows.separate:
            return scores
        width = scores.logits_RW.shape[1]
        others = [self.separate[name].run(batch).logits_RW for name, batch in rows.separate.items()]
        logits_RW = torch.cat([scores.logits_RW, *(_of_width(other_RW, width) for other_RW in others)])
        return Scores(logits_RW, scores.late)

    def clear(self, block_ids: Sequence[int]) -> None:
        """Zeros in these blocks, before anybody reads what an earlier request left there."""
        self.cache.clear(block_ids)

    def clear_beside(self, name: str, block_ids: Sequence[int]) -> None:
        """The same in a separate model's cache, or in that of assistants with keys and values of their own."""
        if name in self.separate:
            self.separate[name].clear(block_ids)
        else:
            assert self.own is not None, "blocks of a cache that there is not"
            self.own.clear(block_ids)


def _of_width(logits_RW: torch.Tensor, width: int) -> torch.Tensor:
    """A head's rows beyond the vocabulary are padding, which models do differently and nobody reads."""
    missing = width - logits_RW.shape[1]
    return logits_RW[:, :width] if missing <= 0 else torch.nn.functional.pad(logits_RW, (0, missing))
