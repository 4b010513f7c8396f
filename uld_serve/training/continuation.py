"""Continues prompts with the base's own words, many side by side. Called by answers. Knows token ids only.

What the prompts have in common, as a chat template's first lines, is read once; rows that have ended are left out.

Shapes: R rows, P padded width of the prompts, V real vocabulary, K tokens that may be drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import DynamicCache

from uld_serve.model.borrowed import decoder_parts
from uld_serve.model.loading import Base
from uld_serve.model.packing import num_alike

TOP_P = 0.95
# A nucleus that is wider is cut. Sorting all of a vocabulary takes as long as the model's pass.
MOST_DRAWN = 512


class Drawing:
    """temperature 0: the most likely token; else nucleus sampling by torch's generator. `avoid`: token sequences that
    are never completed."""

    def __init__(self, *, temperature: float = 0.0, avoid: Iterable[Sequence[int]] = ()) -> None:
        self._temperature = temperature
        self._closing: dict[tuple[int, ...], list[int]] = {}
        for *opening, last in avoid:
            self._closing.setdefault(tuple(opening), []).append(last)

    def __call__(self, logits_RV: torch.Tensor, before: Sequence[Sequence[int]]) -> list[int]:
        """One token a row; `before` has each row's tokens so far."""
        for opening, closing in self._closing.items():
            rows = [row for row, ids in enumerate(before) if _ends_with(ids, opening)]
            logits_RV[torch.tensor(rows, dtype=torch.long)[:, None], closing] = float("-inf")
        if self._temperature == 0:
            return [int(token) for token in logits_RV.argmax(-1)]
        p_RV = (logits_RV / self._temperature).softmax(-1)
        p_RK, ids_RK = p_RV.topk(min(MOST_DRAWN, p_RV.shape[-1]))
        # The first is always kept: nothing stands before it.
        p_RK = p_RK.masked_fill(p_RK.cumsum(-1) - p_RK >= TOP_P, 0.0)
        return [int(token) for token in ids_RK.gather(-1, torch.multinomial(p_RK, 1))[:, 0]]


def _ends_with(ids: Sequence[int], opening: tuple[int, ...]) -> bool:
    return not opening or tuple(ids[-len(opening) :]) == opening


def continuations(
    base: Base, prompts: Sequence[Sequence[int]], *, max_tokens: int, draw: Drawing
) -> list[list[int]]:
    """What follows each prompt, at most `max_tokens`, with the end token where it ended."""
    body, head = base.model.get_decoder(), decoder_parts(base.model).head
    so_far = [list(prompt) for prompt in prompts]
    cache = DynamicCache(config=base.model.config)
    num_shared = _num_shared(prompts)
    if num_shared:
        shared = torch.tensor([list(prompts[0][:num_shared])], device=base.device)
        body(input_ids=shared, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
    ids_RP, is_real_RT = _padded(prompts, num_shared, base.device)
    rows = list(range(len(prompts)))
    for _ in range(max_tokens):
        positions_RP = (is_real_RT.cumsum(-1) - 1)[:, -ids_RP.shape[1] :].clamp_min(0)
        hidden_RPD = body(
            input_ids=ids_RP,
            attention_mask=is_real_RT,
            position_ids=positions_RP,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        # Contiguous: torch multiplies a slice of a batch by a copy of the whole head for every row.
        logits_RV = head(hidden_RPD[:, -1].contiguous())[:, : base.vocab_size].float()
        tokens = draw(logits_RV, [so_far[row] for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            so_far[row].append(token)
        going = [seat for seat, token in enumerate(tokens) if token not in base.eos_ids]
        if not going:
            break
        if len(going) < len(rows):
            seats = torch.tensor(going, device=base.device)
            cache.batch_select_indices(seats)
            is_real_RT, rows = is_real_RT[seats], [rows[seat] for seat in going]
        ids_RP = torch.tensor([[so_far[row][-1]] for row in rows], device=base.device)
        is_real_RT = torch.nn.functional.pad(is_real_RT, (0, 1), value=1)
    return [ids[len(prompt) :] for ids, prompt in zip(so_far, prompts, strict=True)]


def _num_shared(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all begin with; every prompt has one more. A row alone shares nothing."""
    return num_alike([prompt[:-1] for prompt in prompts]) if len(prompts) > 1 else 0


def _padded(
    prompts: Sequence[Sequence[int]], num_shared: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each prompt has beyond the shared tokens, on the right, and which of all positions are real."""
    rest = [list(prompt[num_shared:]) for prompt in prompts]
    width = max(map(len, rest))
    ids = [[0] * (width - len(one)) + one for one in rest]
    is_real = [[1] * num_shared + [0] * (width - len(one)) + [1] * len(one) for one in rest]
    return torch.tensor(ids, device=device), torch.tensor(is_real, device=device)
