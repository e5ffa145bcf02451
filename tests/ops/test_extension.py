"""Life without the compiled library, and what importing the package costs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import lfm_torch as lfm
from lfm_torch.ops._extension import SIMD_LEVELS, _device_notes


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_build_info_tells_what_is_live() -> None:
    info = lfm.build_info()
    assert info.torch == torch.__version__
    assert len(info.cuda_devices) == torch.cuda.device_count()
    assert info.version == lfm.__version__
    assert (info.simd in SIMD_LEVELS) == info.cpu_kernels == (info.cpu_build is not None)
    if torch.version.cuda is None:
        assert any("CUDA" in note for note in info.notes)


@pytest.mark.parametrize(
    ("architectures", "capability", "served"),
    [
        ("8.0,9.0,10.0+PTX", (9, 0), True),
        ("8.0,9.0,10.0+PTX", (8, 6), True),
        ("8.0,9.0,10.0+PTX", (12, 0), True),
        ("8.0,9.0,10.0+PTX", (7, 5), False),
        ("8.6", (8, 0), False),
        ("9.0a", (10, 0), False),
        ("Hopper", (7, 5), True),  # nothing can be said
    ],
)
def test_a_gpu_without_code_is_named(
    architectures: str, capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    notes = _device_notes({"architectures": architectures})
    assert (notes == ()) == served
    assert served or f"compute capability {capability[0]}.{capability[1]}" in notes[0]


def test_without_the_extension_the_twins_give_the_same_scores() -> None:
    code = """
import torch, lfm_torch as lfm
torch.manual_seed(0)
x, y = torch.randn(700, 6, dtype=torch.float64), torch.randn(700, 8, dtype=torch.float64)
scores = lfm.similarity(x, y + x[:, :1], n_basis=20)
print(lfm.build_info().cpu_kernels, *(f"{float(v):.9f}" for v in scores.values()))
"""
    twins, kernels = run(code, LFM_TORCH_NO_EXT="1").split(), run(code, LFM_TORCH_NO_EXT="0").split()
    assert twins[0] == "False"
    for a, b in zip(twins[1:], kernels[1:], strict=True):
        assert abs(float(a) - float(b)) < 1e-6


def test_import_is_light() -> None:
    heavy = "matplotlib,pytorch_lightning,lightning,sklearn,rich,pandas,scipy,faiss,jinja2"
    code = f"import sys, lfm_torch; print([name for name in {heavy.split(',')!r} if name in sys.modules])"
    # torch itself may import some of them: only what comes on top counts
    base = f"import sys, torch; print([name for name in {heavy.split(',')!r} if name in sys.modules])"
    assert run(code) == run(base)


def test_public_names_exist() -> None:
    assert all(hasattr(lfm, name) for name in lfm.__all__)
    # the names of the flow and its records; what is asked for less often is in its module
    assert len(lfm.__all__) <= 40
