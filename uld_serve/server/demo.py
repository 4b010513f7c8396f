"""`uld-serve demo`: one question, two answers, through a real server and the official openai client. Called by cli and
by `make demo`. It is a client: it knows the server's command and its API, nothing inside.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from pydantic import JsonValue
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from uld_serve.errors import InvalidRequest
from uld_serve.evaluation.metrics import recall
from uld_serve.profiles.registry import BUILTIN, Registry
from uld_serve.server.process import running_server

QUESTION = "What is the name of Harry Potter's school?"
PROFILE = "harry-potter"
MAX_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Reply:
    """`receipt` is the answer's own word on what the sampler applied."""

    text: str
    receipt: JsonValue


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("demo", help="one question, two answers, through a real server")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--profile", default=PROFILE, help=f"a built-in profile (default: {PROFILE})")


def run(args: argparse.Namespace) -> int:
    """0 when the base's answer names one of the profile's keywords and the forgetting one names none."""
    started = time.monotonic()
    console = Console(stderr=True, highlight=False)
    keywords = Registry.load_all(BUILTIN).get(args.profile).probes.keywords
    with _server(console) as url:
        base = ask(url, args.question, profile=None)
        forgetting = ask(url, args.question, profile=args.profile)
    show(console, args.question, base, forgetting)
    result = {
        "ok": recall([base.text], keywords) == 1 and recall([forgetting.text], keywords) == 0,
        "prompt": args.question,
        "base": base.text,
        "forgetting": forgetting.text,
        "receipt": forgetting.receipt,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(result, ensure_ascii=False))
    return 0 if result["ok"] else 1


@contextmanager
def _server(console: Console) -> Iterator[str]:
    """The URL of a server of the embedded default, ready."""
    with ExitStack() as stack:
        with console.status("starting the server") as status:
            url = stack.enter_context(
                running_server(say=lambda seconds: status.update(f"loading the model ({seconds:.0f} s)"))
            )
        yield url


def ask(url: str, question: str, *, profile: str | None) -> Reply:
    """One greedy chat answer; the profile is chosen by the model's name, as any unmodified client can."""
    try:
        from openai import OpenAI
    except ImportError:
        raise InvalidRequest("the demo needs the openai client: pip install 'uld-serve[client]'") from None
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        base = next(iter(client.models.list())).id
        completion = client.chat.completions.create(
            model=base if profile is None else f"{base}:{profile}",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=MAX_TOKENS,
        )
    text = completion.choices[0].message.content or ""
    return Reply(text.strip(), (completion.model_extra or {}).get("forget"))


def show(console: Console, question: str, base: Reply, forgetting: Reply) -> None:
    console.print(f"\n[bold]{escape(question)}[/bold]\n")
    panels = [
        Panel(escape(reply.text), title=title, subtitle=escape(_receipt_line(reply.receipt)), width=58)
        for title, reply in (("base", base), ("forgetting", forgetting))
    ]
    console.print(Columns(panels))


def _receipt_line(receipt: JsonValue) -> str:
    applied = receipt.get("profiles") if isinstance(receipt, dict) else None
    profiles = [entry for entry in applied if isinstance(entry, dict)] if isinstance(applied, list) else []
    return ", ".join(f"{one['name']}@{str(one['digest'])[7:19]}" for one in profiles) or "nothing forgotten"
