"""The fused sampler on Triton: all that one shape needs, allocated once, and the launches. Called by ops and by
static_sampler on CUDA tensors.

Never waits for the device. Tested against sampler_reference; passes and bytes are drawn in kernels/README.md.

Legend: R rows of logits, V real vocabulary, B rows to draw, M terms, T tiles, G groups of 16 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log

import torch
import triton

from uld_kernels.finish_triton import _finish_kernel
from uld_kernels.late import last_stream, whole_where_needed
from uld_kernels.late_triton import score_listed
from uld_kernels.list_triton import _list_kernel, _look_further_kernel
from uld_kernels.pack import TERM_INT_COLUMNS, TERM_WORDS
from uld_kernels.rank_triton import _rank_kernel, _rank_tile_kernel
from uld_kernels.rows import LateRows, SampleOutput, SampleRow, ScoreOutput
from uld_kernels.sample_shape import SampleShape
from uld_kernels.scan_triton import _normalizer_kernel, _normalizer_tile_kernel, _scan_kernel, _touch_kernel
from uld_kernels.staging import Staging
from uld_kernels.workspace import SCAN_BLOCK, Workspace
from uld_kernels.workspace import num_groups as num_groups_of
from uld_kernels.workspace import num_tiles as num_tiles_of

# The same for any batch, so that a row has the same bits in any.
SELECT_BLOCK = 2048
CHUNK = 4096
LIST_BLOCK = 512
SCAN_WARPS = 4
FINISH_WARPS = 8
# How much further down (nats) each look for a fused filter's tokens goes; the last has no end, so lists are exact.
FURTHER_LOOKS = (4.0, inf)
# Contracting a - s * x into one rounding would differ from the torch sampler in the last bit.
_OPTIONS = {"enable_fp_fusion": False}


def sample(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
    late: LateRows | None = None,
) -> SampleOutput:
    """ops.fused_sample for fp32, bf16 and fp16 logits."""
    sampler = _ran(logits_RV, rows, None, late, vocab_size=vocab_size, protected_ids=protected_ids)
    return sampler.output()


def score(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    target_ids_B: torch.Tensor,
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
    late: LateRows | None = None,
) -> ScoreOutput:
    """ops.fused_score. Reads target_ids_B on the host: pass it from there."""
    targets: list[int] = target_ids_B.tolist()
    sampler = _ran(logits_RV, rows, targets, late, vocab_size=vocab_size, protected_ids=protected_ids)
    return sampler.scores()


def _ran(
    logits_RV: torch.Tensor,
    rows: Sequence[SampleRow],
    target_ids: Sequence[int] | None,
    late: LateRows | None,
    *,
    vocab_size: int,
    protected_ids: torch.Tensor,
) -> TritonSampler:
    first_late = None
    if late is not None:
        logits_RV, rows = whole_where_needed(logits_RV, rows, late, vocab_size=vocab_size)
        if any(last_stream(term) >= logits_RV.shape[0] for row in rows for term in row.terms):
            first_late = logits_RV.shape[0]
    shape = SampleShape.of(rows, num_rows=len(rows), first_late=first_late)
    sampler = TritonSampler(
        shape, vocab_size=vocab_size, protected_ids=protected_ids, device=logits_RV.device, num_stages=1
    )
    sampler.fill(rows, target_ids=target_ids)
    sampler.run(logits_RV, None if first_late is None else late)
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
        workspace: Workspace | None = None,
    ) -> None:
        """`num_stages`: so many fills may be on their way to the device before one has to wait. `workspace` is shared
        with samplers that never run at the same time; without, this one has its own. Raises WorkspaceTooSmall."""
        self.shape = shape
        self.vocab_size = vocab_size
        self._tables = Staging(shape, vocab_size=vocab_size, device=device, num_stages=num_stages)
        self._protected_ids = protected_ids
        self._protected_V = torch.zeros(vocab_size, dtype=torch.int8, device=device)
        self._protected_V.index_fill_(0, protected_ids, 1)
        workspace = workspace or Workspace.of(shape, vocab_size=vocab_size, device=device)
        self.space = workspace.lend(shape, vocab_size)
        num_terms = shape.num_rows * self._tables.layout.max_terms
        # Not lent: a shape that needs none reads these values and never writes them.
        self.space["normalizers"] = torch.zeros((num_terms, 2), device=device)
        self.space["thresholds"] = torch.full((num_terms,), inf, device=device)
        self._columns = _empty_output(shape.num_rows, shape.max_logprobs, device)

    def fill(self, rows: Sequence[SampleRow], *, target_ids: Sequence[int] | None = None) -> None:
        """What the next run draws, or scores where target ids are given."""
        self._tables.fill(rows, target_ids=target_ids)

    def run(self, logits_RV: torch.Tensor, late: LateRows | None = None) -> None:
        """Launches, and nothing else. Raises ValueError for logits, or late rows, that lack a row or token of the last
        fill."""
        if self.shape.num_rows == 0:
            return
        self._check(logits_RV, late)
        num_tiles, num_groups = num_tiles_of(self.vocab_size), num_groups_of(self.vocab_size)
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
        listing = (
            *row, self._protected_V, self._protected_ids, self._protected_ids.shape[0], *found, num_tiles,
            space["group_max"], space["group_list"], num_groups, space["lucky"], space["lucky"].shape[1],
            space["listed_ids"], space["listed_s"], space["listed_b"],
        )  # fmt: skip
        sizes = {
            "TILES": triton.next_power_of_2(num_tiles),
            "GROUPS": triton.next_power_of_2(num_groups),
            "NOISE_GROUPS": triton.next_power_of_2(space["lucky"].shape[1]),
            "BLOCK": SELECT_BLOCK,
            "CHUNK": CHUNK,
        }
        # The last four are not read where nothing is late.
        listed = space["listed_ids"], space["listed_b"], space["listed_b"], self.shape.first_late or 0
        if late is not None:
            self._score_late(row, listing, sizes, late)
            listed = space["counts"], space["limits"], space["late_scores"], listed[-1]
        _finish_kernel[(self.shape.num_rows,)](
            *listing, *listed,
            columns_B["token_ids_B"], columns_B["logprob_B"], columns_B["rank_B"], columns_B["status_B"],
            columns_B["num_kept_B"], columns_B["kl_B"], columns_B["argmax_changed_B"], columns_B["top_ids_BN"],
            columns_B["top_logprobs_BN"], self.shape.max_logprobs,
            **sizes, LIST=LIST_BLOCK, IS_LISTED=late is not None, num_warps=FINISH_WARPS, **_OPTIONS,
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

    def _check(self, logits_RV: torch.Tensor, late: LateRows | None) -> None:
        """What would otherwise read the wrong memory."""
        needed = self._tables.num_logit_rows, self.vocab_size
        if logits_RV.shape[0] < needed[0] or logits_RV.shape[1] < needed[1]:
            raise ValueError(f"the rows read {needed} logits, got {tuple(logits_RV.shape)}")
        if (late is None) != (self.shape.first_late is None):
            raise ValueError(f"{self.shape} and {'no ' if late is None else ''}late rows do not go together")
        if late is None:
            return
        late.check(self.vocab_size)
        if late.hidden_AD.shape[0] < self._tables.num_late_rows:
            raise ValueError(
                f"the rows read {self._tables.num_late_rows} late rows, got {late.hidden_AD.shape[0]}"
            )

    def _score_late(
        self, row: tuple[object, ...], listing: tuple[object, ...], sizes: dict[str, int], late: LateRows
    ) -> None:
        """Lists the tokens of all rows, and scores the late assistants on those of theirs."""
        space, layout, num_rows = self.space, self._tables.layout, self.shape.num_rows
        first_late = layout.first_late
        assert first_late is not None, "late rows in a shape that has none"
        index_BM = self._tables.terms[: num_rows * layout.max_terms * TERM_WORDS]
        index_BM = index_BM.view(num_rows, layout.max_terms, TERM_WORDS)[
            :, :, TERM_INT_COLUMNS.index("row_1")
        ]
        starts_B, counts_B, limits_B = space["starts"], space["counts"], space["limits"]

        def score() -> None:
            score_listed(
                late, space["listed_ids"], counts_B, index_BM,
                out_BMC=space["late_scores"], starts_B=starts_B, first_late=first_late,
            )  # fmt: skip

        _list_kernel[(num_rows,)](
            *listing, starts_B, counts_B, limits_B, **sizes, num_warps=FINISH_WARPS, **_OPTIONS
        )
        score()
        for step in FURTHER_LOOKS if self.shape.looks_further else ():
            _look_further_kernel[(num_rows,)](
                *row, space["group_max"], space["group_list"], space["group_max"].shape[1],
                space["listed_ids"], space["listed_b"], starts_B, counts_B, limits_B, space["late_scores"], first_late,
                step, BLOCK=SELECT_BLOCK, CHUNK=CHUNK, LIST=LIST_BLOCK, num_warps=FINISH_WARPS, **_OPTIONS,
            )  # fmt: skip
            score()

    def _prepare(self, logits_RV: torch.Tensor) -> None:
        """Fills what is needed before the scan; launches nothing for shapes that need nothing."""
        num_terms = self.shape.num_rows * self._tables.layout.max_terms
        num_tiles, num_groups = num_tiles_of(self.vocab_size), num_groups_of(self.vocab_size)
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
