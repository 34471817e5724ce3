# Everything that a newcomer, a developer and CI type. `make` alone lists it.
#
# The first target makes .venv and installs into it what constraints.txt pins; later ones reuse it.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread each, as studies run on a CPU. Three processes share the files on two cores, because
# many tests wait. Compiled files are kept: the tests start some hundred Python processes.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

.PHONY: help demo transcripts test test-integration test-slow test-cluster chaos test-gpu gpu gpu-prepare check format bench docs dist clean
.DEFAULT_GOAL := help
.NOTPARALLEL: # two pips in one environment would trip over each other

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r target text; do printf '%-18s %s\n' "$$target" "$$text"; done

demo: $(VENV)/.installed ## install, then search the space `tiny`: real training, about 6 minutes on 2 cores
	$(BIN)/moenas run tiny
	@echo "These commands are in $(BIN); \`. $(BIN)/activate\` puts them on your path."

test: $(VENV)/.installed-test ## install with the test extras, then run the tests
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder

test-integration: $(VENV)/.installed-test ## the tests of whole studies, servers, Ray, the pages and exported programs; 10 minutes
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder -m "integration and not slow and not gpu and not cluster"

test-slow: $(VENV)/.installed-test ## the tests that take minutes
	$(PYTEST) -m slow

test-cluster: $(VENV)/.installed-test ## the tests on two nodes of Ray, PostgreSQL and an S3 server; about 5 minutes
	$(PYTEST) -m cluster

chaos: $(VENV)/.installed-test ## break real studies in every way, and write docs/reliability.md; about an hour
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/report.py

test-gpu: $(VENV)/.installed-test ## the tests that need a CUDA device
	$(PYTEST) -m gpu

gpu: $(VENV)/.installed-test ## measure moenas on the GPU of this machine, and write docs/gpu.md; 8 minutes
	$(BIN)/python benchmarks/gpu/run.py

gpu-prepare: $(VENV)/.made ## collect wheels in .gpu for a GPU machine without a network; see docs/gpu.md
	PYTHON=$(BIN)/python bash benchmarks/gpu/prepare.sh

check: $(VENV)/.installed-dev ## ruff, the format and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## put the code into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test ## run the benchmarks whose figures the documents quote
	for file in $(filter-out %/peers.py %/page.py %/recipes.py %/record.py %/search.py %/service_page.py %/table_latencies.py, $(wildcard benchmarks/*.py)); do \
		$(BIN)/python "$$file" || exit 1; done

docs: $(VENV)/.installed ## write the pages of docs/ that come from the code
	$(BIN)/python -m moenas.space.reference > $(VENV)/space_file.md
	mv $(VENV)/space_file.md docs/space_file.md
	$(BIN)/python -m moenas.space.reference --defaults > $(VENV)/defaults.json
	mv $(VENV)/defaults.json moenas/grammar/defaults.json
	$(BIN)/python benchmarks/packages.py docs
	$(BIN)/python benchmarks/zoo.py > $(VENV)/zoo.md
	mv $(VENV)/zoo.md docs/zoo.md
	$(BIN)/python benchmarks/gpu/run.py --page

transcripts: $(VENV)/.installed-test ## run the demo, then write its outputs and picture into the documents
	$(BIN)/python benchmarks/transcripts.py
	$(BIN)/python benchmarks/recipes.py
	$(BIN)/python benchmarks/service_page.py

dist: $(VENV)/.installed-dev ## build the sdist and the wheel into dist/
	$(BIN)/python -m build

clean: ## remove .venv, builds and caches; studies (moenas.db, moenas_runs/) stay
	rm -rf $(VENV) .gpu build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moenas needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# $(call install,extras): install editable and print one line a package. The stamp is written only
# if pip succeeded, so that an interrupted install starts again.
define install
@echo "installing moenas$(1) into $(VENV); some minutes the first time, as PyTorch is large"
@rm -f $@; { $(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.$(1)' && \
	touch $@; } | sed -u -n -e 's/^Collecting \([^ ]*\).*/  \1/p' -e 's/^Installing .*/  unpacking/p'
@test -f $@
endef

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	$(call install)

$(VENV)/.installed-test: $(VENV)/.made pyproject.toml constraints.txt
	$(call install,[test])

$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml constraints.txt
	$(call install,[dev])
