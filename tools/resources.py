"""What the kernels need of a GPU, read from their compiled code; no GPU takes part.

    python -m tools.resources [--shape D F] [--tokens T ...] [--json]

compiles every launch of `cases` for every target and prints a table: registers, spilled and shared
bytes of a program, and how wide the loads of the weight rows are. It exits with 1 if a kernel is
over the budget.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_tools.kernels.few_bits import FewBits
from moe_tools.kernels.quantize import INT4
from moe_tools.kernels.scores import FewBitScores, LinearScores
from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.config import MOST_TOGETHER
from moe_tools.kernels.triton.grouped_call import GroupedCall
from moe_tools.kernels.triton.kernel_launch import KernelLaunch
from moe_tools.kernels.triton.launches import (
    backward_launches,
    forward_launches,
    grouped_backward_launches,
    grouped_launches,
)
from moe_tools.kernels.triton.stored import Rows, of_codes

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
BUDGET = {
    "list_experts": (96, 1),
    "list_firing": (208, 25),
    "list_routed": (112, 48),
    "list_proposed": (216, 25),
    "compute_hidden": (255, 34),
    "combine": (224, 52),
    "add_shares": (160, 0),
    "compute_hidden_grads": (224, 58),
    "compute_weight_grads": (255, 20),
    "compute_mask_grads": (128, 4),
    "group_pairs": (96, 8),
    "compute_pairs_hidden": (160, 25),
    "combine_pairs": (192, 52),
    "compute_pairs_hidden_grads": (192, 41),
    "compute_experts_grads": (255, 58),
}
"""Kernel -> registers of a thread and KiB of shared memory of a program, on every target.

With more than 255 registers the compiler spills. A program may have 163 KiB of shared memory on an
sm_80, 227 on an sm_90 and an sm_100, 64 on a gfx942 and 160 on a gfx950.
"""
SPILLED = {"sm_80": 8, "sm_100": 16}
"""Bytes of stack that the compiler takes for some launches on codes."""
TOKENS = (1, 16, 64, 512)
"""The cases have the smallest, the middle and the largest tile of tokens, and groups by expert."""
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Usage:
    """What one kernel of one case needs, compiled for one target."""

    case: str
    kernel: str
    target: str
    registers: int
    """How many a thread has; on AMD, vector registers."""
    spills: int
    """Bytes of a thread's stack: spilled registers and local arrays."""
    shared: int
    """Bytes of shared memory of a program."""
    load_bits: tuple[int, ...]
    """Widths of the loads of weight rows, each once; empty in kernels that read none."""

    @property
    def fits(self) -> bool:
        """Whether it is within the budget, keeps local memory empty and reads rows by 128 bits."""
        registers, shared = BUDGET[self.kernel]
        lean = self.registers <= registers and self.shared <= 1024 * shared
        wide = min(self.load_bits, default=128) >= (64 if self._narrow else 128)
        return lean and wide and self.spills <= SPILLED.get(self.target, 0)

    @property
    def _narrow(self) -> bool:
        """Whether a tile of codes of four bits has only 8 bytes for each of 256 threads."""
        return _is_amd(self.target) and self.case.startswith(
            ("proposed", "experts int4", "gate first int4")
        )


def cases(
    width: int, neurons: int, tokens: int, target: str
) -> Iterator[tuple[str, list[KernelLaunch]]]:
    """Yields the name and launches of what is compiled: experts of 8 neurons, fp32 for one token.

    bf16, and on one target, as it makes next to no difference, fp16.

    More tokens than one tile holds are grouped: 8 experts of a host, of which each token takes two.
    """
    for dtype in (torch.bfloat16, torch.float16) if target == "sm_90" else (torch.bfloat16,):
        end = f"{_TYPES[dtype]}, {tokens} tokens"
        if tokens > MOST_TOGETHER:
            yield from _grouped_cases(_grouped_call(tokens, width, neurons, dtype), end)
            continue
        call = replace(_call(tokens, width, neurons, dtype), tickets=not _is_amd(target))
        yield from _cases(call, end)
        yield from _scored_cases(call, end)
        for name, stored in (("int8", torch.int8), ("int4", INT4)):
            yield from _codes_cases(call, stored, f"{name} {end}")
    if tokens == 1:
        call = replace(_call(1, width, neurons, torch.float32), tickets=not _is_amd(target))
        yield from _cases(call, "fp32, 1 tokens")


_Cases = Iterator[tuple[str, list[KernelLaunch]]]


def _cases(call: Call, end: str) -> _Cases:
    exact = replace(call, mask_TE=None, act="relu", gate_first=True)
    yield f"experts {end}", forward_launches(call)[0]
    yield f"gate first {end}", forward_launches(exact)[0]
    yield f"backward {end}", backward_launches(call, torch.empty_like(call.x_TD))[0]


def _codes_cases(call: Call, dtype: torch.dtype, end: str) -> _Cases:
    rows = _blank_rows(call.neurons, call.x_TD.shape[1], dtype)
    given = replace(call, gate_FD=rows.stored, up_FD=rows.stored, down_FD=rows.stored)
    scale_FG = rows.scale_FG
    given = replace(given, gate_scale_FG=scale_FG, up_scale_FG=scale_FG, down_scale_FG=scale_FG)
    yield f"experts {end}", forward_launches(given)[0]
    recheck = replace(given, act="relu", gate_first=True)  # of a predicted list
    yield f"gate first {end}", forward_launches(recheck)[0]


def _scored_cases(call: Call, end: str) -> _Cases:
    """A router of experts, and copies in four bits; the residual is added to y."""
    call = replace(call, mask_TE=None, residual_TD=call.x_TD)
    width, dtype = call.x_TD.shape[1], call.x_TD.dtype
    weight_RD = _blank(max(1, call.neurons // 8), width, dtype=dtype)
    routed = LinearScores(call.x_TD, weight_RD, weight_RD[:, 0], 0.5)
    yield f"routed {end}", forward_launches(call, routed)[0]
    copy = _blank_rows(call.neurons, width, INT4)._replace(offset=0.5)
    norm_F = _blank(call.neurons, dtype=torch.float32)
    proposed = FewBitScores(call.x_TD, copy, copy, norm_F, 0.5)
    yield f"proposed {end}", forward_launches(call, proposed)[0]


def _grouped_cases(call: GroupedCall, end: str) -> _Cases:
    yield f"grouped {end}", grouped_launches(call)[0]
    yield f"backward {end}", grouped_backward_launches(call, torch.empty_like(call.x_TD))[0]


def _call(tokens: int, width: int, neurons: int, dtype: torch.dtype) -> Call:
    return Call(
        x_TD=_blank(tokens, width, dtype=dtype),
        gate_FD=_blank(neurons, width, dtype=dtype),
        up_FD=_blank(neurons, width, dtype=dtype),
        down_FD=_blank(neurons, width, dtype=dtype),
        mask_TE=_blank(tokens, max(1, neurons // 8), dtype=dtype),
    )


def _grouped_call(tokens: int, width: int, neurons: int, dtype: torch.dtype) -> GroupedCall:
    gate_up_XFD = _blank(8, 2 * neurons, width, dtype=dtype)
    gate_XND, up_XND = gate_up_XFD.unflatten(1, (2, neurons)).unbind(1)
    return GroupedCall(
        x_TD=_blank(tokens, width, dtype=dtype),
        gate_XND=gate_XND,
        up_XND=up_XND,
        down_XND=_blank(8, neurons, width, dtype=dtype),
        chosen_TK=_blank(tokens, 2, dtype=torch.int64),
        weight_TK=_blank(tokens, 2, dtype=torch.float32),
    )


def _blank_rows(neurons: int, width: int, dtype: torch.dtype) -> Rows:
    """Rows of codes, laid out as `store` would, without data."""
    codes_FD = _blank(neurons, width, dtype=torch.int8)
    scale_FG = _blank(neurons, -(-width // 32), dtype=torch.bfloat16)
    return of_codes(FewBits(codes_FD, scale_FG, 8), halves=dtype == INT4)


def _is_amd(target: str) -> bool:
    return TARGETS[target].backend == "hip"


def _blank(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_launch(launch: KernelLaunch, target: GPUTarget) -> Any:
    """Compiles the kernel as this launch would on `target`."""
    source = _source(launch)
    with triton.knobs.compilation.scope():
        # Code from the cache may name the files of an older version.
        triton.knobs.compilation.always_compile = True
        return triton.compile(source, target=target, options=launch.options)


def _source(launch: KernelLaunch) -> ASTSource:
    """Specialises the kernel as the launcher would for these arguments."""
    kernel, values = launch.kernel, launch.arguments
    fixed = {one.name for one in kernel.params if one.is_constexpr or values[one.name] is None}
    kinds = {
        name: "constexpr" if name in fixed else _kind(values[name]) for name in kernel.arg_names
    }
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in fixed and _divides(values[name])
    }
    return ASTSource(kernel, kinds, {name: values[name] for name in fixed}, attributes)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def _divides(value: Any) -> bool:
    """Whether the launcher would know that 16 divides it; torch aligns the memory of tensors."""
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def measure(case: str, launch: KernelLaunch, target: str) -> Usage:
    """Compiles one launch and reads its resources."""
    made = compile_launch(launch, TARGETS[target])
    amd = _is_amd(target)
    text = made.asm["amdgcn" if amd else "ptx"]
    registers, spills = _amd_usage(text) if amd else _nvidia_usage(made.asm["cubin"])
    widths = tuple(sorted(set(_row_loads(text))))
    return Usage(case, launch.name, target, registers, spills, made.metadata.shared, widths)


def _amd_usage(text: str) -> tuple[int, int]:
    found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
    return int(found["vgpr_count"]), int(found["private_segment_fixed_size"])


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def _row_loads(text: str) -> Iterator[int]:
    """Yields the bits of each load that comes from rows.py, as the debug lines say."""
    files = re.findall(r'\.file\s+(\d+) .*rows\.py"', text)
    inside = False
    for line in text.splitlines():
        if at := re.match(r"\s*\.loc\s+(\d+) ", line):
            inside = at[1] in files
        elif inside and (bits := _load_bits(line)):
            yield bits


def _load_bits(line: str) -> int | None:
    if found := re.search(r"cp\.async\.c\w\.shared\.global.*?\], \[.*?\], (\w+)", line):
        return 8 * int(found[1], 0)
    if found := re.search(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", line):
        return int(found[1] or 1) * int(found[2])
    if found := re.search(
        r"\b(?:global|buffer)_load_(?:lds_)?(dwordx?(\d)?|[us]?short|[us]byte)", line
    ):
        return 32 * int(found[2] or 1) if "dword" in found[1] else 16 if "short" in found[1] else 8
    return None


def measure_all(width: int, neurons: int, tokens: tuple[int, ...] = TOKENS) -> Iterator[Usage]:
    """Measures every kernel of every case on each target; compiles twins across cases once."""
    known: dict[str, Usage] = {}
    for count, target in product(tokens, TARGETS):
        for case, launches in cases(width, neurons, count, target):
            for launch in launches:
                code = f"{_source(launch).hash()} {launch.options} {target}"
                if code not in known:
                    known[code] = measure(case, launch, target)
                yield replace(known[code], case=case)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and returns 0 if every kernel is within the budget."""
    parser = argparse.ArgumentParser(description="registers, spills and load widths, without a GPU")
    parser.add_argument("--shape", nargs=2, type=int, default=(4096, 11008), metavar=("D", "F"))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it")
    fits = True
    width, neurons = options.shape
    for usage in measure_all(width, neurons, tuple(options.tokens)):
        print(json.dumps(asdict(usage)) if options.json else _row(usage), flush=True)
        fits &= usage.fits
    return 0 if fits else 1


def _row(usage: Usage) -> str:
    widths = "/".join(map(str, usage.load_bits)) or "-"
    return (
        f"{usage.case:<32}{usage.kernel:<28}{usage.target:<8}{usage.registers:>4} registers"
        f"{usage.spills:>4} B spilled{usage.shared:>7} B shared{widths:>5} bit loads"
        f"{'' if usage.fits else '  OVER BUDGET'}"
    )


if __name__ == "__main__":
    sys.exit(main())
