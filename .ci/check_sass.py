"""Holds the built extension's machine code to the design: FP8 tensor core instructions, no local memory, registers."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

# Of the forward. Launch registers: 64 Ki over the threads of a CTA, in multiples of 8 (FwdConfig). QGMMA, by head_dim:
# QK and PV, at two places each. A third copy would mean that the compiler split the loop over keys by a condition that
# may differ between the warps of a warpgroup, which must all execute the same wgmma.
LAUNCH_REGISTERS = 128
QGMMA = {128: 16, 64: 12}


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
    forwards = 0
    for name, text in sorted(code.items()):
        registers, stack, local = resources[name]
        qgmma = len(re.findall(r"\bQGMMA\b", text))
        spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
        if spills or stack or local:
            faults.append(f"{name}: {spills} local loads and stores, {stack} bytes of stack, {local} local")
        if "attn_fwd_sm90" in name:
            forwards += 1
            head_dim = int(re.search(r"FwdConfigILi(\d+)E", name)[1])
            if qgmma != QGMMA[head_dim]:
                faults.append(f"{name}: {qgmma} QGMMA, not {QGMMA[head_dim]}")
            if len(re.findall(r"\bWARPGROUP\.DEPBAR\b", text)) >= qgmma:
                faults.append(f"{name}: ptxas waits after every wgmma (warnings C7510 to C7514 say why)")
            if registers != LAUNCH_REGISTERS:
                faults.append(f"{name}: {registers} registers at launch, not {LAUNCH_REGISTERS}")
        print(f"{registers:4} registers {qgmma:3} QGMMA  {demangled(name)}")
    if forwards != 2 * len(QGMMA):
        faults.append(f"{forwards} forward kernels, not one for each head_dim and dtype")
    print("\n".join(faults) or f"{len(code)} kernels, no local memory, no spills")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
