"""`bench decode` and `bench prefill` time what they say, print one JSON line, and refuse what cannot be measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
from kept_profiles import Kept
from tiny_base import Tiny

from uld_serve import cli
from uld_serve.bench import decode
from uld_serve.bench.subjects import Subjects
from uld_serve.bench.variant import Mode, Variant, num_requests, random_prompts
from uld_serve.engine.request import SamplingParams

TINY = ("--shape", "tiny", "--device", "cpu")
Bench = Callable[..., dict]


def subjects(*arguments: str) -> Subjects:
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    return Subjects.of(parser.parse_args([*TINY, *arguments]))


def test_decode_reports_every_mode_at_every_batch(bench: Bench) -> None:
    found = bench("decode", *TINY, "--batch", "1", "3", "--context", "20", "--steps", "3")
    assert [(one["batch"], one["mode"]) for one in found["results"]] == [
        (batch, mode) for batch in (1, 3) for mode in ("plain", "naive", "unlearned")
    ]
    for one in found["results"]:
        assert one["context"] == 20
        low, high = one["ms_quartiles"]
        assert 0 < low <= one["ms_median"] <= high
        assert one["tokens_per_s"] == pytest.approx(one["batch"] / one["ms_median"] * 1e3, rel=1e-3)
    assert set(found["ratios"]) == {"1", "3"}
    assert found["environment"]["device"] == "cpu"
    assert found["settings"]["interleaved"] is True


def test_ratios_are_of_the_medians(bench: Bench) -> None:
    found = bench("decode", *TINY, "--batch", "2", "--context", "8", "--steps", "3")
    medians = {one["mode"]: one["ms_median"] for one in found["results"]}
    expected = {f"{mode}/plain": medians[mode] / medians["plain"] for mode in ("naive", "unlearned")}
    assert found["ratios"]["2"] == pytest.approx(expected, rel=1e-2)


def test_many_profiles_take_many_times_the_bytes(bench: Bench) -> None:
    found = bench(
        "decode", *TINY, "--modes", "unlearned", "mixed", "--profiles-in-batch", "5", "--batch", "4",
        "--context", "8", "--steps", "2", "--assistant-layers", "2", "--rank", "4",
    )  # fmt: skip
    assert [one["mode"] for one in found["results"]] == ["unlearned", "many", "mixed"]
    held = found["adapter_bytes"]
    # Rank 4 on two layers' q, o, gate, up and down projections, in bf16 or fp32.
    num_parameters = 2 * 4 * ((64 + 64) + (64 + 64) + (64 + 128) * 3)
    assert held["1"] in (2 * num_parameters, 4 * num_parameters)
    assert held == {"1": held["1"], "5": 5 * held["1"]}
    assert set(found["ratios"]["4"]) == {"many/unlearned"}
    speeds = {one["mode"]: one["tokens_per_s"] for one in found["results"]}
    assert found["throughput_of_many"] == {"4": pytest.approx(speeds["many"] / speeds["unlearned"], rel=1e-3)}


def test_every_kind_of_assistant_in_one_run(bench: Bench) -> None:
    modes = ("plain", "naive", "unlearned", "all-layers", "own-kv", "mixed", "crowded")
    found = bench(
        "decode", *TINY, "--modes", *modes, "--batch", "3", "--context", "8", "--steps", "2", "--assistant-layers", "2",
    )  # fmt: skip
    assert [one["mode"] for one in found["results"]] == list(modes)
    assert set(found["ratios"]["3"]) == {f"{mode}/plain" for mode in modes[1:]} | {"mixed/crowded"}
    crowded = found["results"][-1]
    assert crowded["tokens_per_s"] == pytest.approx(5 / crowded["ms_median"] * 1e3, rel=1e-3)


def streams(chosen: Subjects, mode: Mode) -> list[tuple[int, int, str, int]]:
    (decision,) = chosen.variant(mode, chosen.settings(1, 16)).decisions
    version = decision.applied[0].version
    ranks = {adapter.rank for adapter in version.adapters.values()}
    return [(one.fork, one.exit, one.kv, *ranks) for one in version.profile.streams]


def test_kinds_of_assistant_differ_in_one_thing() -> None:
    chosen = subjects("--assistant-layers", "2", "--rank", "3")
    assert streams(chosen, "unlearned") == [(2, 4, "borrowed", 3)]
    assert streams(chosen, "all-layers") == [(0, 4, "borrowed", 3)]
    assert streams(chosen, "own-kv") == [(2, 4, "own", 3)]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_crowded_has_as_many_rows_as_mixed(batch: int) -> None:
    chosen = subjects()
    rows = {}
    for mode in ("mixed", "crowded"):
        variant = chosen.variant(mode, chosen.settings(8, 32))
        prompts = random_prompts(num_requests(mode, batch), 8, vocab_size=512, seed=0)
        variant.fill(prompts, SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0))
        scheduler = variant.engine.scheduler
        rows[mode] = sum(one.num_rows for one in scheduler.schedule())
    assert rows["mixed"] == rows["crowded"] > batch


def test_one_at_a_time_measures_the_same_modes(bench: Bench) -> None:
    found = bench(
        "decode", *TINY, "--one-at-a-time", "--modes", "plain", "unlearned", "--batch", "1", "2", "--context", "8",
        "--steps", "2",
    )  # fmt: skip
    assert [(one["batch"], one["mode"]) for one in found["results"]] == [
        (1, "plain"), (1, "unlearned"), (2, "plain"), (2, "unlearned")
    ]  # fmt: skip
    assert found["settings"]["interleaved"] is False


def test_prefill_reports_every_length(bench: Bench) -> None:
    found = bench("prefill", *TINY, "--context", "16", "600", "--repeats", "2")
    assert [(one["context"], one["mode"]) for one in found["results"]] == [
        (16, "plain"), (16, "unlearned"), (600, "plain"), (600, "unlearned")
    ]  # fmt: skip
    assert set(found["ratios"]) == {"16", "600"}
    assert set(found["ratios"]["600"]) == {"unlearned/plain"}


def receipts(variant: Variant, count: int) -> list[str]:
    prompts = random_prompts(count, 8, vocab_size=512, seed=0)
    variant.fill(prompts, SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0))
    ends = []
    while variant.engine.has_work:
        ends += [delta for delta in variant.step() if delta.finish_reason is not None]
    ends.sort(key=lambda delta: delta.request_id)
    return [delta.receipt.header.partition("@")[0] for delta in ends]


def test_each_mode_forgets_what_its_name_says() -> None:
    chosen = subjects("--modes", "plain", "naive", "unlearned", "mixed", "--profiles-in-batch", "3")
    settings = chosen.settings(4, 32)
    found = {mode: receipts(chosen.variant(mode, settings), 4) for mode in chosen.modes}
    assert found == {
        "plain": ["none"] * 4,
        "naive": ["random-0"] * 4,
        "unlearned": ["random-0"] * 4,
        "many": ["random-0", "random-1", "random-2", "random-0"],
        "mixed": ["random-0", "none", "random-0", "none"],
    }


def test_a_batch_starts_together() -> None:
    chosen = subjects()
    variant = chosen.variant("unlearned", chosen.settings(8, 600))
    prompts = random_prompts(8, 500, vocab_size=512, seed=0)
    variant.fill(prompts, SamplingParams(max_tokens=50, ignore_eos=True, temperature=0.0))
    sequences = variant.engine.sequences.values()
    assert [(len(one.output_ids), one.num_computed) for one in sequences] == [(1, 500)] * 8
    variant.decode()
    assert {len(one.output_ids) for one in sequences} == {2}
    variant.clear()
    variant.engine.check_integrity()


def test_a_timed_step_in_which_a_request_ends_is_refused() -> None:
    chosen = subjects()
    variant = chosen.variant("plain", chosen.settings(1, 32))
    variant.fill([[5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.0))
    with pytest.raises(AssertionError, match="plain: 1 of 1"):
        variant.decode()


def test_a_busy_machine_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "decode", *TINY, "--modes", "plain", "--batch", "1", "--context", "8", "--steps", "1"]
    warned = []
    for load in (100.0, 0.0):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, load, load))
        assert cli.main(command) == 0
        out, err = capsys.readouterr()
        assert out.startswith("cpu (")
        warned.append("not comparable" in err)
    assert warned == [True, False]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model", "x"], "exclude each other"),
        (["--profile", "harry-potter"], "random"),
        (["--profiles-in-batch", "0"], "at least 1"),
        (["--assistant-layers", "5"], "does not fit"),
        (["--fork", "3", "--assistant-layers", "2"], "does not fit"),
        (["--rank", "0"], "does not fit"),
        (["--context", "4096"], "4096 positions"),
        (["--steps", "0"], "at least 1"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "decode", *TINY, *arguments]) == 2
    assert word in capsys.readouterr().err


def test_an_adapter_on_the_target_alone_is_measured_beside_plain(
    bench: Bench, kept: Kept, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, version = kept.profiles["distilled"]
    options = [
        "--model",
        str(tiny.folder),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--batch",
        "2",
        "--context",
        "8",
    ]
    options += [
        "--steps",
        "2",
        "--profiles",
        str(folder),
        "--profile",
        "distilled",
        "--modes",
        "plain",
        "unlearned",
    ]
    found = bench("decode", *options)
    assert set(found["ratios"]["2"]) == {"unlearned/plain"}
    assert (found["settings"]["profile"], found["settings"]["fork"]) == (version.ref, None)

    assert cli.main(["bench", "decode", *options, "naive"]) == 2
    assert "has no assistant to vary" in capsys.readouterr().err
