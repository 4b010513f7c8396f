"""One thing to be timed: an engine and what its requests forget. Filled, stepped and emptied by decode and prefill.
Knows no clock and no report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from uld_serve.engine.engine import Engine
from uld_serve.engine.plan import OWN_POOL, Decision
from uld_serve.engine.request import Delta, SamplingParams

Mode = Literal["plain", "naive", "unlearned", "all-layers", "own-kv", "many", "mixed", "crowded"]
MODES: tuple[Mode, ...] = get_args(Mode)

MODE_HELP = (
    "plain: no profile; naive: a second, truncated model beside the target; unlearned: every request with the same "
    "profile; all-layers: the same with a random assistant over all layers; own-kv: the same with a random assistant "
    "over unlearned's layers that keeps keys and values of its own; many: as many different profiles as "
    "--profiles-in-batch, spread over the batch; mixed: every other request with the profile; crowded: no profile, but "
    "as many more requests as mixed has assistant rows"
)


@dataclass(frozen=True, slots=True)
class Variant:
    """`decisions` are dealt to the requests of a batch in turn. `kv_bytes_per_token` is of the target's layers, and
    of naive's second model."""

    mode: Mode
    engine: Engine
    decisions: tuple[Decision, ...]
    kv_bytes_per_token: int

    @property
    def cache_bytes(self) -> int:
        """Of keys and values that the requests hold now, in whole blocks."""
        pools = self.engine.pools
        held = pools.target.num_held * pools.block_size * self.kv_bytes_per_token
        own = pools.by_name.get(OWN_POOL)
        if own is not None and own.num_held:
            decoder, layers = self.engine.runner.decoder, self.engine.planner.own_layers
            held += own.num_held * own.block_size * decoder.cache_bytes_per_token(layers)
        return held

    def fill(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """One request a prompt, run until every one has drawn its first token.

        Every prompt is run once alone before, into the prefix cache: all requests then start in one step, instead
        of the first ones decoding while the last ones wait for their prompts.
        """
        for row, prompt in enumerate(prompts):
            self._add(row, prompt, replace(params, max_tokens=1))
            while self.engine.has_work:
                self.step()
        for row, prompt in enumerate(prompts):
            self._add(row, prompt, params)
        while any(not sequence.output_ids for sequence in self.engine.sequences.values()):
            self.step()

    def step(self) -> list[Delta]:
        """One step of the engine. Raises a request's error."""
        deltas = self.engine.step()
        for delta in deltas:
            if delta.error is not None:
                raise delta.error
        return deltas

    def decode(self) -> None:
        """One step in which every request draws one token and none ends."""
        num_running = len(self.engine.sequences)
        deltas = self.step()
        if len(deltas) != num_running or len(self.engine.sequences) != num_running:
            raise AssertionError(f"{self.mode}: {len(deltas)} of {num_running} requests drew a token")

    def first_token(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """A new request from its arrival to its first token; `clear` ends it."""
        self._add(0, prompt, params)
        while not self.step():
            pass

    def clear(self) -> None:
        for request_id in list(self.engine.sequences):
            self.engine.abort(request_id)

    def _add(self, row: int, prompt: Sequence[int], params: SamplingParams) -> None:
        decision = self.decisions[row % len(self.decisions)]
        self.engine.add(f"{self.mode}-{row}", list(prompt), params, decision)


def num_requests(mode: Mode, batch: int) -> int:
    """Requests of a mode at a batch size. Mixed has an assistant row for every other request of the batch, the first
    one included; crowded has one more request in the place of each."""
    return batch + -(-batch // 2) if mode == "crowded" else batch


def random_prompts(count: int, length: int, *, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts that share no beginning, so that the prefix cache helps nobody."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(vocab_size, (count, length), generator=generator).tolist()
    return ids
