"""Fits an adapter with transformers' Trainer: checkpoints, exact resume, accumulation and several processes are the
library's. Called by run. Knows no files but its checkpoint folder.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState
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
from uld_serve.training.assistant import Assistant
from uld_serve.training.examples import Kind
from uld_serve.training.preparation import nothing_of
from uld_serve.training.settings import Settings
from uld_serve.training.states import Observed, collate

WEIGHTS = "assistant.safetensors"
STATE = "trainer_state.json"
"""What the Trainer writes last of a checkpoint."""

BEST = "best.safetensors"

Report = Callable[[int, Mapping[str, float]], None]
"""Called with the number of finished steps and the mean of the loss's parts since the last call."""


class Lessons(Dataset[Observed]):
    """The whole run's examples in order: every step has its share of each kind, shuffled anew each time that a
    kind has been used up. Item i depends on the seed and i alone, so a resumed run meets the same examples."""

    def __init__(
        self, pools: Mapping[Kind, Sequence[Observed]], settings: Settings, *, num_processes: int = 1
    ) -> None:
        """`num_processes` take turns at the batches; a step is as many more of them."""
        shares = {
            Kind.FORGET: settings.forget_batch,
            Kind.DETOUR: settings.detour_batch,
            Kind.RETAIN: settings.retain_batch,
        }
        shares = {kind: share for kind, share in shares.items() if pools.get(kind)}
        self._slots = [(kind, rank) for kind, share in shares.items() for rank in range(share)]
        self._shares, self._pools, self._seed = shares, pools, settings.seed
        self._num_batches = settings.steps * settings.grad_accum * num_processes
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


class OnProgress(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Tells the assistant how much of its run is over, for what changes meanwhile."""

    def __init__(self, assistant: Assistant) -> None:
        self._assistant = assistant

    def on_step_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_unused: object
    ) -> None:
        self._assistant.progress = state.global_step / state.max_steps


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
