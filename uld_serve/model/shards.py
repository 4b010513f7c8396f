"""A base whose layers are cut up between ranks, as transformers' tensor parallel plan cuts them, and the part of an
adapter that belongs to a rank. Called by load_base and by the engine's ranks. Knows no request and no profile.

After transformers has loaded a rank's part, its linear layers are made plain ones again, so that they are packed,
joined and wrapped as those of a whole base are. Columns (q, k, v, gate, up) need no word with other ranks; rows (o,
down) give partial sums, which SummedLinear adds up. Embedding, norms and head are whole on every rank.

Shapes: r rank of an adapter, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from uld_serve.errors import ModelUnsupported

COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class Part:
    """Which of `size` equal parts a rank holds."""

    rank: int
    size: int

    def of(self, width: int) -> slice:
        each = width // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


class Adapter(Protocol):
    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def scaling(self) -> float: ...


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """What `model.adapter_bank.Adapter` is on one rank."""

    tensors: Mapping[str, torch.Tensor]
    scaling: float


class SummedLinear(nn.Module):
    """y = sum over ranks of W_rank x_rank, + b. What is added to `linear`'s own product is summed with it."""

    def __init__(self, linear: nn.Linear, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.linear = linear
        self.bias_O = bias_O

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x).contiguous()
        dist.all_reduce(y)
        return y if self.bias_O is None else y + self.bias_O


def load_part(folder: Path, dtype: torch.dtype, part: Part) -> PreTrainedModel:
    """This rank's part of the base; all ranks must load at once. Raises ModelUnsupported for a model that `part.size`
    ranks cannot share."""
    check_divides(folder, part.size)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="sdpa",
        distributed_config=DistributedConfig(tp_size=part.size, tp_plan="auto"),
    )
    with torch.no_grad():
        _make_plain(model)
    return model


def check_divides(folder: Path, size: int) -> None:
    """Raises ModelUnsupported naming what of a checkpoint `size` does not divide."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    widths = {
        "query heads": heads,
        "key/value heads": getattr(config, "num_key_value_heads", None) or heads,
        "intermediate width": getattr(config, "intermediate_size", 0),
    }
    uneven = [f"{number} ({what})" for what, number in widths.items() if not number or number % size]
    if uneven:
        raise ModelUnsupported(
            f"{size} ranks cannot share this model: {size} does not divide {' nor '.join(uneven)}; choose another "
            "--tensor-parallel"
        )


def part_of(adapter: Adapter, part: Part) -> AdapterPart:
    """Columns take their outputs of B, rows their inputs of A; the other factor is whole."""
    tensors = {}
    for name, tensor in adapter.tensors.items():
        module, factor = ".".join(name.split(".")[2:4]), name.rsplit(".", 1)[1]
        if module in COLUMNS and factor == "lora_B":
            tensors[name] = tensor[part.of(tensor.shape[0])].contiguous()
        elif module in ROWS and factor == "lora_A":
            tensors[name] = tensor[:, part.of(tensor.shape[1])].contiguous()
        else:
            tensors[name] = tensor
    return AdapterPart(tensors, adapter.scaling)


def _make_plain(model: PreTrainedModel) -> None:
    layers = model.get_decoder().layers
    for module in model.modules():
        module.__dict__.pop("forward", None)  # transformers' own for a sharded layer
    for layer in layers:
        for path in (*COLUMNS, *ROWS):
            _make_linear_plain(layer, path)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, DTensor):
                whole = parameter.full_tensor()
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
    model.config.distributed_config = None


def _make_linear_plain(layer: nn.Module, path: str) -> None:
    parent_path, _, leaf = path.rpartition(".")
    try:
        parent, linear = layer.get_submodule(parent_path), layer.get_submodule(path)
    except AttributeError as error:
        raise ModelUnsupported(f"this model's layers have no {path}, so ranks cannot share them") from error
    dim = 0 if path in COLUMNS else 1
    cut = linear.weight if isinstance(linear, nn.Linear) else None
    if not isinstance(linear, nn.Linear) or not isinstance(cut, DTensor) or cut.placements != (Shard(dim),):
        raise ModelUnsupported(
            f"transformers' tensor parallel plan for this model does not cut {path} as expected"
        )
    weight = cut.to_local().detach().clone()
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    bias = None if linear.bias is None else linear.bias.detach()
    if path in COLUMNS:
        if bias is not None:
            own = bias.to_local() if isinstance(bias, DTensor) else bias
            plain.bias = nn.Parameter(own.clone(), requires_grad=False)
        setattr(parent, leaf, plain)
    else:
        whole = bias.full_tensor() if isinstance(bias, DTensor) else bias
        setattr(parent, leaf, SummedLinear(plain, whole))
