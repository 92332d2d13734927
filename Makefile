# The verbs people type. Everything runs in .venv, which `make setup` fills from constraints.txt.

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= 2
PIP_ARGS ?=
SEED    ?= 0
QUICK   ?=
LLAMAFACTORY ?=

BIN   := .venv/bin
STAMP := .venv/.setup-done

# Tests never reach for the network. Two workers of one thread each beat two that fight over the cores, and threads that
# sleep while they wait do not take a busy machine from the one that works. Compiled once, our own modules import faster.
TEST_ENV := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
            OMP_WAIT_POLICY=PASSIVE MPLBACKEND=Agg PYTHONDONTWRITEBYTECODE=

.PHONY: help setup lint format types test test-fast audit demo real bench schema docs build clean

help:
	@echo 'make setup      create .venv and install everything, as pinned in constraints.txt'
	@echo 'make demo       both quickstart stages on bundled data, evaluation, reload, two questions'
	@echo 'make real       both stages on published weights and pictures, which it fetches; SEED=1 for another seed, QUICK=1 for a look'
	@echo 'make bench      beside TRL, a plain loop and LLAMAFACTORY=its/python, in alternation; QUICK=1 for a look'
	@echo 'make test       lint, types and all tests'
	@echo 'make test-fast  the tests that are not marked slow'
	@echo 'make lint       ruff, mypy and the layers of imports; make format mends what ruff can mend'
	@echo 'make audit      look up the pinned versions among known vulnerabilities (asks the network)'
	@echo 'make schema     write recipes/recipe.schema.json anew'
	@echo 'make docs       the pages as a site in both languages, with search, into build/docs/site'
	@echo 'make build      wheel and sdist into dist/'
	@echo 'make clean      remove caches, outputs/ and data/'

setup: $(STAMP)

# torch comes first and alone: on a machine without a GPU, PIP_ARGS can name the index of torch's CPU builds, which
# are several GB smaller, for example: make setup PIP_ARGS="--index-url <index of CPU builds>"
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed; name it: make setup PYTHON=/path/to/python3.11'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint .venv-lmms-eval/.setup-done .venv-vlmevalkit/.setup-done .venv-web/.setup-done .venv-docs/.setup-done \
		.venv-torchvision/.setup-done
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow'

# pip-audit lives beside the project, so that its own packages are not among those that it looks up.
audit: .venv-audit/bin/pip-audit
	.venv-audit/bin/python .ci/audit.py

.venv-audit/bin/pip-audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet 'pip-audit>=2.10,<3'

# lmms-eval wants other versions of some libraries than the project: it lives beside it, and looks through to .venv.
.venv-lmms-eval/.setup-done: .ci/lmms-eval.txt $(STAMP)
	$(PYTHON) -m venv .venv-lmms-eval
	.venv-lmms-eval/bin/python .ci/look_through.py $(BIN)/python
	.venv-lmms-eval/bin/python -m pip install --quiet --no-deps --requirement .ci/lmms-eval.txt
	@touch $@

# VLMEvalKit likewise, without what single benchmarks of it want (OpenCV, decord, torchvision); vlm_sft/harness says which.
.venv-vlmevalkit/.setup-done: .ci/vlmevalkit.txt $(STAMP)
	$(PYTHON) -m venv .venv-vlmevalkit
	.venv-vlmevalkit/bin/python .ci/look_through.py $(BIN)/python
	.venv-vlmevalkit/bin/python -m pip install --quiet --no-deps --requirement .ci/vlmevalkit.txt
	@touch $@

# Gradio wants an older Pillow than the pinned one: the tests of the page run beside it likewise.
.venv-web/.setup-done: .ci/web.txt $(STAMP)
	$(PYTHON) -m venv .venv-web
	.venv-web/bin/python .ci/look_through.py $(BIN)/python
	.venv-web/bin/python -m pip install --quiet --no-deps --requirement .ci/web.txt
	@touch $@

# PyPI's torchvision is compiled for CUDA, and fails beside a torch for CPUs; image processors need none of what is compiled.
.venv-torchvision/.setup-done: .ci/torchvision.txt .ci/without_operators.py $(STAMP)
	$(PYTHON) -m venv .venv-torchvision
	.venv-torchvision/bin/python .ci/look_through.py $(BIN)/python
	.venv-torchvision/bin/python -m pip install --quiet --no-deps --requirement .ci/torchvision.txt
	.venv-torchvision/bin/python .ci/without_operators.py
	@touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

real: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/real/run.py --seed $(SEED) $(if $(QUICK),--quick)

bench: setup
	$(BIN)/python benchmarks/peers.py $(if $(QUICK),--quick) $(if $(LLAMAFACTORY),--llamafactory $(LLAMAFACTORY))

schema: setup
	$(BIN)/python -m vlm_sft.recipe.schema > recipes/recipe.schema.json

docs: .venv-docs/.setup-done
	.venv-docs/bin/python docs/site/build.py

.venv-docs/.setup-done: .ci/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --requirement .ci/docs.txt
	@touch $@

build: setup
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist outputs data runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
