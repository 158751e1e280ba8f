# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
DATA ?= data
CHROMIUM := $(shell command -v chromium || command -v chromium-browser)

# What `make test` leaves out: minutes-long tests (make chaos), those for a GPU (make test-gpu), and the
# browser's where there is no Chromium (.ci/run installs it).
MARKS := not slow and not gpu$(if $(CHROMIUM),, and not browser)
PYTEST := $(BIN)/pytest
BENCHMARKS ?= benchmarks/api.py
TESTS ?=

.PHONY: help install demo demo-vision serve test test-gpu lint format bench chaos clean

# Waiting threads sleep: spinning ones stall everything when tests, servers and jobs share the cores.
export OMP_WAIT_POLICY ?= passive

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Quantry needs Python 3.11 or newer; $(PYTHON) is older. Say: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

install: $(STAMP) ## make .venv and install Quantry with all its parts into it

demo: export HF_HUB_OFFLINE = 1
demo: $(STAMP) ## quantize the bundled model through a real server, in a minute or two
	$(BIN)/python scripts/demo.py

demo-vision: export HF_HUB_OFFLINE = 1
demo-vision: $(STAMP) ## the same for the bundled image classifier, weights and activations at 4 bits
	$(BIN)/python scripts/demo_vision.py

serve: $(STAMP) ## API, broker and one worker on the folder $(DATA)
	$(BIN)/quantry-server serve --data $(DATA)

lint: $(STAMP) ## format, style, types and import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## write the format and the fixes that ruff is sure of
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: export HF_HUB_OFFLINE = 1
test: lint ## lint, then every test that needs no GPU and no patience
	@$(if $(CHROMIUM),,echo "no Chromium on PATH: tests marked \`browser\` are left out (.ci/run installs it)")
	$(PYTEST) -m "$(MARKS)" $(TESTS)

test-gpu: export HF_HUB_OFFLINE = 1
test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(PYTEST) -m gpu $(TESTS)

chaos: export HF_HUB_OFFLINE = 1
chaos: $(STAMP) ## the tests that take minutes: killed workers, lost brokers, full disks
	$(PYTEST) -m "slow and not gpu" $(TESTS)

bench: $(STAMP) ## the benchmarks that need no other package or text; benchmarks/README.md names the rest
	for script in $(BENCHMARKS); do $(BIN)/python $$script; done

clean: ## remove caches and builds; .venv, .bench and $(DATA) stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -not -path './.bench/*' -prune -exec rm -rf {} +
