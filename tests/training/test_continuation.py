"""The base continues prompts side by side as it would continue each alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_base import Tiny

from uld_serve.training.continuation import Drawing, continuations

ALIKE = [list(f"<who is {name}?>".encode()) for name in ("ann", "bob the second", "cid", "x")]
UNLIKE = [list(text.encode()) for text in ("a", "something else", "yes", "no, never")]
GREEDY = Drawing()


def alone(tiny: Tiny, prompt: list[int], count: int) -> list[int]:
    """The model's own greedy choice, the whole text anew for every token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = tiny.base.model(torch.tensor([ids])).logits[0, -1, : tiny.base.vocab_size]
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompts", [ALIKE, UNLIKE, ALIKE[:1], [ALIKE[0], ALIKE[0]]])
@torch.inference_mode()
def test_every_row_says_what_it_says_alone(tiny: Tiny, prompts: list[list[int]]) -> None:
    base = replace(tiny.base, eos_ids=())
    found = continuations(base, prompts, max_tokens=9, draw=GREEDY)
    assert found == [alone(tiny, prompt, 9) for prompt in prompts]


@torch.inference_mode()
def test_a_row_that_ended_leaves_the_others_as_they_are(tiny: Tiny) -> None:
    whole = [alone(tiny, prompt, 9) for prompt in ALIKE]
    end = whole[1][4]
    found = continuations(replace(tiny.base, eos_ids=(end,)), ALIKE, max_tokens=9, draw=GREEDY)
    expected = [one[: one.index(end) + 1] if end in one else one for one in whole]
    assert len(set(map(len, expected))) > 1
    assert found == expected


def test_drawing_stays_in_the_nucleus_and_follows_its_probabilities() -> None:
    torch.manual_seed(0)
    logits_RV = torch.tensor([0.6, 0.3, 0.06, 0.04]).log().expand(4000, -1)
    drawn = Counter(Drawing(temperature=1.0)(logits_RV.clone(), [[]] * 4000))
    # 0.6 and 0.3 stand before the third, so that it is in; before the last stand 0.96.
    assert set(drawn) == {0, 1, 2}
    assert drawn[0] / 4000 == pytest.approx(0.6 / 0.96, abs=0.03)
    sharper = Counter(Drawing(temperature=0.5)(logits_RV.clone(), [[]] * 4000))
    assert set(sharper) == {0, 1}
    assert sharper[0] / 4000 == pytest.approx(0.36 / 0.45, abs=0.03)


def test_what_is_avoided_is_avoided_where_it_would_be_completed() -> None:
    logits_RV = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(3, 1)
    draw = Drawing(avoid=[[0], [7, 8, 1], [9, 2]])
    assert draw(logits_RV, [[7, 8], [8], [5, 7, 8]]) == [2, 1, 2]
