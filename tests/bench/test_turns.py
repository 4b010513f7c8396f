"""`bench turns`: a conversation that switches profile every turn finds what one that never does finds in the cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from uld_serve import cli

Bench = Callable[..., dict]
TINY = ("--shape", "tiny", "--device", "cpu")


def test_switching_finds_as_much_in_the_cache_as_never_switching(bench: Bench) -> None:
    found = bench(
        "turns", *TINY, "--turns", "4", "--turn-tokens", "21", "--answer-tokens", "11", "--repeats", "2",
        "--assistant-layers", "2", "--profiles", "3",
    )  # fmt: skip
    assert found["cached_tokens_equal"] is True
    for turn in range(1, 5):
        own = {one["mode"]: one for one in found["results"] if one["turn"] == turn}
        assert set(own) == {"plain", "constant", "switching"}
        # All of the last turn but its last token, which was drawn and not run, in whole blocks of 16.
        known = 32 * (turn - 1)
        expected = max(known - 1, 0) // 16 * 16
        for one in own.values():
            assert one["prompt_tokens"] == known + 21
            assert one["cached_tokens"] == [expected]
            assert one["over_constant"] == pytest.approx(
                one["ttft_ms_median"] / own["constant"]["ttft_ms_median"], rel=1e-2
            )


def test_a_cache_of_the_assistants_own_is_found_only_under_the_same_profile(bench: Bench) -> None:
    found = bench(
        "turns", *TINY, "--turns", "3", "--turn-tokens", "21", "--answer-tokens", "11", "--repeats", "1",
        "--assistant-layers", "2", "--profiles", "3", "--kv", "own",
    )  # fmt: skip
    assert found["cached_tokens_equal"] is False
    cached = {
        mode: [one["cached_tokens"] for one in found["results"] if one["mode"] == mode]
        for mode in ("plain", "constant", "switching")
    }
    assert cached == {"plain": [[0], [16], [48]], "constant": [[0], [16], [48]], "switching": [[0]] * 3}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--turns", "0"], "--turns"),
        (["--profiles", "1"], "--profiles"),
        (["--answer-tokens", "0"], "--answer"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "turns", *TINY, *arguments]) == 2
    assert word in capsys.readouterr().err
