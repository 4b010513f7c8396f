"""Llama as vLLM runs it, with the streams of one server's profiles beside the target's rows and their rule in
compute_logits. Made by vLLM in its worker when a server names the architecture; fails there, and so ends the start,
for whatever is wrong with a profile.

A row of hidden states is the target's and then each stream's, side by side, so that whatever vLLM picks of it, pads,
captures or moves keeps what belongs together, together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.sequence import IntermediateTensors

from uld_serve.errors import ModelUnsupported
from uld_serve.model.head import Head
from uld_serve.model.packed_linear import can_pack
from uld_serve.vllm_plugin.blocks import add_deltas, add_streams
from uld_serve.vllm_plugin.limits import check_limits
from uld_serve.vllm_plugin.lineup import Lineup, Seating
from uld_serve.vllm_plugin.orders import KEY, Orders
from uld_serve.vllm_plugin.rule import ServedRule


class UldLlamaModel(LlamaModel):  # type: ignore[misc]
    """`seatings`: who runs in each layer; set once, before the first step."""

    seatings: tuple[Seating, ...] = ()

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,  # noqa: ARG002 - vLLM's name, for other stages' ranks
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, (1 + S) * D): the final norm's rows of the target and of every stream."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual: torch.Tensor | None = None
        left: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(self.layers):
            seating = self.seatings[number]
            hidden, residual = self._reseated(hidden, residual, number, left)
            hidden, residual = layer(positions.repeat(seating.num_blocks), hidden, residual)
        hidden, residual = self._reseated(hidden, residual, len(self.layers), left)
        target, _ = self.norm(hidden, residual)
        return torch.cat([target, *(left[stream] for stream in sorted(left))], dim=-1)

    def _reseated(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, number: int, left: dict[int, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The blocks of rows for a layer, of those of the one before; rows that leave go through the final norm."""
        after = self.seatings[number]
        num_before = self.seatings[number - 1].num_blocks if number else 1
        if not after.leaving and after.num_blocks == num_before:
            return hidden, residual
        hidden_GTD = hidden.view(num_before, -1, hidden.shape[1])
        residual_GTD = None if residual is None else residual.view(num_before, -1, residual.shape[1])
        for stream, block in after.leaving:
            assert residual_GTD is not None, "a stream runs one layer at least"
            left[stream], _ = self.norm(hidden_GTD[block].clone(), residual_GTD[block].clone())
        hidden = torch.cat([hidden_GTD[block] for block in after.picks])
        if residual_GTD is not None:
            residual = torch.cat([residual_GTD[block] for block in after.picks])
        return hidden, residual


class UldLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    supports_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Raises ModelUnsupported, ProfileError, UnknownProfile, InvalidRequest."""
        folder = check_limits(vllm_config)
        orders = Orders.of(vllm_config.additional_config)
        device = torch.device(vllm_config.device_config.device)
        self.lineup = Lineup.of(orders, folder, defers_logits=device.type == "cpu")
        # vLLM keeps compiled graphs under a hash of its configuration: other profiles are other graphs.
        digests = [version.digest for version in self.lineup.versions]
        vllm_config.additional_config[f"{KEY}_digests"] = digests
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.logits_processor.scale != 1.0 or self.logits_processor.soft_cap is not None:
            raise ModelUnsupported(
                "this checkpoint scales or caps its logits, which profiles here do not know"
            )
        self._add_streams(vllm_config, prefix)
        self.rule: ServedRule | None = None
        self.is_rehearsal = False

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", **_: object) -> UldLlamaModel:
        return UldLlamaModel(vllm_config=vllm_config, prefix=prefix)

    def _add_streams(self, vllm_config: VllmConfig, prefix: str) -> None:
        plan, seatings = self.lineup.plan, self.lineup.seatings
        next_layer = len(self.model.layers)
        num_deltas = 0
        for number, layer in enumerate(self.model.layers):
            active = seatings[number].streams
            if active:
                # Appended after the target's layers, as vLLM asks of layers that share another's cache.
                names = [f"{prefix}model.layers.{next_layer + n}.self_attn.attn" for n in range(len(active))]
                next_layer += len(active)
                add_streams(layer, [plan.streams[n] for n in active], names, vllm_config.cache_config)
            num_deltas += add_deltas(
                layer,
                number,
                self.lineup.adapters_of(number),
                num_blocks=seatings[number].num_blocks,
                dtype=vllm_config.model_config.dtype,
            )
        if num_deltas != sum(len(adapter.tensors) // 2 for adapter in self.lineup.adapters):
            raise AssertionError("an adapter of a profile was not applied in full")
        self.model.seatings = seatings

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Once: other weights later would not be those that the profiles were checked against."""
        if self.rule is not None:
            raise ModelUnsupported(
                "weights cannot be replaced in a server that serves profiles; start it anew"
            )
        loaded: set[str] = super().load_weights(weights)
        weight_WD = self.lm_head.weight.detach()[: self.config.vocab_size]
        is_packed = can_pack(weight_WD.dtype, weight_WD.device)
        self.rule = ServedRule(
            self.lineup.plan,
            Head.of_weight(weight_WD, None, is_packed=is_packed),
            self.lineup.vocab_size,
            torch.tensor(self.lineup.protected_ids, device=weight_WD.device),
        )
        return loaded

    def forward(self, *inputs: object, **named: object) -> torch.Tensor:
        # vLLM rehearses steps to measure memory, with attention left out: what comes of them may be anything.
        self.is_rehearsal = get_forward_context().attn_metadata is None
        hidden: torch.Tensor = super().forward(*inputs, **named)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rule is None:
            raise AssertionError("logits before weights")
        return self.rule.logits(hidden_states, is_rehearsal=self.is_rehearsal)

    def compute_logits_local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("parts of the logits cannot be fused")

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("the target's own best token is not the served one")
