# Everything a stranger types. Each target sets up what it needs in .venv (made once, renewed when a requirements file
# changes), so `make demo` and `make test` work on a bare machine with make and Python 3.11 or 3.12.
#
#   make PYTHON=/path/to/python3.12 ...   choose the interpreter
#   make PIP_FLAGS="..." ...              options for pip, for instance the index of the CPU builds of PyTorch
#   make LOCKED=1 ...                     install everything but PyTorch by the hashes of requirements.lock

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
RUN_READY := $(VENV)/.requirements-installed
DEV_READY := $(VENV)/.requirements-dev-installed
PIP_FLAGS ?=

# CPU threads spin only briefly for one another: with the default a step of the demo beside two busy processes took up to
# 3 s, with this 0.5 s; on an idle machine both take 0.2 s.
export GOMP_SPINCOUNT := 20000

TOKENIZER := tokenizer/caseops_8192.model
DEMO := data/demo
DEMO_DATASET := $(DEMO)/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved
DEMO_VAL_DOCS ?= 24
FUZZ_CASES ?= 100000
FUZZ_SEED ?= 0
STRESS_RUNS ?= 50
STRESS_SEED ?= 0
SOAK_RUNS ?= 30
SOAK_HOURS ?= 2
# pip-audit is content, too, with packages that it could not look up: they are skipped in its list.
AUDIT_FLAGS := --disable-pip --require-hashes --progress-spinner off --timeout 10

.PHONY: help setup demo ablate test fuzz stress soak lint size bench records readme clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile

setup: $(DEV_READY)  ## make .venv and install what runs, tests and lint need

demo: $(DEMO)/.prepared  ## the whole pipeline on a small model and real text, on the CPU, in minutes
	@rm -rf runs/demo
	@PRESET=demo DATA_PATH=$(DEMO_DATASET) TOKENIZER_PATH=$(TOKENIZER) RUN_DIR=runs/demo $(PY) train_gpt.py
	@$(PY) read_logs.py runs/demo --plots runs/demo/plots --html runs/demo/report.html

# Any knob in the environment holds for every run. Without any it is the demo's model on the demo's data.
ablate: export PRESET ?= demo
ablate: export DATA_PATH ?= $(DEMO_DATASET)
ablate: export TOKENIZER_PATH ?= $(TOKENIZER)
ablate: $(if $(DATA_PATH),$(RUN_READY),$(DEMO)/.prepared)  ## SETTINGS="A=1 B=2,C=3": what each changes, over SEEDS="42 0"
	@$(PY) ablate.py $(SETTINGS)

test: $(DEV_READY)  ## all tests; those marked gpu skip themselves without a GPU
	@$(PY) -m pytest -q -n 2 --dist loadfile

fuzz: $(DEV_READY)  ## 100,000 damaged and lying artifacts: each loads or fails by name (FUZZ_CASES, FUZZ_SEED)
	@PYTHONPATH=. $(PY) tests/fuzz_artifact.py $(FUZZ_CASES) $(FUZZ_SEED)

stress: $(DEV_READY)  ## 50 runs killed at random moments end in the undisturbed number (STRESS_RUNS, STRESS_SEED)
	@PYTHONPATH=. OMP_NUM_THREADS=1 $(PY) tests/stress_kill.py $(STRESS_RUNS) $(STRESS_SEED)

soak: $(DEMO)/.prepared $(DEV_READY)  ## 30 seeds or 2 hours of the demo: no failure, no growth (SOAK_RUNS, SOAK_HOURS)
	@PYTHONPATH=. $(PY) tests/soak.py $(SOAK_RUNS) $(SOAK_HOURS)

lint: $(DEV_READY)  ## ruff over the whole folder; known vulnerabilities where pip-audit is installed and gets an answer
	@$(PY) -m ruff check .
	@audit=$$(command -v $(VENV)/bin/pip-audit || command -v pip-audit || true); \
	if [ -z "$$audit" ]; then echo "lint: no pip-audit here, known vulnerabilities were not looked up"; \
	elif said=$$("$$audit" $(AUDIT_FLAGS) -r requirements.lock 2>&1) && ! grep -q "Skip Reason" <<< "$$said"; then \
	  echo "pip-audit: nothing known"; \
	elif grep -q "^Found .* known vulnerabilit" <<< "$$said"; then echo "$$said"; exit 1; \
	else echo "lint: pip-audit got no answer: $$(tail -1 <<< "$$said")"; fi

size: $(RUN_READY)  ## bytes of the program by part, and with RUN=runs/demo those of that run's artifact
	@$(PY) train_gpt.py --size $(RUN)

bench: $(RUN_READY)  ## speed of data preparation, and of every part of training and scoring on this machine
	@$(PY) bench/bench_text.py
	@$(PY) bench/throughput.py

records: $(RUN_READY)  ## write records/EXPERIMENTS.md from the run folders in records/
	@$(PY) read_logs.py records/*/ --ledger records/EXPERIMENTS.md

readme: $(DEV_READY)  ## write the knobs table of the README from the manual
	@PYTHONPATH=. $(PY) tests/test_readme.py

clean:  ## remove .venv, caches and the demo's output; records and other runs stay
	rm -rf $(VENV) $(DEMO) runs/demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- data of the demo ------------------------------------------------------------------------------------------------

$(DEMO)/docs.jsonl: prepare_caseops_data.py | $(RUN_READY)
	@echo "demo: collecting sample documents from this machine's Python"
	@$(PY) prepare_caseops_data.py --sample $@

$(DEMO)/.prepared: $(DEMO)/docs.jsonl $(TOKENIZER) lossless_caps.py | $(RUN_READY)
	@echo "demo: documents to token shards"
	@rm -rf $(DEMO)/datasets
	@$(PY) prepare_caseops_data.py --docs $< --out $(DEMO) --sp $(TOKENIZER) --val-docs $(DEMO_VAL_DOCS)
	@touch $@

# ---- virtual environment ---------------------------------------------------------------------------------------------

# $(call find_python,MODULE): the first interpreter of the right version that has this module, or nothing. A name on the
# PATH may be a stub that does not run, so candidates are tried, not looked up.
find_python = for p in $(PYTHON) python3.12 python3.11 python3 /usr/bin/python3; do \
  if "$$p" -c 'import sys, $(1); sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then \
  echo "$$p"; break; fi; done

# One progress line per package; pip's own bars need a terminal and its summary is long.
pip_install = $(PY) -m pip install --disable-pip-version-check --progress-bar off $(PIP_FLAGS) -r $(1) \
  | sed -u -n -E -e 's/^Collecting ([^ ]*).*/  \1/p; s|^Processing (.*/)?([^/ ]*).*|  \2|p' \
  -e 's/^Installing collected.*/  unpacking/p'

$(VENV)/.created:
	@python=$$($(call find_python,ensurepip)); \
	if [ -z "$$python" ]; then \
	  python=$$($(call find_python,os)); \
	  if [ -n "$$python" ]; then echo "setup: $$python cannot make virtual environments; install its venv module" \
	    "(Debian: apt install python3-venv) and run make again" >&2; \
	  else echo "setup: Python 3.11 or 3.12 was not found; install it (Debian 12: apt install python3 python3-venv)" \
	    "or name it with make PYTHON=..." >&2; fi; \
	  exit 1; \
	fi; \
	echo "setup: virtual environment in $(VENV) with $$("$$python" --version) ($$python)"; \
	"$$python" -m venv --clear $(VENV)
	@touch $@

$(RUN_READY): requirements.txt $(VENV)/.created
	@echo "setup: installing requirements.txt (PyTorch is large; once only)"
	@if [ -n "$(LOCKED)" ]; then $(call pip_install,requirements.lock --require-hashes); fi
	@$(call pip_install,$<)
	@touch $@

$(DEV_READY): requirements-dev.txt $(RUN_READY)
	@echo "setup: installing requirements-dev.txt (test and lint tools)"
	@$(call pip_install,$<)
	@touch $@
