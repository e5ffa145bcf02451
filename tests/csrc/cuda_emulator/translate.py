"""Turn the CUDA sources into C++ for emulator.h: launches, shared memory and the few calls that need a CUDA torch."""

from __future__ import annotations

import re
from pathlib import Path

HEADERS = (
    "cuda_runtime.h",
    "cuda_bf16.h",
    "cuda_fp16.h",
    "cuda_pipeline.h",
    "cub/device/device_radix_sort.cuh",
    "cub/device/device_scan.cuh",
)
SCOPE = """struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};
"""


def translate(sources: Path, target: Path, namespace: str, constants: dict[str, str]) -> list[Path]:
    """Write the translation of every file under ``sources``; return the files to compile.

    The operators are registered for CPU tensors under ``namespace``. ``constants`` replaces the values of ``constexpr``
    variables, so that small inputs take the paths of large ones.
    """
    for header in HEADERS:
        path = target / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#include "emulator.h"\n')
    compiled = []
    declarations = 0
    # the origin of the library, build_info_cuda.cu, is no kernel
    kernels = [path for path in sources.rglob("*.cu*") if path.name != "build_info_cuda.cu"]
    # what a folder's kernels share with those for the CPU stands in the header that is called like the folder
    shared = [path for path in sources.glob("*/*.h") if path.stem == path.parent.name]
    for source in sorted([*kernels, *shared, sources / "checks.h"]):
        text = re.sub(r"class DeviceScope \{.*?\n\};\n", SCOPE, source.read_text(), flags=re.DOTALL)
        for name, value in constants.items():
            text = re.sub(rf"(constexpr \w+ {name} = )[^;]+;", rf"\g<1>{value};", text)
        text, declarations = _shared_memory(text, declarations)
        text = _launches(text)
        text = text.replace("STD_CUDA_KERNEL_LAUNCH_CHECK();", "")
        text = re.sub(r"STD_CUDA_CHECK\(", "(void)(", text)
        text = text.replace("is_cuda()", "is_cpu()")
        text = text.replace(
            "STABLE_TORCH_LIBRARY_IMPL(lfm_torch, CUDA, m)", f"STABLE_TORCH_LIBRARY_IMPL({namespace}, CPU, m)"
        )
        path = target / source.relative_to(sources)
        path = path.with_suffix(".cpp") if source.suffix == ".cu" else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#line 1 "{source}"\n{text}')
        if source.suffix == ".cu":
            compiled.append(path)
    return compiled


def _shared_memory(text: str, count: int) -> tuple[str, int]:
    dynamic = r"extern __shared__ __align__\(\d+\) unsigned char (\w+)\[\];"
    text = re.sub(dynamic, r"auto* \1 = static_cast<unsigned char*>(emulator::dynamic_shared_memory());", text)

    def declare(match: re.Match[str]) -> str:
        nonlocal count
        align, kind, names = match.groups()
        result = []
        for declarator in re.split(r",\s*", names):
            count += 1
            name = re.match(r"\w+", declarator)
            assert name is not None
            alignment = f"alignas({align}) " if align else ""
            result.append(
                f"struct Shared{count} {{ {alignment}{kind} {declarator}; }}; auto& {name[0]} = "
                f"static_cast<Shared{count}*>(emulator::shared_memory({count}, sizeof(Shared{count})))->{name[0]};"
            )
        return " ".join(result)

    return re.sub(r"__shared__ (?:__align__\((\d+)\) )?(\w+) ([^;]+);", declare, text), count


def _launches(text: str) -> str:
    while (opening := text.find("<<<")) >= 0:
        begin = len(text[:opening].rstrip())
        if text[begin - 1] == ">":
            begin = _matching(text, begin - 1, -1, "><")
        while re.match(r"[\w:]", text[begin - 1]):
            begin -= 1
        closing = opening + 3
        while not text.startswith(">>>", closing):
            closing = _matching(text, closing, 1, "()") + 1 if text[closing] == "(" else closing + 1
        end = _matching(text, closing + 3, 1, "()") + 1
        name, arguments = text[begin:opening].rstrip(), text[closing + 3 : end]
        configuration = re.sub(r",\s*(\w+\.)?stream(\(\))?$", "", text[opening + 3 : closing])
        call = f'emulator::launch("{name}", {configuration}, [&] {{ {name}{arguments}; }})'
        text = text[:begin] + call + text[end:]
    return text


def _matching(text: str, start: int, step: int, pair: str) -> int:
    """Position of the bracket that closes the one at ``start``, going forwards or backwards."""
    depth, position = 0, start
    while True:
        depth += (text[position] == pair[0]) - (text[position] == pair[1])
        if depth == 0:
            return position
        position += step
