"""What vLLM draws from: fused logits of hidden rows, and low-rank deltas on blocks of rows. Needs no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_base import Tiny
from uld_kernels import reference

from uld_serve.errors import NumericalError
from uld_serve.model.head import Head
from uld_serve.profiles.adapter import LoraAdapter
from uld_serve.vllm_plugin.deltas import JOINED, BlockDeltas
from uld_serve.vllm_plugin.lineup import Lineup
from uld_serve.vllm_plugin.orders import Orders
from uld_serve.vllm_plugin.rule import ServedRule

B, D, W = 5, 32, 264


def rule_of(tiny: Tiny, *names: str, defers_logits: bool = False, **fields: object) -> ServedRule:
    orders = Orders(
        profiles=names, directories=tuple(str(path) for path, _ in tiny.profiles.values()), **fields
    )
    lineup = Lineup.of(orders, Path(tiny.folder), defers_logits=defers_logits)
    weight_WD = torch.randn(W, D, generator=torch.Generator().manual_seed(1))
    head = Head.of_weight(weight_WD, None, is_packed=False)
    return ServedRule(lineup.plan, head, lineup.vocab_size, torch.tensor(lineup.protected_ids))


def hidden(rule: ServedRule) -> torch.Tensor:
    return torch.randn(B, rule.num_blocks * D, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("defers_logits", [False, True])
def test_logits_are_the_served_rule_and_its_filter(tiny: Tiny, defers_logits: bool) -> None:
    rule = rule_of(tiny, "late-fork", defers_logits=defers_logits)
    rows = hidden(rule)
    V = rule.vocab_size
    b, a = ((rows[:, block * D : (block + 1) * D] @ rule.head.weight_WD.T)[:, :V] for block in (0, 1))
    s = reference.relu_difference(b, a, strength=2.0)
    expected = s.masked_fill(~reference.fused_keep(s, tau=0.02), -torch.inf)
    found = rule.logits(rows)
    assert found.shape == (B, W)
    assert found[:, V:].eq(-torch.inf).all()
    torch.testing.assert_close(found[:, :V], expected, rtol=0, atol=1e-4)
    assert not torch.equal(found[:, :V].argmax(-1), b.argmax(-1))


def test_composed_profiles_take_the_larger_penalty(tiny: Tiny) -> None:
    rule = rule_of(tiny, "late-fork", "all-layers")
    rows = hidden(rule)
    V = rule.vocab_size
    b, first, second = ((part @ rule.head.weight_WD.T)[:, :V] for part in rows.split(D, dim=1))
    penalties = [strength * torch.relu(a - b) for a, strength in ((first, 2.0), (second, 4.0))]
    expected = b - torch.maximum(*penalties)
    found = rule.logits(rows)[:, :V]
    for row in range(B):
        kept = (found[row] > -torch.inf).nonzero()[:, 0]
        kept = kept[kept < 256]  # one of the two protects the others, which moves all of these by one number
        shift = (found[row] - expected[row])[kept]
        assert kept.numel() > 0
        torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-4)


def test_strength_multiplies_the_rules_own(tiny: Tiny) -> None:
    weak, strong = rule_of(tiny, "late-fork", strength=0.5), rule_of(tiny, "late-fork", strength=2.0)
    assert [rule.plan.terms[0].strength for rule in (weak, strong)] == [1.0, 4.0]


def test_a_row_does_not_depend_on_the_others(tiny: Tiny) -> None:
    rule = rule_of(tiny, "pair")
    rows = hidden(rule)
    whole = rule.logits(rows)
    torch.testing.assert_close(rule.logits(rows[3:4]), whole[3:4], rtol=0, atol=1e-5)
    assert rule.logits(rows[:0]).shape == (0, W)


def test_a_stream_that_is_not_finite_stops_the_step_and_gives_no_logits(tiny: Tiny) -> None:
    rule = rule_of(tiny, "late-fork")
    rows = hidden(rule)
    rows[2, D:] = torch.nan
    with pytest.raises(NumericalError, match="1 of 5 rows"):
        rule.logits(rows)
    rehearsed = rule.logits(rows, is_rehearsal=True)
    assert rehearsed[2].eq(-torch.inf).all()


def test_an_assistant_that_lost_its_adapter_on_the_way_stops_the_first_step(tiny: Tiny) -> None:
    rule = rule_of(tiny, "late-fork")
    rows = hidden(rule)
    same = torch.cat([rows[:, :D], rows[:, :D]], dim=1)
    with pytest.raises(AssertionError, match="its adapter is not applied"):
        rule.logits(same)
    assert rule.logits(same, is_rehearsal=True).shape == (B, W)
    assert rule.logits(rows).shape == (B, W)


def test_scores_combined_with_other_profiles_are_never_given(tiny: Tiny) -> None:
    rule, other = rule_of(tiny, "late-fork"), rule_of(tiny, "all-layers")
    rule.plan = other.plan
    with pytest.raises(AssertionError, match="other profiles"):
        rule.logits(hidden(rule))


@pytest.mark.parametrize("name", JOINED)
def test_deltas_reach_their_blocks_and_parts_alone(tiny: Tiny, name: str) -> None:
    adapter: LoraAdapter = tiny.version("late-fork").adapters["assistant"]
    sizes = {"self_attn.k_proj": 16, "self_attn.v_proj": 16, "mlp.gate_proj": 48, "mlp.up_proj": 48}
    modules = JOINED[name]
    widths = [sizes.get(module, 32) for module in modules]
    inner = 48 if name == "mlp.down_proj" else 32
    deltas = BlockDeltas(
        {1: adapter}, 2, modules, widths, num_blocks=3, dtype=torch.float32, device=torch.device("cpu")
    )
    x = torch.randn(3 * 4, inner, generator=torch.Generator().manual_seed(0))
    y = deltas(torch.zeros(3 * 4, sum(widths)), x)
    expected, first = torch.zeros(3 * 4, sum(widths)), 0
    for module, width in zip(modules, widths, strict=True):
        key = f"layers.2.{module}"
        if f"{key}.lora_A" in adapter.tensors:
            A, B = adapter.tensors[f"{key}.lora_A"].float(), adapter.tensors[f"{key}.lora_B"].float()
            expected[4:8, first : first + width] = adapter.scaling * (x[4:8] @ A.T) @ B.T
        first += width
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert y[4:8].abs().sum() > 0
    assert list(deltas.parameters()) == []
