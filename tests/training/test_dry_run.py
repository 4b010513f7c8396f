"""A dry run says what a run would take, and leaves nothing behind."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from tiny_base import NUM_LAYERS, Tiny
from tiny_run import FORGET, RETAIN, fresh_base, settings_of, silent, unheard, write_jsonl, write_sources

from uld_serve.errors import DataError
from uld_serve.model.loading import Base
from uld_serve.training import jobs
from uld_serve.training.classroom import Watch
from uld_serve.training.dry_run import Forecast, forecast
from uld_serve.training.methods.catalog import METHODS
from uld_serve.training.sources import Sources

WATCH = Watch(stage=silent, report=unheard)


def forecast_of(tiny: Tiny, folder: Path, method: str, **changes: object) -> Forecast:
    settings = settings_of(method, **changes)
    return forecast(fresh_base(tiny), write_sources(folder), settings, name="tiny", watch=WATCH)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_tried_dry(tiny: Tiny, tmp_path: Path, method: str) -> None:
    found = forecast_of(tiny, tmp_path, method)
    lessons = METHODS[method].lessons(settings_of(method))
    assert [one["adapter"] for one in found.lessons] == [lesson.adapter for lesson in lessons]
    for told, lesson in zip(found.lessons, lessons, strict=True):
        assert told["layers"] == f"{lesson.place.fork} to {lesson.place.exit} of {NUM_LAYERS}"
        assert told["parameters"]
    assert found.num_examples["forget"] == len(FORGET) - 2
    assert found.num_examples["retain"] == len(RETAIN) - 2
    assert found.num_examples["detour"] == (len(FORGET) - 2) * settings_of(method).detours
    assert {"answering", "observing", "training"} == found.seconds.keys()
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert {path.name for path in tmp_path.iterdir()} == {"forget.jsonl", "retain.jsonl"}
    text = "\n".join(found.lines())
    assert "forget: 10 documents" in text
    assert "nothing was written" in text


def test_the_parameters_are_those_that_the_run_trains(tiny: Tiny, tmp_path: Path) -> None:
    """Of each layer r (in + out) on q, o, gate, up and down."""
    config = tiny.base.model.config
    width, inner, heads = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_dim,
    )
    a_layer = 8 * ((width + heads) * 2 + (width + inner) * 3)
    [lesson] = forecast_of(tiny, tmp_path, "rkld").lessons
    assert lesson["parameters"] == 2 * a_layer


def test_what_is_forgotten_is_marked_in_the_examples(tiny: Tiny, tmp_path: Path) -> None:
    found = forecast_of(tiny, tmp_path, "margin")
    shown = {line.split(":")[0]: line for line in found.lines() if " -> " in line}
    assert "who is bob?" in shown["forget"]  # the first is held out
    assert "[" in shown["forget"].split("->")[1]
    assert "[" not in shown["retain"].split("->")[1]


def test_more_steps_take_longer_and_more_examples_more_room(tiny: Tiny, tmp_path: Path) -> None:
    short, long = (forecast_of(tiny, tmp_path, "rkld", steps=steps) for steps in (10, 10_000))
    assert long.seconds["training"] > 20 * short.seconds["training"]
    own = forecast_of(tiny, tmp_path, "rkld", own_samples=50)
    assert own.num_examples["forget"] == 51 * short.num_examples["forget"]
    assert own.bytes > 5 * short.bytes


def test_a_few_documents_that_leave_nothing_to_learn_are_not_all(tiny: Tiny, tmp_path: Path) -> None:
    """The first answers of what stays name a keyword, so no example is made of them."""
    rows = [{"question": f"why {n}?", "answer": "Zz" if n < 3 else "so"} for n in range(5)]
    forget = write_jsonl(tmp_path / "f.jsonl", [{"question": "who?", "answer": "Zz"}])
    sources = Sources(forget=forget, retain=write_jsonl(tmp_path / "r.jsonl", rows), keywords=("Zz",))
    settings = settings_of("divergence")
    found = forecast(fresh_base(tiny), sources, settings, name="tiny", watch=WATCH)
    assert {one["kind"] for one in found.examples} == {"forget", "retain"}
    write_jsonl(tmp_path / "r.jsonl", rows[:3])
    with pytest.raises(DataError, match="no usable retain example: its answers are empty or name a keyword"):
        forecast(fresh_base(tiny), sources, settings, name="tiny", watch=WATCH)


def test_what_a_run_would_refuse_a_dry_one_refuses(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="beyond the base's 4 layers"):
        forecast_of(tiny, tmp_path, "margin", exit=5)
    with pytest.raises(DataError, match="leave out --fork, --exit and --kv"):
        forecast_of(tiny, tmp_path, "undial", fork=1)


def test_the_base_is_given_back_as_it_was(tiny: Tiny, tmp_path: Path) -> None:
    base = fresh_base(tiny)
    before, attention = {name for name, _ in base.model.named_parameters()}, attention_of(base)
    forecast(base, write_sources(tmp_path), settings_of("divergence"), name="tiny", watch=WATCH)
    assert {name for name, _ in base.model.named_parameters()} == before
    assert attention_of(base) == attention


def attention_of(base: Base) -> str:
    return str(base.model.config._attn_implementation)


@pytest.mark.parametrize("option", [["--resume"], ["--plot", "loss.png"], ["--tracker", "tensorboard"]])
def test_options_that_a_dry_run_would_ignore_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    monkeypatch.setattr(jobs, "load_base", lambda *_, **__: pytest.fail("loaded"))
    parser = argparse.ArgumentParser()
    jobs.add_options(parser)
    given = ["--method", "margin", "--preset", "demo", "--out", "nowhere", "--dry-run", *option]
    with pytest.raises(DataError, match=f"--dry-run trains nothing; leave out {option[0]}"):
        jobs.run(parser.parse_args(given))
