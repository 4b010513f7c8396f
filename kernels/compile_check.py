"""Lowers every Triton kernel to PTX and machine code for sm_80 and sm_90, without a GPU: `make kernel-compile`.

A syntax or type error, or a kernel that needs more registers or shared memory than there are, shows here first.
Prints one line a variant (registers, spilled bytes, shared bytes), then one JSON line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from uld_kernels import finish_triton, scan_triton, select_triton
from uld_kernels.sampler_triton import LIST_BLOCK, SCAN_BLOCK

TARGETS = (80, 90)
LOGITS_TYPES = ("fp32", "bf16", "fp16")
POINTER_TYPES = {
    "ints_ptr": "i32",
    "term_ints_ptr": "i32",
    "allowed_ptr": "i8",
    "protected_ptr": "i8",
    "protected_ids_ptr": "i64",
    "history_ptr": "i32",
    "int_partials_ptr": "i32",
    "int_summaries_ptr": "i32",
    "group_list_ptr": "i32",
    "listed_ids_ptr": "i32",
    "token_ids_ptr": "i64",
    "rank_ptr": "i64",
    "status_ptr": "i32",
    "num_kept_ptr": "i64",
    "argmax_changed_ptr": "i1",
    "top_ids_ptr": "i64",
}
SCALAR_TYPES = {"log_vocab_size": "fp32", "stride_row": "i64"}


@dataclass(frozen=True)
class Variant:
    kernel: triton.JITFunction
    constants: dict[str, int] = field(default_factory=dict)
    num_warps: int = 8

    def signature(self, logits_type: str) -> dict[str, str]:
        types = {}
        for name in self.kernel.arg_names:
            if name in self.constants:
                types[name] = "constexpr"
            elif name == "logits_ptr":
                types[name] = f"*{logits_type}"
            elif name.endswith("_ptr"):
                types[name] = f"*{POINTER_TYPES.get(name, 'fp32')}"
            else:
                types[name] = SCALAR_TYPES.get(name, "i32")
        return types


# Tiles and groups of V = 32,000 to 151,936 at the launcher's block sizes.
VARIANTS = (
    Variant(scan_triton._scan_kernel, {"MAX_TERMS": 1, "BLOCK": SCAN_BLOCK}),
    Variant(scan_triton._scan_kernel, {"MAX_TERMS": 4, "BLOCK": SCAN_BLOCK}),
    Variant(scan_triton._normalizer_tile_kernel, {"BLOCK": SCAN_BLOCK}),
    Variant(scan_triton._normalizer_kernel, {"TILES": 64}, num_warps=1),
    Variant(scan_triton._rank_kernel, {"BLOCK": SCAN_BLOCK}),
    Variant(select_triton._select_kernel, {"MAX_TERMS": 1, "TILES": 16, "GROUPS": 512, "BLOCK": SCAN_BLOCK}),
    Variant(
        select_triton._select_kernel, {"MAX_TERMS": 4, "TILES": 128, "GROUPS": 4096, "BLOCK": SCAN_BLOCK}
    ),
    Variant(finish_triton._finish_kernel, {"MAX_TERMS": 1, "BLOCK": LIST_BLOCK}),
    Variant(finish_triton._finish_kernel, {"MAX_TERMS": 4, "BLOCK": LIST_BLOCK}),
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
    for variant in VARIANTS:
        takes_logits = "logits_ptr" in variant.kernel.arg_names
        for logits_type in LOGITS_TYPES if takes_logits else ("fp32",):
            source = ASTSource(
                variant.kernel, signature=variant.signature(logits_type), constexprs=dict(variant.constants)
            )
            for capability in TARGETS:
                compiled = triton.compile(
                    source,
                    target=GPUTarget("cuda", capability, 32),
                    options={"num_warps": variant.num_warps, "enable_fp_fusion": False},
                )
                usage = resources(compiled.asm["cubin"])
                name = variant.kernel.__name__
                print(
                    f"{name:26} {logits_type:5} sm_{capability} {variant.constants} registers {usage['reg']} "
                    f"stack {usage['stack']} shared {compiled.metadata.shared}",
                    flush=True,
                )
                num_tried += 1
                num_lowered += ".entry" in compiled.asm["ptx"]
    is_ok = num_lowered == num_tried > 0
    print(json.dumps({"ok": is_ok, "lowered": num_lowered, "targets": [f"sm_{c}" for c in TARGETS]}))
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
