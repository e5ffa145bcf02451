"""What is built is what is there: the source distribution, wheels over old builds, and libraries of other sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from checkout import ROOT, copied

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not beside the tests"),
    pytest.mark.skipif(find_spec("setuptools") is None, reason="building needs setuptools"),
]
# without compilers: what goes into a package is decided before anything is compiled
NO_KERNELS = {"LFM_TORCH_NO_EXT": "1"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository without what was built in it."""
    return copied(tmp_path / "a checkout", "*.so")


def test_a_copy_does_not_hold_itself(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("kept/a.py", "kept/a.so", "build/b.py", "tmp/of another test/c.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    copy = copied(root / "tmp" / "copy", "*.so", root=root)
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*")) == ["kept", str(Path("kept", "a.py"))]


def run(checkout: Path, *command: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def files_of_wheel(checkout: Path) -> set[str]:
    shutil.rmtree(checkout / "dist", ignore_errors=True)
    run(checkout, "setup.py", "-q", "bdist_wheel", **NO_KERNELS)
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_source_distribution_is_the_repository(checkout: Path) -> None:
    (checkout / "lfm_torch" / "_cpu.abi3.so").write_bytes(b"built here")
    run(checkout, "setup.py", "-q", "sdist", **NO_KERNELS)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        found = {name.partition("/")[2] for name in content.getnames()}
    wanted = {
        path.relative_to(checkout).as_posix()
        for folder in ("csrc", "docs", "lfm_torch", "tests", "benchmarks", "examples")
        for path in (checkout / folder).rglob("*")
        if path.is_file() and path.suffix != ".so"
    }
    wanted |= {"setup.py", "pyproject.toml", "MANIFEST.in", "Makefile"}
    wanted |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    assert wanted - found == set()
    assert not any(name.endswith(".so") for name in found)


def test_a_wheel_holds_nothing_of_an_earlier_build(checkout: Path) -> None:
    (checkout / "lfm_torch" / "gone.py").write_text("")
    assert "lfm_torch/gone.py" in files_of_wheel(checkout)
    (checkout / "lfm_torch" / "gone.py").unlink()
    for library in (
        checkout / "lfm_torch" / "_cuda.abi3.so",
        checkout / "build" / "lib" / "lfm_torch" / "_cuda.abi3.so",
    ):
        library.write_bytes(b"of an earlier build")
    files = files_of_wheel(checkout)
    assert "lfm_torch/pipeline.py" in files
    assert "lfm_torch/report/template.html" in files
    assert not any("gone" in name or name.endswith(".so") for name in files)


def test_torch_is_needed_only_to_compile(checkout: Path) -> None:
    hook = "import setup; print(*setup.get_requires_for_build_wheel())"
    assert run(checkout, "-c", hook, **NO_KERNELS).split() == []
    assert any(name.startswith("torch==") for name in run(checkout, "-c", hook, LFM_TORCH_NO_EXT="").split())
    # metadata without torch, and a build that says what it lacks
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"
    assert run(checkout, "-c", code, "--version", LFM_TORCH_NO_EXT="").strip().count(".") == 2
    command = [sys.executable, "-c", code, "build_ext"]
    environment = {**os.environ, "LFM_TORCH_NO_EXT": ""}
    refused = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "needs torch >= 2.10" in refused.stderr


def test_every_header_brings_about_a_build(checkout: Path) -> None:
    code = """
    import runpy
    for library in runpy.run_path("setup.py")["extensions"]()["ext_modules"]:
        print(library.name, *library.depends)
    """
    for line in run(checkout, "-c", textwrap.dedent(code), LFM_TORCH_NO_EXT="").splitlines():
        name, *depends = line.split()
        headers = {
            p.relative_to(checkout).as_posix() for p in (checkout / "csrc").rglob("*") if p.suffix in (".h", ".cuh")
        }
        generated = f"build/generated/{name.removeprefix('lfm_torch._')}/lfm_torch_build.h"
        assert set(depends) == headers | {generated}
        assert "source=" in (checkout / generated).read_text()


INFO = "import lfm_torch; print(lfm_torch.build_info())"


def test_a_library_of_other_sources_is_named(checkout: Path) -> None:
    libraries = sorted((ROOT / "lfm_torch").glob("_cpu*.so"))
    if not libraries:
        pytest.skip("no compiled library beside the package")
    shutil.copy(libraries[-1], checkout / "lfm_torch")
    here = {"PYTHONPATH": str(checkout), "LFM_TORCH_NO_EXT": ""}
    strict = ("-W", "error:_cpu")  # the message begins with the library's name
    assert "built from sources" not in run(checkout, *strict, "-c", INFO, **here)
    assert "_cuda*.so is missing" in run(
        checkout, "-c", "from lfm_torch.ops._extension import library_problems; print(library_problems())", **here
    )
    with (checkout / "csrc" / "checks.h").open("a") as header:
        header.write("// changed\n")
    assert "_cpu.abi3.so was built from sources" in run(checkout, "-c", INFO, **here)


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_library_that_does_not_load_is_no_silent_loss(checkout: Path, content: bytes) -> None:
    (checkout / "lfm_torch" / "_cpu.abi3.so").write_bytes(content)
    code = """
    import warnings, torch
    warnings.simplefilter("ignore")
    import lfm_torch as lfm
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            lfm.build_graph(torch.randn(20, 3), n_neighbors=4)
    print(*(str(w.message) for w in caught if issubclass(w.category, lfm.LFMWarning)), sep="\\n")
    """
    here = {"PYTHONPATH": str(checkout)}
    (said,) = run(checkout, "-c", textwrap.dedent(code), LFM_TORCH_NO_EXT="", **here).splitlines()
    assert "plain PyTorch on the CPU" in said
    assert "_cpu.abi3.so does not load" in said
    assert run(checkout, "-c", textwrap.dedent(code), **NO_KERNELS, **here).strip() == ""


def test_cuda_code_newer_than_the_driver_is_not_loaded(checkout: Path) -> None:
    """A library of CUDA 13 beside a torch of CUDA 12.8 on its driver, which all three are only made believe."""
    library = checkout / "lfm_torch" / "_cuda.abi3.so"
    library.write_bytes(b"\0lfm_torch build: source=0; architectures=8.0,9.0; cuda=13000\0")
    code = """
    import ctypes, warnings
    import torch

    class Driver:
        @staticmethod
        def cuDriverGetVersion(version):
            version._obj.value = 12080
            return 0

    load, torch.version.cuda = ctypes.CDLL, "12.8"
    ctypes.CDLL = lambda name, *rest, **options: Driver if name == "libcuda.so.1" else load(name, *rest, **options)
    warnings.simplefilter("ignore")
    from lfm_torch.ops._extension import load
    print(load().cuda.live, load().notes)
    """
    said = run(checkout, "-c", textwrap.dedent(code), PYTHONPATH=str(checkout), LFM_TORCH_NO_EXT="")
    assert said.startswith("False")
    assert "was built with CUDA 13.0, and the driver serves CUDA 12.8" in said


def test_a_wrong_level_of_instructions_is_refused() -> None:
    code = ("-c", "import lfm_torch")
    environment = {**os.environ, "LFM_TORCH_SIMD": "foo"}
    refused = subprocess.run([sys.executable, *code], env=environment, capture_output=True, text=True, check=False)
    assert "LFM_TORCH_SIMD must be one of generic, avx2, avx512, vnni, got 'foo'" in refused.stderr
