"""Writes SampleRows as the records that the Triton sampler reads. Called by sampler_triton once a fill.

Decides per row, on the host, how its candidates are found (see kernels/README.md); launches nothing.

Legend: B rows to draw, M terms of a row at most, E entries of bans, histories and biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, log
from struct import Struct
from typing import Final

import torch

from uld_kernels import rules
from uld_kernels.late import NOT_LATE, filter_keep, last_stream, late_list_of
from uld_kernels.rows import SampleRow, Term
from uld_kernels.sample_shape import SampleShape, has_history, is_special, needs_normalizer

# Row classes: where the values that candidates are selected by come from.
FILTERED_BY_TARGET: Final = 0
FILTERED_BY_SCORE: Final = 1
UNFILTERED: Final = 2

# How an unfiltered row lists candidates.
LIST_ALL: Final = 0
LIST_BEST: Final = 1
LIST_NUCLEUS: Final = 2
LIST_LUCKY: Final = 3

# What an entry does to its token; the upper bits of its word.
IN_PROMPT: Final = 0
PUT_OUT: Final = 1
BANNED: Final = 2
BIASED: Final = 3
ENTRY_BITS: Final = 28

# Words of a record. The kernels load them by these numbers.
INT_COLUMNS: Final = (
    "row_b",
    "num_terms",
    "add_penalties",
    "row_class",
    "protect",
    "touch_row",
    "first_entry",
    "num_entries",
    "mask_row",
    "has_penalties",
    "scan_penalizes",
    "top_k",
    "num_logprobs",
    "seed_low",
    "seed_high",
    "position",
    "list_mode",
    "list_best",
    "target_id",
    "late_list",
)
FLOAT_COLUMNS: Final = (
    "temperature",
    "top_p",
    "log_min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "log_fused_tau",
    "list_log_ratio",
)
TERM_INT_COLUMNS: Final = ("kind", "row_1", "row_2", "needs_normalizer", "rank_k", "filter_keep")
TERM_FLOAT_COLUMNS: Final = ("strength", "log_filter_tau", "dead_zone")
# One line of the cache a row.
ROW_WORDS: Final = 32
# A multiple of four: what lies behind the terms stays aligned to 16 bytes, whatever their number.
TERM_WORDS: Final = 12
_ROW: Final = Struct(f"<{len(INT_COLUMNS)}i{len(FLOAT_COLUMNS)}f")
_NUM_TERM_COLUMNS: Final = len(TERM_INT_COLUMNS) + len(TERM_FLOAT_COLUMNS)
_TERM: Final = Struct(
    f"<{len(TERM_INT_COLUMNS)}i{len(TERM_FLOAT_COLUMNS)}f{4 * (TERM_WORDS - _NUM_TERM_COLUMNS)}x"
)
_INT: Final = Struct("<i")
_MASK_ROW: Final = INT_COLUMNS.index("mask_row")
NOBODY: Final = -1
"""row_b of a record that no kernel looks at twice."""

# Lists of unfiltered rows: so many best tokens are listed at most before a row falls back to listing everything.
_MAX_LISTED_TOP_K: Final = 1024
_LISTED_FOR_TOP_P: Final = 512


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tables of one shape lie in their common block of 32-bit words."""

    num_rows: int
    max_terms: int
    num_entries: int
    first_late: int | None = None

    @classmethod
    def of(cls, shape: SampleShape) -> Layout:
        return cls(shape.num_rows, max(1, shape.max_terms), shape.num_touched, shape.first_late)

    @property
    def terms_at(self) -> int:
        return self.num_rows * ROW_WORDS

    @property
    def entries_at(self) -> int:
        return self.terms_at + self.num_rows * self.max_terms * TERM_WORDS

    @property
    def num_words(self) -> int:
        """Each entry takes two words: what it does and to which token; and a bias."""
        return self.entries_at + 2 * max(1, self.num_entries)


@dataclass(slots=True)
class Filled:
    """What a fill has written, and what is left to copy by whoever knows the device."""

    num_words: int = 0
    """From the start of the block on."""
    num_logit_rows: int = 0
    """So many rows of logits are read."""
    num_late_rows: int = 0
    """And so many late ones."""
    late_entries: list[tuple[int, int, torch.Tensor, torch.Tensor | None]] = field(default_factory=list)
    """(first entry, what it does, ids, biases) that lie on a device already."""
    masks: list[torch.Tensor] = field(default_factory=list)
    digests: list[tuple[int, ...]] = field(default_factory=list)

    def count_streams(self, row_b: int, terms: tuple[Term, ...], *, first_late: int | None) -> None:
        """Raises ValueError for a late target."""
        last = max([row_b, *map(last_stream, terms)])
        if first_late is None or last < first_late:
            self.num_logit_rows = max(self.num_logit_rows, last + 1)
            return
        if row_b >= first_late:
            raise ValueError(f"row {row_b} is late; a target needs all its logits")
        self.num_late_rows = max(self.num_late_rows, last + 1 - first_late)
        streams = (index for term in terms for index in (term.row_a, term.row_q, term.row_p))
        whole = (index for index in streams if index < first_late)
        self.num_logit_rows = max(self.num_logit_rows, row_b + 1, max(whole, default=-1) + 1)


def pack(
    words: torch.Tensor,
    rows: Sequence[SampleRow],
    *,
    layout: Layout,
    vocab_size: int,
    target_ids: Sequence[int] | None = None,
) -> Filled:
    """Writes `rows` into `words` (int32, on the host, layout.num_words) and the records of nobody behind them.

    With target_ids the rows are to be scored, not drawn: sampling parameters are left out.
    """
    filled = Filled()
    entries = _Entries(words[layout.entries_at :].view(-1, 2), filled)
    memory = words.numpy().data.cast("B")
    for index, row in enumerate(rows):
        terms = row.distinct_terms
        filled.digests.append(tuple(term.digest for term in terms))
        target_id = -1 if target_ids is None else target_ids[index]
        touched = entries.add(row, is_drawn=target_id < 0)
        mask_row = _add_mask(filled, row)
        late_list = late_list_of(terms, first_late=layout.first_late, vocab_size=vocab_size)
        if late_list is None:
            raise ValueError("this row wants a late stream on the whole vocabulary; give its logits")
        columns = _row_columns(row, terms, touched, late_list, vocab_size=vocab_size, target_id=target_id)
        _ROW.pack_into(memory, 4 * ROW_WORDS * index, *columns)
        _INT.pack_into(memory, 4 * (ROW_WORDS * index + _MASK_ROW), mask_row)
        at = 4 * (layout.terms_at + index * layout.max_terms * TERM_WORDS)
        for term in terms:
            _TERM.pack_into(memory, at, *_term_columns(term, len(terms), vocab_size))
            at += 4 * TERM_WORDS
        filled.count_streams(row.row_b, terms, first_late=layout.first_late)
        end = 4 * (layout.terms_at + (index + 1) * layout.max_terms * TERM_WORDS)
        memory[at:end] = bytes(end - at)
    first_free = 4 * (layout.terms_at + len(rows) * layout.max_terms * TERM_WORDS)
    memory[first_free : 4 * layout.entries_at] = bytes(4 * layout.entries_at - first_free)
    for index in range(len(rows), layout.num_rows):
        _INT.pack_into(memory, 4 * ROW_WORDS * index, NOBODY)
    filled.num_words = layout.entries_at + 2 * entries.num_used
    return filled


def _row_columns(
    row: SampleRow,
    terms: tuple[Term, ...],
    touched: tuple[int, int, int],
    late_list: int,
    *,
    vocab_size: int,
    target_id: int,
) -> tuple[int | float, ...]:
    """A record in the order of its columns; the mask's row is filled in by pack."""
    protect = any(term.protect for term in terms)
    # A late row is listed by its target alone, as no other score is there yet.
    row_class = _row_class(terms, vocab_size) if late_list == NOT_LATE else FILTERED_BY_TARGET
    has_penalties = target_id < 0 and (row.logit_bias is not None or has_history(row))
    # The scan cannot know what the repetition penalty is anchored to, but without terms it is anchored to 0.
    can_scan = has_penalties and (row.repetition_penalty == 1.0 or not terms) and row.num_logprobs == 0
    list_mode, list_best, list_log_ratio = LIST_ALL, 0, 0.0
    if row_class == UNFILTERED and not protect and (can_scan or not has_penalties):
        list_mode, list_best, list_log_ratio = _plan_list(row, is_drawn=target_id < 0)
    fused_tau = max((term.tau for term in terms if term.filter_mode == rules.FUSED), default=0.0)
    return (
        row.row_b,
        len(terms),
        int(len(terms) == 1 or row.compose == rules.COMPOSE_SUM),
        row_class,
        int(protect),
        *touched,
        -1,
        int(has_penalties),
        int(list_mode != LIST_ALL and has_penalties),
        row.top_k if target_id < 0 else 0,
        row.num_logprobs,
        _as_int32(row.seed),
        _as_int32(row.seed >> 32),
        _as_int32(row.position),
        list_mode,
        list_best,
        target_id,
        late_list,
        row.temperature,
        row.top_p,
        log(row.min_p) if row.min_p > 0.0 else -inf,
        row.repetition_penalty,
        row.presence_penalty,
        row.frequency_penalty,
        log(fused_tau) if fused_tau > 0.0 else -inf,
        list_log_ratio,
    )


def _plan_list(row: SampleRow, *, is_drawn: bool) -> tuple[int, int, float]:
    """How an unfiltered row lists few candidates: (mode, how many best tokens, how far below the best).

    LIST_LUCKY lists what noise could lift to the top; LIST_NUCLEUS the best and everything if these are too few.
    """
    num_best = max(1, row.num_logprobs)
    if row.temperature == 0.0 or not is_drawn:
        return LIST_BEST, num_best, 0.0
    if 0 < row.top_k <= _MAX_LISTED_TOP_K:
        return LIST_BEST, max(row.top_k, row.num_logprobs), 0.0
    if row.top_k > 0:
        return LIST_ALL, 0, 0.0
    if row.top_p < 1.0:
        return LIST_NUCLEUS, max(_LISTED_FOR_TOP_P, row.num_logprobs), 0.0
    log_ratio = row.temperature * log(row.min_p) if row.min_p > 0.0 else -inf
    return LIST_LUCKY, row.num_logprobs, log_ratio


def _row_class(terms: tuple[Term, ...], vocab_size: int) -> int:
    if any(filter_keep(term, vocab_size) > 0 for term in terms):
        return FILTERED_BY_TARGET
    if any(term.filter_mode == rules.FUSED for term in terms):
        return FILTERED_BY_SCORE
    return UNFILTERED


def _term_columns(term: Term, num_terms: int, vocab_size: int) -> tuple[int | float, ...]:
    """A term's record in the order of its columns."""
    is_pair = term.kind in (rules.PAIR_LINEAR, rules.PAIR_RANK)
    return (
        term.kind,
        term.row_q if is_pair else term.row_a,
        term.row_p if is_pair else -1,
        int(needs_normalizer(term, num_terms)),
        min(term.rank_k, vocab_size) if term.kind == rules.PAIR_RANK else 0,
        filter_keep(term, vocab_size),
        term.strength,
        log(term.tau) if term.tau > 0.0 else -inf,
        term.dead_zone,
    )


class _Entries:
    """Bans, histories and biases of all rows, one behind the other; most rows have none."""

    def __init__(self, words_E2: torch.Tensor, filled: Filled) -> None:
        self._words_E2 = words_E2
        self._filled = filled
        self._num_rows = 0
        self.num_used = 0

    def add(self, row: SampleRow, *, is_drawn: bool) -> tuple[int, int, int]:
        """(row of the touched tokens, first entry, number of entries); (-1, 0, 0) for a row without any."""
        if not is_special(row):
            return -1, 0, 0
        first = self.num_used
        self._put(row.banned_ids, BANNED)
        if is_drawn and has_history(row):
            self._put(row.prompt_ids, IN_PROMPT)
            self._put(row.output_ids, PUT_OUT)
        if is_drawn and row.logit_bias is not None:
            self._put(row.logit_bias[0], BIASED, row.logit_bias[1].float())
        self._num_rows += 1
        return self._num_rows - 1, first, self.num_used - first

    def _put(self, ids: torch.Tensor | None, effect: int, biases: torch.Tensor | None = None) -> None:
        if ids is None or ids.shape[0] == 0:
            return
        first, self.num_used = self.num_used, self.num_used + ids.shape[0]
        if ids.device.type != "cpu":
            self._filled.late_entries.append((first, effect, ids, biases))
            return
        write_entries(self._words_E2[first : self.num_used], effect, ids, biases)


def write_entries(
    words_E2: torch.Tensor, effect: int, ids: torch.Tensor, biases: torch.Tensor | None
) -> None:
    """Writes one run of entries, on the device of `words_E2`."""
    words_E2[:, 0].copy_(ids.to(torch.int32) | (effect << ENTRY_BITS))
    if biases is not None:
        words_E2[:, 1].copy_(biases.view(torch.int32))


def _add_mask(filled: Filled, row: SampleRow) -> int:
    if row.allowed_mask is None:
        return -1
    filled.masks.append(row.allowed_mask)
    return len(filled.masks) - 1


def _as_int32(word: int) -> int:
    """The low 32 bits of a number as a signed one, which is how int32 tensors hold them."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word
