"""`uld-serve train`: every option reaches its setting or is refused; the demo data; the last line of output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import transformers.utils.logging as transformers_logging
from tiny_base import Tiny
from tiny_run import FORGET, KEYWORDS, RETAIN, write_questions

from uld_serve.data.documents import read_documents
from uld_serve.errors import DataError
from uld_serve.profiles.store import read_profile
from uld_serve.training import command, jobs, options, probing
from uld_serve.training import run as run_module
from uld_serve.training.data_options import sources_of
from uld_serve.training.methods.catalog import METHODS, PRESETS
from uld_serve.training.settings import CHOICES, Settings
from uld_serve.training.sources import Sources

DATA = ("--forget", "f.jsonl", "--retain", "r.jsonl")


@pytest.fixture(autouse=True)
def _transformers_logging_as_before() -> Iterator[None]:
    level, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    yield
    transformers_logging.set_verbosity(level)
    if has_bars:
        transformers_logging.enable_progress_bar()


def parse(*given: str, method: str | None = "margin", out: str = "out") -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_parser(parser.add_subparsers())
    how = [] if method is None else ["--method", method]
    return parser.parse_args(["train", *how, "--out", out, *given])


def settings(tiny: Tiny, *given: str, method: str | None = "margin", has_keywords: bool = False) -> Settings:
    chosen = options.Chosen.of(parse(*DATA, *given, method=method))
    return chosen.settings(tiny.base.num_layers, has_keywords=has_keywords)


def owner(field: str) -> str:
    """A method that has the setting."""
    return next(name for name, one in METHODS.items() if field in one.options or not is_owned(field))


def is_owned(field: str) -> bool:
    return any(field in one.options for one in METHODS.values())


ADAPTED = ("rkld-distill", "undial", "ga", "npo")
"""Without a rule: the target itself has an adapter."""

OWNED = [field for field in options.SETTINGS if is_owned(field)]


@pytest.mark.parametrize("field", list(options.SETTINGS))
def test_each_option_reaches_its_field_and_no_other(tiny: Tiny, field: str) -> None:
    other = CHOICES.get(field, ("3",))[-1]
    value = {
        "fork": "1",
        "exit": "3",
        "lr": "0.125",
        "strength": "2.5",
        "dropout": "0.25",
        "retain_ramp": "0.5",
    }.get(field, other)
    has_keywords = field in ("detour_weight", "focus_weight")  # without them there is nothing to weigh
    method = owner(field)
    needed = ("--start", "solved") if field == "start_quiet" else ()
    given = (*needed, f"--{field.replace('_', '-')}", value)
    found = settings(tiny, *given, method=method, has_keywords=has_keywords)
    usual = settings(tiny, *needed, method=method, has_keywords=has_keywords)
    typed = options.SETTINGS[field][0](value)
    assert getattr(usual, field) != typed
    assert found == replace(usual, **{field: typed})


def test_a_weight_with_nothing_to_weigh_is_refused(tiny: Tiny) -> None:
    for given in ((), ("--augment", "none")):
        with pytest.raises(DataError, match="--detour-weight needs"):
            settings(tiny, "--detour-weight", "3", *given, has_keywords=bool(given))


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        *((name, ("--strength", "2"), "--strength changes nothing") for name in METHODS if name in ADAPTED),
        *((name, ("--tau", "0.1"), "--tau changes nothing") for name in METHODS if name in ADAPTED),
        ("divergence", ("--retain-weight", "2"), "--retain-weight changes nothing in --method divergence"),
        ("ga", ("--retain-weight", "2", "--retain-term", "none"), "--retain-weight weighs nothing"),
        ("undial", ("--preset", "undial-official", "--retain-weight", "2"), "--retain-weight weighs nothing"),
        ("undial", ("--focus-weight", "2"), "--focus-weight needs .* --keywords"),
        ("uld", ("--start-quiet", "3"), "--start-quiet is of the start that is solved for"),
        ("uld", ("--start", "solved", "--modules", "qv"), "--modules qv leaves out"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    tiny: Tiny, method: str, given: tuple[str, ...], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        settings(tiny, *given, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_without_options_a_run_has_its_methods_defaults(tiny: Tiny, method: str) -> None:
    assert settings(tiny, method=method) == METHODS[method].defaults(tiny.base.num_layers)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", OWNED)
def test_an_option_of_other_methods_is_refused(tiny: Tiny, method: str, field: str) -> None:
    if field in METHODS[method].options:
        return
    option, value = f"--{field.replace('_', '-')}", CHOICES.get(field, ("3",))[-1]
    with pytest.raises(DataError, match=f"{option} is for --method {owner(field)}"):
        settings(tiny, option, value, method=method)


NUMBERS = [name for name in options.SETTINGS if name != "seed" and name not in CHOICES]


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_values_that_make_no_sense_are_refused_by_option(tiny: Tiny, field: str, value: str) -> None:
    option = f"--{field.replace('_', '-')}"
    if options.SETTINGS[field][0] is int and value != "-1":
        with pytest.raises(SystemExit):
            parse(*DATA, option, value)
        return
    with pytest.raises(DataError, match=option):
        settings(tiny, option, value, method=owner(field))


def test_an_assistant_must_enter_before_it_leaves(tiny: Tiny) -> None:
    with pytest.raises(DataError, match="must enter before it leaves: --fork 3 --exit 3"):
        settings(tiny, "--fork", "3", "--exit", "3")


def test_defaults_fit_a_shallow_and_a_deep_base() -> None:
    late, truncated, whole = (22, 30), (0, 8), (0, 30)
    for name, method in METHODS.items():
        assert (method.defaults(4).fork, method.defaults(4).exit) == (0, 4)
        found = method.defaults(30)
        expected = truncated if name == "uld" else whole if method.changes_target else late
        assert (found.fork, found.exit) == expected
        assert found.kv == ("own" if method.changes_target else "borrowed")


def test_a_run_has_a_method(tiny: Tiny) -> None:
    with pytest.raises(DataError, match="give --method: margin, uld, "):
        settings(tiny, method=None)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_its_numbers_and_says_where_they_stand(tiny: Tiny, preset: str) -> None:
    base = replace(tiny.base, num_layers=30)
    chosen = options.Chosen.of(parse(*DATA, "--preset", preset, "--rank", "3", method=None))
    found = chosen.settings(base.num_layers, has_keywords=False)
    told = list(chosen.told())
    assert found.method == PRESETS[preset].method
    for (field, (value, where)), line in zip(PRESETS[preset].values.items(), told, strict=True):
        assert getattr(found, field) == (3 if field == "rank" else value)
        assert f"--{field.replace('_', '-')} {value}" in line
        assert where in line
        assert ("given here: 3" in line) == (field == "rank")


def test_a_preset_of_another_method_or_two_at_once_are_refused(tiny: Tiny) -> None:
    with pytest.raises(DataError, match="--preset uld-paper is for --method uld"):
        settings(tiny, "--preset", "uld-paper", method="margin")
    with pytest.raises(DataError, match="give one of the presets uld-paper and rkld-paper"):
        settings(tiny, "--preset", "uld-paper", "--preset", "rkld-paper", method=None)


def test_steps_given_take_the_place_of_a_presets_epochs(tiny: Tiny) -> None:
    found = settings(tiny, "--preset", "uld-paper", "--exit", "4", "--steps", "7", method=None)
    assert (found.steps, found.epochs) == (7, None)
    assert found.for_data(num_forget=1000, num_detours=0).steps == 7
    with pytest.raises(DataError, match="give --steps or --epochs, not both"):
        settings(tiny, "--steps", "7", "--epochs", "2")


def test_a_papers_epochs_are_the_teachers_too(tiny: Tiny) -> None:
    """The strengthening's ten epochs are the paper's number; the student has as many."""
    found = settings(tiny, "--preset", "rkld-paper", "--forget-batch", "10", method=None)
    found = found.for_data(num_forget=50, num_detours=0)
    assert [lesson.steps or found.steps for lesson in METHODS["rkld-distill"].lessons(found)] == [50, 50]


def test_epochs_are_passes_over_the_forget_examples(tiny: Tiny) -> None:
    found = settings(tiny, "--epochs", "2.5", "--forget-batch", "8", "--grad-accum", "2")
    assert found.for_data(num_forget=100, num_detours=0).steps == 16  # 250 examples, 16 a step
    assert found.for_data(num_forget=1, num_detours=0).steps == 1
    assert found.for_data(num_forget=100, num_detours=0, num_processes=2).steps == 8


def test_margin_looks_for_other_answers_if_it_knows_the_keywords(tiny: Tiny) -> None:
    assert settings(tiny, has_keywords=True).detours == 2
    assert settings(tiny, has_keywords=True).detour_batch == 4
    assert settings(tiny, "--augment", "self", has_keywords=True) == settings(tiny, has_keywords=True)
    for found in (
        settings(tiny, "--augment", "none", has_keywords=True),
        settings(tiny, has_keywords=False),
        settings(tiny, method="uld", has_keywords=True),
    ):
        assert (found.detours, found.detour_batch) == (0, 0)


def test_other_methods_take_the_bases_own_words_where_asked_to(tiny: Tiny) -> None:
    assert settings(tiny, "--augment", "self", method="rkld").own_samples == 2
    assert settings(tiny, method="rkld", has_keywords=True).own_samples == 0


def test_margin_augments_itself_with_keywords_only(tiny: Tiny) -> None:
    with pytest.raises(DataError, match="--augment self needs --keywords"):
        settings(tiny, "--augment", "self")


def test_other_answers_have_room_in_a_batch_where_there_are_any(tiny: Tiny) -> None:
    found = settings(tiny, "--forget-batch", "8", method="uld")
    assert found.for_data(num_forget=9, num_detours=0).detour_batch == 0
    assert found.for_data(num_forget=9, num_detours=1).detour_batch == 4


@pytest.fixture
def keywords(tmp_path: Path) -> str:
    path = tmp_path / "keywords.txt"
    path.write_text("Ann\n\n  Death Eater \n")
    return str(path)


def test_sources_are_as_told(keywords: str) -> None:
    plain = Sources(forget=Path("f.jsonl"), retain=Path("r.jsonl"))
    named = replace(plain, keywords=("Ann", "Death Eater"))
    probes = ("--probe-forget", "pf.jsonl", "--probe-retain", "pr.jsonl")
    held_out = replace(named, probe_forget=Path("pf.jsonl"), probe_retain=Path("pr.jsonl"))
    told = {
        (): plain,
        ("--probes", "none"): plain,
        ("--augment", "none"): replace(plain, uses_columns=False),
        ("--augment", "columns"): plain,
        ("--augment", "file", "--augment-file", "a.jsonl"): replace(
            plain, uses_columns=False, augment_file=Path("a.jsonl")
        ),
        ("--keywords", keywords): replace(named, split=True),
        ("--keywords", keywords, "--probes", "split"): replace(named, split=True),
        ("--keywords", keywords, "--probes", "none"): named,
        ("--keywords", keywords, *probes): held_out,
    }
    for given, expected in told.items():
        assert sources_of(parse(*DATA, *given)) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give --forget and --retain, or --preset demo"),
        (("--forget", "f"), "give --forget and --retain"),
        ((*DATA, "--probes", "split"), "give --keywords, or --probes none"),
        ((*DATA, "--probe-forget", "p", "--probe-retain", "q"), "give --keywords"),
        ((*DATA, "--probe-forget", "p"), "--probe-forget and --probe-retain go together"),
        ((*DATA, "--probe-retain", "p"), "--probe-forget and --probe-retain go together"),
        (
            (*DATA, "--probe-forget", "p", "--probe-retain", "q", "--probes", "none"),
            "--probes none contradicts --probe-forget",
        ),
        (("--preset", "demo", "--forget", "f"), "brings its own data; leave out --forget"),
        (("--preset", "demo", "--retain", "f"), "leave out --retain"),
        (("--preset", "demo", "--keywords", "f"), "leave out --keywords"),
        (("--preset", "demo", "--probe-forget", "f"), "leave out --probe-forget"),
        (("--preset", "demo", "--probe-retain", "f"), "leave out --probe-retain"),
        (("--preset", "demo", "--probes", "none"), "leave out --probes"),
        ((*DATA, "--augment", "none", "--augment", "self"), "--augment none contradicts the others"),
        ((*DATA, "--augment", "file"), "--augment file and --augment-file go together"),
        ((*DATA, "--augment-file", "x"), "--augment file and --augment-file go together"),
        (("--preset", "demo", "--augment-file", "x"), "leave out --augment-file"),
        ((*DATA, "--keywords", "no-such-file"), "no-such-file cannot be read as text"),
    ],
)
def test_contradictions_are_refused(options: tuple[str, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        sources_of(parse(*options))


def test_a_keywords_file_without_a_word_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(DataError, match=r"--keywords: .*blank.txt is empty"):
        sources_of(parse(*DATA, "--keywords", str(tmp_path / "blank.txt")))


def test_the_demo_data_is_ample_varied_and_disjoint() -> None:
    sources = sources_of(parse("--preset", "demo"))
    assert sources.probe_forget
    assert sources.probe_retain
    forget, retain, *_ = sources.files
    files = {"forget": forget, "retain": retain,
             "held forget": sources.probe_forget, "held retain": sources.probe_retain}  # fmt: skip
    readings = {name: read_documents(path, kind=name) for name, path in files.items()}
    least = {"forget": (60, 6), "retain": (120, 10), "held forget": (24, 6), "held retain": (24, 10)}
    keys: list[str] = []
    for name, reading in readings.items():
        num_documents, num_forms = least[name]
        assert reading.dropped == {}
        assert len(reading.documents) >= num_documents
        assert len({document.form for document in reading.documents}) >= num_forms
        keys += [document.key for document in reading.documents]
    assert len(set(keys)) == len(keys)
    assert all(
        document.messages for name in ("held forget", "held retain") for document in readings[name].documents
    )
    assert {"Harry", "Hogwarts", "Dumbledore"} <= set(sources.keywords)
    assert not sources.split


def arguments(tiny: Tiny, tmp_path: Path) -> list[str]:
    (tmp_path / "keywords.txt").write_text("\n".join(KEYWORDS))
    (tmp_path / "README.md").write_text("# How this was made\n")
    given = {
        "base": tiny.folder, "dtype": "float32", "device": "cpu", "readme": tmp_path / "README.md",
        "forget": write_questions(tmp_path / "f.jsonl", FORGET), "keywords": tmp_path / "keywords.txt",
        "retain": write_questions(tmp_path / "r.jsonl", RETAIN),
        "steps": 10, "rank": 4, "fork": 2, "max-answer-tokens": 6, "seed": 3, "strength": 2.5,
    }  # fmt: skip
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def test_the_command_trains_and_ends_with_one_line_of_json(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "REPLAY_TOKENS", 4)
    out = tmp_path / "tiny-demo"
    assert command.run(parse(*arguments(tiny, tmp_path), "--json", out=str(out))) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out.splitlines()[-1])
    version = read_profile(out)
    assert told["profile"] == version.ref
    assert told["profile"].startswith("tiny-demo@")
    assert told["path"] == str(out)
    record = json.loads((out / "training.json").read_text())
    assert told["measured"] == record["measured"]
    assert {"forget", "retain"} == told["measured"].keys()
    assert (record["settings"]["rank"], record["settings"]["seed"]) == (4, 3)
    assert version.profile.rule.strength == 2.5
    assert (out / "README.md").read_text() == "# How this was made\n"
    assert "the base answers: forget (10)" in printed.err
    assert "step 10 of 10: loss" in printed.err
    assert '"dropped"' in printed.err


@pytest.mark.parametrize(("options", "name"), [(["--name", "another"], "another"), ([], "out")])
def test_a_profile_is_named_as_told_or_for_its_folder(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], name: str
) -> None:
    told: dict[str, object] = {}

    def train(*_args: object, **options: object) -> None:
        told.update(options)
        raise DataError("enough seen")

    monkeypatch.setattr(jobs, "train", train)
    with pytest.raises(DataError, match="enough seen"):
        command.run(parse(*arguments(tiny, tmp_path), "--resume", *options, out=str(tmp_path / "out")))
    assert told["name"] == name
    assert (told["out"], told["resume"]) == (tmp_path / "out", True)
    assert told["readme"] == "# How this was made\n"


@pytest.mark.parametrize(("rise", "warns"), [(0.2, True), (3.0, False), (None, False)])
def test_a_profile_that_forgets_little_is_called_so(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rise: float | None,
    warns: bool,
) -> None:
    outcome = run_module.Outcome(tiny.version("late-fork"), {"measured": {}, "data": {}}, rise)
    monkeypatch.setattr(jobs, "train", lambda *_, **__: outcome)
    assert command.run(parse(*arguments(tiny, tmp_path), out=str(tmp_path / "new"))) == 0
    assert ("forgets little" in " ".join(capsys.readouterr().err.split())) is warns


def test_the_losses_of_every_lesson_are_told_and_drawn_where_asked_for(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probing, "REPLAY_TOKENS", 2)
    picture = tmp_path / "loss.png"
    given = [*arguments(tiny, tmp_path), "--plot", str(picture), "--steps", "3"]
    assert command.run(parse(*given, method="divergence", out=str(tmp_path / "pair"))) == 0
    told = capsys.readouterr().err
    for adapter in ("forget", "retain"):
        assert f"training {adapter} (3)" in told
    assert told.count("step 3 of 3: loss") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["loss.pdf", "nowhere/loss.png"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_any_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(jobs, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(DataError, match=r"name a .png file in a folder that exists"):
        command.run(parse(*arguments(tiny, tmp_path), "--plot", str(tmp_path / name)))


def test_a_dry_run_shows_and_writes_nothing(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*arguments(tiny, tmp_path), "--dry-run", "--json"]
    assert command.run(parse(*given, out=str(tmp_path / "dry"))) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out.splitlines()[-1])
    assert told["num_examples"]["forget"] == 10
    assert told["settings"]["steps"] == 10
    assert "nothing was written" in printed.err
    assert not (tmp_path / "dry").exists()
    assert not (tmp_path / ".dry.training").exists()
