"""`bench growth`: the cache grows in a straight line with the tokens, and a bent line would be seen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from uld_serve import cli
from uld_serve.bench.line import fit

Bench = Callable[..., dict]
TINY = ("--shape", "tiny", "--device", "cpu")
# Keys and values of 4 layers with 2 heads of width 16.
NUMBERS_A_TOKEN = 2 * 4 * 2 * 16


def test_cache_grows_in_a_straight_line(bench: Bench) -> None:
    found = bench("growth", *TINY, "--context", "160", "320", "640", "--steps", "2", "--batch", "2")
    assert [(one["mode"], one["context"]) for one in found["results"]] == [
        (mode, context) for mode in ("plain", "unlearned") for context in (160, 320, 640)
    ]
    for one in found["results"]:
        # 6 tokens were drawn by the end, and blocks have 16.
        blocks = 2 * -(-(one["context"] + 6) // 16)
        assert one["cache_bytes"] in (blocks * 16 * NUMBERS_A_TOKEN * width for width in (2, 4))
    lines = {mode: fits["bytes"] for mode, fits in found["fits"].items()}
    assert lines["plain"] == lines["unlearned"]
    assert lines["plain"]["r_squared"] > 0.9999
    assert lines["plain"]["slope"] / 2 in (
        pytest.approx(2 * NUMBERS_A_TOKEN, rel=0.05), pytest.approx(4 * NUMBERS_A_TOKEN, rel=0.05)
    )  # fmt: skip
    assert set(found["fits"]["plain"]["ms"]) == {"slope", "intercept", "r_squared", "worst"}


def test_own_keys_and_values_are_counted_too(bench: Bench) -> None:
    found = bench(
        "growth", *TINY, "--context", "160", "320", "640", "--steps", "2", "--modes", "plain", "own-kv", "naive",
        "--assistant-layers", "2",
    )  # fmt: skip
    held = {(one["mode"], one["context"]): one["cache_bytes"] for one in found["results"]}
    for context in (160, 320, 640):
        # Two layers more on top of four.
        assert held["own-kv", context] == held["naive", context] == held["plain", context] * 3 // 2
    assert found["fits"]["own-kv"]["bytes"]["r_squared"] > 0.9999


def test_a_line_is_told_from_a_curve() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    straight, curve = fit(x, [3 + 2 * one for one in x]), fit(x, [one**2 for one in x])
    assert (straight.slope, straight.intercept) == (pytest.approx(2), pytest.approx(3))
    assert (straight.r_squared, straight.worst) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert curve.r_squared < 0.97
    assert curve.worst > 0.05
    assert fit(x, [5.0] * 4).r_squared == 1


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["bench", "growth", *TINY, "--plot", str(tmp_path / "x.png")]) == 2
    assert "uld-serve[plot]" in capsys.readouterr().err


def test_a_plot_is_drawn(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "growth.png"
    bench("growth", *TINY, "--context", "16", "32", "64", "--steps", "2", "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--context", "16", "32"], "three lengths"),
        (["--context", "16", "16", "32"], "three lengths"),
        (["--steps", "0"], "at least 1"),
        (["--context", "5000", "16", "32"], "4096 positions"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "growth", *TINY, *arguments]) == 2
    assert word in capsys.readouterr().err
