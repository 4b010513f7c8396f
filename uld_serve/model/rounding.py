"""Rounds a base's weights to int8 and back: what weight-only int8 quantisation does to answers, simulated. Called by
load_base. Nothing gets smaller or faster.

Shapes: O output channels, I input channels.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from uld_serve.errors import ModelUnsupported

LARGEST = 127


@torch.no_grad()
def round_to_int8(model: PreTrainedModel) -> int:
    """Every linear layer of the decoder, one scale an output channel; embeddings, norms and the head stay, as in the
    usual weight-only schemes. Activations are not rounded. Returns how many layers were. Raises ModelUnsupported where
    there is none."""
    layers = [one for one in model.get_decoder().modules() if isinstance(one, torch.nn.Linear)]
    if not layers:
        raise ModelUnsupported("this base has no linear layers that could be rounded to int8")
    for layer in layers:
        layer.weight.copy_(int8_and_back(layer.weight))
    return len(layers)


def int8_and_back(weight_OI: torch.Tensor) -> torch.Tensor:
    """w' = s · round(w / s) with s = max |w| / 127 over a channel's inputs, in w's own dtype: in bfloat16 the product
    is rounded once more, by up to half a step. A channel of zeros stays so."""
    exact_OI = weight_OI.float()
    scale_O1 = exact_OI.abs().amax(dim=1, keepdim=True) / LARGEST
    steps_OI = (exact_OI / scale_O1.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return (steps_OI * scale_O1).to(weight_OI.dtype)
