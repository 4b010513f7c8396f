"""What reaches the loss and what the gradient reaches: adapter tensors only, real answer tokens only, kinds apart."""

from __future__ import annotations

import re
from typing import cast

import pytest
import torch
from tiny_base import Tiny
from tiny_run import SHORT, example, fresh_assistant, observed, settings_of, shake

from uld_serve.model.borrowed import decoder_parts
from uld_serve.training.assistant import Assistant
from uld_serve.training.examples import Example, Kind
from uld_serve.training.methods.catalog import METHODS
from uld_serve.training.states import IGNORED, Batch, collate

SHORT_RETAIN = example(Kind.RETAIN, 3, 2)
LONG_FORGET = example(Kind.FORGET, 20, 9)
DETOUR = example(Kind.DETOUR, 7, 5)


def losses(assistant: Assistant, batch: Batch) -> dict[str, float]:
    return {name: value.item() for name, value in assistant(**batch).items()}


def shaken(tiny: Tiny, method: str = "margin") -> Assistant:
    assistant = fresh_assistant(tiny, settings_of(method))
    shake(assistant)
    return assistant


def batch_of(assistant: Assistant, *examples: Example, method: str = "margin") -> Batch:
    return collate(observed(assistant, examples, settings_of(method)))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_adapter_in_its_layers_and_nothing_else(tiny: Tiny, method: str) -> None:
    assistant = shaken(tiny, method)
    settings = settings_of(method)
    assistant(**batch_of(assistant, SHORT_RETAIN, LONG_FORGET, method=method))["loss"].backward()
    reached = {
        (int(found[1]), found[2], found[3])
        for name, parameter in assistant.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
        for found in [re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])", name)]
        if found
    }
    layers, modules = range(settings.fork, settings.exit), assistant.place.target_modules
    assert reached == {(layer, module, side) for layer in layers for module in modules for side in "AB"}
    frozen = [parameter for name, parameter in assistant.named_parameters() if "lora" not in name]
    assert frozen
    assert not any(parameter.requires_grad for parameter in frozen)
    assert all(parameter.grad is None for parameter in frozen)
    assert set(assistant.trained()) == {
        name for name, parameter in assistant.peft.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("method", METHODS)
def test_an_example_counts_the_same_alone_and_beside_longer_ones(tiny: Tiny, method: str) -> None:
    assistant = shaken(tiny, method)
    alone = losses(assistant, batch_of(assistant, SHORT_RETAIN, method=method))
    beside = losses(assistant, batch_of(assistant, LONG_FORGET, SHORT_RETAIN, method=method))
    other = losses(assistant, batch_of(assistant, LONG_FORGET, method=method))
    assert alone["retain"] > 0.01
    assert alone["forget"] == 0
    assert other["retain"] == 0
    assert beside["retain"] == pytest.approx(alone["retain"], rel=1e-4)
    assert beside["forget"] == pytest.approx(other["forget"], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_in_padding_changes_neither_loss_nor_gradient(tiny: Tiny, method: str) -> None:
    assistant = shaken(tiny, method)
    clean = batch_of(assistant, SHORT_RETAIN, LONG_FORGET, method=method)
    soiled = cast(Batch, {name: value.clone() for name, value in clean.items()})
    padded_BQ = ~clean["is_answer_BQ"]
    padded_BT = ~clean["is_real_BT"]
    assert padded_BQ.any()
    assert padded_BT.any()
    for name, value in (("final_BQD", 50.0), ("goals_BQ", 9.0), ("logits_BQC", 99.0)):
        soiled[name][padded_BQ] = value  # type: ignore[literal-required]
    soiled["columns_BQC"][padded_BQ] = 7
    soiled["fork_BPD"][padded_BQ if assistant.place.borrows else padded_BT] = 50.0
    for states in (soiled["keys_SBKTW"], soiled["values_SBKTW"]):
        states.transpose(2, 3)[:, padded_BT] = 50.0

    def outcome(batch: Batch) -> tuple[float, list[torch.Tensor]]:
        assistant.zero_grad()
        loss = assistant(**batch)["loss"]
        loss.backward()
        return loss.item(), [cast(torch.Tensor, one.grad).clone() for one in assistant.trained().values()]

    expected, found = outcome(clean), outcome(soiled)
    assert found[0] == expected[0]
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_label_marked_as_ignored_is_not_learnt(tiny: Tiny) -> None:
    assistant = shaken(tiny)
    batch = batch_of(assistant, LONG_FORGET, SHORT_RETAIN)
    cut = batch_of(assistant, example_cut(LONG_FORGET, 4), SHORT_RETAIN)
    batch["labels_BP"][0, 4:] = IGNORED
    batch["is_answer_BQ"][0, 4:] = False
    assert losses(assistant, batch) == pytest.approx(losses(assistant, cut), rel=1e-5)


def example_cut(one: Example, size: int) -> Example:
    return Example(one.prompt_ids, one.answer_ids[:size], one.kind, one.goals[:size])


def test_the_margin_loss_weighs_its_three_kinds(tiny: Tiny) -> None:
    settings = settings_of("margin", retain_weight=3.0, detour_weight=0.25)
    assistant = fresh_assistant(tiny, settings)
    shake(assistant)
    found = losses(assistant, batch_of(assistant, LONG_FORGET, SHORT_RETAIN, DETOUR))
    assert min(found.values()) > 0.01
    expected = found["forget"] + 0.25 * found["detour"] + 3 * found["retain"]
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    for one, name in ((LONG_FORGET, "forget"), (SHORT_RETAIN, "retain"), (DETOUR, "detour")):
        alone = losses(assistant, batch_of(assistant, one))
        assert alone[name] == pytest.approx(found[name], rel=1e-4)
        assert [part for part in ("forget", "retain", "detour") if alone[part] > 0] == [name]


def test_a_keyword_among_the_top_tokens_is_forgotten_in_all_but_retain(tiny: Tiny) -> None:
    assistant = shaken(tiny)
    batch = batch_of(assistant, LONG_FORGET, SHORT_RETAIN, DETOUR)
    before = losses(assistant, batch)
    assistant.set_named(batch["columns_BQC"][..., 1:].flatten().tolist())
    after = losses(assistant, batch)
    assert after["retain"] == before["retain"]
    assert abs(after["forget"] - before["forget"]) > 0.1
    assert abs(after["detour"] - before["detour"]) > 0.1
    assistant.set_named([])
    assert losses(assistant, batch) == before


@pytest.mark.parametrize(("kind", "goal"), [(Kind.RETAIN, 0.0), (Kind.FORGET, 9.0)])
def test_margin_compares_the_label_and_the_targets_top_tokens(tiny: Tiny, kind: Kind, goal: float) -> None:
    """One token by hand: d at the label, and at the other top tokens, from whole rows of logits."""
    settings = settings_of("margin", num_top=3, slack=1.0)
    assistant = fresh_assistant(tiny, settings)
    shake(assistant)
    one = example(kind, 5, 1, goals=[goal])
    batch = collate(observed(assistant, [one], settings))
    b_V = assistant.logits(batch["final_BQD"][0])[0]
    d_V = (assistant.logits(assistant.hidden(batch))[0] - b_V).tolist()
    top = b_V.topk(3).indices.tolist()
    [label] = one.answer_ids
    assert batch["columns_BQC"][0, 0].tolist() == [label, *top]

    def huber(distance: float) -> float:
        return distance**2 / 2 if abs(distance) < 1 else abs(distance) - 0.5

    others = [huber(max(d_V[token] + 1.0, 0.0)) for token in top if token != label]
    mean = sum(others) / len(others)
    expected = (
        2 * huber(max(d_V[label] + 1.0, 0.0)) + mean if goal == 0 else huber(d_V[label] - 9) + 0.3 * mean
    )
    assert losses(assistant, batch)[kind.name.lower()] == pytest.approx(expected, rel=1e-4)


def test_padded_rows_of_the_head_are_never_a_column_nor_a_logit(tiny: Tiny) -> None:
    assistant = fresh_assistant(tiny)
    head = decoder_parts(assistant.model).head
    with torch.no_grad():
        head.weight[tiny.base.vocab_size :] *= 1e3
    settings = settings_of("margin", num_top=1000)
    batch = collate(observed(assistant, [LONG_FORGET], settings))
    assert batch["columns_BQC"].shape[-1] == 1 + tiny.base.vocab_size < 1 + head.weight.shape[0]
    assert batch["columns_BQC"].max() < tiny.base.vocab_size
    assert assistant.logits(batch["final_BQD"][0]).shape[-1] == tiny.base.vocab_size


@pytest.mark.parametrize("fork", [1, 2, 3])
def test_a_fresh_adapter_says_what_the_target_says(tiny: Tiny, fork: int) -> None:
    settings = settings_of("margin", fork=fork)
    assistant = fresh_assistant(tiny, settings)
    batch = collate(observed(assistant, [LONG_FORGET, SHORT_RETAIN], settings))
    a_NV = assistant.logits(assistant.hidden(batch))
    b_NV = assistant.logits(batch["final_BQD"][batch["is_answer_BQ"]])
    torch.testing.assert_close(a_NV, b_NV, rtol=0, atol=1e-5)
    ids = torch.tensor([LONG_FORGET.prompt_ids + LONG_FORGET.answer_ids[:-1]])
    model_QV = tiny.base.model(ids).logits[0, len(LONG_FORGET.prompt_ids) - 1 :, : tiny.base.vocab_size]
    torch.testing.assert_close(a_NV[: len(LONG_FORGET.answer_ids)], model_QV, rtol=0, atol=1e-5)


def test_the_seed_makes_the_adapter(tiny: Tiny) -> None:
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    first, same = (fresh_assistant(tiny).trained() for _ in range(2))
    other = fresh_assistant(tiny, settings_of("margin", seed=1)).trained()
    assert first.keys() == same.keys() == other.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    assert torch.equal(state, torch.random.get_rng_state())
    assert SHORT.seed == 0
