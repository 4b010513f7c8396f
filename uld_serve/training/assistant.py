"""An adapter while it learns: PEFT LoRA on some layers of the frozen base. Called by trainer and measure; knows no
files, no data and no schedule.

An assistant that borrows runs at answer positions over the target's lent keys and values; one with its own, or the
target itself with an adapter, runs at every position.

Shapes: B examples, P positions that the stream runs at, Q answer positions, N answer tokens of the batch without
padding, D hidden width, V vocabulary. Legend of Batch in states.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from uld_serve.errors import DataError
from uld_serve.model.borrowed import (
    assistant_pass,
    causal_mask,
    decoder_parts,
    own_pass,
    use_borrowed_attention,
)
from uld_serve.model.packing import Packing
from uld_serve.training.methods.method import Lesson, Tokens
from uld_serve.training.place import Place
from uld_serve.training.settings import Settings
from uld_serve.training.states import IGNORED, Batch


class Assistant(nn.Module):
    """forward(**batch) -> {"loss", ...}, each a scalar."""

    def __init__(
        self, model: PreTrainedModel | PeftModel, *, lesson: Lesson, settings: Settings, vocab_size: int
    ) -> None:
        """Wraps `model` in place: from here on it carries the adapter, beside those that it carried. Adapter weights
        follow settings.seed."""
        super().__init__()
        self.lesson, self.vocab_size = lesson, vocab_size
        self.settings = settings
        self._is_named_V: torch.Tensor | None = None
        self.progress = 1.0
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 a question by its old name.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            torch.manual_seed(settings.seed)
            self.peft = _carrier(model, lesson.adapter, _lora(lesson.place, settings))

    @property
    def model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.peft.get_base_model())

    @property
    def place(self) -> Place:
        return self.lesson.place

    def trained(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters, by their names in the base."""
        mark = f".{self.lesson.adapter}."
        return {name: one for name, one in self.peft.named_parameters() if "lora_" in name and mark in name}

    def switch_on(self) -> None:
        """Make this adapter the active one, and the only one that learns."""
        self.peft.set_adapter(self.lesson.adapter)

    def set_named(self, token_ids: Iterable[int]) -> None:
        """Tokens that open a keyword: wherever a forget prompt makes them likely, they are forgotten."""
        is_named_V = torch.zeros(decoder_parts(self.model).head.weight.shape[0], dtype=torch.bool)
        is_named_V[list(token_ids)] = True
        self._is_named_V = is_named_V.to(self.model.device)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """(N, D): the adapter's last hidden state at every answer token's position."""
        rows, answers_of = self.run(batch)
        return answers_of(rows)

    def run(self, batch: Batch) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """The stream's rows after the final norm, and what picks the answer tokens' of anything shaped like them."""
        if self.peft.active_adapters != [self.lesson.adapter]:
            self.switch_on()
        is_answer_BP = batch["labels_BP"] != IGNORED
        if self.place.borrows:
            mask_B1PT = causal_mask(batch["is_real_BT"], batch["positions_BP"])
            lent = zip(self.place.layers, batch["keys_SBKTW"], batch["values_SBKTW"], strict=True)
            rows_BPD = assistant_pass(
                self.model,
                batch["fork_BPD"],
                {layer: (keys, values) for layer, keys, values in lent},
                positions_BQ=batch["positions_BP"],
                mask_B1QT=mask_B1PT,
                layers=self.place.layers,
            )
            return rows_BPD, lambda rows: rows[is_answer_BP]
        packing = self._packing(batch)
        seats_N = packing.seats_BT[is_answer_BP]
        rows_1ND = packing.rows(batch["fork_BPD"])
        rows_1ND = own_pass(self.model, rows_1ND, packing=packing, layers=self.place.layers)
        return rows_1ND, lambda rows: rows[0, seats_N]

    def _packing(self, batch: Batch) -> Packing:
        """Of an assistant that runs at every position. With dropout each example drops its own."""
        num_shared = 0 if self.settings.dropout else int(batch["num_shared"])
        lengths = cast("list[int]", batch["is_real_BT"].sum(-1).tolist())
        return Packing.of(lengths, num_shared=num_shared, device=batch["fork_BPD"].device)

    def tokens(self, batch: Batch) -> Tokens:
        """What the objective sees of a batch; runs the adapter's layers."""
        hidden_ND = self.hidden(batch)
        is_answer_BP, is_answer_BQ = batch["labels_BP"] != IGNORED, batch["is_answer_BQ"]
        example_BP = torch.arange(len(is_answer_BP), device=is_answer_BP.device)[:, None]
        example_N = example_BP.expand_as(is_answer_BP)[is_answer_BP]
        teacher_BQE = batch["teacher_BQE"]
        return Tokens(
            labels_N=batch["labels_BP"][is_answer_BP],
            kind_N=batch["kind_B"][example_N],
            example_N=example_N,
            num_examples=len(is_answer_BP),
            goals_N=batch["goals_BQ"][is_answer_BQ],
            columns_NC=batch["columns_BQC"][is_answer_BQ],
            target_logits_NC=batch["logits_BQC"][is_answer_BQ],
            hidden_ND=hidden_ND,
            final_ND=batch["final_BQD"][is_answer_BQ],
            teacher_ND=teacher_BQE[is_answer_BQ] if teacher_BQE.shape[-1] else None,
            head=self.logits,
            head_weight_WD=decoder_parts(self.model).head.weight,
            is_named_V=self._is_named_V,
            progress=self.progress,
        )

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.lesson.objective(self.tokens(cast(Batch, inputs)), self.settings)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """(N, V) in fp32, over real tokens only."""
        head = decoder_parts(self.model).head
        return cast(torch.Tensor, head(hidden_ND))[:, : self.vocab_size].float()


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


def _lora(place: Place, settings: Settings) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale_alpha,
        lora_dropout=settings.dropout,
        target_modules=list(place.target_modules),
        layers_to_transform=list(place.layers),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )


def _carrier(model: PreTrainedModel | PeftModel, name: str, config: LoraConfig) -> PeftModel:
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        model.set_adapter(name)
        return model
    use_borrowed_attention(model)
    return cast(PeftModel, get_peft_model(model, config, adapter_name=name))
