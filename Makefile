.DEFAULT_GOAL := help
.PHONY: help demo study bench test drills mutants lint clean
python := .venv/bin/python

# Every Ray worker imports vLLM and torch: without bytecode each would compile them again.
unexport PYTHONDONTWRITEBYTECODE

help:  ## these lines
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo:  ## set up, then train the embedded model with GRPO-D; ARGS="train.steps=20 algo=grpo" changes settings
	@launch/setup_env.sh auto
	@$(python) -m othink_ray.main $(ARGS)

study:  ## set up, then the paper's experiments on the embedded model; ARGS="study.size=small" is the short one
	@launch/setup_env.sh auto
	@$(python) -m othink_ray.main mode=study $(ARGS)

bench:  ## set up, then the same work here and in TRL, in turn; ARGS="--cells 4 --no-peer" chooses
	@launch/setup_env.sh auto
	@$(if $(findstring --no-peer,$(ARGS)),,launch/setup_peer.sh)
	@$(python) -m benchmarks $(ARGS)

test:  ## set up, then all tests, two at a time; ARGS="tests/core -k kl" chooses some, ARGS="-n 0" one at a time
	@launch/setup_env.sh auto dev
	@$(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

drills:  ## set up, then faults in real runs, twenty of each kind: three hours; ARGS="--times 2 --only learner_dies" chooses
	@launch/setup_env.sh auto dev
	@$(python) -m tests.drills $(ARGS)

mutants:  ## set up, then small changes of the code that tests must notice: two hours; ARGS="--only core/kl.py" chooses
	@launch/setup_env.sh auto dev
	@$(python) -m tests.mutants $(ARGS)

lint:  ## set up, then style, types, import contracts, shell and Docker files
	@launch/setup_env.sh auto dev
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@.venv/bin/shellcheck launch/*.sh launch/*.sbatch .ci/run
	@.venv/bin/hadolint docker/Dockerfile.cpu docker/Dockerfile.gpu

clean:  ## removes the environment and the caches of the tools; runs stay
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
