"""No token and no survivor differs from the fp64 combination of the same bf16 hidden rows and head weights: a small
vocabulary here, and 10,000 rows of the embedded model over real text in `make test-slow`."""

from __future__ import annotations

import sys
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from uld_serve.model.head import Head

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import exactness as bench  # noqa: E402

if TYPE_CHECKING:
    from exactness import Exactness, Rule

ROWS = 10_000
TEXT_CHUNK = 256


def head_of(weight_VD: torch.Tensor) -> Head:
    linear = nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_VD, requires_grad=False)
    return Head.of(linear, is_packed=True)


def compared(
    rule: Rule, hidden_SND: torch.Tensor, weight_VD: torch.Tensor, *, min_keep: int = 256
) -> Exactness:
    head = head_of(weight_VD)
    return bench.exactness(rule, rule, hidden_SND, weight_VD, logits=head.logits, min_keep=min_keep)


def random_head(vocab: int, width: int) -> torch.Tensor:
    return torch.randn(vocab, width, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("rule", bench.RULES)
def test_no_token_and_no_survivor_differs_from_fp64(rule: Rule) -> None:
    hidden_SND = bench.random_streams(2000, 64, torch.device("cpu"), torch.bfloat16)
    found = compared(rule, hidden_SND, random_head(1271, 64), min_keep=40)
    assert (found.wrong_tokens, found.wrong_survivors) == (0, 0)
    assert found.ok
    assert found.rows == 2000


@pytest.mark.parametrize(
    ("fourth", "min_keep", "margin"),
    [
        (2.0, 3, 2.0 - (5.0 + log(bench.TAU))),
        (5.0 + log(bench.TAU) + 1e-5, 3, 1e-5),
        (2.0, 5, 11.0),
    ],
)
def test_rows_are_left_out_by_what_comes_near_the_threshold_and_is_not_it(
    fourth: float, min_keep: int, margin: float
) -> None:
    """Near tau of the best; nearer; and where the last of the best is the threshold itself, the one before it."""
    b_V = torch.tensor([5.0, 4.0, 3.0, fourth, -9.0], dtype=torch.float64)
    _, margin_C = bench.exact_scores("subtract", torch.stack([b_V, b_V])[:, None], min_keep)
    assert margin_C.item() == pytest.approx(margin)


def test_head_logits_rounded_to_bf16_would_be_found() -> None:
    """What the test above could miss."""
    hidden_SND = bench.random_streams(500, 64, torch.device("cpu"), torch.bfloat16)
    weight_VD = random_head(1271, 64)
    found = bench.exactness(
        "bf16", "relu_difference", hidden_SND, weight_VD,
        logits=lambda hidden_RD: (hidden_RD @ weight_VD.T).float(),
    )  # fmt: skip
    assert found.wrong_survivors > 0
    assert found.wrong_tokens > 0
    assert not found.ok


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("rule", bench.RULES)
def test_no_token_and_no_survivor_differs_on_real_text(
    rule: Rule, real_streams: tuple[torch.Tensor, torch.Tensor]
) -> None:
    hidden_SND, weight_VD = real_streams
    found = compared(rule, hidden_SND, weight_VD)
    print(found)
    assert found.rows == ROWS
    assert (found.wrong_tokens, found.wrong_survivors) == (0, 0)
    assert found.ok


@pytest.fixture(scope="module")
def real_streams() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden rows of 10,000 tokens of this repository's documents in the embedded model: of the target, and of its
    layers up to the 8th and the 16th, through its own last norm, as an assistant's are."""
    from uld_serve.model.loading import load_base

    base = load_base(None, device="cpu")
    text = "\n".join(path.read_text() for path in sorted(ROOT.glob("**/*.md")) if ".venv" not in path.parts)
    ids = base.tokenizer(text)["input_ids"][:ROWS]
    assert len(ids) == ROWS, "the documents are too short"
    inner = base.model.model
    parts = []
    with torch.inference_mode():
        for start in range(0, ROWS, TEXT_CHUNK):
            states = inner(
                torch.tensor([ids[start : start + TEXT_CHUNK]]), output_hidden_states=True
            ).hidden_states
            # The last one has been through the norm already.
            parts.append(torch.stack([states[-1][0], inner.norm(states[8])[0], inner.norm(states[16])[0]]))
    return torch.cat(parts, dim=1), base.model.get_output_embeddings().weight.detach()
