"""LangChain's OpenAI chat model against a server: use_langchain.py URL MODEL PROFILE. Prints "ok" last."""

from __future__ import annotations

import sys
from typing import Literal

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict


class Owl(BaseModel):
    model_config = ConfigDict(extra="forbid")

    a: Literal["owl", "toad"]


def main(url: str, model: str, profile: str) -> None:
    settings = {"base_url": f"{url}/v1", "api_key": "unused", "seed": 3, "temperature": 1.0, "max_retries": 0}
    chat = ChatOpenAI(model=f"{model}:{profile}", max_tokens=6, **settings)
    chain = ChatPromptTemplate.from_messages([("system", "Be kind."), ("user", "{question}")]) | chat
    whole = chain.invoke({"question": "Hi"})
    assert whole.usage_metadata["output_tokens"] <= 6
    streamed = list(chain.stream({"question": "Hi"}))
    assert "".join(chunk.content for chunk in streamed) == whole.content
    assert [answer.content for answer in chain.batch([{"question": "Hi"}] * 3)] == [whole.content] * 3

    by_field = ChatOpenAI(model=model, max_tokens=6, extra_body={"forget_profile": profile}, **settings)
    same = by_field.invoke([("system", "Be kind."), ("user", "Hi")])
    assert same.content == whole.content

    long = ChatOpenAI(model=f"{model}:{profile}", max_tokens=200, **settings)
    owl = long.with_structured_output(Owl, method="json_schema").invoke("Hi")
    assert isinstance(owl, Owl)


if __name__ == "__main__":
    main(*sys.argv[1:])
    print("ok")
