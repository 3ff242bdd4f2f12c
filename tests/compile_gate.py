"""Compiles the kernels for a GPU that need not be here: python tests/compile_gate.py 80|90|100.

Prints what each configuration takes; fails where registers spill to memory, where shared memory does not
suffice, or where loads are not 16 bytes wide.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from engine.kernels import norm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {80: 163, 90: 227, 100: 227}  # KiB a block
FLOAT32 = {"MEAN", "RSTD", "D_GATE", "D_SCALE", "D_SHIFT"}  # whatever the type of the rest


def build(kernel, constants: dict[str, int], arch: int, warps: int):
    """The kernel's machine code with bfloat16 data."""
    names = kernel.arg_names
    kind = {}
    for name in names:
        if name in constants:
            kind[name] = "constexpr"
        elif name.isupper():
            kind[name] = "*fp32" if name in FLOAT32 else "*bf16"
        else:
            kind[name] = "fp32" if name == "eps" else "i32"
    aligned = [i for i, name in enumerate(names) if kind[name][0] == "*" or name.startswith("stride")]
    even = {(i,): [["tt.divisibility", 16]] for i in aligned}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=kind, constexprs=fixed, attrs=even)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


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


def main(arch: int) -> int:
    wrong = 0
    for width in (256, 384, 1536):
        block = triton.next_power_of_2(width)
        shape = {"D": width, "BLOCK": block}
        for kernel, more in ((norm.forward_kernel, {}), (norm.backward_kernel, {"CHUNK": norm.CHUNK})):
            made = build(kernel, shape | more, arch, norm.warps(block))
            stack, registers = stack_and_registers(made)
            wide = len(re.findall(r"ld\.global(?:\.\w+)*\.v4", made.asm["ptx"]))
            fine = stack == 0 and made.metadata.shared <= SHARED[arch] * 1024 and wide > 0
            wrong += not fine
            name = kernel.fn.__name__
            print(f"sm_{arch} {name} width {width}: {registers} registers, {stack} bytes spilled, ", end="")
            said = f"{made.metadata.shared} bytes shared, {wide} loads of 16 bytes"
            print(said if fine else f"{said}  <-- WRONG")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
