"""One pass of every kernel, small, for compute-sanitizer to watch: reads and writes out of bounds, uninitialised memory
and races. `--run` starts itself under compute-sanitizer, once a tool; alone it only makes the pass.

    python benchmarks/gpu_sanitize.py --run
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch
from gpu_kernels import Check, attention_checks, lora_checks
from gpu_layers import prefill_checks, step_checks
from gpu_sampler import proof, token_checks
from uld_kernels import LateRows

from uld_serve.bench.sampler_kinds import ROW_KINDS

# racecheck and synccheck watch shared memory and barriers; each run takes minutes, most of it compiling.
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# More tokens than one tile of the scan and no multiple of anything.
VOCAB = 2591
TIMEOUT_S = 1200
NOT_HERE = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of which every kernel has something to do."""

    hidden_size: int = 192
    intermediate_size: int = 320
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    num_key_value_heads: int = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="under compute-sanitizer, which must be on PATH")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--device", default="cuda", help="cpu makes the pass in plain torch")
    args = parser.parse_args(arguments)
    return _under_sanitizer(args.tools) if args.run else _pass(torch.device(args.device))


def _pass(device: torch.device) -> int:
    """Every kernel once, in bf16 and fp32, and whether what came out is right. Prints one JSON line."""
    checks: list[Check] = []
    for dtype in (torch.bfloat16, torch.float32):
        checks += attention_checks(device, dtype, Shape())
        checks += lora_checks(device, dtype, Shape())
        checks += prefill_checks(device, dtype, Shape())
        checks += step_checks(device, dtype, Shape())
    with torch.inference_mode():
        checks += proof(device, VOCAB)
        for name in ROW_KINDS:
            checks += token_checks(name, VOCAB, device, num_rows=9)
    checks.append(_late_check(device))
    wrong = [check.what for check in checks if not check.ok]
    print(json.dumps({"ok": not wrong, "checks": len(checks), "wrong": wrong}))
    return 1 if wrong else 0


def _late_check(device: torch.device) -> Check:
    """Lists of no, one and many tokens, against torch; on a CPU there is no kernel to check."""
    late = LateRows(torch.randn(3, 300, device=device), torch.randn(VOCAB, 300, device=device))
    lengths = [0, 1, 700]
    ids_BC = torch.stack([torch.randperm(VOCAB, device=device)[:700] for _ in lengths])
    exact = [late.scores(row, ids_BC[row, :length]) for row, length in enumerate(lengths)]
    out_BMC = torch.zeros(3, 1, 700, device=device)
    if device.type == "cuda":
        from uld_kernels.late_triton import score_listed

        counts_B = torch.tensor(lengths, dtype=torch.int32, device=device)
        index_BM = torch.arange(3, dtype=torch.int32, device=device)[:, None]
        score_listed(late, ids_BC.int(), counts_B, index_BM, out_BMC=out_BMC)
    else:
        for row, length in enumerate(lengths):
            out_BMC[row, 0, :length] = exact[row]
    gaps = [(out_BMC[row, 0, :length] - exact[row]).abs() for row, length in enumerate(lengths)]
    gap = float(torch.cat(gaps).max())
    return Check("late rows", gap, gap < 1e-3)


def _under_sanitizer(tools: list[str]) -> int:
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("compute-sanitizer is not on PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return NOT_HERE
    found = {tool: _run(program, tool) for tool in tools}
    print(json.dumps({"ok": not any(found.values()), "status": found}))
    return 1 if any(found.values()) else 0


def _run(program: str, tool: str) -> int:
    """compute-sanitizer's own status: 0 where it found nothing and the pass was right."""
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "86",
        "--print-limit",
        "20",
        sys.executable,
        __file__,
    ]
    # Blocks from torch's allocator would hide what lies between tensors.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    print(f"compute-sanitizer --tool {tool}", file=sys.stderr)
    try:
        return subprocess.run(command, env=environment, check=False, timeout=TIMEOUT_S).returncode
    except subprocess.TimeoutExpired:
        print(f"{tool}: not done after {TIMEOUT_S} s", file=sys.stderr)
        return NOT_HERE


if __name__ == "__main__":
    sys.exit(main())
