"""`uld-serve model`: makes the embedded model ready before it is needed. Run by `make setup` and by the
container's build."""

from __future__ import annotations

import argparse

from rich.console import Console

SUMMARY = "convert the embedded model once and print its directory"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    subparsers.add_parser("model", help=SUMMARY, description=SUMMARY)


def run(args: argparse.Namespace) -> int:
    del args  # takes no options
    from uld_serve.model.loading import embedded_model_dir

    console = Console(stderr=True)
    with console.status("looking for the embedded model"):
        directory = embedded_model_dir(lambda message: console.print(f"- {message}"))
    print(directory)
    return 0
