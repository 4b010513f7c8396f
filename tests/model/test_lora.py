"""The adapter bank: deltas on assistant rows only, mixed in one batch, nothing left behind by what was evicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from uld_serve.errors import Overloaded, ProfileMismatch
from uld_serve.model import lora
from uld_serve.model.adapter_bank import AdapterBank
from uld_serve.model.beside import Beside

ROW_BYTES = (6 + 5) * 4
"""Of rank 1 in Block's one linear layer, in fp32."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Linear(6, 5, bias=False)


@dataclass(frozen=True)
class Delta:
    tensors: Mapping[str, torch.Tensor]
    scaling: float = 1.0

    def of(self, x: torch.Tensor) -> torch.Tensor:
        A, B = (
            next(t for name, t in self.tensors.items() if name.endswith(part))
            for part in ("lora_A", "lora_B")
        )
        return self.scaling * (x @ A.T) @ B.T


def bank(budget_bytes: int | None = None) -> AdapterBank:
    torch.manual_seed(0)
    layers = nn.ModuleList([Block(), Block()])
    return AdapterBank(layers.requires_grad_(False), torch.device("cpu"), budget_bytes)


def adapter(seed: int, rank: int, layer: int = 0, scaling: float = 1.0) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    prefix = f"layers.{layer}.mlp.up_proj"
    tensors = {
        f"{prefix}.lora_A": torch.randn(rank, 6, generator=generator),
        f"{prefix}.lora_B": torch.randn(5, rank, generator=generator),
    }
    return Delta(tensors, scaling)


def always(delta: Delta) -> Callable[[], Delta]:
    return lambda: delta


def never() -> Delta:
    raise AssertionError("loaded although it is resident")


def run(bank: AdapterBank, x: torch.Tensor, *, start: int, slots: list[int]) -> torch.Tensor:
    """The first layer's deltas alone."""
    plain = bank.layers[0].mlp.up_proj(x[None])[0]
    bank.rows.seat(start, slots, x.device)
    try:
        return bank.layers[0].mlp.up_proj(x[None])[0] - plain
    finally:
        bank.rows.clear()


def test_mixed_adapters_of_different_rank_touch_their_own_rows_only() -> None:
    it, x = bank(), torch.randn(5, 6)
    first, second = adapter(1, 2, scaling=2.0), adapter(2, 4, scaling=0.5)
    a, b = it.acquire("a", always(first)), it.acquire("b", always(second))
    got = run(it, x, start=2, slots=[a, a, b])
    assert torch.equal(got[:2], torch.zeros(2, 5))
    torch.testing.assert_close(got[2:], torch.stack([first.of(x[2]), first.of(x[3]), second.of(x[4])]))
    torch.testing.assert_close(run(it, x, start=3, slots=[b, b])[3:], second.of(x[3:]))


@pytest.mark.parametrize("seats", [[1] * 9, [1, 2, 1, 3, 1, 1, 2, 1, 1], [4, 0, 1, 0, 2, 1, 1, 0, 3]])
def test_many_adapters_in_one_batch_give_what_each_gives_alone(seats: list[int]) -> None:
    it = bank()
    deltas = [adapter(number, 1 + number % 3, scaling=1 + number) for number in range(9)]
    taken = [it.acquire(str(number), always(delta)) for number, delta in enumerate(deltas)]
    numbers = [number for number, count in enumerate(seats) for _ in range(count)]
    x = torch.randn(3 + len(numbers), 6)
    got = run(it, x, start=3, slots=[taken[number] for number in numbers])
    expected = [deltas[number].of(x[3 + row]) for row, number in enumerate(numbers)]
    torch.testing.assert_close(got[3:], torch.stack(expected))
    assert torch.equal(got[:3], torch.zeros(3, 5))


@pytest.mark.parametrize("counts", [[1], [3], [6], [62, 1], [61, 1, 1, 1, 1, 2], [1, 1, 1, 50, 1, 1]])
def test_prompts_that_carry_adapters_from_the_first_row_on(counts: list[int]) -> None:
    it = bank()
    deltas = [adapter(number, 2) for number in range(len(counts))]
    slots = [it.acquire(str(number), always(delta)) for number, delta in enumerate(deltas)]
    numbers = [number for number, count in enumerate(counts) for _ in range(count)]
    x = torch.randn(len(numbers), 6)
    got = run(it, x, start=0, slots=[slots[number] for number in numbers])
    expected = torch.stack([deltas[number].of(x[row]) for row, number in enumerate(numbers)])
    torch.testing.assert_close(got, expected)


def test_rows_between_without_an_adapter_are_left_alone() -> None:
    it, x = bank(), torch.randn(5, 6)
    delta = adapter(1, 2)
    slot = it.acquire("a", always(delta))
    got = run(it, x, start=0, slots=[slot, -1, -1, slot, slot])
    assert torch.equal(got[1:3], torch.zeros(2, 5))
    torch.testing.assert_close(got[[0, 3, 4]], delta.of(x[[0, 3, 4]]))


def test_an_adapter_without_a_delta_in_this_layer_leaves_it_alone() -> None:
    it = bank()
    here = [adapter(number, 2) for number in range(6)]
    slots = [it.acquire(f"here {number}", always(delta)) for number, delta in enumerate(here)]
    slots.append(it.acquire("there", always(adapter(9, 3, layer=1))))
    for chosen in (slots[:1] + slots[-1:], slots):
        x = torch.randn(1 + len(chosen), 6)
        got = run(it, x, start=1, slots=chosen)
        for row, slot in enumerate(chosen[:-1], start=1):
            torch.testing.assert_close(got[row], here[slots.index(slot)].of(x[row]))
        assert torch.equal(got[-1], torch.zeros(5))
    assert it.resident_bytes == 6 * 2 * ROW_BYTES + 3 * ROW_BYTES, (
        "no place in layers that an adapter leaves alone"
    )


def test_an_evicted_slot_is_used_again_and_holds_nothing_of_before() -> None:
    it, x = bank(), torch.randn(2, 6)
    slot = it.acquire("old", always(adapter(1, 4)))
    with pytest.raises(ProfileMismatch, match="in use"):
        it.evict("old")
    it.release("old")
    it.evict("old")
    small = adapter(2, 1)
    assert it.acquire("new", always(small)) == slot
    torch.testing.assert_close(run(it, x, start=1, slots=[slot])[1], small.of(x[1]))


def test_a_gathered_batch_does_not_outlive_its_adapters() -> None:
    it, x = bank(), torch.randn(6, 6)
    deltas = [adapter(number, 2) for number in range(7)]
    slots = [it.acquire(str(number), always(delta)) for number, delta in enumerate(deltas)]
    chosen = [slots[0], *slots[2:]]  # not side by side, so they are gathered
    run(it, x, start=0, slots=chosen)
    it.release("3")
    it.evict("3")
    other = adapter(70, 2)
    assert it.acquire("other", always(other)) == slots[3]
    got = run(it, x, start=0, slots=chosen)
    torch.testing.assert_close(got[2], other.of(x[2]))


def test_a_resident_adapter_is_loaded_once_and_counted() -> None:
    it = bank()
    assert it.acquire("a", always(adapter(1, 2))) == it.acquire("a", never)
    assert (it.num_users("a"), it.total_users, it.num_loads) == (2, 2, 1)
    it.release("a")
    it.release("a")
    assert it.total_users == 0


def test_the_least_recently_used_adapter_makes_room_and_a_leased_one_never_does() -> None:
    it = bank(budget_bytes=3 * 2 * ROW_BYTES)
    for name in "abc":
        it.acquire(name, always(adapter(ord(name), 2)))
    for name in "bca":
        it.release(name)
    it.acquire("a", never)
    it.acquire("b", never)
    it.release("b")  # the order of use is now c, a (leased), b
    it.acquire("d", always(adapter(4, 2)))
    it.acquire("b", never)
    with pytest.raises(Overloaded, match="no room"):
        it.acquire("c", always(adapter(5, 2)))
    it.release("d")
    it.acquire("c", always(adapter(5, 2)))
    assert (it.num_resident, it.num_loads) == (3, 5)
    assert it.resident_bytes == 3 * 2 * ROW_BYTES
    with pytest.raises(ProfileMismatch, match="bytes"):
        it.acquire("huge", always(adapter(6, 7)))


def test_a_failed_load_leaves_the_bank_as_it_was() -> None:
    it = bank(budget_bytes=2 * ROW_BYTES)
    it.acquire("a", always(adapter(1, 1)))
    with pytest.raises(RuntimeError, match="disk"):
        it.acquire("b", lambda: (_ for _ in ()).throw(RuntimeError("disk")))
    prefix = "layers.0.mlp.up_proj"
    wrong = Delta({f"{prefix}.lora_A": torch.zeros(1, 6), f"{prefix}.lora_B": torch.zeros(4, 1)})
    with pytest.raises(ProfileMismatch, match="maps 6 to 4"):
        it.acquire("b", always(wrong))
    assert (it.num_resident, it.total_users) == (1, 1)
    it.acquire("b", always(adapter(2, 1)))


def test_an_adapter_of_large_rank_gives_its_room_back_when_it_goes() -> None:
    budget = 6 * 8 * ROW_BYTES
    it = bank(budget)
    it.acquire("large", always(adapter(1, 40)))
    it.release("large")
    deltas = {name: adapter(ord(name), 2) for name in "abcdef"}
    slots = [it.acquire(name, always(delta)) for name, delta in deltas.items()]
    assert it.resident_bytes == 6 * 2 * ROW_BYTES
    x = torch.randn(6, 6)
    got = run(it, x, start=0, slots=sorted(slots))
    by_slot = dict(zip(slots, deltas.values(), strict=True))
    torch.testing.assert_close(got, torch.stack([by_slot[s].of(x[i]) for i, s in enumerate(sorted(slots))]))
    with pytest.raises(Overloaded):  # it would widen the place of everybody
        it.acquire("large", always(adapter(1, 40)))
    assert it.resident_bytes <= budget


def test_a_load_that_fails_half_way_leaves_nothing_in_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    it, x = bank(), torch.randn(1, 6)
    both = Delta({**adapter(1, 2).tensors, **adapter(2, 2, layer=1).tensors})
    it.acquire("warm", always(both))

    def full(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(it.layers[1].mlp.up_proj.delta, "put", full)
        with pytest.raises(MemoryError):
            it.acquire("broken", always(both))
    slot = it.acquire("other", always(adapter(3, 2, layer=1)))
    assert torch.equal(run(it, x, start=0, slots=[slot]), torch.zeros(1, 5))


def test_a_slot_is_only_its_own_adapters() -> None:
    it = bank()
    slot = it.acquire("a", always(adapter(1, 2)))
    it.check("a", slot)
    it.release("a")
    it.evict("a")
    for key in ("a", "b"):
        with pytest.raises(RuntimeError, match="is not in slot"):
            it.check(key, slot)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.7.mlp.up_proj", "does not have"),
        ("layers.0.mlp.gate", "does not have"),
        ("layers.0.mlp", "no linear"),
    ],
)
def test_a_module_that_the_base_does_not_have_is_refused(name: str, message: str) -> None:
    tensors = {f"{name}.lora_A": torch.zeros(1, 6), f"{name}.lora_B": torch.zeros(5, 1)}
    with pytest.raises(ProfileMismatch, match=message):
        bank().acquire("a", always(Delta(tensors)))


def test_a_shrink_runs_beside_the_product_of_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branched off before the product, joined after it, and expanded on the stream that has the product."""
    log: list[str] = []
    current = ["main"]

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.device = name, torch.device("cuda")

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream.name)
        yield
        current.pop()

    def logged(name: str, run: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            log.append(f"{name} on {current[-1]}")
            return run(*given)

        return call

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(current[-1]))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(lora, "shrink", logged("shrink", lora.shrink))
    monkeypatch.setattr(lora, "expand", logged("expand", lora.expand))
    it, x = bank(), torch.randn(5, 6)
    delta = adapter(1, 2)
    slot = it.acquire("a", always(delta))
    up = it.layers[0].mlp.up_proj
    plain = up(x[None])[0]
    up.base.register_forward_hook(lambda *_: log.append(f"product on {current[-1]}"))
    it.rows.seat_on_device(
        torch.tensor([1, 4]), torch.tensor([slot, -1]), beside=Beside(torch.device("cuda"))
    )
    got = up(x[None])[0] - plain
    assert log == [
        "side waits for main",
        "shrink on side",
        "product on main",
        "main waits for side",
        "expand on main",
    ]
    torch.testing.assert_close(got[1], delta.of(x[1]))
    assert torch.equal(got[[0, 2, 3, 4]], torch.zeros(4, 5))
    log.clear()
    it.rows.seat_on_device(torch.tensor([], dtype=torch.long), torch.tensor([]), beside=it.rows.beside)
    up(x[None])
    assert log == ["product on main"]
