"""What goes wrong during installation and import ends in one line that says what to do."""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import arc_topk
from arc_topk import _C

ROOT = Path(__file__).parents[2]
COMMAND = "pip install --no-build-isolation -e ."


@pytest.fixture
def setup():
    """setup.py's functions."""
    return runpy.run_path(str(ROOT / "setup.py"))


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def pip_install(target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps")
    # Without these, the choices made by `make` stand, and nothing is compiled again.
    choices = {"ARC_TOPK_TESTS", "ARC_TOPK_WERROR", "ARC_TOPK_CUDA_ARCHS"}
    environment = {name: value for name, value in os.environ.items() if name not in choices}
    return subprocess.run(
        [*pip, *options, "--target", str(target), str(ROOT)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def import_from(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-W", "ignore", "-c", code, cwd=folder)


def test_the_tests_run_the_package_of_this_checkout(tmp_path):
    """The editable form: found from anywhere, and it is the source folder."""
    done = import_from(tmp_path, "import arc_topk; print(arc_topk.__file__)")
    assert done.stdout.strip() == str(ROOT / "arc_topk" / "__init__.py"), done.stderr


def test_a_copy_is_complete(tmp_path):
    done = pip_install(tmp_path, "--no-build-isolation")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "arc_topk" / "py.typed").exists()
    code = """
import arc_topk
from arc_topk import _C, reference
print(arc_topk.__file__, _C.__file__, reference.__file__)
"""
    done = import_from(tmp_path, code)
    folder = tmp_path / "arc_topk"
    folders = [Path(file).parent for file in done.stdout.split()]
    assert folders == [folder, folder, folder / "reference"], done.stderr


def test_an_isolated_build_names_the_right_command(tmp_path):
    done = pip_install(tmp_path)
    if "could not find a version that satisfies" in done.stderr.lower():
        pytest.skip("pip reaches no index from here, and an isolated build begins with setuptools")
    assert done.returncode != 0
    assert "[1 lines of output]" in done.stderr
    assert f"run `{COMMAND}`" in done.stderr


def test_torch_is_no_build_requirement():
    text = (ROOT / "pyproject.toml").read_text()
    assert text.count("requires = [") == 1
    assert 'requires = ["setuptools>=77"]' in text


def test_a_compiler_with_a_libstdcxx_of_its_own_is_refused(tmp_path):
    """What it builds crashes at the first number that is written into a message."""
    compiler = tmp_path / "own-g++"
    compiler.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n')
    compiler.chmod(0o755)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def build(compiler: str) -> str:
        command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
        done = run(*command, cwd=tmp_path, CXX=compiler, ARC_TOPK_CUDA="0")
        assert done.returncode != 0  # there are no sources
        return " ".join(done.stderr.split())

    refused = f"{compiler} links libstdc++ statically"
    said = build(str(compiler))
    assert refused in said
    assert "name another g++ with CXX=" in said
    assert "statically" not in build("g++"), "the compiler refused is kept"


def test_one_compiler_serves_both_halves(tmp_path, setup):
    """CUDAHOSTCXX is no second one: its libraries would come into the link."""
    nvcc = setup["find_nvcc"]()
    if nvcc is None:
        pytest.skip("no nvcc")
    other = tmp_path / "other-g++"
    other.write_text('#!/bin/sh\nexec g++ "$@"\n')
    other.chmod(0o755)
    cmake = (setup["check_tools"](), "-S", str(ROOT), "-B", str(tmp_path / "build"))
    options = (f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DPython_EXECUTABLE={sys.executable}")
    done = run(*cmake, *options, cwd=tmp_path, CUDAHOSTCXX=str(other))
    assert done.returncode == 0, done.stderr
    texts = [file.read_text() for file in (tmp_path / "build").rglob("*.cmake")]
    assert any(nvcc in text for text in texts)
    assert not any(str(other) in text for text in texts)


def test_libstdcxx_is_torchs_own():
    assert b"\0libstdc++.so.6\0" in Path(_C.__file__).read_bytes()


@pytest.mark.parametrize("version", ["2.10.2", "1.13.1+cpu", "2.9.0a0+gitabc"])
def test_an_old_torch_is_refused(tmp_path, version):
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "version.py").write_text(f"__version__ = '{version}'")
    done = run(sys.executable, "setup.py", "--version", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == (
        f"arc-topk: torch {version} is too old, 2.11 is the oldest: "
        f"run `pip install -U torch`, then `{COMMAND}`\n"
    )


@pytest.mark.parametrize("version", ["2.11.0", "2.15.0+cu132", "3.0.0", "2.100.0"])
def test_torch_is_found_without_importing_it(tmp_path, setup, monkeypatch, version):
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "version.py").write_text(f"__version__ = '{version}'")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch")
    assert setup["torch_version"]() == version


@pytest.fixture
def only_programs(tmp_path, monkeypatch):
    """Returns a function that leaves just the named programs on PATH."""

    def leave(*names: str) -> None:
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))

    monkeypatch.delenv("CXX", raising=False)
    return leave


def test_a_missing_cmake_is_named(setup, only_programs):
    only_programs("c++")
    with pytest.raises(SystemExit, match="CMake is missing: run `pip install cmake ninja`"):
        setup["check_tools"]()


@pytest.mark.parametrize(("variable", "name"), [("", "c++, g++"), ("g++-99 -m64", "g++-99")])
def test_a_missing_compiler_is_named(setup, only_programs, monkeypatch, variable, name):
    only_programs("cmake")
    monkeypatch.setenv("CXX", variable)
    with pytest.raises(SystemExit) as caught:
        setup["check_tools"]()
    assert f"no C++ compiler ({name}) is found: install g++ 12 or newer" in str(caught.value)


@pytest.mark.parametrize("compiler", ["c++", "g++"])
def test_cmake_and_a_compiler_suffice(tmp_path, setup, only_programs, compiler):
    only_programs("cmake", compiler)
    assert setup["check_tools"]() == str(tmp_path / "cmake")


KNOWN = ["75", "80", "86", "89", "90", "100", "120"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("90", "90-real"),
        ("80;90", "80-real;90-real"),
        ("8.0 9.0+PTX", "80-real;90"),
        (" 10.0,12.0+ptx; ", "100-real;120"),
        ("9.0a", "90a-real"),
        ("75 80 86 89 90 100 120+PTX", "75-real;80-real;86-real;89-real;90-real;100-real;120"),
    ],
)
def test_architectures_are_named_for_cmake(setup, value, expected):
    assert setup["parse_archs"]("ARC_TOPK_CUDA_ARCHS", value, KNOWN) == expected


@pytest.mark.parametrize(
    ("value", "wrong"), [("90;Hopper", "Hopper"), ("7.0 9.0", "7.0"), ("sm_90", "sm_90"), (";", "")]
)
def test_a_wrong_architecture_is_one_line(setup, value, wrong):
    with pytest.raises(SystemExit) as caught:
        setup["parse_archs"]("TORCH_CUDA_ARCH_LIST", value, KNOWN)
    assert str(caught.value) == (
        f"arc-topk: TORCH_CUDA_ARCH_LIST is {value!r}, and {wrong!r} in it is not a compute "
        "capability that nvcc compiles for; expected some of 75 80 86 89 90 100 120, each perhaps "
        "with +PTX, such as '80;90+PTX'"
    )


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """An nvcc that knows two architectures, named by CUDA_HOME; no other choice is made."""
    for name in ("ARC_TOPK_CUDA", "ARC_TOPK_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    program = tmp_path / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho compute_80\necho compute_90\n")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return str(program)


def test_a_release_build_takes_what_nvcc_knows(setup, nvcc):
    assert setup["cuda_choices"]({}) == [
        "-DARC_TOPK_CUDA=",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        "-DCMAKE_CUDA_ARCHITECTURES=80-real;90",
    ]


def test_choices_about_cuda_are_kept(setup, nvcc, monkeypatch):
    kept = {"CMAKE_CUDA_COMPILER": nvcc, "CMAKE_CUDA_ARCHITECTURES": "80-real"}
    assert setup["cuda_choices"](kept) == ["-DARC_TOPK_CUDA="]
    assert setup["cuda_choices"](kept | {"ARC_TOPK_CUDA": "0"}) == ["-DARC_TOPK_CUDA=0"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert setup["cuda_choices"](kept)[-1] == "-DCMAKE_CUDA_ARCHITECTURES=90-real"
    monkeypatch.setenv("ARC_TOPK_CUDA_ARCHS", "80")
    assert setup["cuda_choices"](kept)[-1] == "-DCMAKE_CUDA_ARCHITECTURES=80-real"


def test_an_nvcc_that_is_not_there_is_named(setup, nvcc, monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    with pytest.raises(SystemExit, match="no nvcc at /nowhere/nvcc, where CUDACXX"):
        setup["cuda_choices"]({})


def test_cuda_that_is_asked_for_and_missing_is_an_error(setup, nvcc, only_programs, monkeypatch):
    only_programs()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setitem(setup["cuda_choices"].__globals__, "find_nvcc", lambda: None)
    assert setup["cuda_choices"]({}) == ["-DARC_TOPK_CUDA=", "-UCMAKE_CUDA_COMPILER"]
    monkeypatch.setenv("ARC_TOPK_CUDA", "1")
    with pytest.raises(SystemExit, match="ARC_TOPK_CUDA is 1, but no nvcc is found"):
        setup["cuda_choices"]({})


def test_nvcc_from_pypi_is_found(tmp_path, setup, monkeypatch):
    program = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    only = str(program)  # neither PATH nor /usr/local has one
    monkeypatch.setitem(
        setup["find_nvcc"].__globals__, "find_program", lambda *names: names[-1] if names else None
    )
    assert setup["find_nvcc"]() == only


def test_the_build_tells_what_it_was_made_with():
    info = arc_topk.build_info()
    assert set(info) == {"version", "torch", "compiler", "cpu_isa", "cuda"}
    assert (info["version"], info["torch"]) == (arc_topk.__version__, torch.__version__)
    assert info["compiler"].startswith("g++ ")
    if info["cuda"] is not None:
        assert int(info["cuda"]["toolkit"].split(".")[0]) >= 12
        assert all(
            arch.removesuffix("+PTX")[:2].isdigit() for arch in info["cuda"]["architectures"]
        )


def test_an_old_setuptools_is_refused(setup):
    with pytest.raises(SystemExit, match=r"setuptools 65\.5\.1 is too old, 77 is the oldest"):
        setup["check_setuptools"]("65.5.1")


def test_another_torch_is_an_import_error_before_the_module_is_loaded(tmp_path):
    code = """
import sys, torch
torch.__version__ = "9.8.7"
try:
    import arc_topk
except ImportError as error:
    print("arc_topk._C" in sys.modules, error)
"""
    done = import_from(tmp_path, code)
    assert done.stdout == (
        f"False arc_topk was built against torch {torch.__version__}, but torch 9.8.7 is imported: "
        f"to build it for this one, in arc-topk's source folder, run `{COMMAND}`\n"
    ), done.stderr


def test_a_package_that_was_not_built_says_so(tmp_path):
    package = tmp_path / "arc_topk"
    package.mkdir()
    for name in ("__init__.py", "_build.py"):
        (package / name).write_text((ROOT / "arc_topk" / name).read_text())
    done = import_from(tmp_path, "import arc_topk")
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: arc_topk in {package} has no compiled module for this Python: "
        "in arc-topk's source folder, run `pip install --no-build-isolation .`"
    )


def test_the_module_has_no_runpath():
    """torch is imported first: a RUNPATH could only lead to another copy of it."""
    module = next((ROOT / "arc_topk").glob(f"_C.{sysconfig.get_config_var('SOABI')}.so"))
    done = run("readelf", "--dynamic", str(module), cwd=ROOT)
    assert "(NEEDED)" in done.stdout, done.stderr
    assert "RUNPATH" not in done.stdout
    assert "RPATH" not in done.stdout
