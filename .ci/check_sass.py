"""Holds the built extension's machine code to the design: FP8 tensor core instructions, no local memory, registers."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

# Tensor core instructions (QGMMA, HGMMA) of each main kernel, by its template parameters: head_dim, and the forward's
# math warpgroups. The forward has QK and PV at two places.
# The backward has S, dP and dV at one place; dK and dQ at two, because those of the last step follow the loop. One
# more copy would mean that the compiler split a loop by a condition that may differ between the warps of a warpgroup,
# which must all execute the same wgmma.
GMMA = {
    "attn_fwd_sm90": {"128, 2": (16, 0), "64, 2": (12, 0), "64, 3": (12, 0)},
    "attn_bwd_sm90": {"128": (4, 36), "64": (2, 32)},
}


# Each is there for windows and for lists of key tiles, in both dtypes.
VARIANTS = [f"{tiles}.*{dtype}" for tiles in ("TileBox", "TileList") for dtype in ("__nv_bfloat16", "__half")]


def launch_registers(warpgroups: int) -> int:
    """Of a thread, as in launch.h, with one warpgroup more for loads."""
    return 64 * 1024 // (128 * (warpgroups + 1)) // 8 * 8


def package_dir(name: str) -> Path:
    return Path(next(iter(importlib.util.find_spec(name).submodule_search_locations)))


def cuobjdump(option: str, module: Path) -> str:
    tools = package_dir("nvidia.cu13") / "bin"  # cuobjdump calls nvdisasm
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run([tools / "cuobjdump", option, module], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"cuobjdump {option} failed:\n{done.stderr}")
    return done.stdout


def demangled(name: str) -> str:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return text.replace("fps::(anonymous namespace)::", "").removeprefix("void ").partition("(")[0]


def functions(sass: str) -> dict[str, str]:
    parts = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def main() -> int:
    (module,) = package_dir("fpsattention").glob("_C*.so")
    code = functions(cuobjdump("-sass", module))
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", cuobjdump("-res-usage", module)
    )
    resources = {name: tuple(map(int, numbers)) for name, *numbers in usage}
    faults = []
    found: dict[str, list[str]] = {kernel: [] for kernel in GMMA}
    for name, text in sorted(code.items()):
        registers, stack, local = resources[name]
        gmma = tuple(len(re.findall(rf"\b{x}\b", text)) for x in ("QGMMA", "HGMMA"))
        spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
        if spills or stack or local:
            faults.append(f"{name}: {spills} local loads and stores, {stack} bytes of stack, {local} local")
        for kernel in GMMA:
            if kernel not in name:
                continue
            found[kernel].append(name)
            parameters = re.findall(r"Li(\d+)E", re.search(r"ConfigI((?:Li\d+E)+)", name)[1])
            expected = GMMA[kernel][", ".join(parameters)]
            if gmma != expected:
                faults.append(f"{name}: (QGMMA, HGMMA) {gmma}, not {expected}")
            if len(re.findall(r"\bWARPGROUP\.DEPBAR\b", text)) >= sum(gmma):
                faults.append(f"{name}: ptxas waits after every wgmma (warnings C7510 to C7514 say why)")
            at_launch = launch_registers(int((*parameters, 2)[1]))
            if registers != at_launch:
                faults.append(f"{name}: {registers} registers at launch, not {at_launch}")
        print(f"{registers:4} registers {gmma[0]:3} QGMMA {gmma[1]:3} HGMMA  {demangled(name)}")
    for kernel, expected in GMMA.items():
        for variant in VARIANTS:
            of_variant = [name for name in found[kernel] if re.search(variant, name)]
            if len(of_variant) != len(expected):
                faults.append(
                    f"{len(of_variant)} kernels {kernel} {variant}, not one for each of {list(expected)}"
                )
    print("\n".join(faults) or f"{len(code)} kernels, no local memory, no spills")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
