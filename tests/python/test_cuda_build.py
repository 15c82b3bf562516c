"""The CUDA kernels as ptxas compiled them: read from the built module, on any machine."""

from __future__ import annotations

import re

import cubin
import pytest

import arc_topk

HOT = ("prepare", "pack", "apply", "select")
HOT_OF_LOW_RANK = ("orthonormalise", "multiplyback", "combine", "send", "receive", "draw")


@pytest.fixture(scope="module")
def kernels() -> list[cubin.Kernel]:
    if arc_topk.build_info()["cuda"] is None:
        pytest.skip("this build has no CUDA kernels: no nvcc was found, or ARC_TOPK_CUDA is 0")
    cuobjdump = cubin.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump on PATH, in /usr/local/cuda, nvidia-cuda-cuobjdump or Triton")
    found = cubin.read(cubin.module(), cuobjdump)
    cubin.record(found)
    return found


def named(kernels: list[cubin.Kernel], *words: str) -> list[cubin.Kernel]:
    """Those with one of the words in their own name, template arguments apart; never none."""
    found = [k for k in kernels if any(word in k.name.split("<")[0].lower() for word in words)]
    assert found, f"no kernel is called {words}: {[k.name for k in kernels]}"
    return found


def test_every_architecture_has_machine_code(kernels: list[cubin.Kernel]) -> None:
    chosen = arc_topk.build_info()["cuda"]["architectures"]
    assert {k.arch for k in kernels} == {f"sm_{arch.removesuffix('+PTX')}" for arch in chosen}
    assert all(k.code for k in kernels), "cuobjdump gave no SASS: is nvdisasm beside it?"


@pytest.mark.parametrize("word", HOT + HOT_OF_LOW_RANK)
def test_hot_kernels_do_not_spill(kernels: list[cubin.Kernel], word: str) -> None:
    spilling = [
        (k.name, k.arch, f"stack {k.stack}, local {k.local}")
        for k in named(kernels, word)
        if k.stack or k.local or k.uses(r"\b(LDL|STL)\b")
    ]
    assert not spilling


def test_prepare_reads_16_bytes_at_once(kernels: list[cubin.Kernel]) -> None:
    # Gradient, state and sums in float32.
    floats = [k for k in named(kernels, "prepare") if re.search(r"float, float, float ?>$", k.name)]
    assert len(floats) == 5, "one for each error feedback, and low rank's"
    narrow = [(k.name, k.arch) for k in floats if not k.uses(r"\bLDG\.E\S*\.128")]
    assert not narrow


def test_scores_are_not_fused(kernels: list[cubin.Kernel]) -> None:
    """A fused multiply-add rounds once, the CPU twice: ranks would choose other rows."""
    fused = {k.name: k.uses(r"\b[FD]FMA\b") for k in named(kernels, "select")}
    assert not {name: lines[:3] for name, lines in fused.items() if lines}


def test_registers_are_recorded(kernels: list[cubin.Kernel]) -> None:
    assert all(0 < k.registers <= 255 for k in kernels)
    lines = (cubin.ROOT / "build" / "cuda_registers.md").read_text().splitlines()
    assert len(lines) == 2 + len(kernels)


USAGE = """
Fatbin elf code:
================
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN8arc_topk4cuda7prepareIfEEvPKT_PS2_l:
  REG:16 STACK:8 SHARED:32 LOCAL:4 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
arch = sm_90
\t\tFunction : _ZN8arc_topk4cuda7prepareIfEEvPKT_PS2_l
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;   /* 0x0 */
                                                                               /* 0x1 */
        /*0010*/                   STL [R1], R8 ;                              /* 0x2 */
"""


def test_what_cuobjdump_says_is_understood() -> None:
    key = ("_ZN8arc_topk4cuda7prepareIfEEvPKT_PS2_l", "sm_90")
    kernel = cubin.parse_usage(USAGE)[key]
    kernel.code = cubin.parse_code(SASS)[key]
    assert (kernel.registers, kernel.stack, kernel.local, kernel.shared) == (16, 8, 4, 32)
    assert kernel.code == ["LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;", "STL [R1], R8 ;"]
    kernel.name = cubin.short(cubin.demangle([key[0]])[0])
    assert kernel.name == "prepare<float>"
    assert cubin.table([kernel]).endswith("| `prepare<float>` | sm_90 | 16 | 8 | 4 | 32 | 1 |\n")
