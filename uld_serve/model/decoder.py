"""Our loop over the base's own Hugging Face layers, with rows that enter at their fork and leave at their exit.

Called by the engine's runner. Rows are one packed sequence to the layers; attention alone knows which row
belongs to which sequence. Knows no request, profile or HTTP.

Shapes: N rows active in a layer, D model width, R rows scored, W width of the LM head.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import torch
from torch import nn

from uld_serve.errors import ModelUnsupported
from uld_serve.model import attention
from uld_serve.model.adapter_bank import AdapterBank
from uld_serve.model.attention_backends import TORCH, AttentionBackend
from uld_serve.model.borrowed import decoder_parts
from uld_serve.model.fusing import Place, fuse
from uld_serve.model.head import Head, Scores
from uld_serve.model.kv_cache import KVCache
from uld_serve.model.layer_steps import choose_steps
from uld_serve.model.loading import Base
from uld_serve.model.packed_linear import can_pack, pack_linears
from uld_serve.model.row_batch import RowBatch, SequenceRows
from uld_serve.model.shared_input import share_inputs
from uld_serve.model.span import AdapterSeats, Caches, Contexts, Span, geometry, spans

RotaryTables = dict[str, tuple[torch.Tensor, torch.Tensor]]

SELF_CHECK_TOKENS = 12
# Share of the largest logit. The order of sums differs between a packed and a batched product: measured 0 in
# fp32 and 0.2 % in bf16 on SmolLM2; a forgotten embedding scale or soft cap changes logits by tens of per cent.
SELF_CHECK_TOLERANCE = {torch.float32: 1e-4}
SELF_CHECK_TOLERANCE_HALF = 0.05


@dataclass(slots=True)
class Decoder:
    """The base's embedding, layers, final norm and head, run row by row."""

    base: Base
    bank: AdapterBank
    embed: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary: nn.Module
    head: Head
    layer_types: tuple[str, ...]
    rotates_by_type: bool
    attention: AttentionBackend = TORCH

    @classmethod
    def of(cls, base: Base) -> Decoder:
        """Raises ModelUnsupported when the base is not built of layers, norm, rotary embedding and head, or when
        its layers do not compute what it computes."""
        parts, config = decoder_parts(base.model), base.model.config.get_text_config()
        attention.register()
        base.model.set_attn_implementation(attention.ATTENTION_NAME)
        is_packed = can_pack(base.dtype, base.device)
        decoder = cls(
            base=base,
            bank=AdapterBank(parts.layers, base.device),
            embed=parts.embed,
            layers=parts.layers,
            norm=parts.norm,
            rotary=parts.rotary,
            head=Head.of(parts.head, is_packed=is_packed),
            layer_types=tuple(getattr(config, "layer_types", None) or ["full_attention"] * len(parts.layers)),
            rotates_by_type="layer_type" in inspect.signature(parts.rotary.forward).parameters,
        )
        decoder._self_check()
        decoder._lay_out(is_packed=is_packed)
        return decoder

    @torch.inference_mode()
    def _lay_out(self, *, is_packed: bool) -> None:
        """Put fused layers where they compute the same, and pack what stays."""
        hidden_ND = torch.zeros(SELF_CHECK_TOKENS, 1, dtype=self.base.dtype, device=self.base.device)
        first = torch.arange(SELF_CHECK_TOKENS, device=self.base.device)
        # The last positions too: some models scale queries by where they are.
        places = [
            (p, self._rotary_tables(hidden_ND, p)) for p in (first, self.max_positions - 1 - first.flip(0))
        ]
        by_layer = [[Place(p, tables[kind]) for p, tables in places] for kind in self.layer_types]
        steps = choose_steps(self.base.device, self.base.dtype)
        if (
            self.base.part is None
        ):  # fused layers add to the residual within a product, before ranks could sum
            fuse(
                self.layers, self.base.model, by_layer, rows=self.bank.rows, is_packed=is_packed, steps=steps
            )
        if is_packed:
            share_inputs(self.layers)
            pack_linears(self.layers)

    @property
    def num_kv_heads(self) -> int:
        """Of this rank, where several share the base."""
        config = self.base.model.config.get_text_config()
        heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        return heads if self.base.part is None else heads // self.base.part.size

    @property
    def head_dim(self) -> int:
        config = self.base.model.config.get_text_config()
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    @property
    def max_positions(self) -> int:
        return int(self.base.model.config.get_text_config().max_position_embeddings)

    def allocate_cache(self, num_layers: int, num_blocks: int, *, block_size: int) -> KVCache:
        """Room for keys and values of `num_layers` of the base's layers, or of as many kept beside them."""
        return KVCache.allocate(
            num_layers,
            num_blocks,
            block_size=block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.base.dtype,
            device=self.base.device,
        )

    def cache_bytes_per_token(self, num_layers: int) -> int:
        return KVCache.bytes_per_token(
            num_layers, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, dtype=self.base.dtype
        )

    @torch.inference_mode()
    def forward(self, batch: RowBatch, cache: KVCache, own: KVCache | None = None) -> Scores:
        """Run one step's rows: scores of the batch's head rows first, then of its assistants, the late ones last.
        Assistants with keys and values of their own keep them in `own`."""
        hidden_RD = self.norm(self._hidden(batch, Caches(cache, own)))
        num_whole = hidden_RD.shape[0] - sum(row.is_late for row in batch.assistants)
        late = self.head.late(hidden_RD[num_whole:]) if num_whole < hidden_RD.shape[0] else None
        return Scores(self.head.logits(hidden_RD[:num_whole]), late)

    @torch.inference_mode()
    def layers_only(self, batch: RowBatch, cache: KVCache) -> None:
        """What a rank does that is asked for no scores: its part of the layers, and its keys and values."""
        self._hidden(batch, Caches(cache, None))

    def _hidden(self, batch: RowBatch, caches: Caches) -> torch.Tensor:
        joins_prompts = self.attention.prefill is not None
        contexts = Contexts.of(batch.sequences, batch.positions_T.device, joins_prompts=joins_prompts)
        hidden_ND = self.embed(batch.token_ids_T)
        tables = self._rotary_tables(hidden_ND, batch.positions_T)
        order: list[int] = []
        left: list[torch.Tensor] = []
        before: Span | None = None
        for span in spans(batch, len(self.layers)):
            hidden_ND = _reseat(hidden_ND, batch.num_target_rows, before, span)
            hidden_ND = self._run_layers(hidden_ND, span, batch, contexts, caches, tables)
            assistants, rows = span.leaving()
            if rows:
                order += assistants
                left.append(hidden_ND[torch.tensor(rows, device=hidden_ND.device)])
            before = span
        targets_RD: torch.Tensor = hidden_ND[batch.head_rows]
        if not left:
            return targets_RD
        return torch.cat([targets_RD, _in_order(torch.cat(left), order, batch)])

    def _run_layers(
        self,
        hidden_ND: torch.Tensor,
        span: Span,
        batch: RowBatch,
        contexts: Contexts,
        caches: Caches,
        tables: RotaryTables,
    ) -> torch.Tensor:
        positions_N = batch.positions_T
        seated = tables
        if span.riders:
            sources = torch.tensor(span.sources, device=hidden_ND.device)
            positions_N = torch.cat([positions_N, positions_N[sources]])
            seated = {kind: _with_riders(table, sources) for kind, table in tables.items()}
        seen = geometry(batch, span, positions_N=positions_N, caches=caches, contexts=contexts)
        seen = replace(seen, decode=self.attention.decode, prefill=self.attention.prefill)
        self._seat_adapters(batch, span)
        try:
            for index, layer in enumerate(self.layers[span.first : span.end], start=span.first):
                out = layer(
                    hidden_ND[None],
                    attention_mask=None,
                    position_ids=positions_N[None],
                    position_embeddings=seated[self.layer_types[index]],
                    geometry=seen,
                )
                hidden_ND = (out[0] if isinstance(out, tuple) else out)[0]
        finally:
            self.bank.rows.clear()
        return hidden_ND

    def _rotary_tables(self, hidden_ND: torch.Tensor, positions_T: torch.Tensor) -> RotaryTables:
        """(cos, sin) of every position, by kind of layer: some models rotate sliding layers differently."""
        if not self.rotates_by_type:
            table = self.rotary(hidden_ND[None], positions_T[None])
            return dict.fromkeys(self.layer_types, table)
        return {kind: self.rotary(hidden_ND[None], positions_T[None], kind) for kind in set(self.layer_types)}

    def _seat_adapters(self, batch: RowBatch, span: Span) -> None:
        for rider in span.riders:
            self.bank.check(rider.adapter_key, rider.slot)
        for rows in batch.sequences:
            if rows.adapter_key is not None:
                self.bank.check(rows.adapter_key, rows.slot)
        seats = AdapterSeats.of(batch, span)
        self.bank.rows.seat(seats.start, seats.slots, batch.positions_T.device)

    @torch.inference_mode()
    def _self_check(self) -> None:
        """Compare our loop over the model's own layers with its own forward on a few tokens.

        Raises ModelUnsupported when they differ: the model then does something outside its layers (scaled
        embeddings, capped logits, mixed masks) that the loop would silently leave out.
        """
        device = self.base.device
        token_ids = torch.arange(SELF_CHECK_TOKENS, device=device) * 7 % self.base.vocab_size
        positions = torch.arange(SELF_CHECK_TOKENS, device=device)
        cache = KVCache.allocate(
            len(self.layers),
            1,
            block_size=SELF_CHECK_TOKENS,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.base.dtype,
            device=device,
        )
        rows = SequenceRows(0, SELF_CHECK_TOKENS, [0])
        try:
            batch = RowBatch(token_ids, positions, positions, (rows,), (), positions)
            ours = self.forward(batch, cache).logits_RW
        except TypeError as error:  # a layer with another signature than Llama's
            raise ModelUnsupported(
                f"{type(self.base.model).__name__}'s layers cannot be called one by one"
            ) from error
        self.base.model.set_attn_implementation("sdpa")
        try:
            theirs = self.base.model(token_ids[None], use_cache=False).logits[0].float()
        finally:
            self.base.model.set_attn_implementation(attention.ATTENTION_NAME)
        gap = float((ours - theirs).abs().max() / theirs.abs().max())
        if not gap <= SELF_CHECK_TOLERANCE.get(self.base.dtype, SELF_CHECK_TOLERANCE_HALF):
            raise ModelUnsupported(
                f"{type(self.base.model).__name__} computes something outside its layers: our loop's logits differ "
                f"from its own by {gap:.1%}; this architecture is not served"
            )


def _with_riders(
    table: tuple[torch.Tensor, torch.Tensor], sources: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables (1, T, W) extended by the positions of assistant rows."""
    cos, sin = table
    return torch.cat([cos, cos[:, sources]], dim=1), torch.cat([sin, sin[:, sources]], dim=1)


def _reseat(hidden_ND: torch.Tensor, num_targets: int, before: Span | None, after: Span) -> torch.Tensor:
    """Rows for the next run of layers: those that stay, and copies of the target's for those that enter."""
    if after.riders == (() if before is None else before.riders):
        return hidden_ND
    targets_TD = hidden_ND[:num_targets]
    if not after.riders:
        return targets_TD
    picks = torch.tensor(after.picks(before), device=hidden_ND.device)
    return torch.cat([targets_TD, hidden_ND.index_select(0, picks)])


def _in_order(left_AD: torch.Tensor, order: list[int], batch: RowBatch) -> torch.Tensor:
    """Assistants' rows, which left in `order`, as the batch has them: the late ones last."""
    whole_first = sorted(range(len(batch.assistants)), key=lambda i: batch.assistants[i].is_late)
    if order == whole_first:
        return left_AD
    place = {assistant: row for row, assistant in enumerate(order)}
    return left_AD[torch.tensor([place[i] for i in whole_first], device=left_AD.device)]
