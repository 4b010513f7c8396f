"""`bench memory` counts what resident profiles take: their adapters' bytes and no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from uld_serve import cli

Bench = Callable[..., dict]
TINY = ("--shape", "tiny", "--device", "cpu")


def test_every_profile_takes_its_adapters_bytes(bench: Bench) -> None:
    found = bench("memory", *TINY, "--count", "1", "3", "--assistant-layers", "2", "--rank", "4")
    held = {one["profiles"]: one["adapter_bytes"] for one in found["results"]}
    # Rank 4 on two layers' q, o, gate, up and down projections, in bf16 or fp32.
    num_parameters = 2 * 4 * ((64 + 64) + (64 + 64) + (64 + 128) * 3)
    assert held[1] in (2 * num_parameters, 4 * num_parameters)
    assert held == {0: 0, 1: held[1], 3: 3 * held[1]}


@pytest.mark.parametrize("count", ["0", "-1"])
def test_no_profile_at_all_is_refused(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "memory", *TINY, "--count", count]) == 2
    assert "--count" in capsys.readouterr().err
