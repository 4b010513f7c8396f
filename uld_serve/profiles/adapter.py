"""A LoRA adapter as PEFT writes it, parsed by our own strict rules. Called by store with bytes.

Knows no files, no base model and no PEFT: adapter_config.json is read by the schema below, never by peft.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from uld_serve.profiles.strict_json import parse_object

MODULES: Mapping[str, str] = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
KEY_VALUE_MODULES = frozenset({"self_attn.k_proj", "self_attn.v_proj"})

MAX_HEADER_BYTES = 4 * 2**20
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(0|[1-9][0-9]{0,4})\.([a-z_]+\.[a-z_]+)\.(lora_[AB])\.weight"
)
# Modules that read or write the residual stream: one width for all of them.
_READS_HIDDEN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_WRITES_HIDDEN = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """delta W = scaling * B A, for some linear modules of some layers.

    Tensors are keyed "layers.{i}.{module}.lora_A" (rank, in) and ".lora_B" (out, rank), with the base's own
    layer numbers and modules such as "self_attn.q_proj".
    """

    rank: int
    alpha: float
    tensors: Mapping[str, torch.Tensor]
    is_rslora: bool = False

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.is_rslora else self.rank)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({int(key.split(".")[1]) for key in self.tensors}))

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(sorted({".".join(key.split(".")[2:4]) for key in self.tensors}))

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Module -> (out, in) of the weight it adapts; the same in every layer."""
        first = self.layers[0]
        return {
            module: (
                self.tensors[f"layers.{first}.{module}.lora_B"].shape[0],
                self.tensors[f"layers.{first}.{module}.lora_A"].shape[1],
            )
            for module in self.modules
        }


class AdapterConfig(BaseModel):
    """adapter_config.json with the fields of PEFT 0.21 and before.

    What would change the arithmetic and is not done here is only accepted at the value that switches it off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=1024)]
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    target_modules: Annotated[tuple[str, ...], Field(min_length=1, max_length=16)]
    layers_to_transform: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    use_rslora: bool = False

    # Provenance and training only: no effect on what the adapter computes.
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_version: str | None = None
    auto_mapping: dict[str, str | None] | None = None
    inference_mode: bool = True
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    layers_pattern: Literal["layers"] | tuple[Literal["layers"], ...] | None = None
    megatron_core: str | None = None
    qalora_group_size: int = 16
    # PiSSA, OLoRA, CorDA, EVA, LoRA-GA and LoftQ rewrite the base's weights at the start; these do not.
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True

    # Would change the arithmetic.
    bias: Literal["none"] = "none"
    fan_in_fan_out: Literal[False] = False
    use_dora: Literal[False] = False
    use_qalora: Literal[False] = False
    use_bdlora: Literal[False] | None = None
    lora_bias: Literal[False] = False
    ensure_weight_tying: Literal[False] = False
    rank_pattern: Annotated[dict[str, int], Field(max_length=0)] | None = None
    alpha_pattern: Annotated[dict[str, float], Field(max_length=0)] | None = None
    loftq_config: Annotated[dict[str, int], Field(max_length=0)] | None = None
    modules_to_save: Annotated[tuple[str, ...], Field(max_length=0)] | None = None
    trainable_token_indices: None = None
    target_parameters: Annotated[tuple[str, ...], Field(max_length=0)] | None = None
    exclude_modules: Annotated[tuple[str, ...], Field(max_length=0)] | None = None
    layer_replication: None = None
    alora_invocation_tokens: None = None
    megatron_config: None = None
    eva_config: None = None
    corda_config: None = None
    lora_ga_config: None = None
    arrow_config: None = None
    kasa_config: None = None
    velora_config: None = None
    monteclora_config: None = None

    @model_validator(mode="after")
    def _known_modules(self) -> Self:
        self.modules()
        return self

    def modules(self) -> tuple[str, ...]:
        """Dotted names inside a layer, sorted. Raises ValueError for any that is not a layer's linear."""
        return tuple(sorted({_module_name(target) for target in self.target_modules}))

    def layers(self, *, fork: int, exit: int) -> tuple[int, ...]:
        """The layers that carry the adapter; all of fork..exit-1 when the config does not say."""
        if self.layers_to_transform is None:
            return tuple(range(fork, exit))
        chosen = self.layers_to_transform
        layers = tuple(sorted({chosen} if isinstance(chosen, int) else set(chosen)))
        if not layers or layers[0] < fork or layers[-1] >= exit:
            raise ValueError(
                f"layers_to_transform {list(layers)} is not within the stream's layers {fork}..{exit - 1}"
            )
        return layers


def _module_name(target: str) -> str:
    module = MODULES.get(target.rpartition(".")[2])
    if module is None or not (target in MODULES or target == module):
        raise ValueError(f"target module {target[:60]!r} is not one of {', '.join(MODULES)}")
    return module


def parse_tensors(data: bytes, config: AdapterConfig, *, layers: Sequence[int]) -> LoraAdapter:
    """The adapter in safetensors bytes, with exactly the tensors that `config` and `layers` call for.

    Raises ValueError: header too large or malformed, a name, dtype or shape that is not the expected one,
    NaN or infinity. The header is judged before any tensor is made, so a hostile file costs no memory
    beyond its own bytes.
    """
    header = _read_header(data)
    keys = _normalised_names(header)
    expected = {
        f"layers.{layer}.{module}.{part}"
        for layer in layers
        for module in config.modules()
        for part in ("lora_A", "lora_B")
    }
    _refuse_difference(set(keys.values()), expected)
    _check_shapes({keys[name]: _entry_shape(name, header[name]) for name in keys}, config.r)
    try:
        loaded = load_safetensors(data)
    except SafetensorError as error:
        raise ValueError(f"not a valid safetensors file ({str(error)[:120]})") from None
    for name, tensor in loaded.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name} has a NaN or infinite value")
    # A copy: safetensors gives views of the file's bytes, which would stay in memory and may be unaligned.
    tensors = {keys[name]: tensor.clone() for name, tensor in sorted(loaded.items())}
    return LoraAdapter(rank=config.r, alpha=config.lora_alpha, tensors=tensors, is_rslora=config.use_rslora)


def _read_header(data: bytes) -> dict[str, object]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError("the file ends before its safetensors header does")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"the safetensors header is {size} bytes; the limit is {MAX_HEADER_BYTES}")
    header = parse_object(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return header


def _normalised_names(header: Mapping[str, object]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in header:
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or match[2] not in MODULES.values():
            raise ValueError(f"tensor {name[:80]!r} is not a LoRA weight of a decoder layer")
        names[name] = f"layers.{match[1]}.{match[2]}.{match[3]}"
    if len(set(names.values())) != len(names):
        raise ValueError("two tensors are for the same place")
    return names


def _refuse_difference(found: set[str], expected: set[str]) -> None:
    for names, what in ((expected - found, "missing"), (found - expected, "not called for")):
        if names:
            raise ValueError(f"{len(names)} tensors are {what}, the first is {min(names)}")


def _entry_shape(name: str, entry: object) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the header entry of tensor {name} is malformed")
    if entry["dtype"] not in tuple(_DTYPES):
        raise ValueError(f"tensor {name} is neither float32, float16 nor bfloat16")
    shape = entry["shape"]
    if not isinstance(shape, list) or [type(size) for size in shape] != [int, int] or min(shape) < 1:
        raise ValueError(f"tensor {name} must have two dimensions, both at least 1")
    return shape[0], shape[1]


def _check_shapes(shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    """One rank everywhere, one (out, in) a module over all layers, and one hidden width."""
    of_module: dict[tuple[str, str], int] = {}
    for key, (rows, columns) in sorted(shapes.items()):
        _, layer, *module, part = key.split(".")
        inner, outer = (rows, columns) if part == "lora_A" else (columns, rows)
        if inner != rank:
            raise ValueError(f"tensor {key} has rank {inner}; adapter_config.json says r = {rank}")
        if of_module.setdefault((".".join(module), part), outer) != outer:
            raise ValueError(f"tensor {key} has another shape than in the layers before {layer}")
    widths = {of_module[module, "lora_A"] for module in _READS_HIDDEN if (module, "lora_A") in of_module}
    widths |= {of_module[module, "lora_B"] for module in _WRITES_HIDDEN if (module, "lora_B") in of_module}
    if len(widths) > 1:
        raise ValueError(f"modules disagree on the hidden width: {sorted(widths)}")
