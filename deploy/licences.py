"""Refuses a bill of materials that names a licence which is not on the list, or none. Run by `make audit`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

# May be given on in an image under Apache-2.0, with their notices: permissive, and MPL, whose files stay as they are.
ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "HPND",
    "ISC",
    "LLVM-exception",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "MPL-2.0",
    "PSF-2.0",
    "Python-2.0",
    "Unlicense",
    "Zlib",
}
# What packages write instead of a licence's SPDX name.
SAME_AS = {
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "Python Software Foundation License": "PSF-2.0",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
# Whose metadata names no licence, and what the text says that they come with.
BY_THEIR_TEXT = {"protobuf": "BSD-3-Clause", "transformers": "Apache-2.0"}


def main() -> int:
    components = json.loads(Path(sys.argv[1]).read_text("utf-8"))["components"]
    refused = {
        f"{one['name']} {one['version']}": licences_of(one) for one in components if not is_allowed(one)
    }
    for name, licences in refused.items():
        print(f"{name}: {' | '.join(licences) or 'says no licence'}", file=sys.stderr)
    print(f"{len(components) - len(refused)} of {len(components)} components have a licence on the list")
    return 1 if refused or not components else 0


def licences_of(component: dict[str, object]) -> list[str]:
    """All that it names, as it names them; texts of whole licences are left out."""
    entries = component.get("licenses", [])
    assert isinstance(entries, list)
    named = [entry.get("expression") or _name(entry.get("license", {})) for entry in entries]
    by_text = BY_THEIR_TEXT.get(str(component["name"]))
    return [name for name in named if name] or ([by_text] if by_text else [])


def is_allowed(component: dict[str, object]) -> bool:
    """Whether all the licences that it names are on the list. What names none is not."""
    named = licences_of(component)
    return bool(named) and all(expression_is_allowed(SAME_AS.get(name, name)) for name in named)


def expression_is_allowed(expression: str) -> bool:
    """SPDX: of `A OR B` one must be on the list, else every part. With brackets: every part."""
    if "(" not in expression and " OR " in expression:
        return any(expression_is_allowed(side) for side in expression.split(" OR "))
    parts = re.findall(r"[^\s()]+", expression)
    return bool(parts) and all(part in {"AND", "OR", "WITH"} or part in ALLOWED for part in parts)


def _name(entry: dict[str, object]) -> str:
    name = entry.get("id") or entry.get("name") or ""
    assert isinstance(name, str)
    # cyclonedx-py names a licence's file so where a package gives its text alone.
    return "" if name.startswith("declared license file") else name


if __name__ == "__main__":
    sys.exit(main())
