"""The offline API: the same engine, the same receipts, the same refusals as the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_base import Tiny

from uld_serve.cli import main
from uld_serve.engine.request import SamplingParams
from uld_serve.errors import InvalidRequest, UnknownProfile
from uld_serve.llm import LLM

GREEDY = SamplingParams(max_tokens=8, temperature=0, logprobs=1)


@pytest.fixture(scope="module")
def llm(tiny: Tiny) -> LLM:
    root = tiny.profiles["pair"][0].parent
    return LLM(str(tiny.folder), profiles=root, dtype="float32", device="cpu")


def test_completions_come_in_order_each_with_its_parameters(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (1, 5, 3)]
    done = llm.generate(["a", "b", "c"], params)
    assert [len(c.token_ids) for c in done] == [1, 5, 3]
    assert [c.receipt.header for c in done] == ["none"] * 3


def test_more_prompts_than_the_queue_takes_are_all_answered(llm: LLM) -> None:
    count = llm.engine.config.max_waiting + 5
    done = llm.generate([[i % 256] for i in range(count)], SamplingParams(max_tokens=0))
    assert len(done) == count
    llm.engine.check_integrity()


def test_scores_are_the_log_probabilities_that_generation_reports(llm: LLM, tiny: Tiny) -> None:
    prompt = list(b"score what was said")
    for profile in (None, "late-fork", ["pair", "truncated"]):
        [done] = llm.generate([prompt], GREEDY, profile=profile)
        [scored] = llm.score([[*prompt, *done.token_ids]], profile=profile)
        assert scored.logprobs[0] is None
        generated = [entry.logprob for entry in done.logprobs or ()]
        assert list(scored.logprobs[len(prompt) :]) == pytest.approx(generated, abs=1e-4)
        assert [ids[0] for ids in scored.top_ids[len(prompt) :]] == list(done.token_ids)  # greedy
        [end] = llm.score([[*prompt, *done.token_ids]], profile=profile, starts=[len(prompt)])
        assert end.logprobs == (None,) * len(prompt) + scored.logprobs[len(prompt) :]
        assert end.top_ids == ((),) * len(prompt) + scored.top_ids[len(prompt) :]


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    [chatted] = llm.chat([messages], GREEDY)
    [plain] = llm.generate([list(llm.tokenizer.encode_chat(messages))], GREEDY)
    assert chatted.token_ids == plain.token_ids
    assert chatted.token_ids != llm.generate(["hi"], GREEDY)[0].token_ids


def test_wrong_use_is_refused_and_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(UnknownProfile):
        llm.generate(["x"], GREEDY, profile="nobody")
    with pytest.raises(InvalidRequest):
        llm.generate(["x"], GREEDY, strength=0.5)
    with pytest.raises(InvalidRequest):
        llm.generate(["x", "y"], [GREEDY])
    with pytest.raises(InvalidRequest):
        llm.generate(["fine", ""], GREEDY)
    with pytest.raises(InvalidRequest, match="scored_from"):
        llm.score([[1, 2]], starts=[-1])
    assert not llm.engine.has_work
    llm.engine.check_integrity()


def test_generate_compares_base_and_profile(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    folder: Path = tiny.profiles["late-fork"][0]
    command = ["generate", "--model", str(tiny.folder), "--profiles", str(folder), "--dtype", "float32"]
    assert main([*command, "--profile", "late-fork", "--compare", "--json", "one", "two"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["one", "two"]
    assert all(record["base"]["receipt"] == "none" for record in records)
    assert all(record["forgetting"]["receipt"].startswith("late-fork@") for record in records)
    assert main([*command, "--compare", "one"]) == 2
    assert main([*command, "--profile", "late-fork", "--compare", "one"]) == 0
    shown = capsys.readouterr().out
    assert "forgetting" in shown
    assert "base" in shown
