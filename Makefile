# What can be run here. PYTHON chooses the interpreter: make test PYTHON=/path/to/python
PYTHON ?= python
RESULTS ?= benchmarks/results

.DEFAULT_GOAL := help
.PHONY: help install test slow networks fuzz sanitize gates lint bench report gpu compat aot

help:     ## this list
	@sed -n 's/^\([a-z]*\): *## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)

install:  ## the package with everything needed to work on it, in place
	$(PYTHON) -m pip install -e ".[dev]"

test:     ## the tests that are quick, in two processes
	$(PYTHON) -m pytest

slow:     ## the others
	$(PYTHON) -m pytest -n0 -m slow

networks: ## accelerate on other libraries' networks and after what people do to them; a quarter of an hour
	$(PYTHON) -m pytest -n2 -m networks tests/acceleration

fuzz:     ## 10,000 random calls; a failure prints the command that repeats it. FUZZ="--seed 7 --kind conv2d"
	cd tests && PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PYTHON) -m fuzz $(FUZZ)

sanitize: ## csrc built with AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and its tests under them
	PYTHON="$(PYTHON)" tools/sanitize

gates:    ## circles of imports, calls, lines: tools/gates.py
	$(PYTHON) tools/gates.py

lint:     ## ruff, mypy and, where it is installed, clang-format
	ruff check .
	ruff format --check .
	mypy
	@if command -v clang-format >/dev/null; then clang-format --dry-run --Werror $$(git ls-files 'csrc/*'); \
	else echo "clang-format is not installed: csrc was not checked"; fi

bench:    ## the benchmarks, into $(RESULTS)/cpu.json
	@mkdir -p $(RESULTS)
	$(PYTHON) -m pytest benchmarks --benchmark-json=$(RESULTS)/.cpu.part && mv $(RESULTS)/.cpu.part $(RESULTS)/cpu.json

report:   ## SPEED.md and its plots, from every result
	$(PYTHON) benchmarks/report.py $(RESULTS)/*.json --out SPEED.md

gpu:      ## on a machine with a GPU: build, tests, sanitizer, benchmarks; files into $$OUT
	$(PYTHON) benchmarks/gpu.py

compat:   ## the suite in fresh environments with the oldest and the newest torch
	set -e; for torch in torch==2.11.0 torch; do \
	  work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	  git clone -q . $$work/fastdiff; $(PYTHON) -m venv $$work/v; \
	  (cd $$work/fastdiff; . $$work/v/bin/activate; pip install -q $$torch; pip install -q -e ".[test]"; \
	   python -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"; pytest -m ''); \
	  rm -rf $$work; \
	done

aot:      ## every Triton kernel compiled for every chip
	$(PYTHON) tests/triton_aot.py --all
