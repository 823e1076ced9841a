# make demo | test | emulate | dry-run | triton-quick | triton | verify | check | check-full | peers | bench | clean. Each target makes the environment it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ORACLE := .venv-oracle
PEERS := .venv-peers
DATA ?=
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest $(if $(DATA),--data=$(DATA))
# Shares hold neighbours, so that what the tests of a file share is made once; who is done takes half of the other's rest.
PARALLEL := -n $(JOBS) --dist worksteal
EMULATOR := build/emulator
# AddressSanitizer must be there before anything else is loaded, and the C++ library for its exceptions.
SANITIZED := ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)"
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: demo test emulator emulate dry-run triton triton-quick parity lint types wheel verify check check-full peers bench clean

demo: $(INSTALLED)  ## the main job: draw scenes, detect on one, evaluate on a hundred, show where the picture is
	$(BIN)/effdet demo --out out/demo

test: $(INSTALLED)  ## the test suite, in $(JOBS) processes at a time; JOBS=0: in one, as pytest alone does
	$(PYTEST) $(PARALLEL) -m "not slow" --ignore tests/oracle

triton-quick: $(INSTALLED)  ## Triton kernels: a small case of each op interpreted, a real one compiled for a GPU that need not be here
	TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) -m quick tests/triton
	$(PYTEST) -n $(JOBS) -m quick tests/test_aot.py

triton: $(INSTALLED)  ## the same of all small cases, and of all calls in the table of machine code
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m "not slow" tests/triton
	$(PYTEST) $(PARALLEL) tests/test_aot.py

emulator: $(INSTALLED)  ## the CUDA kernels built for a CPU, with the emulator of csrc/common/emu
	$(BIN)/cmake -G Ninja -S csrc/common/emu -B $(EMULATOR) -DPython_EXECUTABLE=$(abspath $(BIN))/python \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build $(EMULATOR)

emulate: emulator  ## CUDA kernels through the harness on the emulator, under AddressSanitizer
	$(SANITIZED) $(PYTEST) $(PARALLEL) -m "not slow" tests/cuda --emulator=$(EMULATOR)

dry-run: triton-quick emulator  ## what `bench gpu` will do, without a GPU: Triton kernels interpreted and compiled, CUDA kernels emulated, every part at tiny sizes
	$(SANITIZED) $(BIN)/python -m effdet_kernels.verify --device cpu --quick --dtype fp32 --backend cuda_emu --emulator $(EMULATOR)/_emulated.*
	$(BIN)/python -m bench gpu --device cpu --smoke --out out/dry-run --again $(if $(DATA),--data $(DATA)/bccd)

parity: $(INSTALLED) $(ORACLE)/.installed  ## equality with PyPI effdet 0.4.1, run in an environment of its own
	$(PYTEST) $(PARALLEL) -m "not slow" tests/oracle tests/bench/test_peers.py --oracle=$(ORACLE)/bin/python

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

types: $(INSTALLED)
	$(BIN)/mypy

wheel: $(INSTALLED)  ## build the wheel and use it where there is neither a compiler nor this source tree
	PYTHON=$(BIN)/python bash tests/wheel.sh

verify: $(INSTALLED)  ## every op on every backend that is here, as a table
	$(BIN)/python -m effdet_kernels.verify

check: test emulate triton-quick lint types parity wheel demo

check-full: check triton  ## also the tests that take minutes
	$(PYTEST) -m slow -o faulthandler_timeout=7200 --oracle=$(ORACLE)/bin/python

peers: $(PEERS)/.installed  ## an environment with what the benchmarks compare with

bench: $(INSTALLED)  ## each op's real shapes; see docs/benchmarks.md
	$(BIN)/python -m bench kernels

$(INSTALLED): constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy
	$(BIN)/pip install -q -c constraints.txt -e ".[plot,hub,export,video,test]" ruff mypy clang-format cmake ninja pybind11
	touch $@

$(ORACLE)/.installed: tests/oracle/requirements.txt
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/pip install -q torch==2.13.0 numpy pyyaml pillow safetensors huggingface_hub pycocotools scipy
	$(ORACLE)/bin/pip install -q --no-deps -r tests/oracle/requirements.txt
	touch $@

$(PEERS)/.installed: bench/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q torch==2.13.0 numpy pyyaml pillow safetensors huggingface_hub pycocotools scipy \
		protobuf flatbuffers ml_dtypes
	$(PEERS)/bin/pip install -q --no-deps -r bench/peers/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(ORACLE) $(PEERS) build dist out
