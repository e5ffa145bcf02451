"""The compiled libraries and nothing else; everything declarative is in pyproject.toml.

This file is also the build backend that pyproject.toml names: setuptools, but torch is asked for only where there is
something to compile.

Environment:
    LFM_TORCH_NO_EXT=1      build without any compiler or torch: the package then runs on the pure PyTorch twins.
    LFM_TORCH_NO_CUDA=1     leave the CUDA library out even where nvcc is found.
    TORCH_CUDA_ARCH_LIST    architectures of the CUDA library, by default "8.0;9.0;10.0+PTX".
    LFM_TORCH_SANITIZE=1    CPU library with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.build_meta import *  # noqa: F403 - the hooks of the backend; those below replace theirs
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
GENERATED = ROOT / "build" / "generated"
# One binary for every torch >= 2.10 (LibTorch stable ABI) and every Python >= 3.10 (limited API).
ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
ARCHITECTURES = "8.0;9.0;10.0+PTX"
# torch is needed for its headers only. The version is exact because an open range would make pip download the newest
# CUDA stack just to compile.
COMPILING_NEEDS = ["torch==2.13.0", "numpy", "ninja"]


def asked(variable):
    return os.environ.get(variable) == "1"


def get_requires_for_build_wheel(config_settings=None):
    return [] if asked("LFM_TORCH_NO_EXT") else COMPILING_NEEDS


get_requires_for_build_editable = get_requires_for_build_wheel


class BuildPackage(build_py):
    """Takes away what an earlier build left: modules deleted since, libraries that are not asked for now."""

    def run(self):
        if self.editable_mode:
            wanted = {extension.name.split(".")[-1] for extension in self.distribution.ext_modules or []}
            for library in (ROOT / "lfm_torch").glob("_c*.so"):
                if library.name.split(".")[0] not in wanted:
                    library.unlink()
        else:
            shutil.rmtree(Path(self.build_lib) / "lfm_torch", ignore_errors=True)
        super().run()


class TorchMissing(build_ext):
    """Stands in for torch's build_ext where there is no torch: other commands than building must still run."""

    def run(self):
        raise SystemExit(
            "lfm_torch: compiling the kernels needs torch >= 2.10 in the environment that builds: install it first, "
            "or set LFM_TORCH_NO_EXT=1 to build without them"
        )


def sources(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def generated_header(library, asked_for):
    """Write the header of build_info.h; it changes, and so brings about a build, with the sources and with the request.

    Returns:
        Its folder, and all headers that the library is to be built again after.
    """
    digest = runpy.run_path(str(ROOT / "lfm_torch" / "ops" / "_source_digest.py"))["source_digest"](ROOT / "csrc")
    header = GENERATED / library / "lfm_torch_build.h"
    text = f'#define LFM_BUILD "source={digest}; torch=2.10{asked_for}"\n'
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    # relative, as setuptools copies into an sdist what is named here
    return str(header.parent), [*sources("**/*.h"), *sources("**/*.cuh"), str(header.relative_to(ROOT))]


def cpu_library(cpp_extension):
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
    extra = sanitize if asked("LFM_TORCH_SANITIZE") else ["-g0"]
    folder, depends = generated_header("cpu", "; sanitized" if extra == sanitize else "")
    return cpp_extension.CppExtension(
        "lfm_torch._cpu",
        sources("**/*.cpp"),
        depends=depends,
        include_dirs=[str(ROOT / "csrc"), folder],
        extra_compile_args={"cxx": ["-O3", "-std=c++17", "-Wall", "-Wno-psabi", "-fvisibility=hidden", *extra, *ABI]},
        extra_link_args=[flag for flag in extra if flag.startswith("-fsanitize")],
        py_limited_api=True,
    )


def cuda_home():
    """Toolkit folder of CUDA_HOME or of the nvcc on PATH, None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # the nvcc on PATH may be a wrapper or a link: it knows itself where its toolkit is
    dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    here = re.search(r"^#\$ _HERE_=(.+)$", dry.stderr, flags=re.MULTILINE)
    return Path(here.group(1).strip()).parent if here else Path(nvcc).resolve().parent.parent


def cuda_library(cpp_extension, home):
    # CUDAExtension refuses a CPU build of torch; CppExtension compiles .cu files all the same once it knows the
    # toolkit.
    cpp_extension.CUDA_HOME = str(home)
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    folder, depends = generated_header("cuda", f"; architectures={re.sub('[; ]+', ',', architectures)}")
    library_dir = next((d for d in (home / "lib64", home / "targets/x86_64-linux/lib") if d.is_dir()), home / "lib")
    nvcc = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--threads=2", "-Xcompiler=-fvisibility=hidden"]
    return cpp_extension.CppExtension(
        "lfm_torch._cuda",
        sources("**/*_cuda.cu"),
        depends=depends,
        include_dirs=[str(ROOT / "csrc"), folder, str(home / "include")],
        library_dirs=[str(library_dir)],
        # static: a library linked with one cudart does not load beside a torch that brings another
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_compile_args={"cxx": ["-O3", "-std=c++17"], "nvcc": [*nvcc, "-DUSE_CUDA", *ABI]},
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
        py_limited_api=True,
    )


def extensions():
    if asked("LFM_TORCH_NO_EXT"):
        return {"cmdclass": {"build_py": BuildPackage}}
    try:
        from torch.utils import cpp_extension
    except ModuleNotFoundError:
        placeholder = Extension("lfm_torch._cpu", [])
        return {"ext_modules": [placeholder], "cmdclass": {"build_py": BuildPackage, "build_ext": TorchMissing}}
    modules = [cpu_library(cpp_extension)]
    home = None if asked("LFM_TORCH_NO_CUDA") else cuda_home()
    if home is not None and sources("**/*_cuda.cu"):
        modules.append(cuda_library(cpp_extension, home))

    class BuildLibraries(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)):
        """Compiles CUDA files again after a changed header: torch tells ninja of them only where it has CUDA itself."""

        def build_extension(self, extension):
            newest = max(Path(path).stat().st_mtime for path in extension.depends)
            for compiled in Path(self.build_temp).rglob("*_cuda.o"):
                if compiled.stat().st_mtime < newest:
                    compiled.unlink()
            super().build_extension(extension)

    return {
        "ext_modules": modules,
        "cmdclass": {"build_py": BuildPackage, "build_ext": BuildLibraries},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**extensions())
