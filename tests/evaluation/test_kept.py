"""What a run keeps is found again under its key, and no file is ever half written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from uld_serve.evaluation.groups import over
from uld_serve.evaluation.kept import kept_or_made, key_of, write_whole
from uld_serve.evaluation.rows import dataset_rows, file_rows
from uld_serve.evaluation.table import Column, table


def kept(path: Path, key: str, value: int, told: list[str]) -> int:
    def restore(record: Mapping[str, object]) -> int:
        assert isinstance(record["value"], int)
        return record["value"]

    return kept_or_made(
        path,
        key,
        lambda: value,
        restore=restore,
        record=lambda made: {"value": made},
        when_kept=lambda: told.append("kept"),
    )


def test_a_part_is_made_once_for_a_key(tmp_path: Path) -> None:
    path, told = tmp_path / "folder" / "part.json", list[str]()
    assert kept(path, "a", 1, told) == 1
    assert kept(path, "a", 2, told) == 1
    assert told == ["kept"]
    assert kept(path, "b", 3, told) == 3
    path.write_text("{")
    assert kept(path, "b", 4, told) == 4
    assert told == ["kept"]


def test_keys_tell_values_and_their_types_apart_but_not_the_order_of_names() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert len({key_of("1"), key_of(1), key_of(None), key_of([1]), key_of(1, 1)}) == 5


def test_a_file_that_cannot_be_written_whole_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, "old")
    write_text = Path.write_text

    def half(self: Path, text: str, **more: str) -> int:
        write_text(self, text[: len(text) // 2], **more)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "something new")
    assert path.read_text() == "old"


def test_figures_over_each_other() -> None:
    trees = [{"p": 1.0, "deep": {"n": 4}, "variant": "g", "none": None}, {"p": 3.0, "deep": {"n": 4}}]
    trees[1] |= {"variant": "g", "none": 2.0}
    assert over(trees) == {
        "p": {"mean": 2.0, "std": pytest.approx(2**0.5), "min": 1.0, "max": 3.0},
        "deep": {"n": {"mean": 4.0, "std": 0.0, "min": 4.0, "max": 4.0}},
        "variant": "g",
        "none": None,
    }


def test_a_table_has_a_dash_for_what_was_not_measured() -> None:
    columns = (Column("p", ("deep", "p"), ".2f"), Column("n", ("n",), "g"))
    group = {"deep": {"p": {"mean": 0.5, "std": 0.25, "min": 0.25, "max": 0.75}}}
    lines = table(columns, {"one": {"deep": {"p": 0.125}, "n": 3}, "many": group, "none": {}})
    assert lines == [
        "|  | p | n |",
        "|---|---|---|",
        "| one | 0.12 | 3 |",
        "| many | 0.50 ± 0.25 | – |",
        "| none | – | – |",
    ]


def test_json_lines_may_hold_line_separators(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert file_rows(tmp_path / "x.jsonl") == [{"text": "a\u2028b"}]


def test_configurations_of_a_dataset_are_read_by_the_package_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder as it lies on the hub goes through the same code as an id."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    (folder / "All").mkdir(parents=True)
    (folder / "All" / "level1.json").write_text('[{"query": "q ___", "answer": "a"}]')
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: level1\n  data_files:\n  - split: test\n    path: All/level1.json\n---\n"
    )
    assert list(dataset_rows(str(folder), "level1", split="test")) == [{"query": "q ___", "answer": "a"}]
