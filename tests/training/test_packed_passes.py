"""Examples side by side without padding, their common beginning once: the same states, losses and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from tiny_base import NUM_LAYERS, Tiny
from tiny_run import example, fresh_assistant, observed, settings_of, shake

from uld_serve.model.borrowed import causal_mask, grouped_attention
from uld_serve.model.packing import Packing, num_alike
from uld_serve.training.assistant import Assistant
from uld_serve.training.examples import Example, Kind
from uld_serve.training.place import Place
from uld_serve.training.states import collate, observe

BEGINNING = example(Kind.RETAIN, 11, 1).prompt_ids
SIZES = ((Kind.FORGET, 3, 7), (Kind.RETAIN, 5, 2), (Kind.RETAIN, 1, 4))
ALIKE = [replace(one, prompt_ids=BEGINNING + one.prompt_ids) for one in (example(*size) for size in SIZES)]


def test_every_token_is_one_row_and_the_common_ones_are_rows_once() -> None:
    packing = Packing.of([5, 3, 4], num_shared=2, device=torch.device("cpu"))
    ids_BT = torch.tensor([[7, 8, 1, 2, 3], [7, 8, 4, 0, 0], [7, 8, 5, 6, 0]])
    rows_1N = packing.rows(ids_BT)
    assert rows_1N.tolist() == [[7, 8, 1, 2, 3, 4, 5, 6]]
    assert packing.positions_1N.tolist() == [[0, 1, 2, 3, 4, 2, 2, 3]]
    whole_B1T1 = packing.spread(rows_1N[:, None, :, None])
    is_real_BT = torch.arange(5) < torch.tensor([[5], [3], [4]])
    assert whole_B1T1[:, 0, :, 0][is_real_BT].tolist() == ids_BT[is_real_BT].tolist()


def test_what_sequences_begin_with_is_counted_to_the_end_of_the_shortest() -> None:
    assert num_alike([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert num_alike([[1], [2]]) == 0
    assert num_alike([[5, 6]]) == 2
    assert num_alike([[], [1]]) == 0


@pytest.mark.parametrize("kv", ["own", "borrowed"])
def test_the_target_reads_packed_examples_as_it_reads_each_alone(tiny: Tiny, kv: str) -> None:
    place = Place(2, NUM_LAYERS, "own" if kv == "own" else "borrowed")
    given = {"place": place, "num_top": 4, "vocab_size": tiny.base.vocab_size}
    assistant = fresh_assistant(tiny)
    with assistant.peft.disable_adapter():
        read_as_alone(tiny, assistant, given)


def read_as_alone(tiny: Tiny, assistant: Assistant, given: dict[str, object]) -> None:
    together = observe(assistant.model, ALIKE, **given)  # type: ignore[arg-type]
    for one, example_ in zip(together, ALIKE, strict=True):
        [alone] = observe(assistant.model, [example_], **given)  # type: ignore[arg-type]
        ids = torch.tensor([example_.prompt_ids + example_.answer_ids])
        with torch.no_grad():
            logits_TV = tiny.base.model(ids).logits[0]
        first = len(example_.prompt_ids) - 1
        own_Q1 = logits_TV[first:-1].gather(-1, torch.tensor(example_.answer_ids)[:, None])
        torch.testing.assert_close(one.logits_QC[:, :1], own_Q1)
        assert one.columns_QC.tolist() == alone.columns_QC.tolist()
        for name in ("fork_PD", "final_QD", "keys_SKTW", "values_SKTW"):
            torch.testing.assert_close(getattr(one, name), getattr(alone, name))
        assert one.final_QD.untyped_storage().nbytes() == one.final_QD.nbytes  # holds no batch alive


def outcome(assistant: Assistant, examples: list[Example]) -> tuple[float, list[torch.Tensor]]:
    assistant.zero_grad()
    batch = collate(observed(assistant, examples, assistant.settings))
    loss = assistant(**batch)["loss"]
    loss.backward()
    return loss.item(), [cast(torch.Tensor, one.grad).clone() for one in assistant.trained().values()]


@pytest.mark.parametrize("method", ["undial", "npo"])
def test_a_packed_batch_has_the_loss_and_gradient_of_its_examples(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    assistant = fresh_assistant(tiny, settings_of(method))
    shake(assistant)
    packed = outcome(assistant, ALIKE)
    unlike: list[int] = []

    def apart(lengths: list[int], *, num_shared: int, device: torch.device) -> Packing:
        unlike.append(num_shared)
        return made(lengths, num_shared=0, device=device)

    made = Packing.of
    monkeypatch.setattr(Packing, "of", apart)
    plain = outcome(assistant, ALIKE)
    assert set(unlike) == {len(BEGINNING)}
    assert packed[0] == pytest.approx(plain[0], rel=1e-5)
    torch.testing.assert_close(packed[1], plain[1], rtol=1e-4, atol=1e-5)


def test_with_dropout_nothing_is_shared(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = fresh_assistant(tiny, settings_of("undial", dropout=0.5))
    batch = collate(observed(assistant, ALIKE, assistant.settings))
    shared: list[int] = []
    made = Packing.of

    def counted(lengths: list[int], *, num_shared: int, device: torch.device) -> Packing:
        shared.append(num_shared)
        return made(lengths, num_shared=num_shared, device=device)

    monkeypatch.setattr(Packing, "of", counted)
    assistant(**batch)
    assert int(batch["num_shared"]) == len(BEGINNING)
    assert shared == [0]


@pytest.mark.parametrize("is_masked", [True, False])
def test_attention_that_learns_is_torchs_attention_with_its_gradient(is_masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4))
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    is_real_BT = torch.arange(5) < torch.tensor([[5], [3]])
    mask = causal_mask(is_real_BT, torch.arange(5).expand(2, -1)) if is_masked else None
    slope = torch.randn(2, 5, 6, 4, generator=generator)

    def outcome(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (out, *torch.autograd.grad((out * slope).sum(), inputs))

    query, *lent = inputs
    whole = [one.repeat_interleave(3, dim=1) for one in lent]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *whole, attn_mask=mask, is_causal=not is_masked, scale=0.3
    )
    found = grouped_attention(query, *lent, mask, scaling=0.3)
    torch.testing.assert_close(outcome(found), outcome(expected.transpose(1, 2)))
