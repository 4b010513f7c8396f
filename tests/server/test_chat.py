"""POST /v1/chat/completions through the official openai client: whole, streamed, log-probabilities, messages."""

from __future__ import annotations

import asyncio

import openai
import pytest
from fake_engine import BASE_TEXT, VERSION, FakeTokenizer
from live_server import MODEL, LiveServer

QUESTION = [{"role": "user", "content": "Who?"}]


def chat(server: LiveServer, **fields: object) -> object:
    with server.client() as client:
        answer = client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **fields})
        return list(answer) if fields.get("stream") else answer


def prompt_of(server: LiveServer) -> str:
    return bytes(server.engine.calls[-1].prompt_ids).decode()


def test_answer(server: LiveServer) -> None:
    answer = chat(server, max_tokens=100)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == BASE_TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 21
    assert answer.model_extra["forget"] == {"profiles": [], "engine": VERSION}


def test_stream_opens_with_role_and_carries_receipt(server: LiveServer) -> None:
    chunks = chat(server, stream=True, max_tokens=4, n=2, stream_options={"include_usage": True})
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert chunks[0].model_extra["forget"]["engine"] == VERSION
    for index in (0, 1):
        deltas = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert deltas[0].delta.role == "assistant"
        assert deltas[0].delta.content == ""
        assert "".join(d.delta.content or "" for d in deltas) == BASE_TEXT[:4]
        assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8


def test_logprobs(server: LiveServer) -> None:
    content = chat(server, logprobs=True, top_logprobs=2, max_tokens=2).choices[0].logprobs.content
    assert [(entry.token, entry.logprob, entry.bytes) for entry in content] == [
        ("T", -0.5, [84]),
        ("h", -0.5, [104]),
    ]
    assert [(top.token, top.logprob, top.bytes) for top in content[0].top_logprobs] == [
        ("T", -0.5, [84]),
        ("a", -1.5, [97]),
    ]


def test_streamed_logprobs_equal_the_whole_answers(server: LiveServer) -> None:
    fields = {"logprobs": True, "top_logprobs": 1, "max_tokens": 3}
    whole = chat(server, **fields).choices[0].logprobs.content
    chunks = chat(server, stream=True, **fields)
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == whole


def test_logprobs_without_top_lists_none(server: LiveServer) -> None:
    content = chat(server, logprobs=True, max_tokens=1).choices[0].logprobs.content
    assert content[0].top_logprobs == []


def test_prompt_logprobs_whole_and_streamed(server: LiveServer) -> None:
    whole = chat(server, max_tokens=1, extra_body={"prompt_logprobs": 0}).model_extra["prompt_logprobs"]
    chunks = chat(server, max_tokens=1, stream=True, extra_body={"prompt_logprobs": 0})
    assert len(whole) == len(server.engine.calls[0].prompt_ids)
    assert whole[0] is None
    assert chunks[0].model_extra["prompt_logprobs"] == whole


def test_messages_reach_the_template(server: LiveServer) -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "d"},
    ]
    chat(server, messages=messages)
    assert prompt_of(server) == "<system>Be kind.<user>a\nb<assistant>c<user>d<assistant>"


def test_default_limit_is_the_room_left(server: LiveServer) -> None:
    chat(server)
    call = server.engine.calls[-1]
    assert call.params.max_tokens == 512 - len(call.prompt_ids)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_limit_by_either_name(server: LiveServer, field: str) -> None:
    assert chat(server, **{field: 3}).choices[0].message.content == "The"


def test_model_without_template_is_400(start_server: object) -> None:
    tokenizer = FakeTokenizer()
    tokenizer.has_chat_template = False
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        chat(start_server(tokenizer=tokenizer))


def test_async_client_streams(server: LiveServer) -> None:
    async def texts() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=QUESTION, stream=True, max_tokens=3
            )
            return [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert "".join(asyncio.run(texts())) == "The"
