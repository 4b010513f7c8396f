"""How a run is shown: bars on a terminal, one line a stage and a line now and then in a log file, JSON to programs.
Called by command; knows no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

SHOWN = ("loss", "forget", "detour", "retain")
LINE_EVERY = 20
"""Steps between two lines where there is no terminal."""


class Display:
    """Use as a context; `stage` and `report` are what training.run asks for. Steps are of the last stage begun."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._stage, self._what, self._steps, self._last_line = TaskID(0), "", 0, -LINE_EVERY

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, what: str, total: int) -> Callable[[int], None]:
        """Begin a stage of `total` parts; the answer is to be called with the number of parts done."""
        if not self._console.is_terminal:
            self._console.print(f"{what} ({total})", highlight=False)
        task = self._bars.add_task(what, total=total)
        self._stage, self._what, self._steps, self._last_line = task, what, total, -LINE_EVERY
        return lambda count: self._bars.update(task, advance=count)

    def report(self, step: int, parts: Mapping[str, float]) -> None:
        """Show the loss and its parts after `step` steps."""
        shown = ", ".join(f"{name} {parts[name]:.3f}" for name in SHOWN if name in parts)
        self._bars.update(self._stage, description=f"{self._what}: {shown}", completed=step)
        is_due = step >= self._last_line + LINE_EVERY or step == self._steps
        if is_due and not self._console.is_terminal:
            self._last_line = step
            self._console.print(f"step {step} of {self._steps}: {shown}", highlight=False, soft_wrap=True)


class EventLines:
    """The same for programs: one JSON object a line on standard output. A reader who has gone ends the run."""

    def __init__(self) -> None:
        self._steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def stage(self, what: str, total: int) -> Callable[[int], None]:
        self._steps = total
        _print_event({"event": "stage", "stage": what, "total": total})
        return lambda _count: None

    def report(self, step: int, parts: Mapping[str, float]) -> None:
        losses = {name: parts[name] for name in SHOWN if name in parts}
        _print_event({"event": "step", "step": step, "num_steps": self._steps, **losses})


def _print_event(event: Mapping[str, object]) -> None:
    print(json.dumps(event), flush=True)
