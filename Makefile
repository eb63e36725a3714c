.DEFAULT_GOAL := help
.PHONY: help demo study bench test test-all drills mutants lint docs clean
python := .venv/bin/python
processes := -n 2 --dist loadfile --no-loadscope-reorder

# Every Ray worker imports vLLM and torch; without cached bytecode each would compile them again.
unexport PYTHONDONTWRITEBYTECODE

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo:  ## set up, then train the tiny model with GRPO-D; ARGS="train.steps=20 algo=grpo" overrides settings
	@launch/setup_env.sh auto
	@$(python) -m othink_ray.main $(ARGS)

study:  ## set up, then run the paper's experiments on the tiny model; ARGS="study.size=small" is the short version
	@launch/setup_env.sh auto
	@$(python) -m othink_ray.main mode=study $(ARGS)

bench:  ## set up, then benchmark against TRL; ARGS="--cells 4 --no-peer" selects
	@launch/setup_env.sh auto
	@$(if $(findstring --no-peer,$(ARGS)),,launch/setup_peer.sh)
	@$(python) -m benchmarks $(ARGS)

test:  ## set up, then run the fast tests in two processes: 10 minutes; ARGS="tests/core -k kl" selects, ARGS="-n 0" runs in one process
	@launch/setup_env.sh auto dev
	@$(python) -m pytest $(processes) --slow=none $(ARGS)

test-all:  ## set up, then run all tests: 40 minutes; ARGS="--slow=1/2" runs half of the slow ones, and no others
	@launch/setup_env.sh auto dev
	@$(python) -m pytest $(processes) $(ARGS)

drills:  ## set up, then inject faults into real runs, 20 per kind: 3 hours; ARGS="--times 2 --only learner_dies" selects
	@launch/setup_env.sh auto dev
	@$(python) -m tests.drills $(ARGS)

mutants:  ## set up, then run mutation tests: 2 hours; ARGS="--only core/kl.py" selects
	@launch/setup_env.sh auto dev
	@$(python) -m tests.mutants $(ARGS)

lint:  ## set up, then check style, types, import contracts, vocabulary, shell scripts and Dockerfiles
	@launch/setup_env.sh auto dev
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@$(python) -m tests.arch.language
	@.venv/bin/shellcheck launch/*.sh launch/*.sbatch .ci/run
	@.venv/bin/hadolint docker/Dockerfile.cpu docker/Dockerfile.gpu

# Without --quiet, which would hide broken links from --strict.
docs:  ## set up .venv-docs, then build the documentation in site/; a broken link is an error
	@launch/setup_docs.sh
	@.venv-docs/bin/mkdocs build --strict
	@echo "open site/index.html"

clean:  ## remove environments, tool caches and the documentation site; runs are kept
	@rm -rf .venv .venv-docs site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
