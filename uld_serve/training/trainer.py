"""Fits an adapter with transformers' Trainer: checkpoints, exact resume, accumulation and several processes are the
library's. Called by run. Knows no files but its checkpoint folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from uld_serve.errors import DataError
from uld_serve.model.heap import give_back
from uld_serve.training.assistant import Assistant, adapter_state, load_adapter
from uld_serve.training.early_stop import EarlyStop, OnCheckpoint
from uld_serve.training.examples import Kind
from uld_serve.training.lessons import Lessons
from uld_serve.training.preparation import nothing_of
from uld_serve.training.settings import Settings
from uld_serve.training.states import Observed, collate

WEIGHTS = "assistant.safetensors"
STATE = "trainer_state.json"
"""What the Trainer writes last of a checkpoint."""

Report = Callable[[int, Mapping[str, float]], None]
"""Called with the number of finished steps and the mean of the loss's parts since the last call."""


class AssistantTrainer(Trainer):  # type: ignore[misc]  # transformers ships no types
    """Keeps the order of the data, saves only the adapter, and adds the loss's parts to the log."""

    def __init__(self, model: Assistant, args: TrainingArguments, lessons: Lessons) -> None:
        super().__init__(model=model, args=args, train_dataset=lessons, data_collator=collate)
        self._parts: dict[str, list[float]] = {}

    def _get_train_sampler(self, train_dataset: Dataset[Observed] | None = None) -> Sampler[int]:
        return SequentialSampler(cast("Lessons", train_dataset or self.train_dataset))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        del return_outputs, num_items_in_batch  # only prediction asks for outputs; the loss is a batch's mean
        outputs = model(**inputs)
        loss = cast(torch.Tensor, outputs["loss"])
        if not math.isfinite(loss.item()):
            raise DataError(
                f"the loss is {loss.item()} at step {self.state.global_step}; lower --lr or raise --warmup-steps, and "
                "start again (--resume would come to the same)"
            )
        for name, value in outputs.items():
            if name != "loss":
                self._parts.setdefault(name, []).append(value.item())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {name: round(sum(values) / len(values), 4) for name, values in self._parts.items()}
            self._parts.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        del state_dict  # the base is frozen and does not belong into a checkpoint
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(adapter_state(cast(Assistant, self.model)), folder / WEIGHTS)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        load_adapter(cast(Assistant, model or self.model), load_file(Path(resume_from_checkpoint) / WEIGHTS))


class OnStep(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Tells `report` of every logged step, and keeps what batches of all sizes leave behind from piling up."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_unused: object,
    ) -> None:
        give_back()
        if logs and "loss" in logs:
            self._report(state.global_step, {name: float(value) for name, value in logs.items()})


class OnProgress(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Tells the assistant how much of its run is over, for what changes meanwhile."""

    def __init__(self, assistant: Assistant) -> None:
        self._assistant = assistant

    def on_step_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_unused: object
    ) -> None:
        self._assistant.progress = state.global_step / state.max_steps


def fit(
    assistant: Assistant,
    pools: Mapping[Kind, Sequence[Observed]],
    settings: Settings,
    *,
    folder: Path,
    resume: bool = False,
    report: Report,
    early_stop: EarlyStop | None = None,
    trackers: Sequence[str] = (),
) -> list[dict[str, float]]:
    """Train in place; returns the log. With `resume`, go on from the folder's last checkpoint, if any.

    Raises DataError when a kind that the lesson needs is empty, when the loss is not finite, or when memory runs out.
    """
    for kind in assistant.lesson.kinds:
        if kind is not Kind.DETOUR and not pools.get(kind):
            raise nothing_of(kind)
    needed = {kind: pool for kind, pool in pools.items() if kind in assistant.lesson.kinds}
    arguments = _arguments(settings, assistant, folder, trackers)
    lessons = Lessons(needed, settings, num_processes=arguments.world_size)
    arguments.per_device_train_batch_size = lessons.batch_size
    # One process a device: torch's DataParallel would mix two batches' kinds. `accelerate launch` starts several.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = AssistantTrainer(assistant, arguments, lessons)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(OnStep(report))
    trainer.add_callback(OnProgress(assistant))
    if early_stop is not None:
        trainer.add_callback(OnCheckpoint(early_stop, assistant))
    checkpoint, reached = last_checkpoint(folder) if resume else (None, TrainerState())
    if early_stop is not None and early_stop.is_over(reached.global_step):
        early_stop.restore(assistant)
        assistant.eval()
        return _losses(reached)
    assistant.switch_on()
    assistant.train()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"memory ran out with {lessons.batch_size} examples a batch; lower --forget-batch and --retain-batch, and "
            "raise --grad-accum to make up for it"
        ) from error
    assistant.eval()
    if early_stop is not None:
        early_stop.restore(assistant)
    return _losses(trainer.state)


def last_checkpoint(folder: Path) -> tuple[Path | None, TrainerState]:
    """The last one that was written to its end, with what the Trainer noted of it; one that was cut short is passed
    over."""
    steps = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    for step in sorted((int(one) for one in steps if one.isdecimal()), reverse=True):
        path = folder / f"checkpoint-{step}"
        try:
            return path, TrainerState.load_from_json(str(path / STATE))
        except (OSError, ValueError):
            continue
    return None, TrainerState()


def _losses(state: TrainerState) -> list[dict[str, float]]:
    return [dict(entry) for entry in state.log_history if "loss" in entry]


def _arguments(
    settings: Settings, assistant: Assistant, folder: Path, trackers: Sequence[str]
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        gradient_accumulation_steps=settings.grad_accum,
        max_steps=settings.steps,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=min(10, settings.steps),  # a run of few steps has a log too
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to=list(trackers) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=assistant.model.device.type == "cpu",
    )
