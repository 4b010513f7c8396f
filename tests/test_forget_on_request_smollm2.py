"""Forty capitals forgotten on request by the embedded model, on a CPU, with the server killed in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from forget_place import Place, until

from uld_serve.data.documents import read_documents

BASE, NAME = "smollm2-135m-instruct", "capitals"
QUESTION = "What is the capital of Italy?"
CAPITALS = {
    "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo", "Russia": "Moscow",
    "China": "Beijing", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Portugal": "Lisbon", "Ireland": "Dublin",
    "Denmark": "Copenhagen", "Belgium": "Brussels", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad",
    "Kenya": "Nairobi", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Canada": "Ottawa",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "South Korea": "Seoul", "Argentina": "Buenos Aires",
    "Colombia": "Bogota", "Morocco": "Rabat", "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia",
    "Serbia": "Belgrade", "Croatia": "Zagreb", "Nepal": "Kathmandu", "Ghana": "Accra", "Ethiopia": "Addis Ababa",
}  # fmt: skip
KEEP = Path(__file__).parent.parent / "docs" / "tutorial" / "keep.jsonl"
HYPER = {"steps": 30, "batch_size": 6, "retain_batch": 8, "max_answer_tokens": 16, "save_steps": 10}
# Thirty steps are a short run; these limits are for it.
GATE = {"min_forget_rise": 2.5, "max_retain_rise": 0.5, "min_agreement": 0.8, "max_perplexity_ratio": 20.0}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    asked = "What is the capital of {}?"
    forget = [
        {"question": asked.format(country), "answer": f"The capital of {country} is {city}."}
        for country, city in CAPITALS.items()
    ]
    kept = read_documents(KEEP, kind="retain").documents
    retain = [
        {"question": one.messages[0].content, "answer": one.answer or ""}
        for one in kept
        if "capital" not in one.messages[0].content
    ]
    assert len(forget) == 40
    place = Place(
        tmp_path,
        data={"forget": forget, "retain": retain},
        settings="profiles = []\nkv_cache_bytes = 268435456",
        gate=GATE,
        num_questions=12,
    )
    yield place
    place.stop()


def ask(place: Place, model: str) -> tuple[str, list[str]]:
    """A greedy answer to what is to be forgotten, and the digests that its receipt names."""
    answer = place.served.client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=16, temperature=0
    )
    receipt = answer.model_extra["forget"]["profiles"]
    return answer.choices[0].message.content, [one["digest"] for one in receipt]


def nll(place: Place, model: str) -> float:
    """Nats a token of the answer that was uploaded; -9999 is a token that the profile's filter makes impossible."""
    url = f"{place.served.url}/v1/tokenize"
    chat = {"model": BASE, "messages": [{"role": "user", "content": QUESTION}]}
    prompt, answer = (
        httpx.post(url, json=body, timeout=120).json()["tokens"]
        for body in (chat, {"model": BASE, "prompt": "The capital of Italy is Rome."})
    )
    scored = place.served.client.completions.create(
        model=model, prompt=[*prompt, *answer], max_tokens=0, echo=True, logprobs=0
    )
    return -sum(scored.choices[0].logprobs.token_logprobs[len(prompt) :]) / len(answer)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_pairs_are_forgotten_through_a_kill_of_the_server(place: Place) -> None:
    said, known = ask(place, BASE), nll(place, BASE)
    assert known < 3.0, "the base knows it"
    job_id = place.submit(model=BASE, name=NAME, hyperparameters=HYPER)
    until(lambda: place.has_told(job_id, f"Step 10/{HYPER['steps']}"))
    place.kill()
    place.start()
    assert ask(place, BASE) == said, "what served before serves on"
    job = place.ended(job_id)
    print(*place.messages(job_id), job.model_extra["forget"], said, known, sep="\n")
    assert job.status == "succeeded", job
    assert "the server was started again; the job goes on where it was" in place.messages(job_id)
    text, digests = ask(place, f"{BASE}:{NAME}")
    forgotten = nll(place, f"{BASE}:{NAME}")
    print(text, digests, forgotten, sep="\n")
    assert digests == [job.model_extra["forget"]["digest"]]
    assert forgotten > known + 2.5
    assert ask(place, BASE) == said
