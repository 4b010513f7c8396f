"""The opponent: a second, separately held model beside the target, as people combine logits today.

The assistant is a copy of the base's first K layers, embedding, norm and head, with its own weights in memory, its
own KV cache, its own pass over every token (prompt included) and its own product with the LM head. It is built of
the engine's own parts (decoder, packed weights, attention, scheduler, sampler), the combine rule is the profile's,
and its adapter is taken as merged into its weights, so that nothing but the second model is measured. It shares
the target's block table, which spares it a scheduler of its own. What it pays on top is one copy of both models'
scores into one tensor, where a logits processor would make one combined tensor.

Called by subjects. Knows no request and no timing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from uld_serve.config import EngineSettings
from uld_serve.engine.engine import Engine
from uld_serve.engine.runner import Runner
from uld_serve.errors import InvalidRequest
from uld_serve.model.decoder import Decoder
from uld_serve.model.head import Scores
from uld_serve.model.loading import Base
from uld_serve.model.row_batch import RowBatch
from uld_serve.profiles.adapter import LoraAdapter
from uld_serve.profiles.profile import ProfileVersion, StreamSpec


@dataclass(frozen=True, slots=True)
class NaiveRunner:
    """Runs every row through both models: scores of the target first, then of the assistant."""

    target: Runner
    assistant: Runner

    @property
    def keeps_state(self) -> bool:
        """Yes: what an assistant keeps lies with the second model."""
        return True

    def run(self, rows: RowBatch) -> Scores:
        alone = replace(rows, assistants=())
        return Scores(torch.cat([self.target.run(alone).logits_RW, self.assistant.run(alone).logits_RW]))

    def clear(self, block_ids: Sequence[int]) -> None:
        self.target.clear(block_ids)
        self.assistant.clear(block_ids)


def naive_engine(base: Base, settings: EngineSettings, *, num_layers: int) -> Engine:
    """An engine whose assistant is a second model of `num_layers` layers. It takes over `base`'s model."""
    assistant = truncated_copy(base, num_layers)
    engine = Engine.of(base, settings)
    second = Runner.of(Decoder.of(assistant), engine.config)
    # The engine asks nothing more of a runner that is not recorded.
    engine.runner = cast(Runner, NaiveRunner(engine.runner, second))
    return engine


def naive_version(version: ProfileVersion, *, num_layers: int) -> ProfileVersion:
    """`version` with its assistant from the embedding on and no adapter to add: the planner then orders one
    assistant's scores a row, and the combine rule is the same. Raises InvalidRequest for a pair of streams."""
    if len(version.profile.streams) != 1:
        raise InvalidRequest(
            f"profile '{version.name}' has {len(version.profile.streams)} streams; naive runs one"
        )
    name = version.profile.streams[0].name
    stream = StreamSpec(name=name, fork=0, exit=num_layers, kv="borrowed", adapter=name)
    return replace(
        version,
        profile=version.profile.model_copy(update={"streams": (stream,)}),
        adapters={name: LoraAdapter(rank=1, alpha=1.0, tensors={})},
    )


def truncated_copy(base: Base, num_layers: int) -> Base:
    """The base's first layers with embedding, norm and head, in memory of their own."""
    model = shared_copy(base).model
    body, config = model.get_decoder(), model.config.get_text_config()
    body.layers = nn.ModuleList(list(body.layers)[:num_layers])
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    return replace(base, model=copy.deepcopy(model), num_layers=num_layers)


def shared_copy(base: Base) -> Base:
    """The base with modules of its own over the same weights: an engine may rebuild the modules as it likes."""
    tensors = [*base.model.parameters(), *base.model.buffers()]
    return replace(base, model=copy.deepcopy(base.model, {id(tensor): tensor for tensor in tensors}))
