# Every target prepares what it needs; `make demo` and `make test` are all a fresh clone has to know.
VENV := .venv
BIN := $(VENV)/bin
# without a word about them, what the environment was made with stays
PYTHON ?= $(or $(shell cat $(VENV)/python 2>/dev/null),python3)
TORCH ?= $(or $(shell cat $(VENV)/constraints.txt 2>/dev/null),torch==2.13.0)
# what setup.py reads: other values build again
ASKED := LFM_TORCH_NO_EXT=$(LFM_TORCH_NO_EXT) LFM_TORCH_NO_CUDA=$(LFM_TORCH_NO_CUDA) TORCH_CUDA_ARCH_LIST=$(TORCH_CUDA_ARCH_LIST)
# torch is named in a constraint as well, so that no other package replaces the build chosen here
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt
NATIVE := $(shell find csrc -type f 2>/dev/null | sed 's/ /\\ /g')
FILES := csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*.cu csrc/*/*.cu $(wildcard csrc/*.cuh csrc/*/*.cuh)

.PHONY: setup demo test test-machines emulate sanitize bench gpu-first gpu gpu-sanitize lint format wheel-test clean FORCE

setup: $(VENV)/ready

demo: setup
	$(BIN)/lfm-torch demo --out demo-output

test: setup
	$(BIN)/python -m pytest -q -n 2

# the fast tests as other machines would run them: instruction sets, threads, terminals, users; NAMES chooses some
test-machines: setup
	sh .ci/test-machines "$(BIN)/python" $(NAMES)

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

# the wheel built from the source distribution, in a clean environment outside the source tree, and tested there
wheel-test: setup
	sh .ci/wheel-test "$(BIN)/python"

# what a GPU teaches in its first five minutes, on a machine whose python3 has torch with CUDA; nothing is compiled
gpu-first:
	$(PYTHON) benchmarks/gpu_first.py

# all of it, in nine minutes: take what is built or build, test, measure
gpu:
	$(PYTHON) benchmarks/gpu.py

gpu-sanitize:
	$(PYTHON) benchmarks/gpu.py sanitize

clean:
	rm -rf $(VENV)/ready build dist *.egg-info lfm_torch/*.so demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/ready: $(VENV)/torch $(VENV)/asked pyproject.toml setup.py $(NATIVE)
	@echo "building lfm_torch and installing what tests, demo and benchmarks need"
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@

$(VENV)/torch: $(VENV)/python $(VENV)/constraints.txt
	@echo "preparing $(VENV) with $(TORCH) (a few minutes, once)"
	"$(PYTHON)" -m venv --clear $(VENV)
	printf '%s\n' "$(PYTHON)" > $(VENV)/python
	printf '%s\n' "$(TORCH)" > $(VENV)/constraints.txt
	$(PIP) "$(TORCH)" numpy "setuptools>=77" wheel ninja
	touch $@

# each holds what was asked for, and changes only with it
$(VENV)/python: WANTED = $(PYTHON)
$(VENV)/constraints.txt: WANTED = $(TORCH)
$(VENV)/asked: WANTED = $(ASKED)
$(VENV)/python $(VENV)/constraints.txt $(VENV)/asked: FORCE
	@mkdir -p $(VENV)
	@printf '%s\n' "$(WANTED)" | cmp -s - $@ || printf '%s\n' "$(WANTED)" > $@
