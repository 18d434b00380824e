# Every target runs as typed: the first one that needs the environment builds it.
PYTHON ?= python3
VENV ?= .venv
SANITIZE_address := -fsanitize=address,undefined
SANITIZE_thread := -fsanitize=thread
# Another kind of CPU, for which the kernels are compiled but not run.
CROSS ?= aarch64-linux-gnu-g++

# The transformers whose families docs/families.md lists.
NEWEST ?= 5.24.0

# A worker a core, long files first (tests/conftest.py); a worker of the whole suite takes 3 GB.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# PowerInfer is in no registry: where you built it, or the folder of its source.
POWERINFER ?= $(if $(POWERINFER_SOURCE),build/powerinfer)

# llama.cpp is timed beside our models where its Python package is installed.
AGAINST = $(shell $(BIN)/python -c 'import llama_cpp' 2> /dev/null && echo --against llama.cpp)

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help env lock check format test coverage fast test-lowest test-image test-newest test-vllm test-powerinfer \
  sanitize cross demo bench faults families gpu docs wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(STAMP) ## build the environment, in .venv

# The stamp is written last: an install that was cut short is started again.
$(STAMP): pyproject.toml locks/main.in locks/main.txt locks/models.txt setup.py $(wildcard kernels/csrc/*)
	PYTHON=$(PYTHON) VENV=$(VENV) tools/environment main --install-only
	$(BIN)/python -m moe_tools.data
	@touch $@

lock: ## renew the locks: all that is installed, at its newest version, with hashes
	PYTHON=$(PYTHON) tools/lock

check: $(STAMP) ## lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## let ruff write what `check` asks for
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: $(STAMP) ## the whole suite
	$(BIN)/python -m pytest $(PARALLEL) --durations=40 --durations-min=5

coverage: $(STAMP) ## the suite, and which lines of the core it runs
	$(BIN)/python -m pytest $(PARALLEL) --cov=moe_tools --cov-report=term-missing:skip-covered

fast: $(STAMP) ## the suite without the slow tests
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# Of other versions, each in an environment of its own.
test-lowest: ## the quick tests with the lowest supported versions, in .venv-lowest
	PYTHON=$(PYTHON) VENV=$(VENV)-lowest PARALLEL="$(PARALLEL)" tools/environment lowest

test-image: ## the same with those of a GPU image (PYTHON=python3.12), in .venv-image
	PYTHON=$(PYTHON) VENV=$(VENV)-image PARALLEL="$(PARALLEL)" tools/environment image

test-newest: ## the same with today's newest, in .venv-newest; reports: any warning may fail it
	-PYTHON=$(PYTHON) VENV=$(VENV)-newest PARALLEL="$(PARALLEL)" tools/environment newest

test-powerinfer: $(STAMP) ## exported files in PowerInfer itself (POWERINFER=BUILD, or POWERINFER_SOURCE=FOLDER)
	[ -z "$(POWERINFER_SOURCE)" ] || { \
	  cmake -S "$(POWERINFER_SOURCE)" -B "$(POWERINFER)" -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF && \
	  cmake --build "$(POWERINFER)" --target main perplexity; }
	POWERINFER="$(POWERINFER)" $(BIN)/python -m pytest -m powerinfer tests/export

# vLLM's own pins, so an environment of its own; it takes 4 GB.
test-vllm: ## converted folders in vLLM on a CPU, in .venv-vllm
	PYTHON=$(PYTHON) VENV=$(VENV)-vllm tools/environment vllm

demo: $(STAMP) ## convert a real model and report on it, in demo/
	$(BIN)/moe-tools demo --output demo

bench: $(STAMP) ## time an FFN, its kernels, a model that generates, a training step, and clustering
	$(BIN)/moe-tools bench ffn
	$(BIN)/moe-tools bench kernels --shape llama2-7b --dtype bf16 --expert-size 32 --packed-dtype bf16 int8 int4
	$(BIN)/moe-tools bench kernels --shape llama2-7b --dtype bf16 --expert-size 32 --batch 4 16 512
	$(BIN)/moe-tools bench generate --shape d2048 --dtype bf16 --expert-size 32 --packed-dtype int4 --linears int4 $(AGAINST)
	$(BIN)/moe-tools bench generate --shape d2048 --dtype bf16 --expert-size 32 --packed-dtype int8 --linears int8 $(AGAINST)
	[ ! -d demo/prox ] || $(BIN)/moe-tools bench generate demo/prox --dtype bf16 --packed-dtype int4 --linears int4 $(AGAINST)
	$(BIN)/moe-tools bench train --dtype bf16
	$(BIN)/moe-tools bench clustering
	$(BIN)/moe-tools bench clustering --shape llama2-7b

faults: $(STAMP) ## kill runs, fill disks, damage files: 25 minutes on two cores (FAULTS="--only kills")
	$(BIN)/python -m tests.faults $(FAULTS)

# With the Python that has the card's torch, Triton and transformers: no environment is built.
gpu: ## all that only a GPU can say, in eight minutes, in gpu/ (GPU="--minutes 4 --out DIR", GPU=--dry-run)
	$(PYTHON) -m tools.gpu $(GPU)

families: $(STAMP) build/transformers-$(NEWEST) ## check every family of the newest transformers, and write docs/families.md
	PYTHONPATH=build/transformers-$(NEWEST) $(BIN)/python -m tools.families

# Beside the environment, whose transformers may be older, and without touching it.
build/transformers-$(NEWEST): $(STAMP)
	$(BIN)/pip install --quiet --no-deps --target $@ transformers==$(NEWEST)

sanitize: build/check-address build/check-thread ## the native kernels under ASan, UBSan and TSan
	./build/check-address
	./build/check-thread

# Without OpenMP, whose barriers ThreadSanitizer does not know: the kernels make their own threads.
build/check-%: kernels/csrc/*.cpp kernels/csrc/*.h
	@mkdir -p build
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized -pthread \
	  $(SANITIZE_$*) -fno-sanitize-recover=all -o $@ \
	  $(filter-out %/module.cpp,$(wildcard kernels/csrc/*.cpp))

docs: $(STAMP) ## the documentation, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

cross: $(STAMP) ## compile the native kernels for aarch64
	for source in kernels/csrc/*.cpp; do \
	  $(CROSS) -std=c++17 -O1 -Wall -Wextra -Werror -fopenmp -pthread -c -o /dev/null $$source \
	    -I$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') || exit 1; \
	done

wheel: $(STAMP) ## sdist and wheel, in dist/
	$(BIN)/python -m build --no-isolation --outdir dist

clean: ## remove the environment and everything built
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-image $(VENV)-newest $(VENV)-vllm build dist demo gpu site *.egg-info kernels/cpu/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
