"""The assistant while it learns: PEFT LoRA on some layers of the frozen base, run at answer positions over the
target's lent keys and values. Called by trainer; knows no files, no data and no schedule.

Shapes: B examples, Q answer positions, N answer tokens of the batch without padding, D hidden width, C columns,
V vocabulary. Legend of Batch in states.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from uld_serve.model.borrowed import (
    assistant_pass,
    causal_mask,
    decoder_parts,
    use_borrowed_attention,
)
from uld_serve.training import objectives
from uld_serve.training.examples import Kind
from uld_serve.training.settings import Settings
from uld_serve.training.states import IGNORED, Batch

# No k_proj and v_proj: the assistant borrows the target's keys and values.
MODULES = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Assistant(nn.Module):
    """forward(**batch) -> {"loss", "forget", "retain", "detour"}, each a scalar."""

    def __init__(self, model: PreTrainedModel, *, settings: Settings, vocab_size: int) -> None:
        """Wraps `model` in place: from here on it carries the adapter. Adapter weights follow settings.seed."""
        super().__init__()
        use_borrowed_attention(model)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            target_modules=list(MODULES),
            layers_to_transform=list(range(settings.fork, settings.exit)),
            layers_pattern="layers",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 a question by its old name.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            torch.manual_seed(settings.seed)
            self.peft = cast(PeftModel, get_peft_model(model, config))
        self._settings = settings
        self.vocab_size = vocab_size
        self._named_ids: torch.Tensor | None = None

    @property
    def model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.peft.get_base_model())

    @property
    def layers(self) -> range:
        return range(self._settings.fork, self._settings.exit)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: one for name, one in self.peft.named_parameters() if one.requires_grad}

    def set_named(self, token_ids: Iterable[int]) -> None:
        """Tokens that open a keyword: wherever a forget prompt makes them likely, they are forgotten."""
        is_named_V = torch.zeros(decoder_parts(self.model).head.weight.shape[0], dtype=torch.bool)
        is_named_V[list(token_ids)] = True
        self._named_ids = is_named_V.to(self.model.device)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """(N, D): the assistant's last hidden state at every answer token's position."""
        lent = zip(self.layers, batch["keys_SBKTW"], batch["values_SBKTW"], strict=True)
        out_BQD = assistant_pass(
            self.model,
            batch["fork_BQD"],
            {layer: (keys, values) for layer, keys, values in lent},
            positions_BQ=batch["positions_BQ"],
            mask_B1QT=causal_mask(batch["is_real_BT"], batch["positions_BQ"]),
            layers=self.layers,
        )
        return out_BQD[batch["labels_BQ"] != IGNORED]

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = cast(Batch, inputs)
        is_token_BQ = batch["labels_BQ"] != IGNORED
        kind_N = batch["kind_B"][:, None].expand_as(is_token_BQ)[is_token_BQ]
        is_forget_N = kind_N == int(Kind.FORGET)
        is_detour_N = kind_N == int(Kind.DETOUR)
        hidden_ND = self.hidden(batch)
        if self._settings.method == "margin":
            return self._margin(batch, hidden_ND, is_token_BQ, kind_N)
        logits_NV = self.logits(hidden_ND)
        labels_N = batch["labels_BQ"][is_token_BQ]
        if self._settings.method == "uld":
            terms = objectives.uld(
                logits_NV, labels_N, is_forget_N=is_forget_N, beta=self._settings.retain_weight
            )
        else:
            terms = objectives.rkld(
                logits_NV,
                self.logits(batch["final_BQD"][is_token_BQ]),
                labels_N,
                is_forget_N=is_forget_N,
                weight=self._settings.retain_weight,
            )
        assert not is_detour_N.any(), "only margin has a use for detours"
        return {"loss": terms.total, "forget": terms.forget.detach(), "retain": terms.retain.detach()}

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """(N, V) in fp32, over real tokens only."""
        head = decoder_parts(self.model).head
        return cast(torch.Tensor, head(hidden_ND))[:, : self.vocab_size].float()

    def _margin(
        self, batch: Batch, hidden_ND: torch.Tensor, is_token_BQ: torch.Tensor, kind_N: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        columns_NC = batch["columns_BQC"][is_token_BQ]
        weight = decoder_parts(self.model).head.weight
        # Only the columns that the objective compares: 65 rows of the head a token, not all 49,152.
        logits_NC = torch.einsum("nd,ncd->nc", hidden_ND, weight[columns_NC]).float()
        goal_NC = torch.zeros_like(logits_NC)
        if self._named_ids is not None:
            is_named_NC = self._named_ids[columns_NC] & (kind_N != int(Kind.RETAIN))[:, None]
            goal_NC[is_named_NC] = self._settings.goal
        goal_NC[:, 0] = batch["goals_BQ"][is_token_BQ]
        counts_NC = columns_NC != columns_NC[:, :1]
        difference_NC = logits_NC - batch["logits_BQC"][is_token_BQ]
        weights = objectives.MarginWeights(slack=self._settings.slack)
        settings = self._settings
        terms = {
            kind: objectives.margin(
                difference_NC, goal_NK=goal_NC, counts_NK=counts_NC, chosen_N=kind_N == kind, weights=weights
            )
            for kind in Kind
        }
        loss = (
            terms[Kind.FORGET]
            + settings.detour_weight * terms[Kind.DETOUR]
            + settings.retain_weight * terms[Kind.RETAIN]
        )
        return {"loss": loss, **{kind.name.lower(): term.detach() for kind, term in terms.items()}}
