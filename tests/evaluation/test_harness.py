"""lm-evaluation-harness, as it is published: over HTTP and in process it gets the same scores, and with a profile it
gets others than of the base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from served_process import Served, start
from tiny_base import Tiny

import uld_serve.evaluation.tasks
from uld_serve.errors import DataError

lm_eval = pytest.importorskip("lm_eval")
# lm-eval and what it imports warn of their own dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = Path(uld_serve.evaluation.tasks.__file__).parent
FORGET = ["wizards_choice", "wizards_words", "wizards_answer"]
PROFILE = "late-fork"
MAX_LENGTH = 257


@pytest.fixture(scope="module")
def served(tiny: Tiny) -> Iterator[Served]:
    profiles = tiny.profiles[PROFILE][0].parent
    server = start("--model", str(tiny.folder), "--profiles", str(profiles), "--dtype", "float32")
    yield server
    server.process.terminate()
    assert server.process.wait(timeout=20) == 0
    assert server.process.stdout is not None
    server.process.stdout.close()


def evaluated(model: str, arguments: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    import uld_serve.evaluation.harness  # noqa: F401  # registers the model

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lm_eval.simple_evaluate(  # type: ignore[no-any-return]
        model=model, model_args=arguments, tasks=tasks, task_manager=manager, bootstrap_iters=0
    )


def in_process(tiny: Tiny, tasks: list[str], **arguments: object) -> dict[str, Any]:
    own = {
        "model": str(tiny.folder),
        "profiles": str(tiny.profiles[PROFILE][0].parent),
        "dtype": "float32",
        "device": "cpu",
        "max_length": MAX_LENGTH,
    }
    return evaluated("uld-serve", {**own, **arguments}, tasks)


def answers(found: dict[str, Any], task: str) -> list[Any]:
    """What the model said to each request of each sample."""
    return [sample["resps"] for sample in found["samples"][task]]


@pytest.mark.parametrize("profile", [None, PROFILE])
def test_scores_in_process_are_those_over_http(tiny: Tiny, served: Served, profile: str | None) -> None:
    ours = in_process(tiny, FORGET, **({} if profile is None else {"profile": profile}))
    theirs = evaluated(
        "local-completions",
        {
            "model": tiny.folder.name if profile is None else f"{tiny.folder.name}:{profile}",
            "base_url": f"{served.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(tiny.folder),
            "max_length": MAX_LENGTH,
        },
        FORGET,
    )
    for task in FORGET:
        assert len(answers(ours, task)) == 8
        for mine, other in zip(answers(ours, task), answers(theirs, task), strict=True):
            assert flat(mine) == pytest.approx(flat(other), abs=1e-4)
    for task, figures in ours["results"].items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs["results"][task][name], rel=1e-6)


def flat(values: object) -> list[Any]:
    """Numbers and texts of nested lists; words as they are, for approx compares only numbers."""
    if isinstance(values, list | tuple):
        return [one for value in values for one in flat(value)]
    return [sum(values.encode()) if isinstance(values, str) else float(values)]  # type: ignore[arg-type]


def test_a_profile_changes_what_the_forget_tasks_give(tiny: Tiny) -> None:
    base, forgetting = in_process(tiny, FORGET), in_process(tiny, FORGET, profile=PROFILE)
    for task in FORGET:
        assert answers(base, task) != answers(forgetting, task)
    assert base["results"]["wizards_words"] != forgetting["results"]["wizards_words"]
    assert forgetting["config"]["profiles"] == [{"name": PROFILE, "digest": tiny.version(PROFILE).digest}]
    assert base["config"]["profiles"] == []


def test_strength_is_applied(tiny: Tiny) -> None:
    whole, half = (
        in_process(tiny, ["wizards_choice"], profile=PROFILE, strength=value) for value in (1.0, 0.5)
    )
    assert answers(whole, "wizards_choice") != answers(half, "wizards_choice")


@pytest.mark.slow  # lm-eval's command reads all of its own tasks first
def test_the_command_knows_the_model(tiny: Tiny, tmp_path: Path) -> None:
    arguments = f"model={tiny.folder},profiles={tiny.profiles[PROFILE][0].parent},profile={PROFILE}"
    command = [
        *(sys.executable, "-m", "uld_serve.evaluation.harness", "run", "--model", "uld-serve"),
        *("--model_args", f"{arguments},dtype=float32", "--device", "cpu", "--tasks", "wizards_choice"),
        *("--include_path", str(TASKS), "--output_path", str(tmp_path / "out.json"), "--limit", "2"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out*.json")
    assert 0 <= json.loads(path.read_text())["results"]["wizards_choice"]["acc,none"] <= 1


@pytest.fixture(scope="module")
def lm(tiny: Tiny) -> Any:
    from uld_serve.evaluation.harness import UldServeLM

    profiles = str(tiny.profiles[PROFILE][0].parent)
    return UldServeLM(
        PROFILE, profiles=profiles, model=str(tiny.folder), dtype="float32", device="cpu", max_length=40
    )


def request(kind: str, *arguments: object) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_a_filtered_token_counts_as_the_server_prints_it(lm: Any) -> None:
    found = lm.loglikelihood([request("loglikelihood", "a", chr(65 + number)) for number in range(50)])
    assert min(value for value, _ in found) == -9999.0
    assert all(isfinite(value) for value, _ in found)


def test_greedy_is_what_generation_gives(lm: Any) -> None:
    (said,) = lm.generate_until([request("generate_until", "who", {"max_gen_toks": 3})])
    if said.isascii() and said:
        ((_, is_greedy),) = lm.loglikelihood([request("loglikelihood", "who", said[:1])])
        assert is_greedy
    others = lm.loglikelihood([request("loglikelihood", "who", chr(c)) for c in range(33, 127)])
    assert sum(is_greedy for _, is_greedy in others) <= 1


def test_a_long_context_loses_its_beginning_and_a_long_text_is_taken_in_windows(lm: Any) -> None:
    ask = [request("loglikelihood", context, "yz") for context in ("b" * 37, "a" * 60 + "b" * 37)]
    short, long = lm.loglikelihood(ask)
    assert short == long
    (whole,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", "owl " * 30)])
    (part,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", "owl " * 9)])
    assert whole < part < 0
    with pytest.raises(DataError, match="leaves no context"):
        lm.loglikelihood([request("loglikelihood", "a", "b" * 60)])


@pytest.mark.parametrize(
    ("options", "told"), [({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 64}, "leaves no room")]
)
def test_an_option_that_cannot_be_kept_is_refused(lm: Any, options: dict[str, int], told: str) -> None:
    from uld_serve.errors import UldError

    with pytest.raises(UldError, match=told):
        lm.generate_until([request("generate_until", "who", options)])


@pytest.mark.parametrize("options", [{"batch_size": 8}, {"max_batch_size": 4}, {"dtype": "int4"}])
def test_an_argument_that_would_change_nothing_is_refused(options: dict[str, Any]) -> None:
    from uld_serve.evaluation.harness import UldServeLM

    with pytest.raises(DataError):
        UldServeLM(**options)
