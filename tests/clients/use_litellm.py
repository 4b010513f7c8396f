"""LiteLLM against a server: use_litellm.py URL MODEL PROFILE. Prints "ok" last."""

from __future__ import annotations

import sys

import litellm


def main(url: str, model: str, profile: str) -> None:
    ask = {
        "api_base": f"{url}/v1",
        "api_key": "unused",
        "messages": [{"role": "user", "content": "Hi"}],
        "seed": 3,
        "max_tokens": 6,
        "num_retries": 0,
    }
    whole = litellm.completion(model=f"openai/{model}:{profile}", **ask)
    assert whole.usage.completion_tokens <= 6
    chunks = litellm.completion(model=f"openai/{model}:{profile}", stream=True, **ask)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == (whole.choices[0].message.content or "")
    same = litellm.completion(model=f"openai/{model}", extra_body={"forget_profile": profile}, **ask)
    assert same.choices[0].message.content == whole.choices[0].message.content
    try:
        litellm.completion(model=f"openai/{model}", extra_body={"forget_profil": profile}, **ask)
    except litellm.BadRequestError:
        return
    raise AssertionError("a misspelt forget_profile was taken")


if __name__ == "__main__":
    main(*sys.argv[1:])
    print("ok")
