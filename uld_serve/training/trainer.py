"""Fits an assistant with transformers' Trainer: checkpoints, exact resume, accumulation, several devices and the
progress bar are the library's. Called by run. Knows no files but its checkpoint folder.
"""

from __future__ import annotations

import math
import random
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
from transformers.trainer_utils import get_last_checkpoint

from uld_serve.errors import DataError
from uld_serve.training.assistant import Assistant
from uld_serve.training.examples import Kind
from uld_serve.training.settings import Settings
from uld_serve.training.states import Observed, collate

WEIGHTS = "assistant.safetensors"

Report = Callable[[int, Mapping[str, float]], None]
"""Called with the number of finished steps and the mean of the loss's parts since the last call."""


class Lessons(Dataset[Observed]):
    """The whole run's examples in order: every step has its share of each kind, shuffled anew each time that a
    kind has been used up. Item i depends on the seed and i alone, so a resumed run meets the same examples."""

    def __init__(self, pools: Mapping[Kind, Sequence[Observed]], settings: Settings) -> None:
        shares = {
            Kind.FORGET: settings.forget_batch,
            Kind.DETOUR: settings.detour_batch if pools.get(Kind.DETOUR) else 0,
            Kind.RETAIN: settings.retain_batch,
        }
        self._slots = [(kind, rank) for kind, share in shares.items() for rank in range(share)]
        self._shares, self._pools, self._seed = shares, pools, settings.seed
        self._num_batches = settings.steps * settings.grad_accum
        self._orders: dict[tuple[Kind, int], list[int]] = {}

    @property
    def batch_size(self) -> int:
        return len(self._slots)

    def __len__(self) -> int:
        return self._num_batches * self.batch_size

    def __getitem__(self, index: int) -> Observed:
        batch, slot = divmod(index, self.batch_size)
        kind, rank = self._slots[slot]
        pool = self._pools[kind]
        epoch, place = divmod(batch * self._shares[kind] + rank, len(pool))
        return pool[self._order(kind, epoch)[place]]

    def _order(self, kind: Kind, epoch: int) -> list[int]:
        if (kind, epoch) not in self._orders:
            order = list(range(len(self._pools[kind])))
            random.Random(f"{self._seed}:{kind}:{epoch}").shuffle(order)
            self._orders[kind, epoch] = order
        return self._orders[kind, epoch]


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
                f"the loss is {loss.item()} at step {self.state.global_step}; lower --lr, or continue from the "
                "last checkpoint with --resume"
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
    """Tells `report` of every logged step."""

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
        if logs and "loss" in logs:
            self._report(state.global_step, {name: float(value) for name, value in logs.items()})


def fit(
    assistant: Assistant,
    pools: Mapping[Kind, Sequence[Observed]],
    settings: Settings,
    *,
    folder: Path,
    resume: bool = False,
    report: Report,
) -> list[dict[str, float]]:
    """Train in place; returns the log. With `resume`, go on from the folder's last checkpoint, if any.

    Raises DataError when a kind that every step needs is empty, or when the loss is not finite.
    """
    for kind in (Kind.FORGET, Kind.RETAIN):
        if not pools.get(kind):
            raise DataError(f"there is no usable {kind.name.lower()} example; see the reading report")
    lessons = Lessons(pools, settings)
    trainer = AssistantTrainer(assistant, _arguments(settings, lessons, assistant, folder), lessons)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(OnStep(report))
    checkpoint = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    assistant.train()
    trainer.train(resume_from_checkpoint=checkpoint)
    assistant.eval()
    return [dict(entry) for entry in trainer.state.log_history]


def _arguments(settings: Settings, lessons: Lessons, assistant: Assistant, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=lessons.batch_size,
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
        logging_steps=10,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=assistant.model.device.type == "cpu",
    )


def adapter_state(assistant: Assistant) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone().contiguous() for name, one in assistant.trained().items()}


def load_adapter(assistant: Assistant, state: Mapping[str, torch.Tensor]) -> None:
    """Raises DataError if the state is of another adapter."""
    trained = assistant.trained()
    if set(trained) != set(state) or any(state[name].shape != one.shape for name, one in trained.items()):
        raise DataError("the checkpoint is of another run: rank, fork or exit differ; start without --resume")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state[name])
