"""What a run says: a first line on the machine, a bar, a table for people, one JSON line for programs. Called by
every bench command. Knows nothing of how times were taken."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from uld_serve.bench.environment import Environment

Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]


LOG_WIDTH = 120


class Reporter:
    """Everything a command prints. With `as_json` people's part goes to standard error, and standard output holds
    the JSON line alone."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        # A log file is not 80 columns wide, and a number cut in half says nothing.
        width = None if (sys.stderr if as_json else sys.stdout).isatty() else LOG_WIDTH
        self.console = Console(stderr=as_json, highlight=False, soft_wrap=True, width=width)
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def begin(self, environment: Environment) -> None:
        self.console.print(environment.line)
        if environment.is_busy:
            self._errors.print(
                f"warning: load {environment.load_average:.2f} on {environment.cores} cores: other work runs here, "
                "so these times are not comparable with others"
            )

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar on a terminal, nothing elsewhere; call what it gives once a part."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = self._errors
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(
            title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True
        )
        for number, name in enumerate(columns):
            table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number > 0)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def end(self, record: Mapping[str, Json]) -> None:
        if self._as_json:
            print(json.dumps(record), flush=True)
