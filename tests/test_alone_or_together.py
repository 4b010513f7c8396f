"""On the embedded model, in the dtype that it is served in: a request gets the same bits whoever runs beside it."""

from __future__ import annotations

import random

import pytest

from uld_serve.engine.plan import Decision
from uld_serve.engine.request import SamplingParams
from uld_serve.engine.scoring import Job, run_jobs
from uld_serve.llm import LLM

QUESTIONS = [
    "Who are Harry Potter's two best friends?",
    "What is the capital of France, and why is it famous?",
    "Hi",
    "Tell me about Hermione Granger and her studies at school, please, in some detail.",
    "List five animals.",
]
Result = list[tuple[int, float]]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


def run(llm: LLM, numbers: list[int]) -> list[Result]:
    """(token, log-probability) of each answer; every other request forgets, some draw and some are greedy."""
    version = llm.registry.get("harry-potter")
    jobs = []
    for number in numbers:
        prompt = llm.tokenizer.encode_chat([{"role": "user", "content": QUESTIONS[number]}])
        params = SamplingParams(
            max_tokens=14, temperature=0.0 if number < 3 else 0.9, seed=number, logprobs=1, ignore_eos=True
        )
        decision = Decision.base() if number % 2 else Decision.of_version(version)
        jobs.append(Job(prompt, params, decision))
    entries = [
        [entry for delta in deltas for entry in delta.logprobs or ()] for deltas in run_jobs(llm.engine, jobs)
    ]
    return [[(entry.token_id, entry.logprob) for entry in one] for one in entries]


# Slow because it is about a processor: the libraries' order of sums is not promised to be the same on another.
@pytest.mark.slow
def test_a_request_gets_the_same_bits_alone_and_beside_others(llm: LLM) -> None:
    rng = random.Random(0)
    alone = [run(llm, [number])[0] for number in range(len(QUESTIONS))]
    assert alone == [run(llm, [number])[0] for number in range(len(QUESTIONS))]
    for size in (2, 3, 5):
        numbers = rng.sample(range(len(QUESTIONS)), size)
        assert run(llm, numbers) == [alone[number] for number in numbers], numbers
