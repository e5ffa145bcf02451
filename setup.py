"""The compiled extension and nothing else; everything declarative is in pyproject.toml.

Environment:
    LFM_TORCH_NO_EXT=1      build without any compiler: the package then runs on the pure PyTorch twins.
    LFM_TORCH_NO_CUDA=1     leave the CUDA library out even where nvcc is found.
    TORCH_CUDA_ARCH_LIST    architectures of the CUDA library, by default "8.0;9.0;10.0+PTX".
    LFM_TORCH_SANITIZE=1    CPU library with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# One binary for every torch >= 2.10 (LibTorch stable ABI) and every Python >= 3.10 (limited API).
ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]


def sources(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def cpu_library(cpp_extension):
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
    extra = sanitize if os.environ.get("LFM_TORCH_SANITIZE") == "1" else ["-g0"]
    return cpp_extension.CppExtension(
        "lfm_torch._cpu",
        sources("**/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
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
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    library_dir = next((d for d in (home / "lib64", home / "targets/x86_64-linux/lib") if d.is_dir()), home / "lib")
    nvcc = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "--threads=2", "-Xcompiler=-fvisibility=hidden"]
    return cpp_extension.CppExtension(
        "lfm_torch._cuda",
        sources("**/*_cuda.cu"),
        include_dirs=[str(ROOT / "csrc"), str(home / "include")],
        library_dirs=[str(library_dir)],
        # static: a library linked with one cudart does not load beside a torch that brings another
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_compile_args={"cxx": ["-O3", "-std=c++17"], "nvcc": [*nvcc, "-DUSE_CUDA", *ABI]},
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
        py_limited_api=True,
    )


def extensions():
    if os.environ.get("LFM_TORCH_NO_EXT") == "1":
        return {}
    from torch.utils import cpp_extension

    modules = [cpu_library(cpp_extension)]
    home = None if os.environ.get("LFM_TORCH_NO_CUDA") == "1" else cuda_home()
    if home is not None and sources("**/*_cuda.cu"):
        modules.append(cuda_library(cpp_extension, home))
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extensions())
