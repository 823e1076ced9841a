"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on random problems; and on emulated CPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from effdet_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "tests" / "native"
CSRC = ROOT / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
# A report names files and lines, which -g1 has; with -g most files take 30% longer to compile.
SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "-mavx512bf16"),
    "amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
EMULATOR = shutil.which("qemu-x86_64")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler (g++, or CXX)")


def compile_all(sources: list[Path], folder: Path, *flags: str) -> list[str]:
    """Object files of the sources, two at a time."""
    # GCC 12 warns of uninitialised values inside its own AVX-512 header when it does not optimise.
    common = ["-std=c++17", "-fopenmp", f"-I{CSRC}", "-DEFFDET_X86=1", "-Wno-maybe-uninitialized"]

    def build(source: Path) -> str:
        target = folder / f"{'_'.join(source.relative_to(ROOT).parts)}.o"
        command = [str(COMPILER), *common, *flags, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, sources))


def run_sanitized(objects: list[str], program: Path, *arguments: str) -> None:
    subprocess.run([str(COMPILER), "-fopenmp", *SANITIZERS, "-o", program, *objects], check=True)
    # libgomp keeps its threads' memory to the end of the process: not a leak of ours.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr[-2000:]


OLDEST_AND_NEWEST = pytest.mark.parametrize(
    "isa",
    [
        pytest.param("portable", marks=pytest.mark.slow),
        _native.ISAS[_native.module().isa()],
    ],
)


@needs_compiler
@OLDEST_AND_NEWEST
@pytest.mark.parametrize(
    ("op", "problems"),
    [
        ("soft_nms", 2_000),
        ("decode_topk", 200),
        pytest.param("soft_nms", 100_000, marks=pytest.mark.slow),
        pytest.param("decode_topk", 10_000, marks=pytest.mark.slow),
    ],
)
def test_fuzz_detection(isa, op, problems, tmp_path):
    sources = [
        CSRC / op / "cpu.cpp",
        *(CSRC / op).glob("*.simd.cpp"),
        CSRC / "common" / "isa.cpp",
        CSRC / "common" / "scratch.cpp",
        NATIVE / f"{op}_fuzz.cpp",
    ]
    # One instruction set, under the name of the oldest; rounded as the program compares.
    one_set = ("-UEFFDET_X86", "-DEFFDET_ISA=portable", "-ffp-contract=off", *FLAGS[isa])
    objects = compile_all(sources, tmp_path, *SANITIZERS, *one_set)
    run_sanitized(objects, tmp_path / "fuzz", str(problems))


@needs_compiler
@OLDEST_AND_NEWEST
def test_fuzz_kernels(isa, tmp_path):
    """The oldest and the newest instruction set that runs here."""
    sources = [
        *CSRC.glob("*/*.simd.cpp"),
        CSRC / "common" / "isa.cpp",
        CSRC / "common" / "scratch.cpp",
        NATIVE / "kernels_fuzz.cpp",
    ]
    flags = (*SANITIZERS, *FLAGS[isa], f"-DEFFDET_ISA={isa}")
    run_sanitized(compile_all(sources, tmp_path, *flags), tmp_path / "fuzz")


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-x86_64")
def test_an_older_cpu_runs_the_kernels_it_has(tmp_path):
    """Emulated CPUs stop at the first instruction that they lack."""
    objects = compile_all(
        [NATIVE / "dispatch.cpp", CSRC / "common" / "isa.cpp", CSRC / "common" / "scratch.cpp"],
        tmp_path,
        "-O2",
    )
    for isa, flags in FLAGS.items():
        sources = sorted(CSRC.glob("*/*.simd.cpp"))
        objects += compile_all(sources, tmp_path / isa, "-O3", *flags, f"-DEFFDET_ISA={isa}")
    program = tmp_path / "dispatch"
    subprocess.run([str(COMPILER), "-fopenmp", "-o", program, *objects], check=True)
    for cpu, isa in (("Nehalem", "portable"), ("Haswell", "avx2")):
        done = subprocess.run(
            [str(EMULATOR), "-cpu", cpu, program], capture_output=True, text=True, timeout=300
        )
        assert done.stdout.startswith(f"isa {_native.ISAS.index(isa)} status 0 y 4.96653")
