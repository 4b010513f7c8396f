"""Checks and times the sampler at a model's own vocabulary: the same tokens as the torch sampler (G7), none that fp64
would not take (G8), and every kind of rows against its floor and the plain chain (G1). Called by gpu.py; on a CPU the
same calls run in plain torch.

Legend: R rows of logits, B rows to draw, D model width, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from exactness import RULES, exactness, random_streams
from gpu_head import HeadTime, LateTime, head_times, late_times, random_head
from gpu_kernels import Check
from uld_kernels import SampleOutput, SampleRow, SampleShape, StaticSampler, fused_sample, ops

from uld_serve.bench.sampler import DrawTime, measure, over_chain
from uld_serve.bench.sampler_kinds import (
    KINDS,
    ROW_KINDS,
    History,
    kinds_of_batch,
    rotated_logits,
)
from uld_serve.bench.sampler_variants import VARIANTS, VariantName, case_of, missing

CHECKED_ROWS = 32
EXACT_ROWS = 10_000
EXACT_ROWS_ON_CPU = 500
REPEATS = 10
# performance.md's G1, at a vocabulary of 128,256 in fp32.
GOAL_VOCAB = 128_256
GOAL_US = {1: 8.0, 8: 8.0, 32: 15.0, 64: 28.0, 256: 110.0}
GOAL_SHARE, GOAL_SHARE_FROM, GOAL_TIMES_CHAIN = 0.75, 32, 5.0
GOAL_EXTRA_US, GOAL_EXTRA_UP_TO = 12.0, 64
FUSED_KINDS = ("subtract", "relu_difference", "pair_linear")


@dataclass(frozen=True, slots=True)
class Goal:
    """A miss is a figure to explain, not a failure of the run."""

    name: str
    what: str
    value: float
    limit: float
    met: bool


@dataclass(frozen=True, slots=True)
class SamplerReport:
    checks: list[Check]
    times: list[DrawTime]
    heads: list[HeadTime]
    late: list[LateTime]
    goals: list[Goal]
    """A GPU's; none on a CPU."""
    left_out: dict[VariantName, str]

    def lines(self) -> Iterator[str]:
        for check in self.checks:
            yield f"{'ok  ' if check.ok else 'FAIL'} {check.what}: {check.gap:.0f}"
        for name, why in self.left_out.items():
            yield f"{name} is left out: {why}"
        for one in self.times:
            yield (
                f"{one.rows:16} vocab {one.vocab:6} batch {one.batch:4} {one.variant:10} {one.us:10.1f} us "
                f"{one.floor_us / one.us:6.1%} of copy bandwidth"
            )
        for one in self.heads:
            yield f"head and {one.rows:16} batch {one.batch:4} {one.us:10.1f} us, {one.extra_us:.1f} over argmax"
        for one in self.late:
            yield f"assistants' logits, batch {one.batch:4}: whole {one.whole_us:9.1f} us, late {one.late_us:9.1f} us"
        for goal in self.goals:
            yield f"{'met ' if goal.met else 'MISS'} {goal.name} {goal.what}: {goal.value:.2f} of {goal.limit:g}"

    def record(self) -> dict[str, object]:
        """For the report; checks are with all the others."""
        return {
            "times": [one.record() for one in self.times],
            "ratios": over_chain(self.times),
            "heads": [asdict(one) for one in self.heads],
            "late": [asdict(one) for one in self.late],
            "goals": [asdict(goal) for goal in self.goals],
            "left_out": dict(self.left_out),
        }


def sampler_report(
    device: torch.device,
    dtype: torch.dtype,
    *,
    vocab: int,
    width: int,
    batches: Sequence[int],
    bytes_per_s: float,
) -> SamplerReport:
    with torch.inference_mode():
        checks = sampler_checks(device, dtype, vocab=vocab, width=width)
        times, left_out = sampler_times(device, vocab=vocab, batches=batches, bytes_per_s=bytes_per_s)
        heads = head_times(device, dtype, vocab=vocab, width=width, batches=batches)
        late = late_times(device, dtype, vocab=vocab, width=width, batches=batches)
    found = goals(times, heads) if device.type == "cuda" else []
    return SamplerReport(checks, times, heads, late, found, left_out)


def sampler_checks(device: torch.device, dtype: torch.dtype, *, vocab: int, width: int) -> list[Check]:
    checks = proof(device, vocab)
    checks += [check for name in ROW_KINDS for check in token_checks(name, vocab, device)]
    num_rows = EXACT_ROWS if device.type == "cuda" else EXACT_ROWS_ON_CPU
    head = random_head(vocab, width, device, dtype)
    hidden_SND = random_streams(num_rows, width, device, dtype)
    for rule in RULES:
        found = exactness(rule, rule, hidden_SND, head.weight_WD, logits=head.logits)
        what = (
            f"{rule}: tokens and survivors of fp64 in {found.rows} rows "
            f"({found.close_tokens} and {found.close_survivors} left out as too close)"
        )
        checks.append(Check(what, float(found.wrong_tokens + found.wrong_survivors), found.ok))
    return checks


def proof(device: torch.device, vocab: int) -> list[Check]:
    """On a GPU, whether its kernels have passed their trial; otherwise torch samples, and all else here is of torch."""
    if device.type != "cuda":
        return []
    passed = {
        "the Triton sampler has passed its trial on this device": ops.prove(device, vocab),
        "and that of late rows": ops.prove(device, vocab, head_dtype=torch.bfloat16),
    }
    return [Check(what, 0.0 if is_proven else 1.0, is_proven) for what, is_proven in passed.items()]


def token_checks(
    name: str, vocab: int, device: torch.device, *, num_rows: int = CHECKED_ROWS
) -> Iterator[Check]:
    """Rows that differ from the torch sampler's on the CPU, from themselves alone, and from the static sampler's."""
    history = History.random(num_rows, vocab, device)
    kinds = kinds_of_batch(name, num_rows)
    rows = [replace(kind.row(n, num_rows, history), is_measured=True) for n, kind in enumerate(kinds)]
    logits_RV = rotated_logits(num_rows, vocab, torch.float32, device, at_most=1)[0]
    together = _drawn(logits_RV, rows)
    by_torch = _drawn(logits_RV.cpu(), [_on_host(row) for row in rows])
    yield _equal(f"{name}: tokens of the torch sampler", together, by_torch, bits=False)
    alone = [_drawn(logits_RV, [row]) for row in rows[: len(KINDS)]]
    singles = [torch.cat([one.token_ids_B for one in alone]), torch.cat([one.logprob_B for one in alone])]
    is_same = torch.equal(singles[0], together.token_ids_B[: len(alone)])
    is_same &= torch.equal(singles[1], together.logprob_B[: len(alone)])
    yield Check(f"{name}: alone as beside others, to the bit", 0.0 if is_same else 1.0, is_same)
    static = StaticSampler(
        SampleShape.of(rows, num_rows=num_rows + 3), vocab_size=vocab, protected_ids=_no_ids(device), device=device
    )  # fmt: skip
    static.fill(rows)
    static.run(logits_RV)
    yield _equal(f"{name}: the static sampler, to the bit", static.output(), together, bits=True)


def _drawn(logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> SampleOutput:
    none = _no_ids(logits_RV.device)
    return fused_sample(logits_RV, rows, vocab_size=logits_RV.shape[1], protected_ids=none)


def _equal(what: str, ours: SampleOutput, others: SampleOutput, *, bits: bool) -> Check:
    is_other_B = ours.token_ids_B.cpu() != others.token_ids_B.cpu()
    is_other_B |= ours.status_B.cpu() != others.status_B.cpu()
    if bits:
        is_other_B |= ours.logprob_B.cpu() != others.logprob_B.cpu()
    num_other = int(is_other_B.sum().item())
    return Check(what, float(num_other), num_other == 0)


def _on_host(row: SampleRow) -> SampleRow:
    if row.output_ids is None or row.prompt_ids is None:
        return row
    return replace(row, output_ids=row.output_ids.cpu(), prompt_ids=row.prompt_ids.cpu())


def sampler_times(
    device: torch.device, *, vocab: int, batches: Sequence[int], bytes_per_s: float
) -> tuple[list[DrawTime], dict[VariantName, str]]:
    """And which variants were left out, and why."""
    left_out = {name: why for name in VARIANTS if (why := missing(name, device)) is not None}
    if device.type == "cpu":
        left_out.setdefault("compiled", "it compiles for 10 s and more for each case")
    variants = [name for name in VARIANTS if name not in left_out]
    times: list[DrawTime] = []
    for batch in batches:
        logits_NRV = rotated_logits(batch, vocab, torch.float32, device, at_most=_at_most(device))
        history = History.random(batch, vocab, device)
        for name in ROW_KINDS:
            case = case_of(name, batch, logits_NRV, history)
            # One compilation a kind is enough to tell by, and each takes the device's time.
            named = (
                variants if batch == min(64, max(batches)) else [one for one in variants if one != "compiled"]
            )
            times += measure(case, named, REPEATS, bytes_per_s=bytes_per_s)
    return times, left_out


def _at_most(device: torch.device) -> int | None:
    return None if device.type == "cuda" else REPEATS


def goals(times: Sequence[DrawTime], heads: Sequence[HeadTime]) -> list[Goal]:
    """G1 and G2 wherever they speak of what was measured."""
    found: list[Goal] = []
    by_case: dict[tuple[str, int, int], dict[VariantName, DrawTime]] = {}
    for one in times:
        by_case.setdefault((one.rows, one.vocab, one.batch), {})[one.variant] = one
    for (rows, vocab, batch), variants in by_case.items():
        ours = variants.get("static")
        if ours is None or vocab != GOAL_VOCAB or rows not in FUSED_KINDS:
            continue
        where = f"{rows}, batch {batch}"
        if batch in GOAL_US:
            found.append(_at_most_goal("G1", f"us, {where}", ours.us, GOAL_US[batch]))
        if batch >= GOAL_SHARE_FROM:
            share = ours.floor_us / ours.us
            found.append(_at_least_goal("G1", f"share of copy bandwidth, {where}", share, GOAL_SHARE))
        if "chain" in variants:
            ratio = variants["chain"].us / ours.us
            found.append(_at_least_goal("G1", f"times the torch chain, {where}", ratio, GOAL_TIMES_CHAIN))
        if "flashinfer" in variants:
            ratio = variants["flashinfer"].us / ours.us
            found.append(_at_least_goal("G1", f"times FlashInfer's sampling, {where}", ratio, 1.0))
    for one in heads:
        if one.batch <= GOAL_EXTRA_UP_TO:
            what = f"us over head and argmax, {one.rows}, batch {one.batch}"
            found.append(_at_most_goal("G2", what, one.extra_us, GOAL_EXTRA_US))
    return found


def _at_most_goal(name: str, what: str, value: float, limit: float) -> Goal:
    return Goal(name, what, value, limit, value <= limit)


def _at_least_goal(name: str, what: str, value: float, limit: float) -> Goal:
    return Goal(name, what, value, limit, value >= limit)


def _no_ids(device: torch.device) -> torch.Tensor:
    return torch.tensor([], dtype=torch.int64, device=device)
