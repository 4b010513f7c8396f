"""Every field of the contract does what it says, through HTTP and the real engine. Each case is asked twice, with the
field and without it, and must see the difference: a field that is parsed and then ignored fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from real_server import BASE, CHAT, COMPLETIONS, LEAST, Answer, Body, RealServer, real_server
from tiny_base import EOS_ID, Tiny

from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import Applied, Decision
from uld_serve.engine.scoring import score
from uld_serve.server.protocol import ChatRequest, CompletionRequest, StreamOptions

A, B = ord("a"), ord("b")
ONLY_A: Body = {"logit_bias": {str(A): 100}}
ONLY_END: Body = {"logit_bias": {str(EOS_ID): 100}}
WARM: Body = {"temperature": 1.5, "seed": 4}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["owl", 7]}},
    "required": ["a"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Case:
    """`sees` is true of the answer to a request with `field: value`, and false without. `beside` goes with both;
    `instead` is the value without, for a field that must be there."""

    field: str
    value: object
    sees: Callable[[Answer], bool]
    beside: Body = field(default_factory=dict)
    instead: object = None
    paths: tuple[str, ...] = (COMPLETIONS, CHAT)


def is_greedy(answer: Answer) -> bool:
    return answer.text == answer.again(temperature=0).text


def differs_from(**fields: object) -> Callable[[Answer], bool]:
    return lambda answer: answer.text != answer.again(**fields).text


def num_prompt_tokens(number: int) -> Callable[[Answer], bool]:
    return lambda answer: answer.usage["prompt_tokens"] == number


def num_drawn(answer: Answer) -> int:
    return answer.usage["completion_tokens"]


def chat(text: object) -> list[Body]:
    return [{"role": "user", "content": text}]


def is_json_of_the_schema(answer: Answer) -> bool:
    try:
        return json.loads(answer.text)["a"] in ("owl", 7)
    except (ValueError, TypeError, KeyError):
        return False


GREEDY: Body = {"temperature": 0, "max_tokens": 24}
CASES = [
    Case("model", f"{BASE}:late-fork", lambda a: a.profiles == {"late-fork": 2.0}, instead=BASE),
    Case("forget_profile", "truncated", lambda a: a.profiles == {"truncated": pytest.approx(0.7)}),
    Case("forget_profile", ["pair", "late-fork"], lambda a: a.profiles.keys() == {"pair", "late-fork"}),
    Case("forget_strength", 0.5, lambda a: a.profiles == {"late-fork": 1.0}, {"forget_profile": "late-fork"}),
    Case("n", 3, lambda a: [one["index"] for one in a.choices] == [0, 1, 2]),
    Case("stream", True, lambda a: a.is_stream),
    Case(
        "stream_options.include_usage",
        {"include_usage": True},
        lambda a: a.events[-1]["choices"] == [] and a.events[-1]["usage"]["completion_tokens"] > 0,
        {"stream": True},
    ),
    Case(
        "stream_options.continuous_usage_stats",
        {"continuous_usage_stats": True},
        lambda a: all("usage" in one for one in a.events),
        {"stream": True},
    ),
    Case("temperature", 0, is_greedy, {"seed": 4}),
    Case("top_p", 1e-6, is_greedy, WARM),
    Case("top_k", 1, is_greedy, WARM),
    Case("min_p", 1.0, is_greedy, WARM),
    Case("seed", 7, lambda a: a.text == a.again(seed=7).text),
    Case("stop", "aaa", lambda a: (a.text, a.finish) == ("", "stop"), ONLY_A),
    Case("stop", ["zz", "aa"], lambda a: (a.text, a.finish) == ("", "stop"), ONLY_A),
    Case("stop_token_ids", [A], lambda a: (num_drawn(a), a.finish) == (1, "stop"), ONLY_A),
    Case("presence_penalty", 2.0, differs_from(**GREEDY), GREEDY),
    Case("repetition_penalty", 1.5, differs_from(**GREEDY), GREEDY),
    Case(
        "frequency_penalty",
        2.0,
        lambda a: set(a.text) > {"a"},
        {"logit_bias": {str(A): 30}, "temperature": 0, "max_tokens": 32},
    ),
    Case("logit_bias", {str(A): 100}, lambda a: a.text == "a" * 8),
    Case("logit_bias", {str(A): 100, str(B): 100, "258": -100}, lambda a: set(a.text) <= {"a", "b"}),
    Case("min_tokens", 4, lambda a: num_drawn(a) >= 4, ONLY_END),
    Case("ignore_eos", True, lambda a: (num_drawn(a), a.finish) == (8, "length"), ONLY_END),
    Case("user", "ann", lambda a: [line["user"] for line in a.audit] == ["ann"] * 2),
    Case("max_tokens", 3, lambda a: (num_drawn(a), a.finish) == (3, "length"), ONLY_A, instead=5),
    Case(
        "prompt_logprobs",
        1,
        lambda a: len(prompt_entries(a)) == a.usage["prompt_tokens"] and prompt_entries(a)[0] is None,
    ),
    Case("return_token_ids", True, lambda a: token_ids_of(a) == (num_prompt_ids(a), num_drawn(a))),
    Case("prompt", [72], num_prompt_tokens(1), instead="Hi", paths=(COMPLETIONS,)),
    Case("prompt", "Hello", num_prompt_tokens(5), instead="Hi", paths=(COMPLETIONS,)),
    Case("prompt", ["Hello", "H"], num_prompt_tokens(6), instead="Hi", paths=(COMPLETIONS,)),
    Case("prompt", [[72], [1, 2, 3]], num_prompt_tokens(4), instead="Hi", paths=(COMPLETIONS,)),
    Case(
        "logprobs",
        2,
        lambda a: any(len(row) >= 2 for row in a.choices[0]["logprobs"]["top_logprobs"]),
        {"temperature": 0},
        0,
        (COMPLETIONS,),
    ),
    Case("echo", True, lambda a: a.text.startswith("Hi"), ONLY_A, paths=(COMPLETIONS,)),
    Case(
        "messages",
        [{"role": "system", "content": "x"}, *chat([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
        lambda a: a.usage["prompt_tokens"] > a.again().usage["prompt_tokens"],
        instead=chat("Hi"),
        paths=(CHAT,),
    ),
    Case(
        "max_completion_tokens",
        2,
        lambda a: (num_drawn(a), a.finish) == (2, "length"),
        {**ONLY_A, "max_tokens": None, "stop": "a" * 8},
        paths=(CHAT,),
    ),
    Case("logprobs", True, lambda a: bool(a.choices[0]["logprobs"]), paths=(CHAT,)),
    Case(
        "top_logprobs",
        3,
        lambda a: len(a.choices[0]["logprobs"]["content"][0]["top_logprobs"]) == 3,
        {"logprobs": True},
        paths=(CHAT,),
    ),
    Case("response_format", {"type": "json_object"}, lambda a: a.text.startswith("{"), paths=(CHAT,)),
    Case(
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "owl", "schema": SCHEMA, "strict": True}},
        is_json_of_the_schema,
        {"max_tokens": 120, "seed": 3},
        paths=(CHAT,),
    ),
]  # fmt: skip


def token_ids_of(answer: Answer) -> tuple[int, int]:
    """How many ids of the prompt and of the answer are given: as vLLM, a chat's prompt has them beside its choices."""
    choice = answer.choices[0]
    prompt = choice.get("prompt_token_ids") or answer.json.get("prompt_token_ids") or []
    return len(prompt), len(choice.get("token_ids") or [])


def num_prompt_ids(answer: Answer) -> int:
    return answer.usage["prompt_tokens"]


def prompt_entries(answer: Answer) -> list[object]:
    # vLLM puts them into a completion's choice, and beside a chat's choices.
    return answer.choices[0].get("prompt_logprobs") or answer.json.get("prompt_logprobs") or [0]


@pytest.fixture(scope="module")
def real(
    tiny: Tiny, make_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    with real_server(tiny, make_engine(), tmp_path_factory.mktemp("audit") / "audit.jsonl") as server:
        yield server


@pytest.mark.parametrize(
    ("path", "case"),
    [
        pytest.param(path, case, id=f"{path.split('/')[2]}-{number}-{case.field}")
        for number, case in enumerate(CASES)
        for path in case.paths
    ],
)
def test_field_does_what_it_says(real: RealServer, path: str, case: Case) -> None:
    name = case.field.split(".")[0]
    plain = {**LEAST[path], **case.beside}
    without = plain if case.instead is None else {**plain, name: case.instead}
    assert case.sees(real.ask(path, {**plain, name: case.value}))
    assert not case.sees(real.ask(path, without)), "the case would not notice if the field were ignored"


@pytest.mark.parametrize(("path", "model"), [(COMPLETIONS, CompletionRequest), (CHAT, ChatRequest)])
def test_every_field_of_the_contract_has_a_case(
    path: str, model: type[CompletionRequest | ChatRequest]
) -> None:
    tested = {case.field for case in CASES if path in case.paths}
    options = {f"stream_options.{name}" for name in StreamOptions.model_fields}
    assert tested == (set(model.model_fields) - {"stream_options"}) | options


def test_header_chooses_a_profile(real: RealServer) -> None:
    for path, body in LEAST.items():
        answer = real.ask(path, body, headers={"X-Forget-Profile": "late-fork"})
        assert answer.profiles == {"late-fork": 2.0}
        assert answer.response.headers["X-Forget-Profile"].startswith("late-fork@")


@pytest.mark.parametrize("profile", [None, "late-fork", "truncated", "pair"])
def test_prompt_is_scored_under_the_served_distribution(
    real: RealServer, tiny: Tiny, make_engine: Callable[..., Engine], profile: str | None
) -> None:
    """As in process, to the last digit that JSON holds; and under a profile not as the base scores it."""
    token_ids = [72, 101, 108, 108, 111, 33]
    asked = {"prompt": token_ids, "max_tokens": 0, "echo": True, "logprobs": 1, "prompt_logprobs": 1}
    answer = real.ask(COMPLETIONS, {**LEAST[COMPLETIONS], **asked, "forget_profile": profile})
    decision = Decision.forgetting([Applied(tiny.version(profile))]) if profile else Decision.base()
    (entries,) = score(make_engine(), [token_ids], decision)
    expected = [max(entry.logprob, -9999.0) for entry in entries[1:]]
    found = answer.choices[0]["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert found[1:] == pytest.approx(expected, abs=1e-4)
    listed = answer.choices[0]["prompt_logprobs"][1:]
    assert [row[str(token)]["logprob"] for row, token in zip(listed, token_ids[1:], strict=True)] == found[1:]
    base = real.ask(COMPLETIONS, {**LEAST[COMPLETIONS], **asked}).choices[0]["logprobs"]["token_logprobs"]
    assert (found == base) == (profile is None)


def test_chosen_token_is_the_argmax_by_float_equality(real: RealServer) -> None:
    """How lm-evaluation-harness tells that an answer is greedy."""
    greedy = {"temperature": 0, "logprobs": 1, "forget_profile": "truncated"}
    rows = real.ask(COMPLETIONS, {**LEAST[COMPLETIONS], **greedy}).choices[0]["logprobs"]
    for value, top in zip(rows["token_logprobs"], rows["top_logprobs"], strict=True):
        assert value == max(top.values())


@pytest.mark.parametrize("stream", [False, True])
def test_json_answers_under_a_profile_for_every_choice(real: RealServer, stream: bool) -> None:
    body = {
        **LEAST[CHAT],
        "forget_profile": "truncated",
        "response_format": {"type": "json_schema", "json_schema": {"name": "owl", "schema": SCHEMA}},
        "max_tokens": 120,
        "n": 3,
        "seed": 2,
        "stream": stream,
    }
    answer = real.ask(CHAT, body)
    assert answer.profiles.keys() == {"truncated"}
    texts = ["", "", ""]
    if stream:
        for event in answer.events:
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
    else:
        texts = [choice["message"]["content"] for choice in answer.choices]
    assert all(json.loads(text)["a"] in ("owl", 7) for text in texts)


@pytest.mark.parametrize("stream", [False, True])
def test_schema_that_cannot_be_compiled_is_400_and_names_the_field(real: RealServer, stream: bool) -> None:
    shape = {"name": "n", "schema": {"type": "secretword"}}
    body = {**LEAST[CHAT], "response_format": {"type": "json_schema", "json_schema": shape}, "stream": stream}
    response = real.live.post(CHAT, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"
    assert "secretword" not in response.text


def test_answer_cut_off_inside_its_json_finishes_by_length(real: RealServer) -> None:
    cut = real.ask(CHAT, {**LEAST[CHAT], "response_format": {"type": "json_object"}, "max_tokens": 2})
    assert cut.finish == "length"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("field", "value"), [("logit_bias", {"9999": 1}), ("stop_token_ids", [9999]), ("min_tokens", 9)]
)
def test_value_that_does_not_fit_the_model_is_400_and_names_the_field(
    real: RealServer, path: str, field: str, value: object
) -> None:
    response = real.live.post(path, {**LEAST[path], field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
