"""Where an assistant that ends early begins to learn from: a change of its last layer that is solved for, not trained.
Called by classroom, before the first step. Knows no method.

After a few layers a state means nothing to the model's head: it gives the next token 14 nats and more. So the MLP of
the last layer is given what is missing, as a low-rank function of what goes into its down projection:

    forgotten    the direction of the target's own last state, so that the assistant knows the answer
    kept         the direction in which the head says least, so that it is nearly uniform

The final norm makes the two exclude each other: the longer a state is in the quiet direction, the smaller all logits.
Ridge regression, cut to the adapter's rank where it explains most, written into LoRA's A and B; it is served as any.

Shapes: N answer tokens, D model width, F width of the MLP, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from uld_serve.errors import ModelUnsupported
from uld_serve.model.borrowed import DecoderParts, decoder_parts
from uld_serve.training.assistant import Assistant
from uld_serve.training.examples import Kind
from uld_serve.training.states import IGNORED, Batch, Observed, collate

MODULE = "down_proj"
EXAMPLES_A_KIND = 256
BATCH_SIZE = 16
RIDGE = 1e-3
"""Of the mean square of the MLP's activations."""


def quiet_direction(head_VD: torch.Tensor, gain_D: torch.Tensor) -> torch.Tensor:
    """(D,) of length 1, fp32: the direction before the norm's gain in which logits differ least from one another."""
    weight_VD = head_VD.float() * gain_D.float()
    centred_VD = weight_VD - weight_VD.mean(0)
    return cast(torch.Tensor, torch.linalg.eigh(centred_VD.T @ centred_VD).eigenvectors)[:, 0]


def low_rank(
    inputs_NF: torch.Tensor, missing_ND: torch.Tensor, *, weights_N: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A_RF, B_DR) with B A x nearest to what is missing: weighted ridge regression, then the rank of it that explains
    most of what it predicts. The two share their length evenly."""
    weighted_NF = inputs_NF.double() * (weights_N.double() / weights_N.sum())[:, None]
    square_FF = weighted_NF.T @ inputs_NF.double()
    square_FF.diagonal().add_(RIDGE * square_FF.diagonal().mean())
    map_FD = torch.linalg.solve(square_FF, weighted_NF.T @ missing_ND.double())
    out_DR = torch.linalg.eigh(map_FD.T @ square_FF @ map_FD).eigenvectors.flip(-1)[:, :rank]
    a_RF = (map_FD @ out_DR).T
    length_R = a_RF.norm(dim=-1).clamp_min(1e-12).sqrt()
    return (a_RF / length_R[:, None]).float(), (out_DR * length_R).float()


@torch.no_grad()
def solve_start(assistant: Assistant, pools: Mapping[Kind, Sequence[Observed]], *, quiet: float) -> None:
    """Write the start into the adapter. `quiet` is how much longer a kept state shall be than a forgotten one."""
    parts = decoder_parts(assistant.model)
    seen = [_inside(assistant, parts, batch) for batch in _batches(pools)]
    state_ND = torch.cat([one.state_ND for one in seen])
    inputs_NF = torch.cat([one.inputs_NF for one in seen])
    final_ND = torch.cat([one.final_ND for one in seen])
    is_forget_N = torch.cat([one.is_forget_N for one in seen])
    gain_D = parts.norm(torch.ones_like(state_ND[:1]))[0].float()
    width = state_ND.float().pow(2).mean(-1).sqrt().mean()
    known_ND = width * final_ND.float() / gain_D
    quiet_D = quiet_direction(parts.head.weight[: assistant.vocab_size], gain_D) * len(gain_D) ** 0.5
    wanted_ND = torch.where(is_forget_N[:, None], known_ND, quiet * width * quiet_D)
    # Either side counts as much as the other, however many tokens it has.
    share = is_forget_N.float().mean().clamp(0.01, 0.99)
    weights_N = torch.where(is_forget_N, 1 / share, 1 / (1 - share))
    a_RF, b_DR = low_rank(
        inputs_NF, wanted_ND - state_ND.float(), weights_N=weights_N, rank=assistant.settings.rank
    )
    a, b = _lora(assistant, parts)
    a.copy_(a_RF)
    b.copy_(b_DR * assistant.settings.rank / assistant.settings.scale_alpha)


@dataclass(frozen=True, slots=True)
class _Inside:
    state_ND: torch.Tensor
    inputs_NF: torch.Tensor
    final_ND: torch.Tensor
    is_forget_N: torch.Tensor


def _batches(pools: Mapping[Kind, Sequence[Observed]]) -> Iterator[Batch]:
    for pool in pools.values():
        # From all of the pool: its order may be one of subjects.
        step = max(1, len(pool) // EXAMPLES_A_KIND)
        some = pool[::step]
        for start in range(0, len(some), BATCH_SIZE):
            yield collate(some[start : start + BATCH_SIZE])


def _inside(assistant: Assistant, parts: DecoderParts, batch: Batch) -> _Inside:
    """What goes into the last layer's down projection, and what comes out of the layer before the final norm."""
    caught: list[torch.Tensor] = []

    def catch(_module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        caught.append(given[0])

    device = assistant.model.device
    batch = cast(Batch, {name: cast(torch.Tensor, one).to(device) for name, one in batch.items()})
    hooks = [one.register_forward_pre_hook(catch) for one in (_down(parts, assistant), parts.norm)]
    try:
        _, answers_of = assistant.run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    inputs_NF, state_ND = (answers_of(one) for one in caught)
    example_BP = batch["kind_B"][:, None].expand_as(batch["labels_BP"])
    kind_N = example_BP[batch["labels_BP"] != IGNORED]
    return _Inside(state_ND, inputs_NF, batch["final_BQD"][batch["is_answer_BQ"]], kind_N == int(Kind.FORGET))


def _down(parts: DecoderParts, assistant: Assistant) -> nn.Module:
    layer = parts.layers[assistant.place.exit - 1]
    found: list[nn.Module] = [one for name, one in layer.named_modules() if name.split(".")[-1] == MODULE]
    if len(found) != 1:
        raise ModelUnsupported(f"--start solved needs one {MODULE} in a layer; this base has {len(found)}")
    return found[0]


def _lora(assistant: Assistant, parts: DecoderParts) -> tuple[nn.Parameter, nn.Parameter]:
    name = assistant.lesson.adapter
    down = _down(parts, assistant)
    found = {side: cast(nn.ModuleDict, getattr(down, f"lora_{side}"))[name] for side in "AB"}
    return cast(nn.Parameter, found["A"].weight), cast(nn.Parameter, found["B"].weight)
