"""Answers keep to their JSON schema: under every rule, in any company, across preemptions and beside overlap; and what
cannot be kept to is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import jsonschema
import pytest
import torch
from oracle import Oracle
from recorded_run import RecordedRun
from tiny_base import RULES, Tiny
from uld_kernels import reference

from uld_serve.engine.async_engine import AsyncEngine
from uld_serve.engine.cuda_graphs import GraphedRunner
from uld_serve.engine.engine import Engine
from uld_serve.engine.grammar import MAX_COMPILED, MAX_SCHEMA_CHARS, MAX_SCHEMA_VALUES, Grammars
from uld_serve.engine.plan import Applied, Decision
from uld_serve.engine.request import Delta, SamplingParams
from uld_serve.errors import InvalidRequest

MakeEngine = Callable[..., Engine]
SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"a": {"enum": ["owl", "toad", None]}},
    "required": ["a"],
    "additionalProperties": False,
}
ASK = SamplingParams(max_tokens=300, temperature=0.9, seed=5, logprobs=2, json_schema=json.dumps(SCHEMA))
PROMPT = [(31 + 7 * i) % 250 for i in range(20)]
NAMES = [(), *((name,) for name in RULES if name != "ranked"), ("late-fork", "truncated")]


def decision(tiny: Tiny, names: tuple[str, ...]) -> Decision:
    applied = [Applied(tiny.version(name)) for name in names]
    return Decision.forgetting(applied) if applied else Decision.base()


def run(engine: Engine) -> dict[str, list[Delta]]:
    deltas: dict[str, list[Delta]] = {}
    while engine.has_work:
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        engine.check_integrity()
    return deltas


def answer(deltas: list[Delta]) -> object:
    assert deltas[-1].finish_reason == "stop", deltas[-1].error
    return json.loads("".join(delta.text for delta in deltas))


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("names", NAMES, ids=lambda names: "+".join(names) or "base")
def test_answer_keeps_to_the_schema_and_equals_the_oracle(
    tiny: Tiny, oracle: Oracle, make_engine: MakeEngine, names: tuple[str, ...]
) -> None:
    engine = make_engine()
    engine.add("a", PROMPT, ASK, decision(tiny, names))
    deltas = run(engine)["a"]
    jsonschema.validate(answer(deltas), SCHEMA)
    assert [entry.name for entry in deltas[-1].receipt.profiles] == list(names)
    if len(names) < 2:
        assert tokens(deltas) == expected(oracle, engine, names)


def expected(oracle: Oracle, engine: Engine, names: tuple[str, ...]) -> list[int]:
    compiled = engine.grammars.compiled(ASK.json_schema)
    drawn = oracle.generate(
        PROMPT,
        ASK.max_tokens,
        list(names),
        eos_ids=engine.tokenizer.eos_ids,
        temperature=ASK.temperature,
        seed=ASK.seed,
        allowed=lambda so_far: compiled.start().allowed(so_far),
    )
    return [token.token_id for token in drawn]


def test_the_mask_comes_before_the_filters_maximum(
    tiny: Tiny, oracle: Oracle, make_engine: MakeEngine
) -> None:
    """Steps at which the plausibility filter of the whole vocabulary would leave nothing that the schema allows."""
    engine, rule = make_engine(), tiny.version("truncated").profile.rule
    engine.add("a", PROMPT, ASK, decision(tiny, ("truncated",)))
    drawn = tokens(run(engine)["a"])
    compiled, num_emptied = engine.grammars.compiled(ASK.json_schema), 0
    for end in range(len(drawn)):
        logits_RV, _ = oracle._logits([*PROMPT, *drawn[:end]], ["truncated"])
        kept_V = reference.plausibility_keep(logits_RV[0], tau=rule.filter.tau, min_keep=rule.filter.min_keep)
        num_emptied += not (kept_V & compiled.start().allowed(drawn[:end])).any()
    assert num_emptied > 0


def test_rows_with_and_without_a_schema_do_not_disturb_each_other(
    tiny: Tiny, make_engine: MakeEngine
) -> None:
    asks = {
        f"{name or 'base'}-{kind}": (params, (name,) if name else ())
        for name in (None, "truncated")
        for kind, params in {"json": ASK, "text": SamplingParams(max_tokens=12, seed=5)}.items()
    }
    alone = {}
    for name, (params, names) in asks.items():
        engine = make_engine()
        engine.add(name, PROMPT, params, decision(tiny, names))
        alone |= run(engine)
    engine = make_engine()
    for name, (params, names) in asks.items():
        engine.add(name, PROMPT, params, decision(tiny, names))
    together = run(engine)
    assert {name: tokens(got) for name, got in together.items()} == {
        name: tokens(got) for name, got in alone.items()
    }


@pytest.mark.parametrize("overlap", [False, True])
def test_a_preempted_answer_goes_on_where_it_was(tiny: Tiny, make_engine: MakeEngine, overlap: bool) -> None:
    asks = [(f"{name}-{seed}", name, seed) for name in ("late-fork", "truncated") for seed in (1, 2)]
    found = []
    for settings in ({}, {"block_size": 4, "kv_cache_bytes": 56 * 512, "max_model_len": 60}):
        engine = make_engine(overlap=overlap, **settings)
        for request_id, name, seed in asks:
            engine.add(request_id, PROMPT, replace(ASK, seed=seed, max_tokens=40), decision(tiny, (name,)))
        found.append({name: tokens(got) for name, got in run(engine).items()})
    assert engine.scheduler.num_preemptions > 0
    assert found[0] == found[1]


def test_rows_with_a_schema_never_run_a_step_ahead(tiny: Tiny, make_engine: MakeEngine) -> None:
    engine, num_ahead = make_engine(overlap=True), 0
    engine.add("text", PROMPT, SamplingParams(max_tokens=40, ignore_eos=True, seed=1), Decision.base())
    engine.add("json", PROMPT, replace(ASK, max_tokens=20), decision(tiny, ("late-fork",)))
    while engine.has_work:
        engine.step()
        if engine.ahead is not None:
            num_ahead += 1
            assert [item for item in engine.ahead.scheduled if item.sequence.request_id == "json"] == []
    assert num_ahead > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_recorded_steps_draw_under_the_schema_too(tiny: Tiny, make_engine: MakeEngine, overlap: bool) -> None:
    found = []
    for records in (False, True):
        engine = make_engine(overlap=overlap and records)
        if records:
            engine.planner.defers_logits = False  # as on a GPU
            engine.runner = GraphedRunner.around(engine.runner, RecordedRun, max_rows=8)
        for number, name in enumerate(("late-fork", "truncated")):
            engine.add(name, PROMPT, replace(ASK, logprobs=None, seed=number), decision(tiny, (name,)))
        found.append({name: tokens(got) for name, got in run(engine).items()})
    assert found[0] == found[1]
    assert engine.runner.graphs.num_replayed > 10


def test_a_step_that_is_run_again_asks_for_the_same_mask(make_engine: MakeEngine) -> None:
    state = make_engine().grammars.compiled(ASK.json_schema).start()
    first = state.allowed([])
    assert torch.equal(state.allowed([]), first)
    assert first[ord("{")]
    assert torch.equal(state.allowed([ord("{")]), state.allowed([ord("{")]))
    assert not torch.equal(state.allowed([ord("{")]), first)


class Ambiguous:
    """A matcher that comes to its limit after some masks."""

    def __init__(self, matcher: object, num_masks: int) -> None:
        self.matcher, self.num_masks = matcher, num_masks

    def consume_tokens(self, token_ids: list[int]) -> bool:
        return self.matcher.consume_tokens(token_ids)

    def compute_bitmask(self) -> bytes:
        self.num_masks -= 1
        return self.matcher.compute_bitmask()

    def is_accepting(self) -> bool:
        return self.matcher.is_accepting()

    def is_error(self) -> bool:
        return self.num_masks < 0


def test_a_mask_that_could_not_be_made_is_not_the_one_before(make_engine: MakeEngine) -> None:
    """The step that fails is run again, and the state is then asked a second time."""
    engine = make_engine()
    for name in ("a", "b"):
        engine.add(name, PROMPT, ASK, Decision.base())
    state = engine.sequences["a"].grammar
    state._matcher = Ambiguous(state._matcher, 3)
    found = run(engine)
    assert (found["a"][-1].finish_reason, found["a"][-1].error.code) == ("error", "response_format_failed")
    assert len(tokens(found["a"])) == 3
    jsonschema.validate(answer(found["b"]), SCHEMA)


def test_length_in_the_middle_is_reported_as_length(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", PROMPT, replace(ASK, max_tokens=5), Decision.base())
    deltas = run(engine)["a"]
    assert deltas[-1].finish_reason == "length"
    assert "".join(delta.text for delta in deltas).startswith("{")


def test_logprobs_are_of_the_tokens_that_the_schema_allows(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("a", PROMPT, ASK, Decision.base())
    entries = [entry for delta in run(engine)["a"] for entry in delta.logprobs or ()]
    first = entries[0]
    assert (first.token_id, first.logprob) == (ord("{"), pytest.approx(0.0, abs=1e-6))
    assert [value for _, _, value in first.top[1:] if value > -9999] == []


def test_json_object_gives_any_object(make_engine: MakeEngine) -> None:
    engine = make_engine()
    # A closing brace is likelier than what a random model would go on with for ever.
    params = replace(ASK, json_schema='{"type":"object"}', logit_bias={ord("}"): 100.0})
    engine.add("a", PROMPT, params, Decision.base())
    assert answer(run(engine)["a"]) == {}


BAD = {
    "not JSON": "{",
    "no object": "[1]",
    "unknown type": '{"type":"secretword"}',
    "unsatisfiable": '{"enum":[]}',
    "endless": '{"$ref":"#"}',
    "another host": '{"$ref":"http://127.0.0.1:9/secretword"}',
    "a file": '{"$ref":"file:///etc/secretword"}',
    "unsupported": '{"type":"array","items":{},"uniqueItems":true}',
    "lenient": '{"x-guidance":{"lenient":true},"type":"array","uniqueItems":true}',
    "bad pattern": '{"type":"string","pattern":"secretword("}',
    "long": json.dumps({"const": "x" * MAX_SCHEMA_CHARS}),
    "wide": json.dumps({"enum": list(range(MAX_SCHEMA_VALUES))}),
    "deep": '{"items":' * 400 + "{}" + "}" * 400,
    "deeper": '{"allOf":[' * 400 + "{}" + "]}" * 400,
    "exploding": json.dumps(
        {"allOf": [{"anyOf": [{"pattern": f"^a{i}b{j}"} for j in range(10)]} for i in range(10)]}
    ),
}


@pytest.mark.parametrize("schema", BAD.values(), ids=BAD.keys())
def test_a_schema_that_cannot_be_kept_to_is_refused(make_engine: MakeEngine, schema: str) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest) as caught:
        engine.add("a", PROMPT, replace(ASK, json_schema=schema), Decision.base())
    assert caught.value.param == "response_format"
    assert "secretword" not in caught.value.message
    assert not engine.has_work


def test_an_unsupported_keyword_is_named(make_engine: MakeEngine) -> None:
    with pytest.raises(InvalidRequest, match="uniqueItems cannot be enforced"):
        make_engine().grammars.compiled(BAD["unsupported"])


@pytest.mark.parametrize(("field", "value"), [("min_tokens", 3), ("ignore_eos", True)])
def test_what_would_write_on_after_the_end_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        replace(ASK, **{field: value})
    assert caught.value.param == field


def test_compiled_schemas_are_kept_by_salt_and_not_without_end(make_engine: MakeEngine) -> None:
    grammars = Grammars(make_engine().tokenizer)
    first = grammars.compiled(ASK.json_schema, salt="a")
    assert grammars.compiled(ASK.json_schema, salt="a") is first
    assert grammars.compiled(ASK.json_schema, salt="b") is not first
    for number in range(MAX_COMPILED):
        grammars.compiled(json.dumps({"const": number}), salt="a")
    assert grammars.find(ASK.json_schema, salt="a") is first, "it is still held"
    del first
    assert grammars.find(ASK.json_schema, salt="a") is None


def test_a_new_schema_is_compiled_beside_the_event_loop(make_engine: MakeEngine) -> None:
    import asyncio
    import threading

    engine, threads = make_engine(), []
    really = engine.grammars._compile
    engine.grammars._compile = lambda schema: (threads.append(threading.current_thread()), really(schema))[1]

    async def ask() -> str:
        behind = AsyncEngine(engine)
        behind.start()
        try:
            got = [d async for d in behind.stream(PROMPT, ASK, Decision.base(), request_id="a")]
            return "".join(delta.text for delta in got)
        finally:
            behind.stop()

    jsonschema.validate(json.loads(asyncio.run(ask())), SCHEMA)
    assert [thread.name.split("_")[0] for thread in threads] == ["uld-schemas"]
