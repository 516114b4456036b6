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

.PHONY: demo demo-ablation demo-circuit-breaker demo-domains demo-rl fast test test-hosts hosts test-sdks test-slow test-wide mutation lint compiled docs serve bench bench-gpu gpu-first kernels-report clean
.DELETE_ON_ERROR:

# HOST=ogx or HOST=0.7: on that host, in an environment of its own.
HOST := 0.6
ENVIRONMENT := $(if $(filter-out 0.6,$(HOST)),.cache/hosts/$(if $(filter 0.7,$(HOST)),llama-stack-0.7,$(HOST)))
# STAY=1: the server stays up at the end, for a look at the dashboard, until Ctrl-C.
demo: $(VENV)/.llama_cpp $(ENVIRONMENT:%=%/.made)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/demo.py --host $(HOST) $(ENVIRONMENT:%=--programs %/bin) $(if $(filter 1,$(STAY)),--stay)

# MODEL=--dense: the dense model instead of the upcycled one.
demo-circuit-breaker: $(VENV)/.demo
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/demo_circuit_breaker.py $(MODEL)

# OUT=FILE: the figures as JSON, here and below.
demo-ablation: $(VENV)/.demo
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/demo_ablation.py $(OUT:%=--out %)

demo-domains: $(VENV)/.demo
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/demo_domains.py $(OUT:%=--out %)

# Reinforcement learning of a rule, beside a control whose rewards are shuffled.
demo-rl: $(VENV)/.demo
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/demo_rl.py $(OUT:%=--out %)

# Three processes, for on two cores one of them often waits for a server, or for jobs that it has started.
# A file's tests stay in one process, which has its server. Not by marks: pytest 9.2 overlooks xdist's groups.
# llama.cpp comes from pip and npm, some 20 s; without npm it is built, some 13 minutes (`moe-train export setup`).
# The tests of the other hosts are skipped, and say so, where their environments can't be made.
test: $(VENV)/.dev $(VENV)/.llama_cpp
	@$(MAKE) --no-print-directory -j 2 lint compiled
	-@$(MAKE) --no-print-directory hosts
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -m "not gpu and not slow and not wide" -n 3 --dist loadfile --no-loadscope-reorder --durations 15

# A new environment's modules are compiled when they are first imported. Here by one process beside mypy, which has one
# too; three that run tests would each compile all of them.
compiled: $(VENV)/.dev
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --collect-only -qq > /dev/null 2>&1 || true

# For use while you work: lint, and the tests that train no model, but for files that run whole servers, supervisors,
# clusters or loads for more than a few seconds.
FAST := tests/client tests/contracts tests/control tests/ground tests/jobdir tests/spec
SLOWER := cli/test_live.py server/test_load.py server/test_lost_store.py server/test_overload.py supervisor/test_ray.py \
	supervisor/test_stalled.py supervisor/test_supervisors.py
fast: lint
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -m "not e2e and not gpu and not slow and not wide" -n 2 --dist loadfile $(FAST) \
		$(addprefix --ignore=tests/control/, $(SLOWER))

# Llama Stack 0.7 and OGX, each in an environment of its own: from our extra and its constraints, without torch.
# With what pip has downloaded before, both take some 20 s.
HOSTS := llama-stack-0.7 ogx
hosts: $(HOSTS:%=.cache/hosts/%/.made)

.cache/hosts/%/.made: constraints-%.txt pyproject.toml | $(VENV)/.uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .cache/hosts/$*
	$(BIN)/uv pip install --quiet --python .cache/hosts/$*/bin/python --constraint $< -e '.[$*,s3-files]'
	@touch $@

# Everything on every host: also restarts, streams at the end of a server, files in S3 and large ones. A whole run writes
# tests/results/hosts.json, for docs/reference/hosts.md.
test-hosts: $(VENV)/.dev hosts
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -p tests.support.host_results tests/system/test_hosts.py \
		tests/system/test_hosts_life.py tests/system/test_openai_hosts.py tests/system/test_guard_hosts.py \
		--durations 15

# What takes many minutes, such as 600 forks of the forkserver.
test-slow: $(VENV)/.dev
	TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not gpu" --durations 15

# What `make test` leaves out because like cases are in it: further models of each law, hosts, and sizes. Some hours.
test-wide: $(VENV)/.dev $(VENV)/.llama_cpp hosts
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -m "wide and not gpu and not slow" -n 3 --dist loadfile --durations 15

# Every generation of the Python and npm SDKs, and the openai packages, against live servers, in environments of their
# own; needs the network. It writes tests/results/sdks.json, for docs/reference/sdks.md.
test-sdks: $(VENV)/.dev hosts
	TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest tests/system/test_sdk_matrix.py -m slow -s

# Changes the files that compute in one place at a time, and names each change that no test notices.
# FILES="losses/breaker.py training/data.py": these alone. SAMPLE=0: every change, not a random 40 a file.
SAMPLE ?= 40
mutation: $(VENV)/.dev
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		nice $(BIN)/python -m tests.mutation $(FILES) --sample $(SAMPLE)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In a folder of its own, because zensical keeps (and clears) a .cache where it runs.
# Into build/docs; a broken link or anchor ends it. Its search needs a server: python -m http.server -d build/docs
docs: $(VENV)/.dev
	$(BIN)/python -m tests.contracts.docs_reference
	rm -rf build/docs build/docs-source && mkdir -p build/docs-source && cp -r docs mkdocs.yml build/docs-source
	cd build/docs-source && $(CURDIR)/$(BIN)/zensical build --strict
	mv build/docs-source/build/docs build/docs

serve: $(VENV)/.demo
	$(BIN)/llama stack run run_configs/quickstart.yaml --port $(PORT)

bench: $(VENV)/.dev demo
	$(BIN)/python -m benchmarks.server_start
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.cpu_experts
	$(BIN)/python -m benchmarks.quantized_base
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.loading_memory
	$(BIN)/python -m benchmarks.breaker_memory
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.job_start
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.job_against_trl
	$(BIN)/python -m benchmarks.job_store
	$(BIN)/python -m benchmarks.follow_cost
	$(BIN)/python -m benchmarks.polling
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.telemetry
	$(BIN)/python -m benchmarks.bring_data
	$(BIN)/python -m benchmarks.data_check
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.tokenising
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.peak_memory
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.merge
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.ablation_apply
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pruning
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gguf

# Needs a GPU. Without this .venv: `python -m benchmarks.experts_gpu`, wherever torch, triton, transformers and peft are.
bench-gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks.experts_gpu

# The first thing to run on a GPU; some 7 minutes. MODE=--interpret or MODE=--compile: without one. It installs nothing,
# for such a machine may have no network: torch, triton, transformers and peft must be in .venv, or in $(PYTHON).
MODE ?=
gpu-first:
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m benchmarks.gpu_first $(MODE) $(if $(MODE),--out build/gpu_first.json)

kernels-report: $(VENV)/.dev
	TRITON_DEFAULT_FP_FUSION=1 $(BIN)/python -m tests.support.triton_cases compile table

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
