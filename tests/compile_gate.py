"""Compiles the kernels for a GPU that need not be here: python tests/compile_gate.py 80|90|100 [kernel].

Prints what each configuration takes; fails where registers spill to memory, where shared memory does not
suffice, or where the machine code lacks the instructions that make the kernel fast.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton
from engine.kernels import attention, norm, rope, rope_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {80: 99, 90: 227, 100: 227}  # KiB a block; 163 on an A100, but its table serves consumer GPUs too
WIDE = {"loads of 16 bytes": r"ld\.global(?:\.\w+)*\.v4"}
HALF_AS_WIDE = {"loads of 8 bytes": r"ld\.global(?:\.\w+)*\.v2"}
TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


@dataclass(frozen=True)
class Case:
    """A kernel in one configuration. Of its parameters, the names in capitals are pointers to `data` unless
    `types` says otherwise; the others are int32 unless it does. `wanted`: patterns that PTX must have.
    """

    name: str
    kernel: triton.JITFunction
    constants: dict[str, object]
    warps: int
    stages: int = 3
    data: str = "bf16"
    types: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    wanted: dict[str, str] = field(default_factory=dict)


def norm_cases(arch: int) -> Iterator[Case]:
    float32 = dict.fromkeys(("MEAN", "RSTD", "D_GATE", "D_SCALE", "D_SHIFT"), "*fp32") | {"eps": "fp32"}
    for width in (256, 384, 1536):
        shape = {"D": width, "BLOCK": triton.next_power_of_2(width)}
        for kernel, more in ((norm.forward_kernel, {}), (norm.backward_kernel, {"CHUNK": norm.CHUNK})):
            name = f"norm {kernel.fn.__name__} width {width}"
            warps = norm.warps(shape["BLOCK"])
            yield Case(name, kernel, shape | more, warps, types=float32, wanted=WIDE)


def attention_cases(arch: int) -> Iterator[Case]:
    """Every rule of the table and every candidate, with one part and with several."""
    table = attention.read_table(f"sm_{arch}")
    for rule in table["window_attention"]:
        config, data = attention.Config(**rule["config"]), "fp32" if "float32" in rule["dtype"] else "bf16"
        for d in rule["head_dim"]:
            for splits in (1, 4):
                yield attention_case(arch, config, data, d, splits)
    for d in attention.HEAD_DIMS:
        constants = {"D": d, "SPLITS": 4, "BLOCK": attention.MERGED}
        types = {"PARTS": "*fp32", "LSE": "*fp32"}
        yield Case(f"attention merge_kernel d {d}", attention.merge_kernel, constants, 4, types=types)


def attention_case(arch: int, config: attention.Config, data: str, d: int, splits: int) -> Case:
    page = 1560 if config.tma else 13
    m, n = config.block_m, config.block_n
    constants = {"HEADS": 4, "D": d, "PAGE": page, "BLOCK_M": m, "BLOCK_N": n, "SPLITS": splits}
    constants["TMA"] = config.tma
    types = {"PAGES": "*i32", "LENGTHS": "*i32", "ROWS": ("i32", "i32"), "scale": "fp32"}
    if splits == 1:
        constants["LSE"] = None
    else:
        types |= {"LSE": "*fp32", "OUT": "*fp32"}
    wanted = {}
    if data != "fp32":  # whose products are exact, so not for tensor cores
        # Hopper's and Blackwell's own instructions take 64 rows at least.
        wanted["tensor core instructions"] = TENSOR_CORES[arch if m >= 64 else 80]
        if not config.tma:
            wanted["copies of 16 bytes"] = r"cp\.async\.cg\.shared\.global \[[^;]*, 0x10"
    if config.tma:
        wanted["tiles by TMA"] = r"cp\.async\.bulk\.tensor"
    how = f"{data} d {d} tile {m}x{n} warps {config.warps} stages {config.stages} parts {splits}"
    name = "attention " + how + " TMA" * config.tma
    return Case(name, attention.forward_kernel, constants, config.warps, config.stages, data, types, wanted)


def rope_cases(arch: int) -> Iterator[Case]:
    """Heads normalised each by itself, as in the shipped model, and all together with the mean left in."""
    types = {"COS": "*fp32", "SIN": "*fp32", "SLOTS": "*i32", "D_WEIGHTS": "*fp32", "eps": "fp32"}
    for heads, d, whole in ((4, 64, False), (6, 64, False), (12, 128, False), (12, 128, True)):
        over = heads * d if whole else d
        sizes, warps = rope.blocks(heads, d, over)
        constants = {"heads": heads, "D": d, "OVER": over, "RMS": whole, **sizes}
        for kernel, more in (
            (rope_triton.forward_kernel, {}),
            (rope_triton.backward_kernel, {"CHUNK": rope.CHUNK}),
        ):
            name = f"rope {kernel.fn.__name__} {heads} heads of {d}, norm over {over}"
            wanted = WIDE if heads > 4 else HALF_AS_WIDE  # there a thread has no more
            yield Case(name, kernel, constants | more, warps, types=types, wanted=wanted)


# Each gives the cases of a file of kernels for an architecture.
CASES = (norm_cases, rope_cases, attention_cases)


def build(case: Case, arch: int):
    """The kernel's machine code."""
    names = case.kernel.arg_names
    pointer = f"*{case.data}"
    kind = {name: case.types.get(name, pointer if name.isupper() else "i32") for name in names}
    kind |= dict.fromkeys(case.constants, "constexpr")
    aligned = [i for i, name in enumerate(names) if kind[name][0] == "*" or name.startswith("stride")]
    even = {(i,): [["tt.divisibility", 16]] for i in aligned}
    fixed = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(fn=case.kernel, signature=kind, constexprs=fixed, attrs=even)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def stack_and_registers(made) -> tuple[int, int]:
    """Bytes that spilled, and registers a thread."""
    tool = Path(os.path.dirname(triton.__file__)) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+).*?STACK:(\d+)", said).groups()
    return int(stack), int(registers)


def fine(case: Case, arch: int) -> bool:
    """Builds it, prints what it takes, and says whether all is as it must be."""
    print(f"sm_{arch} {case.name}: ", end="", flush=True)
    try:
        made = build(case, arch)
    except Exception as error:  # of the compiler, of whichever kind
        print(f"does not compile: {error}  <-- WRONG")
        return False
    stack, registers = stack_and_registers(made)
    found = {what: len(re.findall(pattern, made.asm["ptx"])) for what, pattern in case.wanted.items()}
    right = stack == 0 and made.metadata.shared <= SHARED[arch] * 1024 and all(found.values())
    said = "".join(f", {count} {what}" for what, count in found.items())
    print(f"{registers} registers, {stack} bytes spilled, {made.metadata.shared} bytes shared{said}", end="")
    print("" if right else "  <-- WRONG")
    return right


def main(arch: int, name: str = "") -> int:
    cases = [case for cases in CASES for case in cases(arch) if name in case.name]
    return not all([fine(case, arch) for case in cases])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
