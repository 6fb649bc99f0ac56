# Every command of the repository. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The tiers share the machine's cores and memory, so one command runs at a time.
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

VENV := .venv
PYTHON := $(VENV)/bin/python
UV := $(VENV)/bin/uv
PYTEST := $(PYTHON) -m pytest
COMPILE := $(UV) pip compile pyproject.toml --generate-hashes --no-emit-index-url --no-header --python-version 3.11 --quiet
OVERRIDE := --override requirements/overrides.txt
# The images get the versions that the tests ran with.
TESTED := --constraint requirements/dev.txt
GENERATED := crds docs/api.md docs/status.md helm/trimtab/templates/crds helm/trimtab/presets helm/trimtab/dashboards \
	helm/trimtab/values.yaml helm/trimtab/values.schema.json helm/trimtab/README.md

# Other projects' code, as the tests of `test-oracles` see it: an environment with the trainer's own versions, and sources.
ORACLES := .oracles
ORACLES_STAMP := $(ORACLES)/setup-$(shell { pwd; cat requirements/build.txt tests/oracles/peers.txt tests/oracles/sources.txt; } | sha256sum | cut -c1-16)

# The environment is made anew when what defines it changes, the place of the checkout included.
STAMP := $(VENV)/setup-$(shell { pwd; cat pyproject.toml requirements/bootstrap.txt requirements/dev.txt; } | sha256sum | cut -c1-16)

.PHONY: help setup demo test check lint images test-repo test-unit test-chart test-trainer test-serving test-local \
	test-controlplane test-cluster test-faults test-resume test-oracles test-rollouts \
	bench-operator bench-children bench-memory bench-eta bench-trainer generate verify requirements clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Install everything into .venv/ (instant when nothing changed)

$(STAMP):
	@python=; for candidate in python3.11 python3 python; do \
	  if "$$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
	    python=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make setup: no Python 3.11 with its venv module on PATH. On Debian 12: apt-get install python3 python3-venv" >&2; \
	  exit 1; \
	fi; \
	echo "Setting up $(VENV)/ with $$(command -v "$$python"): several gigabytes, minutes at the first time"; \
	[ -x $(PYTHON) ] || "$$python" -m venv $(VENV)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	@$(UV) pip install --quiet --python $(PYTHON) --no-deps --require-hashes -r requirements/dev.txt
	@$(UV) pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/setup-* && touch $@

demo: setup ## Train, serve and question a small model on this machine
	@$(PYTHON) examples/quickstart/demo.py

test: setup ## Run all checks and every tier that needs neither root nor a cluster
	@$(MAKE) --keep-going lint test-repo test-unit test-chart test-trainer test-serving test-local test-controlplane

check: lint test-repo test-unit ## Lint, types, layers and the fast tests: under a minute

lint: setup ## Run ruff, mypy and import-linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --cache-dir .import_linter_cache

test-repo: setup ## Check the repository itself: sizes, pins, generated files
	$(PYTEST) -n 2 tests/repo

test-unit: setup ## Test the pure functions
	$(PYTEST) -n 2 tests/unit

test-chart: setup ## Render the chart with Helm 3 and 4, and check objects, values and roles
	$(PYTHON) tests/kubernetes/build.py chart
	$(PYTEST) -n 2 tests/chart

test-trainer: setup ## Test the trainer with real engines and processes
	$(PYTEST) -n 2 --dist loadfile tests/trainer

test-serving: setup ## Test the launcher and the served addresses
	$(PYTEST) -n 2 --dist loadfile tests/serving

# Real data for the acceptance of the FLAN example, where they lie beside the checkout.
test-local: export TRIMTAB_FLAN_DATA ?= $(abspath $(wildcard ../shared/data/flan-cot))
test-local: setup ## Test the whole product as processes on this machine
	$(PYTEST) -n 2 --dist loadfile tests/local

test-faults: setup ## Sweep crashes, faults, stale views and fields, and find deliberate bugs: a quarter of an hour
	$(PYTHON) tests/kubernetes/build.py
	$(PYTEST) tests/faults

test-resume: export TRIMTAB_KILLS := 10
test-resume: export TRIMTAB_LIVES := 2
test-resume: export TRIMTAB_ELASTIC := all
test-resume: setup ## Kill each type of stage ten times between its checkpoints, twice, and go on with other numbers of processes
	$(PYTEST) --timeout 3600 tests/trainer/engine/test_kills.py tests/trainer/engine/test_elastic.py

test-rollouts: setup ## Sample with vLLM through whole stages, and in bf16 with sharded weights: minutes
	$(PYTEST) tests/rollouts

test-oracles: setup $(ORACLES_STAMP) ## Compare losses with those of TRL, OpenRLHF, verl, Liger and DeepSpeed: in an environment of its own
	DS_ACCELERATOR=cpu $(ORACLES)/bin/python -m pytest tests/oracles

$(ORACLES_STAMP):
	@rm -rf $(ORACLES) && $(UV) venv --quiet --python $(PYTHON) $(ORACLES)
	@$(UV) pip install --quiet --python $(ORACLES) --no-deps --require-hashes -r requirements/build.txt
	@$(UV) pip install --quiet --python $(ORACLES) --no-deps --require-hashes -r tests/oracles/peers.txt
	@$(UV) pip install --quiet --python $(ORACLES) --no-deps --require-hashes -r tests/oracles/sources.txt \
	  --target $(ORACLES)/sources
	@$(UV) pip install --quiet --python $(ORACLES) --no-deps --no-build-isolation --editable .
	@touch $@

# Another version of Kubernetes: make test-controlplane KUBERNETES=v1.34.4 (tests/kubernetes/versions has them).
test-controlplane: setup ## Test the operator on a real kube-apiserver
	$(PYTHON) tests/kubernetes/build.py
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder tests/controlplane

# Sizes, seconds at rest, seconds of 503 with the last size (0: none), and where the table goes.
JOBS := 100 1000 5000
REST := 60
OUTAGE := 60
TABLE := bench/README.md
bench-operator: setup ## Measure the operator with many jobs against a bare loop
	$(PYTHON) tests/kubernetes/build.py
	$(PYTHON) -m bench.operator --jobs $(JOBS) --rest-seconds $(REST) --outage-seconds $(OUTAGE) --write $(TABLE)

bench-memory: setup ## Compare the estimate of memory with what real stages need: minutes and gigabytes
	$(PYTHON) -m bench.memory

bench-eta: setup ## Compare what stages say at step 20 of the time that they still take with what they took
	$(PYTHON) -m bench.eta

# Rounds of turns, and the races by the first word of their names: SFT DPO reward PPO.
ROUNDS := 9
RACES := SFT DPO reward PPO
bench-trainer: setup $(ORACLES_STAMP) ## Measure the trainer against TRL, packing against padding, rankings against pairs
	$(PYTHON) -m bench.trainer --rounds $(ROUNDS) --only $(RACES) --write bench/trainer/README.md

bench-children: setup ## The part of bench-operator until the children of all jobs exist
	$(PYTHON) tests/kubernetes/build.py
	$(PYTHON) -m bench.operator --jobs $(JOBS) --children

# For machines without a GPU: IMAGE_FLAGS="--build-arg REQUIREMENTS=serving-cpu.txt --build-arg PACKAGES=libnuma1"
images: ## Build the three images with docker or buildah, whichever works here
	@if docker info >/dev/null 2>&1; then builder="docker build"; \
	elif command -v buildah >/dev/null; then builder="buildah build --layers"; \
	else echo "make images: neither a docker daemon nor buildah is here. On Debian: apt-get install buildah" >&2; exit 1; fi; \
	version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml); \
	for image in operator:operator trainer-image:trainer serving:serving; do \
	  $$builder --build-arg REVISION=$$(git rev-parse HEAD) --build-arg VERSION=$$version $(IMAGE_FLAGS) \
	    --file $${image%:*}/Dockerfile --tag trimtab-$${image#*:}:$$version .; \
	done

# A machine that may become a node: root on Linux. The folder's own programs are checked first, and missing ones named.
test-cluster: setup ## Install, train, serve and break things on a real node: images built from the Dockerfiles; root
	$(PYTEST) --timeout=3600 tests/cluster

generate: setup ## Write the CRDs, the chart's values and copies, and the reference pages
	$(PYTHON) -m trimtab_operator.api.generate
	$(PYTHON) -m trimtab_operator.chart.generate

generate-rbac: setup ## Write the table of the chart's roles; needs Helm, and builds it once
	$(PYTHON) -m tests.chart.rbac

verify: generate ## Fail if a generated file is not committed as generated
	git --no-pager diff --exit-code -- $(GENERATED)
	@new=$$(git ls-files --others -- $(GENERATED)); [ -z "$$new" ] || { echo "make verify: not committed: $$new" >&2; exit 1; }

requirements: setup ## Compile the pinned requirement sets from pyproject.toml
	$(UV) pip compile --group pyproject.toml:bootstrap --generate-hashes --no-emit-index-url --no-header \
	  --python-version 3.11 --quiet -o requirements/bootstrap.txt
	$(COMPILE) $(OVERRIDE) --extra operator --extra trainer --extra serving-cpu --extra cli --group dev -o requirements/dev.txt
	$(UV) pip compile --group pyproject.toml:build --generate-hashes --no-emit-index-url --no-header $(TESTED) \
	  --python-version 3.11 --quiet -o requirements/build.txt
	$(COMPILE) $(OVERRIDE) $(TESTED) --group runtime -o requirements/runtime.txt
	$(COMPILE) $(OVERRIDE) $(TESTED) --extra operator -o requirements/operator.txt
	$(COMPILE) $(OVERRIDE) $(TESTED) --extra trainer -o requirements/trainer.txt
	$(COMPILE) $(OVERRIDE) $(TESTED) --extra serving-cpu -o requirements/serving-cpu.txt
	$(COMPILE) --constraint requirements/trainer.txt --extra serving -o requirements/serving.txt
	$(COMPILE) --constraint requirements/trainer.txt --extra trainer tests/oracles/peers.in -o tests/oracles/peers.txt
	$(UV) pip compile tests/oracles/sources.in --no-deps --generate-hashes --no-emit-index-url --no-header \
	  --python-version 3.11 --quiet -o tests/oracles/sources.txt

clean: ## Remove what runs leave behind; the environment stays
	rm -rf .trimtab .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
