"""Brings the records of a batch from the host to the device without waiting for it. Owned by a sampler_triton
sampler; what the records say is pack's.

Legend: B rows to draw, V real vocabulary, E entries of bans, histories and biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from uld_kernels import pack
from uld_kernels.pack import Filled, Layout
from uld_kernels.rows import SampleRow
from uld_kernels.sample_shape import SampleShape


@dataclass(slots=True)
class _Stage:
    """Host memory that one fill is written to and copied from."""

    words: torch.Tensor
    masks: torch.Tensor
    is_copied: torch.cuda.Event | None = None


class Staging:
    """The tables on the device, and stages on the host that take turns: while one is being copied the next is
    written."""

    def __init__(self, shape: SampleShape, *, vocab_size: int, device: torch.device, num_stages: int) -> None:
        self.shape = shape
        self.layout = Layout.of(shape)
        self.digests: list[tuple[int, ...]] = []
        self.num_logprobs = 0
        self.num_logit_rows = 0
        self.num_late_rows = 0
        self._vocab_size = vocab_size
        self._is_cuda = device.type == "cuda"
        self._words = torch.zeros(self.layout.num_words, dtype=torch.int32, device=device)
        mask_shape = (shape.num_masks, vocab_size) if shape.num_masks else (1, 1)
        self.masks = torch.zeros(mask_shape, dtype=torch.bool, device=device)
        self._stages = [self._stage(mask_shape) for _ in range(num_stages)]
        self._turn = 0

    @property
    def ints(self) -> torch.Tensor:
        """All tables as int32: records of rows, then of terms, then entries."""
        return self._words

    @property
    def floats(self) -> torch.Tensor:
        return self._words.view(torch.float32)

    @property
    def terms(self) -> torch.Tensor:
        return self._words[self.layout.terms_at :]

    @property
    def entries(self) -> torch.Tensor:
        return self._words[self.layout.entries_at :]

    @property
    def entry_biases(self) -> torch.Tensor:
        return self.floats[self.layout.entries_at + 1 :]

    def fill(self, rows: Sequence[SampleRow], *, target_ids: Sequence[int] | None) -> None:
        """Raises ValueError if the shape does not cover `rows`."""
        self.shape.check(rows)
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % len(self._stages)
        if stage.is_copied is not None:
            # Copied some fills ago; only a host that runs that far ahead of its device waits here.
            stage.is_copied.synchronize()
        filled = pack.pack(
            stage.words, rows, layout=self.layout, vocab_size=self._vocab_size, target_ids=target_ids
        )
        self.digests = filled.digests
        self.num_logit_rows, self.num_late_rows = filled.num_logit_rows, filled.num_late_rows
        self.num_logprobs = max((row.num_logprobs for row in rows), default=0)
        self._copy(stage, filled)

    def _copy(self, stage: _Stage, filled: Filled) -> None:
        self._words[: filled.num_words].copy_(stage.words[: filled.num_words], non_blocking=True)
        entries_E2 = self.entries.view(-1, 2)
        for first, effect, ids, biases in filled.late_entries:
            pack.write_entries(entries_E2[first : first + ids.shape[0]], effect, ids, biases)
        for index, mask_V in enumerate(filled.masks):
            source = stage.masks[index].copy_(mask_V) if mask_V.device.type == "cpu" else mask_V
            self.masks[index].copy_(source, non_blocking=True)
        if stage.is_copied is not None:
            stage.is_copied.record()

    def _stage(self, mask_shape: tuple[int, int]) -> _Stage:
        """Pinned where there is a device to copy to."""
        words = torch.zeros(self.layout.num_words, dtype=torch.int32, pin_memory=self._is_cuda)
        masks = torch.zeros(mask_shape, dtype=torch.bool, pin_memory=self._is_cuda)
        is_copied = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]
        return _Stage(words, masks, is_copied)
