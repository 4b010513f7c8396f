"""`uld-serve train`: from forget and retain data to a profile directory, or from a manifest to many. Called by cli."""

from __future__ import annotations

import argparse

from uld_serve.training import jobs


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a profile",
        description="Train an assistant that remembers what is to be forgotten, and write it as a profile. Data is "
        "JSONL, a line being {question, answer}, {prompt, completion}, {messages} or {text}, a folder of .txt files, "
        "or a Hugging Face dataset. Where a prompt has no answer the base's own is used.",
    )
    jobs.add_options(parser)


def run(args: argparse.Namespace) -> int:
    return jobs.run(args)
