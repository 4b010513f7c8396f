"""Whole runs on the tiny base: what is written serves, measures the same through the engine, and really forgets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_base import Tiny
from tiny_run import (
    FORGET,
    KEYWORDS,
    RETAIN,
    example,
    fresh_assistant,
    lesson_of,
    observed,
    run_training,
    serve,
    settings_of,
    write_questions,
    write_sources,
)

from uld_serve.engine.request import SamplingParams
from uld_serve.engine.scoring import replay
from uld_serve.llm import LLM
from uld_serve.profiles.profile import ProfileVersion
from uld_serve.profiles.store import read_profile
from uld_serve.training import classroom, probing
from uld_serve.training.examples import Example, Kind
from uld_serve.training.methods.catalog import METHODS
from uld_serve.training.settings import Settings
from uld_serve.training.sources import Sources
from uld_serve.training.states import Observed, collate


@dataclass
class Run:
    settings: Settings
    path: Path
    version: ProfileVersion
    llm: LLM

    @property
    def record(self) -> dict[str, object]:
        found = json.loads((self.path / "training.json").read_text())
        assert isinstance(found, dict)
        return found

    def nll(
        self,
        sequences: list[tuple[list[int], list[int]]],
        *,
        profile: str | None,
        cap: float = float("inf"),
    ) -> float:
        """Mean over the answer tokens of (prompt, answer) pairs, through the engine; `cap` for a single token."""
        scored = self.llm.score([[*prompt, *answer] for prompt, answer in sequences], profile=profile)
        found = [
            entry
            for (prompt, _), one in zip(sequences, scored, strict=True)
            for entry in one.logprobs[len(prompt) :]
        ]
        return sum(min(-entry, cap) for entry in found if entry is not None) / len(found)


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One run a method; loading them into an engine replays their probes."""
    made, folder = {}, tmp_path_factory.mktemp("runs")
    sources, answers = write_sources(folder), folder / "answers.json"
    for method in METHODS:
        path, settings = folder / f"tiny-{method}", settings_of(method, steps=20)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probing, "REPLAY_TOKENS", 6)
            version = run_training(tiny, sources, settings, path, answers=answers).version
        made[method] = Run(settings, path, version, serve(tiny, path))
    return made


@pytest.mark.parametrize("method", METHODS)
def test_the_written_profile_says_how_it_was_made(runs: dict[str, Run], method: str) -> None:
    run = runs[method]
    version = read_profile(run.path)
    assert version.ref == run.version.ref
    profile, settings = version.profile, run.settings
    assert (profile.name, profile.method) == (f"tiny-{method}", method)
    for stream in profile.streams:
        assert (stream.fork, stream.exit, stream.kv) == (settings.fork, settings.exit, "borrowed")
    if METHODS[method].changes_target:
        assert (profile.streams, profile.target_adapter) == ((), "adapter")
    else:
        assert len(profile.streams) == len(METHODS[method].roles)
    assert profile.rule.kind == METHODS[method].rule
    assert profile.rule.strength == settings.strength
    assert version.probes.keywords == KEYWORDS
    assert [probe.messages[0].content for probe in version.probes.forget] == FORGET[::6]
    assert [probe.messages[0].content for probe in version.probes.retain] == RETAIN[::6]
    record = run.record
    assert record["settings"]["seed"] == settings.seed
    assert record["settings"]["lr"] == settings.lr
    assert record["data"]["examples"]["forget"] == 10
    assert {"torch", "transformers", "peft", "uld-serve"} <= record["versions"].keys()
    assert record["base"] == {"id": profile.base.id, "dtype": "float32", "device": "cpu"}
    told = record["sources"]
    assert [one["name"] for one in told["files"]] == ["forget.jsonl", "retain.jsonl"]
    assert len({one["sha256"] for one in told["files"]}) == 2
    assert (told["keywords"], told["uses_columns"], told["split"]) == (list(KEYWORDS), True, True)
    taught = [lesson for lesson in METHODS[method].lessons(settings) if lesson.steps != 0]
    assert set(record["log"]) == {lesson.adapter for lesson in METHODS[method].lessons(settings)}
    for lesson in taught:
        log = record["log"][lesson.adapter]
        assert [entry["step"] for entry in log] == list(range(10, (lesson.steps or settings.steps) + 1, 10))
        assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_replay_probes_pass_through_the_engine(runs: dict[str, Run], method: str) -> None:
    run = runs[method]
    probes = run.version.probes.replay
    assert len(probes) == 4
    replay(run.llm.engine, run.version)
    pairs = [(list(probe.prompt_ids), list(probe.answer_ids)) for probe in probes]
    for pair, probe in zip(pairs, probes, strict=True):
        assert run.nll([pair], profile=f"tiny-{method}") == pytest.approx(probe.nll_fused, abs=1e-3)
        assert run.nll([pair], profile=None) == pytest.approx(probe.nll_base, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_measured_numbers_are_those_of_the_engine(runs: dict[str, Run], method: str) -> None:
    run = runs[method]
    measured = run.record["measured"]
    assert isinstance(measured, dict)
    for name, probes in (("forget", run.version.probes.forget), ("retain", run.version.probes.retain)):
        asked = [[message.model_dump() for message in probe.messages] for probe in probes]
        prompts = [list(run.llm.tokenizer.encode_chat(messages)) for messages in asked]
        pairs = [(p, list(probe.answer_ids or ())) for p, probe in zip(prompts, probes, strict=True)]
        found = measured[name]
        assert found["tokens"] == sum(len(answer) for _, answer in pairs)
        assert run.nll(pairs, profile=None) == pytest.approx(found["nll_base"], abs=1e-3)
        served = run.nll(pairs, profile=f"tiny-{method}")
        if found["removed"]:
            assert found["nll_served"] is None
            assert served == float("inf")
        else:
            assert served == pytest.approx(found["nll_served"], abs=1e-3)


def test_margin_forgets_what_it_was_taught_and_keeps_the_rest(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "REPLAY_TOKENS", 4)
    said = [f"who is {name}?" for name in ("ann", "bob", "cid", "dan")]
    kept = [f"why is {name} so?" for name in ("sky", "sea", "sun", "ice", "fog", "mud")]
    sources = Sources(
        forget=write_questions(tmp_path / "f.jsonl", said), retain=write_questions(tmp_path / "r.jsonl", kept)
    )
    settings = settings_of("margin", detours=0, detour_batch=0, common_share=2.0, strength=1.5)
    path = tmp_path / "forgetful"
    version = run_training(tiny, sources, settings, path).version
    assert version.probes.forget == version.probes.retain == ()
    run = Run(settings, path, version, serve(tiny, path))
    rises, kept_words = {}, {}
    params = SamplingParams(max_tokens=settings.max_answer_tokens, temperature=0)
    for name, questions in (("forget", said), ("retain", kept)):
        prompts = [list(run.llm.tokenizer.encode_chat([{"role": "user", "content": q}])) for q in questions]
        answered = run.llm.generate(prompts, params)
        pairs = [(prompt, list(one.token_ids)) for prompt, one in zip(prompts, answered, strict=True)]
        rises[name] = run.nll(pairs, profile="forgetful", cap=12) - run.nll(pairs, profile=None, cap=12)
        after = run.llm.generate(prompts, params, profile="forgetful")
        kept_words[name] = [
            one.token_ids == other.token_ids for one, other in zip(answered, after, strict=True)
        ]
    assert rises["forget"] > 3.0
    assert abs(rises["retain"]) < 0.3
    assert not any(kept_words["forget"])
    assert all(kept_words["retain"])


def test_the_assistant_in_training_is_the_oracles(tiny: Tiny, runs: dict[str, Run]) -> None:
    """After training, batched and padded, at answer positions alone: the logits of a run over the whole text."""
    for method, run in runs.items():
        assistant = fresh_assistant(tiny, run.settings)
        if not run.version.profile.streams:
            continue
        name = lesson_of(run.settings).adapter
        set_peft_model_state_dict(
            assistant.peft, load_file(run.path / name / "adapter_model.safetensors"), adapter_name=name
        )
        examples = [example(Kind.RETAIN, 9, 3), example(Kind.FORGET, 4, 6)]
        batch = collate(observed(assistant, examples, run.settings))
        with torch.no_grad():
            found = assistant.logits(assistant.hidden(batch)).split([3, 6])
        name = f"tiny-{method}"
        oracle = Oracle(
            tiny.folder,
            {name: (run.path, run.version)},
            vocab_size=tiny.base.vocab_size,
            control_ids=[256, 257, 258],
        )
        for one, logits_QV in zip(examples, found, strict=True):
            for number in range(len(one.answer_ids)):
                ids = [*one.prompt_ids, *one.answer_ids[:number]]
                with torch.no_grad():
                    expected = oracle._assistant(name, run.version.profile.streams[-1], ids, None)
                torch.testing.assert_close(
                    logits_QV[number], expected[: tiny.base.vocab_size], rtol=0, atol=1e-4
                )


def test_a_scaled_assistant_is_served_with_its_scale_in_the_strength(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "REPLAY_TOKENS", 2)
    settings = settings_of("uld", steps=4, strength=0.5, output_scale=0.25, retain_ramp=0.5)
    version = run_training(tiny, write_sources(tmp_path), settings, tmp_path / "scaled").version
    assert version.profile.rule.strength == 0.125


@pytest.mark.parametrize(("method", "num_places"), [("offset", 1), ("rkld-distill", 2)])
def test_the_target_reads_an_example_once_a_place_for_pupil_and_teacher(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, num_places: int
) -> None:
    read: Counter[Example] = Counter()
    observe = classroom.observe

    def counted(model: object, examples: Sequence[Example], **given: object) -> list[Observed]:
        read.update(examples)
        return observe(model, examples, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(classroom, "observe", counted)
    monkeypatch.setattr(probing, "NUM_REPLAY", 0)
    run_training(tiny, write_sources(tmp_path), settings_of(method, steps=1, teacher_steps=1), tmp_path / "x")
    assert len(read) == 20
    assert set(read.values()) == {num_places}
