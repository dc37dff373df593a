# Both main targets work on a machine with Python >= 3.10 and a C++17 compiler, nothing else prepared.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The version that development and CI use; users may have any torch >= 2.8.
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Where `make wheel` leaves its wheel.
WHEELS := dist
# What an installed package is built from; Python files are used where they lie.
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

# About half of the Python tests, by time; the other half is everything else.
HALF := $(addprefix tests/,bench chains commands comparing cuda docs experiments flow gate monitor ops \
  oracle packaging report)

.PHONY: reproduce test lint native-test fuzz half-test rest-test bench gate gpu-check docs wheel clean

reproduce: $(VENV)/.installed
	$(BIN)/rgfast reproduce --preset quick

# With `-j 2` two of these run at a time.
test: lint native-test fuzz half-test rest-test

half-test: $(VENV)/.dev
	MAKEFLAGS= $(BIN)/python -m pytest $(HALF)

rest-test: $(VENV)/.dev
	MAKEFLAGS= $(BIN)/python -m pytest $(addprefix --ignore=,$(HALF))

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.hpp' 'csrc/*.cu' 'csrc/*.cuh')

native-test: $(VENV)/.dev
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DRGFAST_SANITIZE=ON \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --parallel 2 --output-on-failure

# The Python module under the sanitizers, which are GCC's; docs/reliability.md has the run at full size.
fuzz: native-test
	$(BIN)/cmake --build build/sanitize --target _native
	$(BIN)/python tests/reliability/fuzz.py --cases 300 --seed 1 --sanitized build/sanitize

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

# Every kernel for every architecture, which takes nvcc and Triton and no GPU, and tests of kernels on the CPU at
# every size; `make test` compiles what has changed and runs the sizes at their edges. Every whole probe that a
# README predicts, too, of which `make test` has one.
gate: $(VENV)/.dev native-test
	$(BIN)/python tests/gate/gate.py --all
	$(BIN)/python benchmarks/gpu_readme.py --check
	RGFAST_GATE=1 $(BIN)/ctest --test-dir build/sanitize --output-on-failure -R cuda_shim

# On a machine with a GPU, under the Python that has torch there: no environment is made, nothing is downloaded.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/docs

# A wheel with the compiled module and, if there is nvcc, kernels for GPUs (RGFAST_CUDA_ARCHS says for which); it
# is named after the oldest Linux that its symbols allow, and a test tries it.
wheel: $(VENV)/.dev
	rm -rf build/wheel/built
	PATH="$(abspath $(BIN)):$$PATH" RGFAST_REQUIRE_NATIVE=1 $(BIN)/python -m build --wheel --no-isolation \
	  -Cbuild-dir=build/wheel/cmake --outdir build/wheel/built
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir $(WHEELS) build/wheel/built/*.whl

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

# Figures on a CPU need no kernels for GPUs.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	RGFAST_CUDA_ARCHS=none $(PIP) --editable .
	touch $@

# Kernels for one architecture: a wheel's three take three times as long.
$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	RGFAST_CUDA_ARCHS=$${RGFAST_CUDA_ARCHS:-90} $(PIP) --editable '.[dev,examples,docs]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build
