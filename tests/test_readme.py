"""The README's tree and the documented profile are those of the repository."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path

from uld_serve.profiles.profile import Profile

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_path_of_the_tree_exists() -> None:
    (tree,) = [block for block in README.split("```") if "cli.py  " in block]
    tracked = _tracked()
    folders: list[Path] = []
    for line in tree.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            path = (folders[depth - 1] if depth else ROOT) / name
            relative = str(path.relative_to(ROOT))
            assert any(one == relative or one.startswith(f"{relative}/") for one in tracked), relative
            folders[depth:] = [path]


def test_every_package_is_in_the_tree() -> None:
    packages = {path.parent.name for path in (ROOT / "uld_serve").glob("*/__init__.py")}
    assert {name for name in packages if f"  {name}/ " not in README} == set()


def test_python_examples_compile() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        ast.parse(example)


def test_documented_profile_is_a_profile() -> None:
    text = (ROOT / "docs" / "profiles.md").read_text()
    (block,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    profile = Profile.model_validate(json.loads(block.replace("sha256:…", "sha256:" + "0" * 64)))
    assert profile.streams[0].kv == "borrowed"


def _tracked() -> list[str]:
    """What a fresh clone will hold, so that a file that only exists here does not count."""
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return result.stdout.split("\0")
