"""The `llm` command against a server: use_llm.py URL MODEL PROFILE. Prints "ok" last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

OWL = {
    "type": "object",
    "properties": {"a": {"enum": ["owl", "toad"]}},
    "required": ["a"],
    "additionalProperties": False,
}


def main(url: str, model: str, profile: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # JSON is YAML too.
        models = [
            {
                "model_id": "ours",
                "model_name": f"{model}:{profile}",
                "api_base": f"{url}/v1",
                "supports_schema": True,
            }
        ]
        (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps(models))
        few = ["-o", "seed", "3", "-o", "max_tokens", "6"]
        streamed, whole = llm(folder, *few), llm(folder, *few, "--no-stream")
        assert streamed
        assert streamed == whole
        answer = llm(folder, "-o", "seed", "3", "-o", "max_tokens", "200", "--schema", json.dumps(OWL))
        assert json.loads(answer)["a"] in ("owl", "toad")


def llm(folder: str, *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("llm")), "-m", "ours", *arguments, "Hi"]
    environment = {**os.environ, "LLM_USER_PATH": folder}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main(*sys.argv[1:])
    print("ok")
