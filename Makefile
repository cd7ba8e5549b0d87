# Everything happens in .venv, installed by plain pip with the versions of constraints.txt.
# `make run` and `make test` are all that a fresh machine needs.
.POSIX:
.SUFFIXES:
# Two pips in one environment would trip over each other.
.NOTPARALLEL:

# The interpreter to make .venv with; empty: the first that is new enough.
PYTHON =
# For `make run`, as in `make run PORT=9000 ARGS='--model torchvision/resnet50'`. The environment sets
# nothing here (HOST is often the machine's name): there it is CAMSERVE_HOST and CAMSERVE_PORT.
HOST =
PORT =
ARGS =
# More arguments of pip for each installation: an index with the CPU build of torch, a proxy …
PIP_ARGS =
# For `make image`: the base image, for a release with its digest: python:3.11-slim-bookworm@sha256:…
BASE =
# For `make load`: a server that runs; without it one is started.
URL =

# Installs with pip, which talks during the first, long installation and is quiet afterwards.
PIP_INSTALL = quiet=; [ ! -e .venv/.installed ] || quiet=--quiet; \
	.venv/bin/python -m pip install --disable-pip-version-check $$quiet $(PIP_ARGS) -c constraints.txt
SAFE = PYTHONSAFEPATH=1
CLIENTS = sh tests/protocols/install.sh
# The service's tests that `make gpu` runs a second time, with the models on the GPU.
ON_GPU = explain activations_http stepwise_http mask concurrency faults overload repository protocols
LOAD = $(SAFE) PYTHONPATH=benchmarks:deploy/load .venv/bin/python
TEST = $(SAFE) .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
	-m 'not browser and not labeling and not container and not protocols and not ray and not gpu and not large'

.PHONY: help install run test coverage test-all large browser protocols labeling ray gpu load capacity check mutants docs bench image lock container clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

install: .venv/.installed ## create .venv and install the service

run: install ## start the service on http://127.0.0.1:8000 (HOST=, PORT=, ARGS= for `camserve serve`)
	@exec .venv/bin/camserve serve $(HOST:%=--host %) $(PORT:%=--port %) $(ARGS)

test: .venv/.installed-test ## run every test that needs only Python (ARGS= for pytest)
	@$(TEST) $(ARGS)

coverage: .venv/.installed-test ## make test, and measure the lines and branches that it reaches: report in build/coverage
	@$(TEST) --cov --cov-report=term --cov-report=html $(ARGS)

test-all: .venv/.installed-test ## run every test; a test whose tool is missing is skipped with a reason
	@$(SAFE) .venv/bin/python -m pytest $(ARGS)

large: .venv/.installed-test ## run the tests with large models, which `make test` leaves out (ARGS= for pytest)
	@$(SAFE) .venv/bin/python -m pytest -n 2 -m large $(ARGS)

browser: .venv/.installed-test tests/browser/node_modules/.installed ## test the page in Chromium (ARGS= for pytest)
	@$(SAFE) .venv/bin/python -m pytest -m browser $(ARGS)

protocols: .venv/.installed-test .venv-protocols/.installed .venv-x-anylabeling/.installed .venv-cvat/.installed .venv-fiftyone/.installed .venv-labelbox/.installed .venv-openapi/.installed ## test the service with the clients of KServe, Triton, X-AnyLabeling, CVAT, FiftyOne and Labelbox, a generated one, Java, curl and node
	@$(SAFE) .venv/bin/python -m pytest -o testpaths='tests/protocols tests/integration/test_client_alone.py' -m protocols $(ARGS)

labeling: .venv/.installed-test .venv-label-studio/.installed ## test the backend of a real Label Studio, in Chromium (ARGS= for pytest)
	@$(SAFE) .venv/bin/python -m pytest -o testpaths='tests/labeling' -m labeling $(ARGS)

ray: .venv/.installed-dev ## test the service on a Ray cluster of two nodes (ARGS= for pytest)
	@$(SAFE) sh tests/cluster/alone.sh .venv/bin/python -m pytest -m ray $(ARGS)

gpu: .venv/.installed-test ## run the tests that need a CUDA device, and the service's tests on it (ARGS= for pytest)
	@$(SAFE) .venv/bin/python -m pytest -m gpu $(ARGS)
	@if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(SAFE) CAMSERVE_TEST_DEVICE=cuda .venv/bin/python -m pytest $(ON_GPU:%=tests/integration/test_%.py) $(ARGS); fi

check: .venv/.installed-dev ## lint, format, types, imports, dependencies, unused code
	@$(SAFE) .venv/bin/python -m ruff check
	@$(SAFE) .venv/bin/python -m ruff format --check
	@$(SAFE) .venv/bin/python -m mypy
	@$(SAFE) .venv/bin/lint-imports --no-logo
	@$(SAFE) .venv/bin/deptry --no-ansi .
	@$(SAFE) .venv/bin/vulture

mutants: .venv/.installed-test ## change one token at a time: which changes do the tests not notice? (ARGS=--count 10)
	@$(SAFE) PYTHONPATH=. .venv/bin/python tools/mutants.py $(ARGS)

docs: .venv-docs/.installed ## build the documentation into build/docs; fails on a broken link
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml
	@echo 'camserve: the documentation is in build/docs/index.html'

image: ## build the container image, camserve:latest (BASE=NAME@DIGEST for a release)
	docker build --tag camserve:latest --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null)" \
		$(BASE:%=--build-arg PYTHON_IMAGE=%) --build-arg VERSION="$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' service/__init__.py)" .

lock: ## write the hashes of the packages in the images, after a change of constraints.txt or a requirement
	@PYTHON="$(PYTHON)" deploy/image/lock.sh

container: .venv/.installed-test .venv-deploy/.installed .venv-protocols/.installed ## build the image and run it; test manifests, alerts and the dashboard
	@$(SAFE) .venv/bin/python -m pytest -m container $(ARGS)

load: .venv/.installed-dev ## load a server (or ARGS='--url URL') up to overload, report in build/load
	@$(LOAD) deploy/load/load.py $(URL:%=--url %) $(ARGS)

capacity: .venv/.installed-dev ## measure the throughput under several settings, write docs/reference/capacity.md (a quarter of an hour)
	@$(LOAD) deploy/load/capacity.py $(ARGS)

bench: .venv/.installed-dev ## compare with other libraries, write docs/reference/benchmarks.md (ARGS=--quick: 2 minutes)
	@$(SAFE) PYTHONPATH=benchmarks .venv/bin/python benchmarks/bench.py $(ARGS)

clean: ## remove .venv, caches and build outputs
	rm -rf .venv .venv-deploy .venv-docs .venv-protocols .venv-x-anylabeling .venv-cvat .venv-fiftyone .venv-labelbox .venv-label-studio .venv-openapi .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	rm -rf tests/browser/node_modules
	find api_schemas benchmarks camserve examples service tests -type d -name __pycache__ -prune \
		-exec rm -rf {} + 2>/dev/null || true

# A stamp says what .venv holds. Each extra contains the one before it, so the larger installation
# also settles the smaller ones.

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	@echo 'camserve: installing the service'
	@$(PIP_INSTALL) -e .
	@touch $@

.venv/.installed-test: .venv/bin/python pyproject.toml constraints.txt
	@echo 'camserve: installing the service and what its tests need'
	@$(PIP_INSTALL) -e '.[test]'
	@touch .venv/.installed $@

.venv/.installed-dev: .venv/bin/python pyproject.toml constraints.txt
	@echo 'camserve: installing the service, its tests and the checks'
	@$(PIP_INSTALL) -e '.[dev]'
	@touch .venv/.installed .venv/.installed-test $@

# npm brings axe-core; without npm the tests that need it are skipped and say so.
tests/browser/node_modules/.installed: tests/browser/package.json tests/browser/package-lock.json
	@if command -v npm >/dev/null; then \
		npm ci --prefix tests/browser --no-audit --no-fund && touch $@; \
	else \
		echo 'camserve: npm is not installed; tests of accessibility will be skipped' >&2; \
	fi

.venv-docs/.installed: .venv/bin/python docs/requirements.txt
	@echo 'camserve: installing what builds the documentation'
	@.venv/bin/python -m venv --clear .venv-docs
	@.venv-docs/bin/python -m pip install --disable-pip-version-check --quiet -r docs/requirements.txt
	@touch $@

# Environments of other programs' clients. Where one cannot be made, its tests are skipped.

.venv-protocols/.installed: .venv/bin/python tests/protocols/constraints.txt
	@$(CLIENTS) tests/protocols/constraints.txt .venv-protocols

.venv-deploy/.installed: .venv/bin/python tests/container/constraints.txt
	@$(CLIENTS) tests/container/constraints.txt .venv-deploy

.venv-label-studio/.installed: .venv/bin/python tests/labeling/constraints.txt
	@$(CLIENTS) tests/labeling/constraints.txt .venv-label-studio

.venv-x-anylabeling/.installed: .venv/bin/python tests/protocols/constraints-x-anylabeling.txt
	@$(CLIENTS) tests/protocols/constraints-x-anylabeling.txt .venv-x-anylabeling

.venv-cvat/.installed: .venv/bin/python tests/protocols/constraints-cvat.txt
	@$(CLIENTS) tests/protocols/constraints-cvat.txt .venv-cvat

.venv-fiftyone/.installed: .venv/bin/python tests/protocols/constraints-fiftyone.txt
	@$(CLIENTS) tests/protocols/constraints-fiftyone.txt .venv-fiftyone

.venv-labelbox/.installed: .venv/bin/python tests/protocols/constraints-labelbox.txt
	@$(CLIENTS) tests/protocols/constraints-labelbox.txt .venv-labelbox

.venv-openapi/.installed: .venv/bin/python tests/protocols/constraints-openapi.txt
	@$(CLIENTS) tests/protocols/constraints-openapi.txt .venv-openapi

.venv/bin/python:
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "camserve: making .venv with $$("$$python" -V)"; \
			echo 'camserve: the first installation downloads about 5 GB (the CUDA build of torch,' \
				'which also runs on a CPU; README.md: PIP_ARGS for the CPU build)'; \
			"$$python" -m venv --clear .venv && exit 0; \
			echo "camserve: $$python cannot make virtual environments;" \
				'on Debian and Ubuntu: apt install python3-venv' >&2; \
			rm -rf .venv; \
			exit 1; \
		fi; \
	done; \
	echo 'camserve: no Python 3.11 or newer found; install one, or say which: make PYTHON=/path/to/it' >&2; \
	exit 1
