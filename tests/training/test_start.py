"""The start that is solved for: what is low-rank is found, what is kept is quiet, and all of it is an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_base import NUM_LAYERS, Tiny
from tiny_run import example, fresh_assistant, observed, run_training, serve, settings_of, write_sources

from uld_serve.engine.request import SamplingParams
from uld_serve.training.answers import own_answers
from uld_serve.training.examples import Example, Kind
from uld_serve.training.start import low_rank, quiet_direction, solve_start
from uld_serve.training.states import collate

SIZES = {Kind.FORGET: range(3, 9), Kind.RETAIN: range(10, 16)}


def answered(tiny: Tiny, kind: Kind) -> list[Example]:
    """Random prompts with the target's own answers: what it says, an assistant can learn of it."""
    prompts = [example(kind, size, 1).prompt_ids for size in SIZES[kind]]
    made = own_answers(replace(tiny.base, eos_ids=()), prompts, max_tokens=6)
    goal = (9.0 if kind is Kind.FORGET else 0.0,) * 6
    return [Example(ids, tuple(answer), kind, goal) for ids, answer in zip(prompts, made, strict=True)]


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_map_of_low_rank_is_found() -> None:
    inputs_NF, map_FD = drawn(400, 12, seed=1), drawn(12, 3, seed=2) @ drawn(3, 8, seed=3)
    a_RF, b_DR = low_rank(inputs_NF, inputs_NF @ map_FD, weights_N=torch.ones(400), rank=3)
    assert (a_RF.shape, b_DR.shape) == ((3, 12), (8, 3))
    torch.testing.assert_close(inputs_NF @ a_RF.T @ b_DR.T, inputs_NF @ map_FD, rtol=0, atol=0.05)
    torch.testing.assert_close(a_RF.norm(dim=1), b_DR.norm(dim=0), rtol=1e-3, atol=0)


def test_rank_goes_to_what_explains_most() -> None:
    inputs_NF = drawn(400, 6, seed=1)
    missing_ND = torch.stack([9 * inputs_NF[:, 0], inputs_NF[:, 1]], dim=-1)
    a_RF, b_DR = low_rank(inputs_NF, missing_ND, weights_N=torch.ones(400), rank=1)
    found_ND = inputs_NF @ a_RF.T @ b_DR.T
    torch.testing.assert_close(found_ND[:, 0], missing_ND[:, 0], rtol=0, atol=0.2)
    assert found_ND[:, 1].abs().max() < 0.5


def test_a_heavy_token_is_fitted_before_a_light_one() -> None:
    missing_ND = torch.tensor([[1.0], [3.0]])
    a_RF, b_DR = low_rank(torch.ones(2, 1), missing_ND, weights_N=torch.tensor([1.0, 999.0]), rank=1)
    assert (a_RF @ b_DR.T).item() == pytest.approx(3.0, abs=0.02)


def test_the_quiet_direction_is_the_one_that_changes_no_logit() -> None:
    head_VD, gain_D = drawn(50, 4, seed=1), torch.tensor([1.0, 2.0, 4.0, 0.5])
    quiet_D = torch.tensor([0.5, 0.5, -0.5, 0.5])
    weight_VD = head_VD - (head_VD @ quiet_D)[:, None] * quiet_D + 3.0 * quiet_D  # all logits alike along it
    found = quiet_direction(weight_VD / gain_D, gain_D)
    assert abs(float(found @ quiet_D)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("kv", ["own", "borrowed"])
def test_an_assistant_begins_with_both_terms_lower(tiny: Tiny, kv: str) -> None:
    settings = settings_of("uld", kv=kv, rank=16)
    assistant = fresh_assistant(tiny, settings)
    pools = {kind: observed(assistant, answered(tiny, kind), settings) for kind in SIZES}
    batch = collate([one for pool in pools.values() for one in pool])
    before = {name: value.item() for name, value in assistant(**batch).items()}
    solve_start(assistant, pools, quiet=2.0)
    after = {name: value.item() for name, value in assistant(**batch).items()}
    assert after["forget"] < 0.9 * before["forget"]
    assert after["retain"] < 0.7 * before["retain"]
    changed = {name for name, one in assistant.trained().items() if "lora_B" in name and one.any()}
    assert len(changed) == 1
    assert f"layers.{settings.exit - 1}.mlp.down_proj" in changed.pop()


def test_a_run_that_begins_so_is_served(tiny: Tiny, tmp_path: Path) -> None:
    settings = settings_of("uld", start="solved", steps=2, exit=NUM_LAYERS - 1)
    run_training(tiny, write_sources(tmp_path), settings, tmp_path / "quiet")
    # Loading replays what was recorded after training.
    [answer] = serve(tiny, tmp_path / "quiet").generate(
        ["who is ann?"], SamplingParams(max_tokens=2), profile="quiet"
    )
    assert answer.receipt.profiles[0].name == "quiet"
