"""Who runs in a vLLM server that forgets: the streams of its profiles, their adapters and the rules, verified against
the checkpoint before any weight is loaded. Made once at start. Knows nothing of vLLM.

Every token of every request gets the same rows, so that where rows enter and leave is known beforehand: `seatings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from uld_serve.engine.plan import Applied, Decision, Planner
from uld_serve.engine.streams import Plan, StreamPlan
from uld_serve.errors import ModelUnsupported, ProfileMismatch
from uld_serve.model.loading import control_ids, ending_ids, fingerprint, tokenizer_hash
from uld_serve.profiles.adapter import LoraAdapter
from uld_serve.profiles.profile import BaseFacts, ProfileVersion
from uld_serve.profiles.registry import check_base
from uld_serve.vllm_plugin.orders import Orders

TARGET_BLOCK = 0


@dataclass(frozen=True, slots=True)
class Seating:
    """Which blocks of rows a layer runs: the target's first, then those of `streams`, by number.

    `picks` are the blocks of the layer before that they continue, or copy; `leaving` are streams that have left, with
    the blocks that they had there.
    """

    streams: tuple[int, ...]
    picks: tuple[int, ...]
    leaving: tuple[tuple[int, int], ...]

    @property
    def num_blocks(self) -> int:
        return 1 + len(self.streams)

    def block_of(self, stream: int) -> int:
        return 1 + self.streams.index(stream)


def seatings(streams: Sequence[StreamPlan], num_layers: int) -> tuple[Seating, ...]:
    """One for each layer, and one for what comes after the last."""
    found, before = [], Seating((), (TARGET_BLOCK,), ())
    for layer in range(num_layers + 1):
        active = tuple(n for n, one in enumerate(streams) if one.fork <= layer < one.exit)
        picks = [before.block_of(n) if n in before.streams else TARGET_BLOCK for n in active]
        leaving = tuple((n, before.block_of(n)) for n in before.streams if n not in active)
        before = Seating(active, (TARGET_BLOCK, *picks), leaving)
        found.append(before)
    return tuple(found)


@dataclass(slots=True)
class HeldAdapters:
    """The planner's bank: whatever it asks for is kept, by slot."""

    adapters: list[LoraAdapter] = field(default_factory=list)
    _slots: dict[str, int] = field(default_factory=dict)

    @property
    def total_users(self) -> int:
        return len(self._slots)

    def acquire(self, key: str, load: Callable[[], LoraAdapter]) -> int:
        if key not in self._slots:
            self._slots[key] = len(self.adapters)
            self.adapters.append(load())
        return self._slots[key]

    def release(self, key: str) -> None:
        """Held as long as the server runs."""

    def evict_all(self, prefix: str) -> int:  # noqa: ARG002 - of the protocol
        return 0


@dataclass(frozen=True, slots=True)
class Lineup:
    """`adapters` are by slot, as the plan's seats name them. `vocab_size` counts real tokens."""

    plan: Plan
    adapters: tuple[LoraAdapter, ...]
    versions: tuple[ProfileVersion, ...]
    seatings: tuple[Seating, ...]
    vocab_size: int
    protected_ids: tuple[int, ...]

    @classmethod
    def of(cls, orders: Orders, folder: Path, *, defers_logits: bool) -> Lineup:
        """Raises ProfileError, UnknownProfile or ModelUnsupported for whatever does not fit."""
        versions = orders.versions()
        tokenizer, config = _read(folder)
        facts = _facts(folder, tokenizer, config)
        for version in versions:
            check_base(version, facts)
            if version.models:
                raise ModelUnsupported(
                    f"profile '{version.name}' runs in a model of its own, which vLLM does not load beside the base; "
                    "`uld-serve serve` runs it"
                )
        bank = HeldAdapters()
        planner = Planner(bank, defers_logits=defers_logits, own_layers=facts.num_layers)
        applied = [Applied(version, orders.strength) for version in versions]
        plan = planner.plan(Decision.forgetting(applied, compose=orders.compose))
        return cls(
            plan=plan,
            adapters=tuple(bank.adapters),
            versions=versions,
            seatings=seatings(plan.streams, facts.num_layers),
            vocab_size=facts.vocab_size,
            protected_ids=control_ids(tokenizer, ending_ids(_generation(folder, config), tokenizer)),
        )

    def adapters_of(self, layer: int) -> dict[int, LoraAdapter]:
        """Block of rows in a layer -> the adapter that it carries there."""
        seating, plan = self.seatings[layer], self.plan
        seats = {TARGET_BLOCK: plan.target_seat}
        seats |= {seating.block_of(n): plan.streams[n].seat for n in seating.streams}
        return {block: self.adapters[seat.slot] for block, seat in seats.items() if seat is not None}


def _read(folder: Path) -> tuple[PreTrainedTokenizerFast, PreTrainedConfig]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelUnsupported(
            f"model {folder.name} has no fast tokenizer (tokenizer.json); convert it first"
        )
    return tokenizer, AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _generation(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def _facts(folder: Path, tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig) -> BaseFacts:
    return BaseFacts(
        id=folder.name,
        fingerprint=fingerprint(folder),
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=min(len(tokenizer), int(config.vocab_size)),
        num_layers=int(config.num_hidden_layers),
        module_shapes=module_shapes(config),
    )


def module_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers that adapters may change. Raises ProfileMismatch for a config without them."""
    try:
        width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    except AttributeError as error:
        raise ProfileMismatch(f"this checkpoint's config does not say its sizes: {error}") from error
    head_dim = getattr(config, "head_dim", None) or width // heads
    queries = heads * head_dim
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    return {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
