# Every target prepares what it needs; `make demo` and `make test` are all a fresh clone has to know.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# torch is named in a constraint as well, so that no other package replaces the build chosen here
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt
NATIVE := $(shell find csrc -type f 2>/dev/null | sed 's/ /\\ /g')
FILES := csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu $(wildcard csrc/*.cuh csrc/*/*.cuh)

.PHONY: setup demo test emulate bench gpu gpu-sanitize lint format wheel-test clean

setup: $(VENV)/ready

demo: setup
	$(BIN)/lfm-torch demo --out demo-output

test: setup
	$(BIN)/python -m pytest -q -n 2

# the CUDA kernels without a GPU: compiled for the CPU and run block by block, many minutes
emulate: setup
	$(BIN)/python -m pytest -q -m emulated

# the CPU operators with AddressSanitizer and UndefinedBehaviorSanitizer, through their tests
sanitize: setup
	sh .ci/sanitize "$(BIN)/python"

bench: setup
	for bench in benchmarks/bench_*.py; do $(BIN)/python "$$bench" || exit 1; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FILES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FILES)

# the wheel, installed and tested in a clean environment outside the source tree
wheel-test: setup
	sh .ci/wheel-test "$(BIN)/python"

# on a machine whose python3 has torch with CUDA, without network: build (or take what is built), test, measure
gpu:
	$(PYTHON) benchmarks/gpu.py

gpu-sanitize:
	$(PYTHON) benchmarks/gpu.py sanitize

clean:
	rm -rf build dist *.egg-info lfm_torch/*.so demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/ready: $(VENV)/torch pyproject.toml setup.py $(NATIVE)
	@echo "building lfm_torch and installing what tests, demo and benchmarks need"
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@

$(VENV)/torch:
	@echo "preparing $(VENV) with $(TORCH) (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	echo "$(TORCH)" > $(VENV)/constraints.txt
	$(PIP) "$(TORCH)" numpy "setuptools>=77" wheel ninja
	touch $@
