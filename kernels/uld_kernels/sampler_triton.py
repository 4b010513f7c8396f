"""The fused sampler on Triton: all that one shape needs, allocated once, and the launches. Called by ops and by
static_sampler on CUDA tensors.

Never waits for the device. Tested against sampler_reference; passes and bytes are drawn in kernels/README.md.

Legend: R rows of logits, V real vocabulary, B rows to draw, M terms, T tiles, G groups of 16 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log

import torch
import triton

from uld_kernels import columns_triton as columns
from uld_kernels.finish_triton import _finish_kernel
from uld_kernels.rank_triton import _rank_kernel, _rank_tile_kernel
from uld_kernels.rows import SampleOutput, SampleRow, ScoreOutput
from uld_kernels.sample_shape import SampleShape
from uld_kernels.scan_triton import (
    NUM_BESTS,
    NUM_INT_PARTIALS,
    NUM_PARTIALS,
    _normalizer_kernel,
    _normalizer_tile_kernel,
    _scan_kernel,
    _touch_kernel,
)
from uld_kernels.staging import Staging

# The same for any batch, so that a row has the same bits in any.
SCAN_BLOCK = 1024
SELECT_BLOCK = 2048
CHUNK = 4096
LIST_BLOCK = 512
SCAN_WARPS = 4
FINISH_WARPS = 8
# Contracting a - s * x into one rounding would differ from the torch sampler in the last bit.
_OPTIONS = {"enable_fp_fusion": False}


def sample(
    logits_RV: torch.Tensor, rows: Sequence[SampleRow], *, vocab_size: int, protected_ids: torch.Tensor
) -> SampleOutput:
    """ops.fused_sample for fp32, bf16 and fp16 logits."""
    sampler = _filled(logits_RV, rows, vocab_size=vocab_size, protected_ids=protected_ids)
    sampler.run(logits_RV)
    return sampler.output()


def score(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    target_ids_B: torch.Tensor,
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
) -> ScoreOutput:
    """ops.fused_score. Reads target_ids_B on the host: pass it from there."""
    targets: list[int] = target_ids_B.tolist()
    sampler = _filled(logits_RV, rows, targets, vocab_size=vocab_size, protected_ids=protected_ids)
    sampler.run(logits_RV)
    return sampler.scores()


def _filled(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    target_ids: Sequence[int] | None = None,
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
) -> TritonSampler:
    shape = SampleShape.of(rows, num_rows=len(rows))
    sampler = TritonSampler(
        shape, vocab_size=vocab_size, protected_ids=protected_ids, device=logits_RV.device, num_stages=1
    )
    sampler.fill(rows, target_ids=target_ids)
    return sampler


class TritonSampler:
    """Tables, workspace and output of one shape. `fill` and `run` may alternate for ever; nothing is allocated."""

    def __init__(
        self,
        shape: SampleShape,
        *,
        vocab_size: int,
        protected_ids: torch.Tensor,
        device: torch.device,
        num_stages: int = 3,
    ) -> None:
        """`num_stages`: so many fills may be on their way to the device before one has to wait."""
        self.shape = shape
        self.vocab_size = vocab_size
        self._tables = Staging(shape, vocab_size=vocab_size, device=device, num_stages=num_stages)
        self._protected_ids = protected_ids
        self._protected_V = torch.zeros(vocab_size, dtype=torch.int8, device=device)
        self._protected_V.index_fill_(0, protected_ids, 1)
        self.space = _workspace(shape, vocab_size, device)
        self._columns = _empty_output(shape.num_rows, shape.max_logprobs, device)

    def fill(self, rows: Sequence[SampleRow], *, target_ids: Sequence[int] | None = None) -> None:
        """What the next run draws, or scores where target ids are given."""
        self._tables.fill(rows, target_ids=target_ids)

    def run(self, logits_RV: torch.Tensor) -> None:
        """Launches, and nothing else. Raises ValueError for logits that lack a row or token of the last fill."""
        if self.shape.num_rows == 0:
            return
        needed = self._tables.num_logit_rows, self.vocab_size
        if logits_RV.shape[0] < needed[0] or logits_RV.shape[1] < needed[1]:
            raise ValueError(f"the rows read {needed} logits, got {tuple(logits_RV.shape)}")
        num_tiles, num_groups = _num_tiles(self.vocab_size), _num_groups(self.vocab_size)
        self._prepare(logits_RV)
        space, columns_B = self.space, self._columns
        row = (
            logits_RV, logits_RV.stride(0), self.vocab_size, self._tables.ints, self._tables.floats,
            self._tables.masks, space["touched"], space["biases"], space["normalizers"], space["thresholds"],
            self._tables.layout.terms_at, self._tables.layout.max_terms,
        )  # fmt: skip
        found = space["bests"], space["partials"], space["int_partials"]
        _scan_kernel[(self.shape.num_rows, num_tiles)](
            *row, self._protected_V, *found, space["group_max"],
            num_groups, BLOCK=SCAN_BLOCK, num_warps=SCAN_WARPS, **_OPTIONS,
        )  # fmt: skip
        _finish_kernel[(self.shape.num_rows,)](
            *row, self._protected_V, self._protected_ids, self._protected_ids.shape[0], *found, num_tiles,
            space["group_max"], space["group_list"], num_groups, space["lucky"], space["lucky"].shape[1],
            space["listed_ids"], space["listed_s"], space["listed_b"],
            columns_B["token_ids_B"], columns_B["logprob_B"], columns_B["rank_B"], columns_B["status_B"],
            columns_B["num_kept_B"], columns_B["kl_B"], columns_B["argmax_changed_B"], columns_B["top_ids_BN"],
            columns_B["top_logprobs_BN"], self.shape.max_logprobs,
            TILES=triton.next_power_of_2(num_tiles),
            GROUPS=triton.next_power_of_2(num_groups), NOISE_GROUPS=triton.next_power_of_2(space["lucky"].shape[1]),
            BLOCK=SELECT_BLOCK, CHUNK=CHUNK, LIST=LIST_BLOCK, num_warps=FINISH_WARPS, **_OPTIONS,
        )  # fmt: skip

    def output(self) -> SampleOutput:
        """The rows of the last fill, as the last run left them; overwritten by the next one."""
        columns_B = self._filled_columns()
        del columns_B["rank_B"]
        return SampleOutput(**columns_B, digests=self._tables.digests)

    def scores(self) -> ScoreOutput:
        """The same after a fill with target ids."""
        columns_B = self._filled_columns()
        del columns_B["token_ids_B"]
        return ScoreOutput(**columns_B, digests=self._tables.digests)

    def _filled_columns(self) -> dict[str, torch.Tensor]:
        num_rows, width = len(self._tables.digests), self._tables.num_logprobs
        columns_B = {name: column[:num_rows] for name, column in self._columns.items()}
        for name in ("top_ids_BN", "top_logprobs_BN"):
            columns_B[name] = columns_B[name][:, :width]
        return columns_B

    def _prepare(self, logits_RV: torch.Tensor) -> None:
        """Fills what is needed before the scan; launches nothing for shapes that need nothing."""
        num_terms = self.shape.num_rows * self._tables.layout.max_terms
        num_tiles, num_groups = _num_tiles(self.vocab_size), _num_groups(self.vocab_size)
        logits, terms, space = (
            (logits_RV, logits_RV.stride(0), self.vocab_size),
            self._tables.terms,
            self.space,
        )
        if self.shape.num_special:
            _touch_kernel[(self.shape.num_rows, num_tiles)](
                self.vocab_size, self._tables.ints, self._tables.entries, self._tables.entry_biases,
                space["touched"], space["biases"], BLOCK=SCAN_BLOCK, num_warps=SCAN_WARPS, **_OPTIONS,
            )  # fmt: skip
        if self.shape.needs_normalizers:
            maxima, sums = space["stream_partials"]
            _normalizer_tile_kernel[(num_terms * 2, num_tiles)](
                *logits, terms, maxima, sums, BLOCK=SCAN_BLOCK, num_warps=SCAN_WARPS, **_OPTIONS
            )
            _normalizer_kernel[(num_terms * 2,)](
                terms, maxima, sums, space["normalizers"], num_tiles, log(self.vocab_size),
                TILES=triton.next_power_of_2(num_tiles), num_warps=1, **_OPTIONS,
            )  # fmt: skip
        if self.shape.needs_ranks:
            _rank_tile_kernel[(num_terms, num_tiles)](
                *logits, terms, space["rank_groups"], num_groups, space["rank_bad"],
                BLOCK=SCAN_BLOCK, num_warps=SCAN_WARPS, **_OPTIONS,
            )  # fmt: skip
            _rank_kernel[(num_terms,)](
                *logits, terms, space["rank_groups"], space["rank_list"], num_groups, space["rank_bad"], num_tiles,
                space["rank_listed"], space["thresholds"],
                TILES=triton.next_power_of_2(num_tiles), GROUPS=triton.next_power_of_2(num_groups),
                BLOCK=SELECT_BLOCK, CHUNK=CHUNK, LIST=LIST_BLOCK, num_warps=FINISH_WARPS, **_OPTIONS,
            )  # fmt: skip


def _num_tiles(vocab_size: int) -> int:
    return -(-vocab_size // SCAN_BLOCK)


def _num_groups(vocab_size: int) -> int:
    return -(-vocab_size // int(columns.GROUP.value))


def _workspace(shape: SampleShape, vocab_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the kernels hand to each other, by name."""
    num_tiles, num_groups = _num_tiles(vocab_size), _num_groups(vocab_size)
    rows, num_terms, special = (
        shape.num_rows,
        shape.num_rows * max(1, shape.max_terms),
        max(1, shape.num_special),
    )

    def floats(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=device)

    def ints(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.int32, device=device)

    space = {
        "normalizers": torch.zeros((num_terms, 2), device=device),
        "thresholds": torch.full((num_terms,), inf, device=device),
        "touched": ints(special, vocab_size if shape.num_special else 1),
        "biases": floats(special, vocab_size if shape.num_special else 1),
        "bests": torch.empty((rows, num_tiles, NUM_BESTS.value), dtype=torch.int64, device=device),
        "partials": floats(rows, num_tiles, NUM_PARTIALS.value),
        "int_partials": ints(rows, num_tiles, NUM_INT_PARTIALS.value),
        "group_max": floats(rows, num_groups),
        "group_list": ints(rows, num_groups),
        "lucky": floats(rows, triton.cdiv(vocab_size, columns.NOISE_GROUP.value)),
        # Room for the whole vocabulary: a list can overflow nothing. Rows touch only what they list.
        "listed_ids": ints(rows, vocab_size),
        "listed_s": floats(rows, vocab_size),
        "listed_b": floats(rows, vocab_size),
    }
    if shape.needs_normalizers:
        space["stream_partials"] = floats(2, num_terms * 2, num_tiles)
    if shape.needs_ranks:
        space["rank_groups"] = floats(num_terms, num_groups)
        space["rank_list"] = ints(num_terms, num_groups)
        space["rank_bad"] = ints(num_terms, num_tiles)
        space["rank_listed"] = floats(num_terms, vocab_size)
    return space


def _empty_output(num_rows: int, width: int, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "token_ids_B": torch.empty(num_rows, dtype=torch.int64, device=device),
        "logprob_B": torch.empty(num_rows, dtype=torch.float32, device=device),
        "rank_B": torch.empty(num_rows, dtype=torch.int64, device=device),
        "status_B": torch.empty(num_rows, dtype=torch.int32, device=device),
        "num_kept_B": torch.empty(num_rows, dtype=torch.int64, device=device),
        "kl_B": torch.empty(num_rows, dtype=torch.float32, device=device),
        "argmax_changed_B": torch.empty(num_rows, dtype=torch.bool, device=device),
        "top_ids_BN": torch.full((num_rows, width), -1, dtype=torch.int64, device=device),
        "top_logprobs_BN": torch.full((num_rows, width), -inf, dtype=torch.float32, device=device),
    }
