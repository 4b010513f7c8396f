"""Ends a run that no longer gets better on its held-out prompts. Called by trainer; knows no prompt, only a score."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from uld_serve.training.assistant import Assistant, adapter_state, load_adapter

BEST = "best.safetensors"


@dataclass(slots=True)
class EarlyStop:
    """Ends a run when the held-out score has not risen for `patience` checkpoints, and puts the best adapter back.

    `score` says how good the adapter is now. What is best is kept in the run's folder, so that a resumed run knows it.
    Of several processes all come to the same score; the first alone writes, and it alone needs the best one back.
    """

    score: Callable[[], float]
    patience: int
    folder: Path
    best: float = -math.inf
    num_worse: int = 0
    step: int = 0
    """The last that was looked at."""

    def __post_init__(self) -> None:
        if self._note.is_file():
            noted = json.loads(self._note.read_text())
            self.best, self.num_worse, self.step = noted["best"], noted["num_worse"], noted["step"]

    @property
    def _note(self) -> Path:
        return self.folder / "best.json"

    def look(self, assistant: Assistant, step: int) -> bool:
        """Whether to stop after this step. A step that was looked at before the run was interrupted gives the same."""
        if step <= self.step:
            return self.num_worse >= self.patience
        assistant.eval()
        now = self.score()
        assistant.train()
        self.num_worse = 0 if now > self.best else self.num_worse + 1
        is_better, self.step = now > self.best, step
        self.best = now if is_better else self.best
        if PartialState().is_main_process:
            self._keep(assistant if is_better else None)
        return self.num_worse >= self.patience

    def _keep(self, better: Assistant | None) -> None:
        if better is not None:
            save_file(adapter_state(better), self.folder / BEST)
        partial = self._note.with_suffix(".partial")
        partial.write_text(json.dumps({"best": self.best, "num_worse": self.num_worse, "step": self.step}))
        partial.replace(self._note)

    def is_over(self, step: int) -> bool:
        """Whether a run that was interrupted after `step` had ended before."""
        return self.num_worse >= self.patience and self.step <= step

    def restore(self, assistant: Assistant) -> None:
        if PartialState().is_main_process and (self.folder / BEST).is_file():
            load_adapter(assistant, load_file(self.folder / BEST))


class OnCheckpoint(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Lets `early_stop` look before every checkpoint: what it noted is then never behind one."""

    def __init__(self, early_stop: EarlyStop, assistant: Assistant) -> None:
        self._early_stop, self._assistant = early_stop, assistant

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_unused: object
    ) -> TrainerControl:
        if state.global_step % args.save_steps == 0:
            control.should_training_stop |= self._early_stop.look(self._assistant, state.global_step)
        return control
