"""`uld-serve generate`: answer prompts in process, without a server; with --compare, both answers side by side.
Called by cli; talks to the engine only through LLM."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from uld_serve.engine.request import SamplingParams
from uld_serve.errors import InvalidRequest
from uld_serve.llm import LLM, Completion


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("generate", help="answer prompts offline, without and with a profile")
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="prompts; read from standard input if none"
    )
    parser.add_argument("--model", help="directory or Hugging Face id (default: the embedded model)")
    parser.add_argument("--profiles", type=Path, help="directory of profiles (default: the built-in ones)")
    parser.add_argument(
        "--profile", action="append", default=[], help="forget with this profile; repeat to compose"
    )
    parser.add_argument("--strength", type=float, default=1.0, help="scales the profile's strength, up to 2")
    parser.add_argument(
        "--compare", action="store_true", help="show the base's answer beside the forgetting one"
    )
    parser.add_argument(
        "--completion", action="store_true", help="continue the prompt as text; no chat template"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON line a prompt instead of text")


def run(args: argparse.Namespace) -> int:
    prompts = args.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise InvalidRequest("no prompt: give one as an argument or a line each on standard input")
    if args.compare and not args.profile:
        raise InvalidRequest("--compare needs --profile: there is nothing to compare the base with")
    llm = LLM(args.model, profiles=args.profiles, dtype=args.dtype, device=args.device)
    columns = {}
    if args.compare or not args.profile:
        columns["base"] = _answers(llm, prompts, args, profile=[])
    if args.profile:
        columns["forgetting"] = _answers(llm, prompts, args, profile=args.profile)
    for number, prompt in enumerate(prompts):
        answers = {name: completions[number] for name, completions in columns.items()}
        print(_json_line(prompt, answers)) if args.json else _show(prompt, answers)
    return 0


def _answers(
    llm: LLM, prompts: list[str], args: argparse.Namespace, *, profile: list[str]
) -> list[Completion]:
    params = SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    )
    strength = args.strength if profile else 1.0
    if args.completion or not llm.tokenizer.has_chat_template:
        return llm.generate(prompts, params, profile=profile, strength=strength)
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return llm.chat(conversations, params, profile=profile, strength=strength)


def _json_line(prompt: str, answers: dict[str, Completion]) -> str:
    record: dict[str, object] = {"prompt": prompt}
    for name, answer in answers.items():
        record[name] = {
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "receipt": answer.receipt.header,
        }
    return json.dumps(record, ensure_ascii=False)


def _show(prompt: str, answers: dict[str, Completion]) -> None:
    table = Table(title=prompt, title_justify="left", show_lines=True)
    for name, answer in answers.items():
        table.add_column(f"{name} ({answer.receipt.header})", ratio=1, overflow="fold")
    table.add_row(*(answer.text for answer in answers.values()))
    Console().print(table, markup=False)
