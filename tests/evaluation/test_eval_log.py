"""Logs are read in every published form, and the eval command tells what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uld_serve.cli import main
from uld_serve.errors import DataError
from uld_serve.evaluation.eval_log import PUBLISHED, SECTIONS, read_log, write_log

COUNTS = {"retain": 5, "real_authors": 3, "world_facts": 4, "forget": 6}


def section(name: str, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng([seed, SECTIONS.index(name)])
    count = COUNTS[name]
    return {
        "avg_gt_loss": rng.uniform(0, 2, count).tolist(),
        "avg_paraphrased_loss": rng.uniform(0, 2, count).tolist(),
        "average_perturb_loss": rng.uniform(1, 4, (count, 3)).tolist(),
        "rougeL_recall": rng.uniform(0.1, 1, count).tolist(),
    }


def whole(seed: int = 0) -> dict[str, Any]:
    return {name: section(name, seed) for name in SECTIONS}


def published(seed: int = 0) -> dict[str, Any]:
    """By sample index, one metric in another order, with what else the published files hold."""
    found: dict[str, Any] = {}
    for file, name in PUBLISHED.items():
        by_index = {
            metric: {str(number): value for number, value in enumerate(values)}
            for metric, values in section(name, seed).items()
        }
        by_index["rougeL_recall"] = dict(reversed(by_index["rougeL_recall"].items()))
        found[file] = by_index | {"generated_text": {"0": ["question", "answer", "truth"]}}
    return found


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_all_forms_of_a_log_read_alike(tmp_path: Path) -> None:
    ours = read_log(write(tmp_path / "log.json", whole()))
    aggregated = read_log(write(tmp_path / "eval_log_aggregated.json", published()))
    folder = tmp_path / "ds_size300"
    folder.mkdir()
    for file, values in published().items():
        write(folder / file, values)
    own = tmp_path / "acme"
    own.mkdir()
    write_log(own / "eval_log.json", ours.sections)
    for other in (aggregated, read_log(folder), read_log(own), read_log(own / "eval_log.json")):
        assert set(other.sections) == set(SECTIONS)
        for name, expected in ours.sections.items():
            for field in ("loss_N", "paraphrased_loss_N", "perturbed_loss_NJ", "rougeL_recall_N"):
                np.testing.assert_array_equal(getattr(other.sections[name], field), getattr(expected, field))


def test_the_command_tells_utility_and_forget_quality(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, reference = write(tmp_path / "a.json", whole(1)), write(tmp_path / "b.json", whole(2))
    records = {}
    for variant in ("geometric", "arithmetic"):
        options = ["--reference", str(reference), "--truth-ratio", variant, "--json"]
        assert main(["eval", "tofu-logs", str(log), *options]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        records[variant] = json.loads(out)
    geometric = records["geometric"]
    assert 0 < geometric["model_utility"] < 1
    assert set(geometric["forget_quality"]) == {"p", "d", "n"}
    assert geometric["forget_quality"]["n"] == COUNTS["forget"]
    forget = section("forget", 1)
    ratios = [
        math.exp(sum(wrong) / 3 - right)
        for wrong, right in zip(forget["average_perturb_loss"], forget["avg_paraphrased_loss"], strict=True)
    ]
    expected = sum(min(ratio, 1 / ratio) for ratio in ratios) / len(ratios)
    assert geometric["sections"]["forget"]["truth_ratio"] == pytest.approx(expected)
    assert records["arithmetic"]["truth_ratio"] == "arithmetic"
    assert records["arithmetic"]["model_utility"] != geometric["model_utility"]


def test_a_reference_of_another_forget_set_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = whole(2)
    for values in other["forget"].values():
        values.pop()
    log, reference = write(tmp_path / "a.json", whole(1)), write(tmp_path / "b.json", other)
    assert main(["eval", "tofu-logs", str(log), "--reference", str(reference)]) == 2
    assert f"{COUNTS['forget'] - 1} forget samples" in capsys.readouterr().err


def test_without_a_reference_there_is_no_forget_quality(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "tofu-logs", str(write(tmp_path / "a.json", whole())), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forget_quality"] is None


def test_a_table_is_printed_without_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "tofu-logs", str(write(tmp_path / "a.json", whole()))]) == 0
    out = capsys.readouterr().out
    assert "model utility" in out
    assert "world_facts" in out


def without(log: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in log.items() if key != name}


def changed(metric: str, value: object) -> dict[str, Any]:
    log = whole()
    log["retain"][metric] = value
    return log


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ([], "must hold a JSON object"),
        ({"other": 1}, "none of the sections"),
        (whole() | {"retain": 3}, "must be an object of arrays"),
        (whole() | {"eval_log.json": section("retain")}, "'retain' twice"),
        (changed("avg_gt_loss", [1.0]), "as many samples of each"),
        (changed("avg_gt_loss", {"0": 1.0}), "by sample index"),
        (changed("rougeL_recall", [1.0, 1.0, 1.0, 1.0, True]), r"rougeL_recall\[4\] must be a number"),
        (
            changed("avg_paraphrased_loss", [1.0, 1.0, 1.0, 1.0, math.inf]),
            r"avg_paraphrased_loss\[4\] is inf",
        ),
        (changed("avg_gt_loss", [1.0, 1.0, 1.0, 1.0, math.nan]), "must be a number"),
        (changed("average_perturb_loss", [[1.0], [1.0], [1.0], [1.0], [1.0, 2.0]]), "as many wrong answers"),
        (without(section("retain"), "avg_gt_loss"), "none of the sections"),
        ({"retain": without(section("retain"), "avg_gt_loss")}, "retain has no avg_gt_loss"),
    ],
)
def test_a_log_that_cannot_be_judged_is_refused_by_name(tmp_path: Path, log: object, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_log(write(tmp_path / "log.json", log))


def test_a_log_without_what_is_needed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log.json", without(whole(), "world_facts"))
    assert main(["eval", "tofu-logs", str(log)]) == 2
    assert "has no section 'world_facts'" in capsys.readouterr().err
    assert main(["eval", "tofu-logs", str(tmp_path / "nothing.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert main(["eval", "tofu-logs", str(tmp_path / "broken.json")]) == 2
    assert "is not JSON" in capsys.readouterr().err
