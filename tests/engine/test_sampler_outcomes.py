"""Wants to rows and outputs to outcomes: every parameter reaches its row, every flag becomes that request's error, and
scores combined with other profiles than the request's are no answer."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from types import SimpleNamespace

import pytest
import torch
from fake_engine import FakeTokenizer
from uld_kernels import SampleRow, Term, ops, rules

from uld_serve.engine import sampler as sampler_module
from uld_serve.engine.batch import Want
from uld_serve.engine.request import Measure, ReceiptEntry, SamplingParams
from uld_serve.engine.sampler import InFlight, Outcome, Sampler, same_draws
from uld_serve.engine.sequence import Sequence
from uld_serve.engine.streams import LanePlan, Plan, TermPlan
from uld_serve.errors import NumericalError
from uld_serve.model.head import Scores

ENTRY = ReceiptEntry("acme", "sha256:" + "a" * 64, "subtract", 2.0)
TERM = TermPlan("subtract", 2.0, {"a": 0}, "plausibility", 0.01, 2, True, 0, 0.0, 77, ENTRY)
RANK = TermPlan("pair_rank", 1.0, {"q": 0, "p": 1}, "none", 0.0, 1, False, 3, 0.0, 78, ENTRY)
SOFT = TermPlan("relu_difference", 1.0, {"a": 1}, "fused", 0.5, 1, False, 0, 1.5, 79, ENTRY)
LOGITS = torch.tensor([[3.0, 2.0, 1.0, 0.0], [9.0, 0.0, 0.0, 0.0]])


class Tokenizer(FakeTokenizer):
    control_ids = (3,)
    eos_ids = (3,)


def sampler(**changes: object) -> Sampler:
    return Sampler(Tokenizer(), 4, torch.device("cpu"), "v1", **changes)


def plan(*terms: TermPlan, compose: str = "max") -> Plan:
    return Plan((), terms, (), compose, (LanePlan("target", "0:"),), None, 0)


def want(
    *terms: TermPlan,
    target: int | None = None,
    row: int = 0,
    output: tuple[int, ...] = (),
    grammar: object = None,
    compose: str = "max",
    **params: object,
) -> Want:
    sequence = Sequence(
        "r", [1, 2], SamplingParams(**params), plan(*terms, compose=compose), 5, None, 64, grammar
    )
    sequence.output_ids.extend(output)
    return Want(sequence, 2 + len(output), row, (1, 1), target)


def outcomes(*wants: Want, logits: torch.Tensor = LOGITS, **changes: object) -> list[Outcome]:
    ours = sampler(**changes)
    return ours.collect(ours.launch(wants, Scores(logits)))


def row_of(one: Want, **changes: object) -> SampleRow:
    (row,) = sampler(**changes).rows([one])
    return row


def test_every_parameter_reaches_its_row() -> None:
    params = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "logprobs": 2, "min_tokens": 4}
    row = row_of(want(TERM, output=(0,), stop_token_ids=(1,), logit_bias={2: 1.5, 0: -2.0}, **params))
    assert (row.row_b, row.temperature, row.top_k, row.top_p, row.min_p) == (0, 0.5, 3, 0.9, 0.1)
    assert (row.seed, row.position, row.num_logprobs, row.is_measured) == (5, 3, 2, True)
    assert row.banned_ids.tolist() == [1, 3]
    assert [one.tolist() for one in row.logit_bias] == [[2, 0], [1.5, -2.0]]
    assert (row.prompt_ids, row.output_ids, row.allowed_mask) == (None, None, None)


def test_least_parameters_leave_the_row_alone() -> None:
    row = row_of(want())
    assert (row.terms, row.compose, row.banned_ids, row.logit_bias) == ((), rules.COMPOSE_MAX, None, None)
    assert (row.num_logprobs, row.is_measured, row.temperature) == (0, False, 1.0)
    assert row_of(want(compose="sum")).compose == rules.COMPOSE_SUM
    assert [row_of(want(temperature=t)).temperature for t in (1e-5, 0.9e-5)] == [1e-5, 0.0]
    assert row_of(want(min_tokens=2, output=(0,))).banned_ids.tolist() == [3]
    assert row_of(want(min_tokens=2, output=(0, 0))).banned_ids is None


@pytest.mark.parametrize(
    ("params", "prompt", "output"),
    [
        ({"repetition_penalty": 1.5}, [1, 2], [0]),
        ({"presence_penalty": 0.5}, None, [0]),
        ({"frequency_penalty": 0.5}, None, [0]),
    ],
)
def test_penalties_bring_the_tokens_that_they_look_at(
    params: dict[str, float], prompt: list[int] | None, output: list[int]
) -> None:
    row = row_of(want(output=(0,), **params))
    assert (None if row.prompt_ids is None else row.prompt_ids.tolist()) == prompt
    assert row.output_ids.tolist() == output
    assert {name: getattr(row, name) for name in params} == params


def test_a_draw_that_looks_back_needs_every_token_before_it() -> None:
    late = replace(want(presence_penalty=0.5), position=3)
    with pytest.raises(AssertionError, match="tokens unknown"):
        row_of(late)


def test_a_grammar_says_what_is_allowed_after_what_was_said() -> None:
    mask = torch.tensor([True, False, True, False])
    grammar = SimpleNamespace(allowed=lambda ids: mask if ids == [0] else None)
    assert row_of(want(output=(0,), grammar=grammar)).allowed_mask.tolist() == mask.tolist()


def test_terms_carry_their_rules_codes_and_rows() -> None:
    row = row_of(want(TERM, RANK, SOFT))
    assert row.terms == (
        Term(rules.SUBTRACT, 2.0, 77, row_a=1, filter_mode=rules.PLAUSIBILITY, tau=0.01, min_keep=2, protect=True),
        Term(rules.PAIR_RANK, 1.0, 78, row_q=1, row_p=1, min_keep=1, rank_k=3),
        Term(
            rules.RELU_DIFFERENCE, 1.0, 79, row_a=1, filter_mode=rules.FUSED, tau=0.5, min_keep=1, dead_zone=1.5
        ),
    )  # fmt: skip


def test_rows_can_be_read_from_other_places() -> None:
    (row,) = sampler().rows([want(TERM, row=1)], places=[4, 7])
    assert (row.row_b, row.terms[0].row_a) == (7, 7)
    scored = sampler()._scoring_row(want(TERM, target=2, row=1, compose="sum", prompt_logprobs=3))
    assert (scored.row_b, scored.terms[0].row_a, scored.compose) == (1, 1, rules.COMPOSE_SUM)
    assert (scored.position, scored.num_logprobs) == (2, 3)


def test_draws_and_scores_of_one_step_come_back_in_order() -> None:
    wants = [
        want(target=1, prompt_logprobs=1),
        want(temperature=0.0),
        want(target=2),
        want(TERM, temperature=0.0),
    ]
    found = outcomes(*wants)
    assert [one.want for one in found] == wants
    assert [one.token_id for one in found] == [1, 0, 2, 1]
    assert [one.error for one in found] == [None] * 4
    assert [one.receipt.profiles for one in found] == [(), (), (), (ENTRY,)]
    assert found[0].receipt.engine == "v1"
    assert [None if one.logprob is None else len(one.logprob.top) for one in found] == [1, None, 0, None]


def test_log_probabilities_are_of_the_token_and_of_as_many_as_were_asked_for() -> None:
    few, many, none = outcomes(*(want(temperature=0.0, logprobs=n) for n in (1, 3, None)))
    expected = LOGITS[0].log_softmax(-1).tolist()
    assert [top[0] for top in many.logprob.top] == [0, 1, 2]
    assert [top[2] for top in many.logprob.top] == pytest.approx(expected[:3])
    assert few.logprob.top == many.logprob.top[:1]
    assert (few.logprob.token_id, few.logprob.text, few.logprob.bytes) == (0, "\0", b"\0")
    assert few.logprob.logprob == pytest.approx(expected[0])
    assert none.logprob is None


@pytest.mark.parametrize(
    ("logits", "params", "code"),
    [
        (torch.tensor([[nan, 0.0, 0.0, 0.0]] * 2), {}, "numerical_error"),
        (torch.tensor([[-inf, -inf, -inf, 0.0]] * 2), {"min_tokens": 1}, "nothing_kept"),
    ],
)
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_flagged_row_is_its_requests_error(
    logits: torch.Tensor, params: dict[str, object], code: str, logprobs: int | None
) -> None:
    (found,) = outcomes(want(TERM, logprobs=logprobs, **params), logits=logits, measure_every=1)
    assert isinstance(found.error, NumericalError)
    assert (found.error.code, found.token_id, found.logprob, found.measure) == (code, -1, None, None)


def test_some_tokens_are_measured_and_no_given_one() -> None:
    wants = [want(TERM), want(TERM, output=(0,)), want(TERM, output=(0, 0)), want()]
    assert [type(one.measure) for one in outcomes(*wants, measure_every=2)] == [
        Measure, type(None), Measure, type(None),
    ]  # fmt: skip
    assert outcomes(wants[0])[0].measure is None
    assert outcomes(want(TERM, target=0), measure_every=1)[0].measure is None
    assert [row_of(one, measure_every=2).is_measured for one in wants] == [True, False, True, False]


def test_scores_of_other_profiles_are_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.fused_sample

    def without_terms(logits: torch.Tensor, rows: list[SampleRow], **given: object) -> object:
        return real(logits, [replace(row, terms=()) for row in rows], **given)

    monkeypatch.setattr(ops, "fused_sample", without_terms)
    assert outcomes(want())[0].error is None
    with pytest.raises(AssertionError, match="other profiles"):
        outcomes(want(TERM))


def test_what_a_recording_drew_is_kept_when_its_buffers_are_written_again() -> None:
    ours, wants = sampler(), [want(temperature=0.0, logprobs=1), want(TERM, temperature=0.0)]
    out = ours.draw(ours.rows(wants), Scores(LOGITS))
    flight = ours.drawn(wants, out)
    for column in (out.token_ids_B, out.status_B, out.logprob_B, out.top_ids_BN):
        column.fill_(3)
    assert [one.token_id for one in ours.collect(flight)] == [0, 1]
    assert flight.drawn.token_ids_B.tolist() == [0, 1]
    assert flight.drawn.row_of == {one.sequence: row for row, one in enumerate(wants)}
    launched = ours.launch(wants, Scores(LOGITS))
    assert launched.drawn.row_of == flight.drawn.row_of
    assert ours.launch([want(target=1)], Scores(LOGITS)).drawn is None


def test_collecting_waits_for_the_device() -> None:
    waited: list[bool] = []
    done = SimpleNamespace(synchronize=lambda: waited.append(True))
    assert sampler().collect(InFlight([], (), None, done)) == []
    assert waited == [True]


@pytest.mark.parametrize("is_proven", [True, False])
def test_kernels_that_are_proven_share_one_workspace(
    monkeypatch: pytest.MonkeyPatch, is_proven: bool
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(ops, "prove", lambda *_, **given: asked.append(given) or is_proven)
    monkeypatch.setattr(sampler_module, "StaticSampler", lambda shape, **given: given | {"shape": shape})
    ours = sampler(late_head_dtype=torch.bfloat16, workspace_bytes=512)
    assert asked == [{}, {"head_dtype": torch.bfloat16}]
    made = ours.static("a shape")
    assert (made["shape"], made["vocab_size"], made["device"]) == ("a shape", 4, torch.device("cpu"))
    assert made["protected_ids"].tolist() == [3]
    assert (made["workspace"] is None) == (not is_proven)
    assert sampler().static("a shape")["workspace"] is None


def test_draws_are_the_same_only_with_equal_tokens_flags_and_terms() -> None:
    ours, wants = sampler(), [want(TERM, temperature=0.0)]
    one, same = (ours.draw(ours.rows(wants), Scores(LOGITS)) for _ in range(2))
    assert same_draws(one, same)
    assert not same_draws(one, replace(same, digests=[(1,)]))
    assert not same_draws(one, replace(same, token_ids_B=same.token_ids_B + 1))
    assert not same_draws(one, replace(same, status_B=same.status_B + 1))
