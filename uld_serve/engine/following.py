"""What every rank but the first does: it runs the rows that it is told to, on its part of the layers, until it is told
to stop. Called by `uld-serve serve`. Draws no token and knows no request."""

from __future__ import annotations

import logging

from uld_serve.config import EngineSettings
from uld_serve.engine.leading import acquire_part, rows_on
from uld_serve.engine.memory import runner_of
from uld_serve.engine.ranks import Acquire, Begin, Clear, EvictAll, Message, Ranks, Release, Run, Stop
from uld_serve.engine.runner import Runner
from uld_serve.errors import ModelUnsupported, UldError
from uld_serve.model.loading import Base

logger = logging.getLogger(__name__)


def follow(base: Base, ranks: Ranks, settings: EngineSettings | None = None) -> None:
    """Returns when rank 0 has stopped. Raises RanksLost when it is gone, ModelUnsupported for another checkpoint than
    rank 0's."""
    runner, _ = runner_of(base, settings or EngineSettings(), ranks)
    begin = ranks.hear()
    assert isinstance(begin, Begin), "rank 0 begins with its own configuration"
    if begin.fingerprint != base.fingerprint:
        raise ModelUnsupported(
            f"rank {ranks.part.rank} has loaded {base.fingerprint}, rank 0 {begin.fingerprint}: give all the same files"
        )
    if begin.config.num_blocks != runner.cache.num_blocks:
        runner = Runner.of(runner.decoder, begin.config)
    runner.decoder.bank.budget_bytes = begin.config.adapter_bytes
    while not isinstance(message := ranks.hear(), Stop):
        _do(message, runner, ranks)
    ranks.leave()


def _do(message: Message, runner: Runner, ranks: Ranks) -> None:
    bank = runner.decoder.bank
    match message:
        case Run(rows):
            runner.decoder.layers_only(rows_on(rows, runner.decoder.base.device), runner.cache)
        case Clear(block_ids):
            runner.clear(block_ids)
        case Acquire(key):
            try:
                acquire_part(bank, ranks, message)
            except UldError as error:  # rank 0's bank has raised the same, and told who asked
                logger.info("adapter %s was not taken in: %s", key, error.message)
        case Release(key):
            bank.release(key)
        case EvictAll(prefix):
            bank.evict_all(prefix)
        case _:
            raise AssertionError(f"rank 0 told {type(message).__name__} out of turn")
