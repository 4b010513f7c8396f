"""POST /v1/completions: shapes of whole and streamed answers, echo, log-probabilities, batches."""

from __future__ import annotations

import json
import math

import pytest
from fake_engine import BASE_TEXT, VERSION
from live_server import MODEL, LiveServer


def complete(server: LiveServer, **fields: object) -> dict[str, object]:
    response = server.post("/v1/completions", {"model": MODEL, "prompt": "Hi", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def events(server: LiveServer, path: str = "/v1/completions", **fields: object) -> list[dict[str, object]]:
    response = server.post(path, {"model": MODEL, "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_answer_has_openai_shape(server: LiveServer) -> None:
    body = complete(server, max_tokens=100)
    assert body["object"] == "text_completion"
    assert str(body["id"]).startswith("cmpl-")
    assert body["model"] == MODEL
    assert body["choices"] == [{"index": 0, "text": BASE_TEXT, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 21, "total_tokens": 23}
    assert body["forget"] == {"profiles": [], "engine": VERSION}


def test_default_max_tokens_is_16_and_finishes_by_length(server: LiveServer) -> None:
    choice = complete(server)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (BASE_TEXT[:16], "length")


def test_choices_are_prompt_major_with_own_seeds(server: LiveServer) -> None:
    server.engine.text_of = lambda call: f"{bytes(call.prompt_ids).decode()}/{call.params.seed}"
    body = complete(server, prompt=["A", "B"], n=2, seed=7, max_tokens=100)
    texts = [choice["text"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [text[0] for text in texts] == ["A", "A", "B", "B"]
    assert texts[0] == "A/7"
    assert len({text[1:] for text in texts}) == 4
    assert body == {
        **complete(server, prompt=["A", "B"], n=2, seed=7, max_tokens=100),
        "id": body["id"],
        "created": body["created"],
    }


def test_prompt_tokens_count_once_for_n_choices(server: LiveServer) -> None:
    usage = complete(server, prompt=["abc", "de"], n=3, max_tokens=1)["usage"]
    assert usage == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}


def test_no_seed_draws_a_new_one_each_time(server: LiveServer) -> None:
    complete(server)
    complete(server)
    seeds = [call.params.seed for call in server.engine.calls]
    assert None not in seeds
    assert len(set(seeds)) == 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [[72, 105]]),
        (["Hi", "B"], [[72, 105], [66]]),
        ([72, 105], [[72, 105]]),
        ([[72, 105], [66]], [[72, 105], [66]]),
    ],
)
def test_prompt_forms(server: LiveServer, prompt: object, expected: list[list[int]]) -> None:
    complete(server, prompt=prompt)
    assert [call.prompt_ids for call in server.engine.calls] == expected


def test_logprobs_shape(server: LiveServer) -> None:
    logprobs = complete(server, logprobs=2, max_tokens=3)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["T", "h", "e"]
    assert logprobs["token_logprobs"] == [-0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] == {"T": -0.5, "a": -1.5}
    assert logprobs["text_offset"] == [0, 1, 2]


def test_logprobs_zero_gives_the_drawn_token_alone(server: LiveServer) -> None:
    assert complete(server, logprobs=0, max_tokens=1)["choices"][0]["logprobs"]["top_logprobs"] == [
        {"T": -0.5}
    ]


def test_filtered_token_prints_as_minus_9999(server: LiveServer) -> None:
    server.engine.logprob_of = lambda token: -math.inf
    logprobs = complete(server, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]


def test_tokens_that_read_the_same_keep_the_larger_value(server: LiveServer) -> None:
    # Two bytes that are no UTF-8 by themselves both show as U+FFFD; the argmax's value must survive.
    server.engine.text_of = lambda call: "é"
    rows = complete(server, logprobs=1, max_tokens=2)["choices"][0]["logprobs"]
    assert rows["tokens"] == ["�", "�"]
    assert rows["top_logprobs"] == [{"�": -0.5}, {"�": -0.5}]
    assert rows["text_offset"] == [0, 0]


def test_echo_puts_the_prompt_first(server: LiveServer) -> None:
    assert complete(server, echo=True, max_tokens=3)["choices"][0]["text"] == "HiThe"
    assert complete(server, prompt=[72, 105], echo=True, max_tokens=0)["choices"][0]["text"] == "Hi"


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_is_what_lm_eval_reads(server: LiveServer, max_tokens: int) -> None:
    choices = complete(
        server,
        prompt=[[72, 105, 33], [66, 67]],
        max_tokens=max_tokens,
        logprobs=1,
        echo=True,
        seed=1,
        temperature=0,
    )
    for choice, length in zip(choices["choices"], (3, 2), strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == length + max_tokens
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert value == max(top.values())
    assert [call.params.prompt_logprobs for call in server.engine.calls] == [1, 1]
    assert [call.params.max_tokens for call in server.engine.calls] == [max_tokens] * 2


def test_one_token_prompt_with_nothing_to_draw_is_refused(server: LiveServer) -> None:
    body = {"model": MODEL, "prompt": ["Hi", "H"], "max_tokens": 0, "echo": True, "logprobs": 1}
    response = server.post("/v1/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"


def test_prompt_logprobs_are_by_token_id(server: LiveServer) -> None:
    entries = complete(server, prompt_logprobs=1, max_tokens=1)["choices"][0]["prompt_logprobs"]
    assert entries == [None, {"105": {"logprob": -0.5, "rank": 1, "decoded_token": "i"}}]


def test_stream_keeps_id_and_ends_with_reason(server: LiveServer) -> None:
    chunks = events(server, prompt="Hi", max_tokens=4)
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == BASE_TEXT[:4]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert chunks[0]["forget"] == {"profiles": [], "engine": VERSION}
    assert all("usage" not in chunk and "forget" not in chunk for chunk in chunks[1:])


def test_stream_usage_comes_in_a_last_chunk_without_choices(server: LiveServer) -> None:
    chunks = events(server, prompt="Hi", max_tokens=2, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None, None]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


def test_continuous_usage_counts_up(server: LiveServer) -> None:
    chunks = events(server, prompt="Hi", max_tokens=3, stream_options={"continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]


def test_streamed_echo_and_logprobs_equal_the_whole_answer(server: LiveServer) -> None:
    fields = {"prompt": "Hi", "max_tokens": 5, "echo": True, "logprobs": 2, "seed": 3}
    whole = complete(server, **fields)["choices"][0]
    parts = [chunk["choices"][0] for chunk in events(server, **fields)]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [row for part in parts for row in part["logprobs"][name]] == whole["logprobs"][name]


def test_held_back_text_sends_no_empty_chunk_but_the_first(server: LiveServer) -> None:
    server.engine.text_of = lambda call: "éé!"
    texts = [chunk["choices"][0]["text"] for chunk in events(server, prompt="Hi")]
    assert texts == ["", "!"]
