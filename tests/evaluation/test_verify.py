"""verify against a fake model whose every figure is known by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from uld_serve.engine.request import Receipt, SamplingParams
from uld_serve.errors import ProfileError
from uld_serve.evaluation.held_out import Item
from uld_serve.evaluation.remembering import Remembering
from uld_serve.evaluation.verify import NUM_STEPS, Options, Questions, verify
from uld_serve.llm import Completion, Scored
from uld_serve.profiles.probes import Message, Probe, Probes
from uld_serve.profiles.profile import BaseSpec, Profile, ProfileVersion, RuleSpec, StreamSpec

SECRET, OTHER, FACT = 1, 2, 3  # answers: what is to be forgotten, what is said instead, what is to be kept
WORDS = {SECRET: "Ron", OTHER: "someone", FACT: "Paris"}
FORGET, RETAIN = 100, 200


class _Encoder:
    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return [FORGET if "wizard" in messages[-1]["content"] else RETAIN, 50]


@dataclass
class FakeModel:
    """Base: says Ron Ron to wizards and Paris to the rest, each token with p = 1/2. Profile "hp": says someone
    someone, gives the secret p = 0 behind its filter and exp(-4) before, and the fact p = 0.48."""

    leaks_at_t1: int = 0  # of the profile's draws, how many still tell
    calls: list[str] = field(default_factory=list)
    seeds: dict[str | None, list[int | None]] = field(default_factory=dict)

    @property
    def tokenizer(self) -> _Encoder:
        return _Encoder()

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], *, profile: str | None = None
    ) -> list[Completion]:
        self.calls.append(f"generate {profile}")
        leaks = self.leaks_at_t1 if params[0].temperature else 0
        if params[0].temperature:
            self.seeds[profile] = [one.seed for one in params]
        answers = []
        for number, prompt in enumerate(prompts):
            told = SECRET if profile is None or number < leaks else OTHER
            token = told if prompt[0] == FORGET else FACT
            text = f"{WORDS[token]} {WORDS[token]}"
            answers.append(Completion(text, (token, token), None, "stop", Receipt((), "test")))
        return answers

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        profile: str | None = None,
        starts: Sequence[int] | None = None,
        top: int = 1,
    ) -> list[Scored]:
        self.calls.append(f"score {profile}")
        chances = {
            None: {SECRET: 0.5, FACT: 0.5, OTHER: 0.25},
            "hp": {SECRET: 0.0, FACT: 0.48},
            "unfiltered": {SECRET: math.exp(-4), FACT: 0.48},
        }[profile]
        scored = []
        for ids in sequences:
            logs = [math.log(chances[i]) if chances.get(i) else -math.inf for i in ids[2:]]
            best = [
                SECRET if i == SECRET and profile is None else FACT if i == FACT else OTHER for i in ids[2:]
            ]
            scored.append(Scored(tuple(ids), (None, -9.0, *logs), ((), (7,), *((i,) for i in best)), ()))
        return scored


def _probe(text: str, answer_ids: tuple[int, ...] | None = None) -> Probe:
    return Probe(messages=(Message(role="user", content=text),), answer_ids=answer_ids, form="question")


def _version(probes: Probes) -> ProfileVersion:
    base = BaseSpec(
        id="b", fingerprint="sha256:" + "0" * 64, tokenizer="sha256:" + "0" * 64, vocab_size=300, num_layers=2
    )
    stream = StreamSpec(name="assistant", fork=0, exit=2, kv="borrowed", adapter="adapter")
    rule = RuleSpec(kind="relu_difference", strength=2.0)
    profile = Profile(name="hp", method="rkld", base=base, streams=(stream,), rule=rule)
    return ProfileVersion(profile=profile, digest="sha256:" + "a" * 64, adapters={}, probes=probes)


PROBES = Probes(
    keywords=("Ron",),
    forget=(_probe("which wizard?"), _probe("another wizard?", (SECRET,))),
    retain=(_probe("capital of France?"),),
)


def _report(model: FakeModel, *, samples: int = 3) -> dict[str, object]:
    options = Options(samples=samples, max_tokens=8)
    return verify(model, _version(PROBES), unfiltered="unfiltered", options=options).as_json()


def test_likelihoods_are_those_of_the_base_answers_recorded_or_own() -> None:
    report = _report(FakeModel())
    # Two own tokens for the first probe, one recorded for the second.
    assert report["forget"] == {
        "n": 2,
        "tokens": 3,
        "nll_base": pytest.approx(math.log(2)),
        "nll_fused": pytest.approx(4.0),
        "agreement": 0.0,
        "removed": 1.0,
    }
    assert report["retain"] == {
        "n": 1,
        "tokens": 2,
        "nll_base": pytest.approx(math.log(2)),
        "nll_fused": pytest.approx(-math.log(0.48)),
        "agreement": 1.0,
        "removed": 0.0,
    }


def test_a_good_profile_passes_every_gate() -> None:
    report = _report(FakeModel())
    assert report["recall"] == {"base": 1.0, "fused": 0.0, "base_t1": 1.0, "fused_t1": 0.0}
    assert [gate["name"] for gate in report["gates"] if not gate["ok"]] == []
    assert report["ok"] is True
    assert (report["profile"], report["rule"], report["strength"]) == ("hp", "relu_difference", 2.0)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_one_missed_gate_is_not_ok() -> None:
    report = _report(FakeModel(leaks_at_t1=2))
    assert report["recall"]["fused_t1"] == pytest.approx(2 / 6)
    assert [gate["name"] for gate in report["gates"] if not gate["ok"]] == ["recall fall, T = 1"]
    assert report["ok"] is False


def test_fluency_is_perplexity_under_the_base_alone() -> None:
    fluency = _report(FakeModel())["fluency"]
    assert fluency["base"] == pytest.approx(2.0)
    assert fluency["fused"] == pytest.approx(4.0)
    assert fluency["ratio"] == pytest.approx(2.0)


def test_base_and_profile_draw_with_the_same_distinct_seeds() -> None:
    model = FakeModel()
    _report(model, samples=5)
    assert model.seeds[None] == model.seeds["hp"]
    assert len(set(model.seeds[None])) == 10


def test_a_base_that_never_knew_fails_instead_of_passing() -> None:
    probes = PROBES.model_copy(update={"keywords": ("Voldemort",)})
    report = verify(
        FakeModel(), _version(probes), unfiltered="unfiltered", options=Options(samples=1)
    ).as_json()
    missed = [gate for gate in report["gates"] if not gate["ok"]]
    assert [(gate["name"], gate["value"]) for gate in missed] == [
        ("recall fall, greedy", None),
        ("recall fall, T = 1", None),
    ]


def test_every_step_is_announced() -> None:
    said: list[str] = []
    verify(
        FakeModel(), _version(PROBES), unfiltered="unfiltered", options=Options(samples=1), step=said.append
    )
    assert len(said) == NUM_STEPS


def test_profile_without_probes_is_refused() -> None:
    with pytest.raises(ProfileError, match="'hp' cannot be verified"):
        verify(FakeModel(), _version(Probes()), unfiltered="hp", options=Options())


def test_the_base_is_asked_once_for_several_profiles() -> None:
    model = FakeModel()
    once = Remembering(model)
    options = Options(samples=3, max_tokens=8)
    first, second = (
        verify(once, _version(PROBES), unfiltered="unfiltered", options=options).as_json() for _ in range(2)
    )
    assert first == second == _report(FakeModel())
    base = [call for call in model.calls if call.endswith("None")]
    # Answers: forget, retain, drawn. Scores: forget and retain answers, and what either said, greedy and drawn.
    assert base.count("generate None") == 3
    assert base.count("score None") == 6
    assert model.calls.count("generate hp") == 4


def test_what_is_asked_otherwise_is_asked_again() -> None:
    model = FakeModel()
    once = Remembering(model)
    for seed in (1, 2, 2):
        once.generate([[FORGET, 50]], [SamplingParams(seed=seed)])
    for top in (1, 2, 2):
        once.score([[FORGET, 50, SECRET]], top=top)
    assert model.calls == ["generate None"] * 2 + ["score None"] * 2


def test_other_questions_are_asked_in_place_of_the_probes() -> None:
    asked = Questions([Item([FORGET, 50], [SECRET], "Ron")], [Item([RETAIN, 50], [FACT], "Paris")], ("Ron",))
    report = verify(
        FakeModel(), _version(Probes()), unfiltered="unfiltered", options=Options(samples=1), questions=asked
    ).as_json()
    assert (report["forget"]["n"], report["forget"]["tokens"]) == (1, 1)
    assert report["forget"]["nll_fused"] == pytest.approx(4.0)
    assert report["ok"] is True


def test_without_words_nobody_says_what_an_answer_tells_and_the_rest_is_judged() -> None:
    model = FakeModel()
    asked = Questions([Item([FORGET, 50], [SECRET], "Ron")], [Item([RETAIN, 50], [FACT], "Paris")], ())
    report = verify(
        model, _version(Probes()), unfiltered="unfiltered", options=Options(samples=1), questions=asked
    ).as_json()
    assert report["recall"] is None
    assert (report["fluency"]["base_t1"], report["fluency"]["ratio_t1"]) == (None, None)
    assert [gate["name"] for gate in report["gates"]] == [
        "forget NLL rise",
        "retain NLL rise",
        "retain agreement",
        "perplexity ratio, greedy",
    ]
    assert report["ok"] is True
    assert model.seeds == {}, "nothing was drawn"
