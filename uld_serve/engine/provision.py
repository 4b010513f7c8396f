"""Provides what profiles need beyond the base: room for assistants' own keys and values, and separate models. Called
by Engine.prepare before a profile is admitted; a request that needs neither never pays for them.

Knows no request and no file: separate models come loaded.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from uld_serve.config import EngineConfig
from uld_serve.engine.block_pool import BlockPool
from uld_serve.engine.plan import OWN_POOL, Planner, ProfileVersion, SecondModel
from uld_serve.engine.pools import Pools
from uld_serve.engine.runner import Runner
from uld_serve.errors import InvalidRequest, Overloaded, ProfileError, ProfileMismatch
from uld_serve.model.decoder import Decoder
from uld_serve.model.loading import Base
from uld_serve.model.vocabulary import check_same_vocabulary


@dataclass(frozen=True, slots=True)
class Provision:
    """The parts of an engine that grow with what its profiles need. `has_own`: some request, running or waiting, has
    or will want room of its own."""

    base: Base
    config: EngineConfig
    planner: Planner
    pools: Pools
    runner: Runner
    has_own: bool

    def make(self, versions: Sequence[ProfileVersion], models: Mapping[str, Base]) -> None:
        """`models` are separate models by fingerprint; those known already need not be given.

        Raises ProfileMismatch for a model of another vocabulary, ProfileError for one that was not given,
        ModelUnsupported for one that our loop cannot run, InvalidRequest where memory is set too small, Overloaded
        when assistants' room must grow while requests are in it.
        """
        streams = [stream for version in versions for stream in version.profile.streams]
        if not self.runner.keeps_state and any(stream.kv == "own" for stream in streams):
            raise ProfileError(
                "assistants with keys and values of their own, or in models of their own, are not served by several "
                "processes together; leave these profiles out, or --tensor-parallel"
            )
        own = [stream.exit - stream.fork for stream in streams if stream.kv == "own" and not stream.model]
        self._make_own(max(own, default=0))
        for version in versions:
            for fingerprint, spec in version.models.items():
                if fingerprint in self.planner.models:
                    continue
                if fingerprint not in models:
                    raise ProfileError(
                        f"profile '{version.name}' names model {spec.id}, which is not loaded here"
                    )
                self._add_model(fingerprint, models[fingerprint], spec.tokenizer)

    def _make_own(self, num_layers: int) -> None:
        if num_layers <= self.planner.own_layers:
            return
        if self.has_own:
            raise Overloaded(
                f"a profile keeps keys and values of its own in {num_layers} layers and requests are in the room for "
                f"{self.planner.own_layers}; try again when they are done"
            )
        before = self.planner.own_layers
        try:
            self._renew_own(num_layers)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold what had been taken
            if before:  # for the profiles that are served already
                self._renew_own(before)
            raise

    def _renew_own(self, num_layers: int) -> None:
        """The room there was is gone before the next is made: both together might not fit. Until it is there, profiles
        that need it are refused."""
        self.planner.own_layers, self.runner.own = 0, None
        num_blocks = self._num_blocks(self.runner.decoder, num_layers)
        self.runner.own = self.runner.decoder.allocate_cache(
            num_layers, num_blocks, block_size=self.config.block_size
        )
        self.pools.by_name[OWN_POOL] = BlockPool(num_blocks, self.config.block_size)
        self.planner.own_layers = num_layers

    def _add_model(self, fingerprint: str, model: Base, tokenizer_hash: str) -> None:
        if (model.fingerprint, model.tokenizer_hash) != (fingerprint, tokenizer_hash):
            raise ProfileMismatch(
                f"model {model.id} has fingerprint {model.fingerprint} and tokenizer {model.tokenizer_hash}; the "
                f"profile was made with {fingerprint} and {tokenizer_hash}"
            )
        check_same_vocabulary(self.base, model)
        decoder = Decoder.of(model)
        decoder.bank.budget_bytes = self.config.adapter_bytes
        num_blocks = self._num_blocks(decoder, model.num_layers)
        self.runner.separate[fingerprint] = Runner.of(decoder, self.config, num_blocks=num_blocks)
        self.pools.by_name[fingerprint] = BlockPool(num_blocks, self.config.block_size)
        self.planner.models[fingerprint] = SecondModel(decoder.bank, model.num_layers, decoder.max_positions)

    def _num_blocks(self, decoder: Decoder, num_layers: int) -> int:
        """As many as own_kv_bytes hold; by default as many as the target has, if a GPU's memory that is still free
        holds twice that."""
        block_bytes = decoder.cache_bytes_per_token(num_layers) * self.config.block_size
        budget = self.config.own_kv_bytes
        if budget is None:
            budget = self.config.num_blocks * block_bytes
            if self.base.device.type == "cuda":
                budget = min(budget, torch.cuda.mem_get_info(self.base.device)[0] // 2)
        if budget < block_bytes:
            raise InvalidRequest(
                f"own_kv_bytes {budget} holds no block of {self.config.block_size} tokens ({block_bytes} bytes)",
                param="own_kv_bytes",
            )
        return budget // block_bytes
