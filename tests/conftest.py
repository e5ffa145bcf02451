"""Fixtures shared by all tests: the real data where it is there, devices, and a fixed seed."""

from __future__ import annotations

import os
import secrets

# Before torch reads it: waiting threads sleep instead of spinning. On a busy machine small parallel regions are
# otherwise up to fifty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import hypothesis
import pytest
import torch
from ambients import AMBIENTS, surround

# CI runs the same examples every time; at home each run tries others
hypothesis.settings.register_profile("home", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "home")

# a shell that asks all its programs for colours means the screen, not what tests compare
for name in ("FORCE_COLOR", "PYTHON_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)

# what the random graphs of a run are drawn with; set here, so that the workers of pytest-xdist share it
os.environ.setdefault("LFM_TORCH_SEED", str(secrets.randbits(32)))

DATA = Path(os.environ.get("LFM_TORCH_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    """The folder of real inputs; tests that need it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"real data not found at {DATA}; set LFM_TORCH_DATA to its folder")
    return DATA


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reversed", action="store_true", help="run the tests in reversed order: none leans on another")
    parser.addoption(
        "--ambient", choices=AMBIENTS, help="make every call of the library inside one of tests/ambients.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--ambient"):
        surround(AMBIENTS[config.getoption("--ambient")])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"random graphs were drawn with LFM_TORCH_SEED={os.environ['LFM_TORCH_SEED']}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--reversed"):
        items.reverse()


def devices() -> list[object]:
    """CPU always; CUDA as a parameter marked gpu that skips without a device."""
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return [
        pytest.param(torch.device("cpu"), id="cpu"),
        pytest.param(torch.device("cuda"), marks=[pytest.mark.gpu, no_gpu], id="cuda"),
    ]


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.param  # type: ignore[no-any-return]
