# `make` lists the targets. Variables: PYTHON, ACCELERATOR, FLASH_ATTENTION (requirements/setup.sh), CONFIG, ARGS.
CONFIG ?= configs/decisions.yaml
ARGS ?=
python := .venv/bin/python
# JupyterLab opens a browser where there is a screen for one, and refuses to run as root unless told.
lab_flags := $(if $(DISPLAY)$(WAYLAND_DISPLAY)$(filter Darwin,$(shell uname)),,--no-browser) $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help setup run test learn-coding learn-wordle learn-functions learn-distributed show-distributed test-bfcl test-wordle test-ollama-template test-verl test-verl-nodes verifiers verl lab check lock lock-check clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-18s %s\n' "$$name" "$$text"; done

setup: ## install everything into .venv from one lock (quick when nothing changed)
	@bash requirements/setup.sh

run: setup ## the whole chain of notebooks on CONFIG=configs/decisions.yaml
	@$(python) -m lib.run all $(CONFIG) $(ARGS)

test: export TESTS = 1
test: setup verifiers verl ## the tests (ARGS="-k ledger" for some)
	@$(python) -m pytest $(ARGS)

learn-coding: setup ## GRPO on one-line functions in the sandbox: held-out pass rate before and after (about 10 minutes)
	@$(python) -m lib.run all configs/coding_templates.yaml $(ARGS)

learn-wordle: setup ## GRPO on Wordle with 3 letters: held-out win rate before and after (about 9 minutes)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(python) benchmarks/wordle_gain.py $(ARGS)

learn-functions: setup ## GRPO on short function calls: held-out exact match before and after (about 10 minutes)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(python) benchmarks/functions_gain.py $(ARGS)

learn-distributed: setup ## decisions through two rollout workers against one process: held-out gains (about 20 minutes)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(python) benchmarks/learning_distributed.py $(ARGS)

show-distributed: setup ## every sync method, a worker killed in the middle: notebook 3 executed (about 4 minutes)
	@$(python) benchmarks/show_distributed.py $(ARGS)

test-bfcl: setup ## 20,000 seeded mutations against bfcl-eval in an environment of its own (build/bfcl)
	@test -x build/bfcl/bin/python || $(python) -m venv build/bfcl
	@build/bfcl/bin/python -m pip install -q --no-deps bfcl-eval==2026.3.23
	@PYTHONPATH=. $(python) tests/bfcl_parity.py --python build/bfcl/bin/python $(ARGS)

test-wordle: setup ## feedback and games against TextArena 0.7.4 in an environment of its own (build/wordle)
	@test -x build/wordle/bin/python || $(python) -m venv build/wordle
	@build/wordle/bin/python -m pip install -q textarena==0.7.4 pydantic==2.14.3 pyyaml numpy
	@PYTHONPATH=. build/wordle/bin/python tests/wordle_parity.py $(ARGS)

test-ollama-template: setup ## Ollama templates of real models, and 20,000 random ones, against Go's own text/template (needs Go)
	@PYTHONPATH=. $(python) tests/ollama_template_parity.py $(ARGS)

test-verl: setup verifiers verl ## configs, parquet, reward and estimator against verl itself (build/verl)
	@$(python) -m pytest -q $(wildcard tests/test_verl_*.py) $(ARGS)

test-verl-nodes: setup verl ## verl over two machines with disks of their own (about 10 minutes)
	@$(python) -m pytest -q tests/verl_nodes_proof.py $(ARGS)

verifiers: setup ## a small environment of the verifiers package in build/, for configs/gsm8k.yaml and the tests
	@$(python) -m lib.tasks._verifiers_make classic v1

verl: setup ## a small environment of verl in build/ (340 MB, half a minute): checks, the tests, training on a processor
	@$(python) -m lib.verl.environment

lab: setup ## JupyterLab on the notebooks
	@$(python) -m jupyter lab $(lab_flags) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks --LabApp.news_url=None $(ARGS)

check: setup ## lint, formatting, types, layers
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(python) -m pytest -q tests/test_layers.py

# uv does not read pip's configuration: hand it the index that pip is configured with, if any.
index = $$($(python) -m pip config get global.index-url 2>/dev/null || echo https://pypi.org/simple)
lock_with_uv = UV=$(CURDIR)/.venv/bin/uv UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$(index)}" bash requirements/lock.sh

lock: setup ## resolve the locks from requirements/versions.in and verl.in
	@$(lock_with_uv)

lock-check: setup ## do the locks still resolve?
	@CHECK=1 $(lock_with_uv)

clean: ## remove .venv and caches (outputs/ stays)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
