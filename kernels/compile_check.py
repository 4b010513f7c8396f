"""Lowers every Triton kernel to PTX and machine code for sm_80 and sm_90, without a GPU: `make kernel-compile`.

A syntax or type error, or a kernel that needs more registers or shared memory than there are, shows here first.
Prints one line a variant (registers, spilled bytes, shared bytes), then one JSON line; fails if a kernel of NEVER_SPILL
spills. With an argument: only kernels with that in their name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from uld_kernels import (
    attention_triton,
    finish_triton,
    late_triton,
    layer_triton,
    list_triton,
    lora_triton,
    prefill_triton,
    rank_triton,
    scan_triton,
)
from uld_kernels.sampler_triton import CHUNK, FINISH_WARPS, LIST_BLOCK, SCAN_WARPS, SELECT_BLOCK
from uld_kernels.workspace import SCAN_BLOCK

TARGETS = (80, 90)
# Kernels of every step: what they spill goes through memory in the innermost loops.
NEVER_SPILL = (
    "_scan_kernel",
    "_finish_kernel",
    "_list_kernel",
    "_rank_tile_kernel",
    "_normalizer_tile_kernel",
)
TYPES = ("fp32", "bf16", "fp16")
# Pointers whose type is the base's; the other ones have one type each.
TYPED_POINTERS = (
    "logits_ptr",
    "query_ptr",
    "keys_ptr",
    "values_ptr",
    "out_ptr",
    "heads_ptr",
    "cos_ptr",
    "sin_ptr",
    "gate_up_ptr",
    "hidden_ptr",
    "weight_ptr",
    "x_ptr",
    "y_ptr",
    "A_ptr",
    "B_ptr",
    "B_1_ptr",
    "B_2_ptr",
)
POINTER_TYPES = {
    "ids_ptr": "i32",
    "counts_ptr": "i32",
    "starts_ptr": "i32",
    "index_ptr": "i32",
    "ints_ptr": "i32",
    "terms_ptr": "i32",
    "entries_ptr": "i32",
    "masks_ptr": "i1",
    "touched_ptr": "i32",
    "protected_ptr": "i8",
    "protected_ids_ptr": "i64",
    "bests_ptr": "i64",
    "int_partials_ptr": "i32",
    "group_list_ptr": "i32",
    "is_bad_ptr": "i32",
    "listed_ids_ptr": "i32",
    "token_ids_ptr": "i64",
    "rank_ptr": "i64",
    "status_ptr": "i32",
    "num_kept_ptr": "i64",
    "argmax_changed_ptr": "i1",
    "top_ids_ptr": "i64",
    "rows_ptr": "i64",
    "blocks_ptr": "i64",
    "lengths_ptr": "i32",
    "places_ptr": "i64",
    "place_of_ptr": "i64",
    "positions_ptr": "i64",
}
SCALAR_TYPES = {
    "step": "fp32",
    "log_vocab_size": "fp32",
    "stride_row": "i64",
    "scale_log2": "fp32",
    "eps": "fp32",
}


@dataclass(frozen=True)
class Variant:
    kernel: triton.JITFunction
    constants: dict[str, int] = field(default_factory=dict)
    num_warps: int = 8
    num_stages: int = 3
    is_fused: bool = False  # multiply and add in one rounding, where the launcher allows it
    types: tuple[str, ...] = ()

    @property
    def type_names(self) -> tuple[str, ...]:
        """Of the pointers in TYPED_POINTERS; one, whichever, for a kernel that has none of them."""
        return self.types or (TYPES if set(TYPED_POINTERS) & set(self.kernel.arg_names) else ("fp32",))

    @property
    def attributes(self) -> dict[tuple[int], list[list[str | int]]]:
        """What a launch finds out by itself: tensors and the strides of whole heads lie at multiples of 16."""
        names = enumerate(self.kernel.arg_names)
        aligned = [index for index, name in names if name.endswith("_ptr") or "_stride_" in name]
        return {(index,): [["tt.divisibility", 16]] for index in aligned}

    def signature(self, type_name: str) -> dict[str, str]:
        types = {}
        for name in self.kernel.arg_names:
            if name in self.constants:
                types[name] = "constexpr"
            elif name in TYPED_POINTERS:
                types[name] = f"*{type_name}"
            elif name.endswith("_ptr"):
                types[name] = f"*{POINTER_TYPES.get(name, 'fp32')}"
            else:
                types[name] = SCALAR_TYPES.get(name, "i32")
        return types


def attention_variants() -> Iterator[Variant]:
    """Llama 8B's heads with one chunk, with several and with a window; SmolLM2's; widths that fill no tile."""
    for heads, group, width, window in (
        (32, 4, 128, 0),
        (32, 4, 128, 4096),
        (9, 3, 64, 0),
        (8, 8, 96, 0),
        (4, 1, 256, 0),
    ):
        for type_name, itemsize in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
            shape = {
                "NUM_HEADS": heads,
                "WINDOW": window,
                "BLOCK_N": attention_triton.block_n(width, itemsize),
                "BLOCK_SIZE": 16,
                "WIDTH": width,
                "BLOCK_D": attention_triton.block_d(width),
            }
            for is_direct in (0, 1):
                yield Variant(
                    attention_triton._decode_attention_kernel,
                    {**shape, "GROUP": group, "IS_DIRECT": is_direct, "IS_UPCAST": 0},
                    num_warps=attention_triton.NUM_WARPS,
                    num_stages=attention_triton.NUM_STAGES,
                    is_fused=True,
                    types=(type_name,),
                )
            yield Variant(
                attention_triton._merge_chunks_kernel,
                shape,
                num_warps=attention_triton.NUM_WARPS,
                is_fused=True,
                types=(type_name,),
            )


def prefill_variants() -> Iterator[Variant]:
    """The same heads as attention_variants has."""
    for group, width, window in ((4, 128, 0), (4, 128, 4096), (3, 64, 0), (8, 96, 0), (1, 256, 0)):
        for type_name, itemsize in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
            tile = prefill_triton.tile_of(width, itemsize)
            yield Variant(
                prefill_triton._prefill_attention_kernel,
                {
                    "GROUP": group,
                    "WINDOW": window,
                    "BLOCK_X": tile.block_x,
                    "BLOCK_N": tile.block_n,
                    "BLOCK_SIZE": 16,
                    "WIDTH": width,
                    "BLOCK_D": attention_triton.block_d(width),
                    "IS_UPCAST": 0,
                },
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                is_fused=True,
                types=(type_name,),
            )


def layer_variants() -> Iterator[Variant]:
    """Llama 8B's and SmolLM2's rows and heads, and heads with a norm of their own."""
    for width in (4096, 576):
        yield Variant(
            layer_triton._rms_norm_kernel,
            {"WIDTH": width, "BLOCK": triton.next_power_of_2(width)},
            num_warps=layer_triton.norm_warps(width),
            is_fused=True,
        )
    for heads, width, has_norm in ((40, 128, 0), (12, 64, 0), (40, 128, 1)):
        yield Variant(
            layer_triton._rotate_kernel,
            {
                "NUM_HEADS": heads,
                "HALF": width // 2,
                "BLOCK_HALF": triton.next_power_of_2(width // 2),
                "BLOCK_H": layer_triton.BLOCK_H,
                "HAS_NORM": has_norm,
            },
            num_warps=layer_triton.NUM_WARPS,
            is_fused=True,
        )
    yield Variant(
        layer_triton._silu_mul_kernel,
        {"BLOCK": layer_triton.BLOCK_I},
        num_warps=layer_triton.NUM_WARPS,
        is_fused=True,
    )


def lora_variants() -> Iterator[Variant]:
    """Llama 8B's projections at rank 16: queries, gate and up in one product, down; and a large, odd rank."""
    for width, rank, num_parts in ((4096, 16, 1), (4096, 16, 2), (14336, 16, 1), (576, 33, 3)):
        slice_width, num_slices = lora_triton.slices_of(width)
        yield Variant(
            lora_triton._shrink_kernel,
            {
                "IN_WIDTH": width,
                "SHRUNK_WIDTH": rank * num_parts,
                "SLICE": slice_width,
                "BLOCK_I": lora_triton.BLOCK_I,
                "BLOCK_X": lora_triton.block_of(rank * num_parts),
                "HAS_TABLE": 1,
                "IS_UPCAST": 0,
            },
            num_warps=lora_triton.NUM_WARPS,
            num_stages=lora_triton.NUM_STAGES,
            is_fused=True,
        )
        yield Variant(
            lora_triton._expand_kernel,
            {
                "RANK": rank,
                "SHRUNK_WIDTH": rank * num_parts,
                "NUM_SLICES": num_slices,
                "BLOCK_J": triton.next_power_of_2(num_slices),
                "BLOCK_R": lora_triton.block_of(rank),
                "BLOCK_O": lora_triton.block_o(rank),
                "HAS_TABLE": 1,
            },
            num_warps=lora_triton.NUM_WARPS,
            is_fused=True,
        )


def sampler_variants() -> Iterator[Variant]:
    """The vocabularies of Llama 3, Qwen and SmolLM2."""
    yield Variant(scan_triton._scan_kernel, {"BLOCK": SCAN_BLOCK}, num_warps=SCAN_WARPS)
    yield Variant(scan_triton._touch_kernel, {"BLOCK": SCAN_BLOCK}, num_warps=SCAN_WARPS)
    yield Variant(scan_triton._normalizer_tile_kernel, {"BLOCK": SCAN_BLOCK}, num_warps=SCAN_WARPS)
    yield Variant(rank_triton._rank_tile_kernel, {"BLOCK": SCAN_BLOCK}, num_warps=SCAN_WARPS)
    for vocab_size, types in ((128256, TYPES), (151936, TYPES[:1]), (49152, TYPES[:1])):
        tiles = triton.next_power_of_2(triton.cdiv(vocab_size, SCAN_BLOCK))
        groups = triton.next_power_of_2(triton.cdiv(vocab_size, 16))
        lists = {"TILES": tiles, "GROUPS": groups, "BLOCK": SELECT_BLOCK, "CHUNK": CHUNK, "LIST": LIST_BLOCK}
        yield Variant(scan_triton._normalizer_kernel, {"TILES": tiles}, num_warps=1)
        yield Variant(rank_triton._rank_kernel, lists, num_warps=FINISH_WARPS, types=types)
        shape = {**lists, "NOISE_GROUPS": groups // 16}
        for is_listed in (0, 1):
            constants = {**shape, "IS_LISTED": is_listed}
            yield Variant(finish_triton._finish_kernel, constants, num_warps=FINISH_WARPS, types=types)
        of_list = {name: value for name, value in shape.items() if name != "LIST"}
        yield Variant(list_triton._list_kernel, of_list, num_warps=FINISH_WARPS, types=types)
    further = {"BLOCK": SELECT_BLOCK, "CHUNK": CHUNK, "LIST": LIST_BLOCK}
    yield Variant(list_triton._look_further_kernel, further, num_warps=FINISH_WARPS)


def late_variants() -> Iterator[Variant]:
    """Without a bias, and with one."""
    for has_bias in (0, 1):
        yield Variant(
            late_triton._late_kernel,
            {
                "HAS_STARTS": 1,
                "HAS_BIAS": has_bias,
                "BLOCK_C": late_triton.BLOCK_C,
                "BLOCK_D": late_triton.BLOCK_D,
            },
            num_warps=late_triton.NUM_WARPS,
            num_stages=late_triton.NUM_STAGES,
            is_fused=True,
        )


VARIANTS = (
    *sampler_variants(),
    *late_variants(),
    *attention_variants(),
    *prefill_variants(),
    *layer_variants(),
    *lora_variants(),
)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack (spills) a thread, as the assembler reports them."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", report)}


def main() -> int:
    num_lowered = num_tried = 0
    spilling: list[str] = []
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for variant in (one for one in VARIANTS if wanted in one.kernel.__name__):
        for type_name in variant.type_names:
            source = ASTSource(
                variant.kernel,
                signature=variant.signature(type_name),
                constexprs=dict(variant.constants),
                attrs=variant.attributes,
            )
            for capability in TARGETS:
                compiled = triton.compile(
                    source,
                    target=GPUTarget("cuda", capability, 32),
                    options={
                        "num_warps": variant.num_warps,
                        "num_stages": variant.num_stages,
                        "enable_fp_fusion": variant.is_fused,
                    },
                )
                usage = resources(compiled.asm["cubin"])
                name = variant.kernel.__name__
                print(
                    f"{name:26} {type_name:5} sm_{capability} {variant.constants} registers {usage['reg']} "
                    f"stack {usage['stack']} shared {compiled.metadata.shared}",
                    flush=True,
                )
                num_tried += 1
                if name in NEVER_SPILL and usage["stack"] > 0:
                    spilling.append(f"{name} {type_name} sm_{capability}")
                num_lowered += ".entry" in compiled.asm["ptx"]
    is_ok = num_lowered == num_tried > 0 and not spilling
    targets = [f"sm_{capability}" for capability in TARGETS]
    print(json.dumps({"ok": is_ok, "lowered": num_lowered, "targets": targets, "spilling": spilling}))
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
