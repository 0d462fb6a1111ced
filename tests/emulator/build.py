"""Compiles the kernels' sources for the CPU, with the emulator in place of Hopper's instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setup import nvcc_on_path, package_dir

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "kernels"
HOPPER = Path("fpsattention/hopper.cuh")
PARAMS = Path("fpsattention/params.h")
GMMA = Path("cute/arch/mma_sm90_gmma.hpp")
GMMA_EXTENDED = Path("cute/arch/mma_sm90_gmma_ext.hpp")  # the other widths
CUTE_UTIL = Path("cute/arch/util.hpp")
FLAGS = [
    *("-std=c++17", "-O2", "-march=native", "-fPIC", "-fvisibility=hidden", "-w", "-fpermissive"),
    "-ffp-contract=off",  # nvcc fuses some products; which ones is unknown
    "-fno-strict-aliasing",
    "-fno-gnu-unique",  # each build in a process gets its own variables
]


class MissingTool(RuntimeError):
    """A compiler or headers that a build needs are not installed."""


def cuda_include() -> list[Path]:
    """The CUDA headers and CCCL: those of nvcc on PATH, else those of NVIDIA's wheels."""
    if nvcc := nvcc_on_path():
        command = [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"]
        plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        include = Path(re.search(r'INCLUDES="-I(.*?)"', plan)[1])
    else:
        include = (package_dir("nvidia") or Path()) / "cu13" / "include"
    if not (include / "cuda_runtime.h").exists():
        raise MissingTool(
            "no CUDA headers: PATH has no nvcc >= 12.8, and nvidia-cuda-runtime 13 is not installed"
        )
    return [include, include / "cccl"]


def include_dirs() -> list[Path]:
    cutlass, pybind11 = package_dir("cutlass_library"), package_dir("pybind11")
    if not shutil.which("g++"):
        raise MissingTool("no g++ on PATH")
    if cutlass is None or pybind11 is None:
        raise MissingTool("nvidia-cutlass or pybind11 is not installed")
    python = Path(sysconfig.get_paths()["include"])
    if not (python / "Python.h").exists():
        raise MissingTool(f"no Python.h in {python}")
    return [cutlass / "source" / "include", *cuda_include(), pybind11 / "include", python]


def replace(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times, not once"
    return text.replace(old, new)


def check_hopper() -> None:
    """Every function of the real hopper.cuh must have a replacement."""
    real, ours = (ROOT / "include" / HOPPER).read_text(), (HERE / HOPPER.name).read_text()
    names = re.findall(r"__device__ .*?(\w+)(?:<\w+>)?\(", real)
    assert len(names) == real.count("__device__ "), "a function of hopper.cuh whose name was not found"
    missing = [name for name in names if not re.search(rf"\b{name}\(", ours)]
    assert not missing, f"tests/emulator/hopper.cuh lacks {missing}"


def as_cpp(source: str) -> str:
    """A .cu file as C++: rewrites what no macro can translate."""
    source = source.replace(
        "extern __shared__ char smem_bytes[];", "char *smem_bytes = emulator::shared_memory();"
    )
    source = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 __shared__", source)
    assert not re.search(r"extern __shared__|__shared__ alignas", source), (
        "a form of __shared__ that is new here"
    )
    return source


def emulated_gmma(source: str) -> str:
    """CUTLASS's wgmma wrappers with calls of the emulator in place of their host code, which only fails."""
    parts = re.split(r"^(?=struct MMA_64x)", source, flags=re.MULTILINE)
    name = re.compile(r"struct MMA_64x(\d+)x(\d+)_(F16|F32)(E4M3E4M3|BF16BF16)_(SS|RS)(?:_TN)?\n")
    for i, part in enumerate(parts):
        match = name.match(part)
        if not match:
            continue
        n, k, sums, types, operands = match.groups()
        fp16, fp8, in_registers = sums == "F16", types == "E4M3E4M3", operands == "RS"
        signature = part[part.index("fma(") : part.index("#if defined")]
        d, a = re.findall(r"\w+\s*& (d\d+)", signature), re.findall(r"uint32_t const& (a\d+)", signature)
        assert len(d) == int(n) // (4 if fp16 else 2) and len(a) == (4 if in_registers else 0), match[0]
        major = [
            "false" if fp8 or (x == "A" and in_registers) else f"tnsp{x} == GMMA::Major::MN" for x in "AB"
        ]
        shape = ", ".join([n, k, *(str(x).lower() for x in (fp8, fp16, in_registers)), *major])
        a_descriptor = "0" if in_registers else "desc_a"
        addresses = [", ".join(f"&{x}" for x in registers) for registers in (a, d)]
        call = (
            f"emulator::wgmma({{{shape}}}, {{{addresses[0]}}}, {a_descriptor}, desc_b, {{{addresses[1]}}}, "
            "scale_D == GMMA::ScaleOut::One);"
        )
        parts[i], found = re.subn(r"CUTE_INVALID_CONTROL_PATH\(.*?\);", call, part, count=1)
        assert found, match[0]
    return "".join(parts)


def emulated_barriers(source: str) -> str:
    """The same for what orders wgmmas."""
    for what, call in (("fence", ""), ("wait_group<N>", "wgmma_wait(N)"), ("commit_group", "wgmma_commit()")):
        failure = f'CUTE_INVALID_CONTROL_PATH("Attempting to use wgmma.{what} without CUTE_ARCH_MMA_SM90A_ENABLED");'
        source = replace(source, failure, f"emulator::{call};" if call else "")
    return source


def observed_params(source: str) -> str:
    """params.h, with loads of BlockMeta observed: wgmma reads it too."""
    meta = re.search(r"struct alignas\(128\) BlockMeta \{.*?\n\};\n", source, re.DOTALL)[0]
    observed, count = re.subn(r"\b(float|int) (\w+);", r"emulator::Observed<\1> \2;", meta)
    assert count == 3, meta
    return replace(source, meta, observed)


def emulated_util(source: str) -> str:
    failure = 'printf("ERROR: cast_smem_ptr_to_uint not supported but used.\\n");\n  return 0;'
    return replace(source, failure, "return emulator::shared_address(ptr);")


@dataclass(frozen=True)
class Mutation:
    """A fault that a build puts into a kernel, asleep until `emulator_configure` is given its number.

    Attributes:
        source: the kernel's file, without suffix.
        replacements: {text: its replacement}. Each text occurs once in the source: whole statements, or an expression.
    """

    source: str
    replacements: Mapping[str, str]


def mutated(text: str, source: str, mutations: Sequence[Mutation]) -> str:
    """A kernel's source with the original and the fault of each of its mutations, and a switch. Numbers start at 1."""
    variants: dict[str, list[tuple[int, str]]] = {}
    for number, mutation in enumerate(mutations, 1):
        for old, new in mutation.replacements.items() if mutation.source == source else ():
            variants.setdefault(old, []).append((number, new))
    for old, news in variants.items():
        code = old
        for number, new in news:
            active = f"emulator::active_mutation == {number}"
            if old.rstrip().endswith((";", "}")):
                code = f"if ({active}) {{\n{new}}} else {{\n{code}}}\n"
            else:
                code = f"({active} ? ({new}) : ({code}))"
        text = replace(text, old, code)
    return text


def compiler(folder: Path) -> list[str]:
    """The compiler's command, without files, for the headers that `build` has put into this folder."""
    dirs = [folder / "include", ROOT / "include", HERE, *include_dirs()]
    return ["g++", *FLAGS, *(f"-I{path}" for path in dirs), "-include", str(HERE / "emulator.h")]


def build(folder: Path, mutations: Sequence[Mutation] = ()) -> Path:
    """Builds the module `_C`, with these mutations asleep in it, in `folder`, and returns its path."""
    include = folder / "include"
    cutlass = include_dirs()[0]
    command = compiler(folder)
    check_hopper()
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (HOPPER, (HERE / HOPPER.name).read_text()),
        (PARAMS, observed_params((ROOT / "include" / PARAMS).read_text())),
        (GMMA, emulated_barriers(emulated_gmma((cutlass / GMMA).read_text()))),
        (GMMA_EXTENDED, emulated_gmma((cutlass / GMMA_EXTENDED).read_text())),
        (CUTE_UTIL, emulated_util((cutlass / CUTE_UTIL).read_text())),
    ):
        (include / path).parent.mkdir(parents=True, exist_ok=True)
        (include / path).write_text(text)
    sources = [HERE / "emulator.cpp", KERNELS / "bindings.cpp"]
    for kernel in sorted(KERNELS.glob("*.cu")):
        text = mutated(kernel.read_text(), kernel.stem, mutations)
        (folder / f"{kernel.stem}.cpp").write_text(as_cpp(text))
        sources.append(folder / f"{kernel.stem}.cpp")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run([*command, "-c", str(source), "-o", str(target)])
        return target

    # The longest compilation first.
    sources.sort(key=lambda path: not path.stem.startswith("attn"))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    module = folder / "_C.so"
    run(["g++", "-shared", *map(str, objects), "-o", str(module)])
    return module


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[:4000]}"
