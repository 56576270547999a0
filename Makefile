# make demo     train the embedded model with E³RL, about a minute on two cores
# make test     the whole test suite
# make test-peers    agreement with TRL by value, with a table of the largest differences
# make test-browser  the report in a real browser
# make test-vllm     the vLLM engine against the oracle, with a table (own environment, several GB)
# make test-ranks    training on two ranks: DDP, ZeRO-1, FSDP2, DeepSpeed; their losses beside one process's (own environment)
# make test-chaos    kills, damage, failing calls, power cuts, hostile files, answers and clients, a soak (20 minutes; CHAOS=10: tenfold)
# make test-ray      rollout workers on Ray, one of them killed (own environment)
# make test-clients  openai, verifiers, lm-eval, litellm, langchain and OpenEnv against e3rl serve (own environments)
# make docs     the documentation as a site in site/
# make check    style, types, tests: what a change must pass to land
# make dist     wheel and source distribution in dist/
.PHONY: help setup demo test check lint docs test-peers test-browser test-vllm test-ranks test-ray dist

# the first of these that is new enough; or say make PYTHON=/path/to/python …
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# with the default spinning, two threads on busy cores are many times slower
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

help:
	@sed -n 's/^# make/make/p' Makefile

.PHONY: python
python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found; name one: make PYTHON=/path/to/python" >&2; exit 2; }

setup: python
	@"$(PYTHON)" tools/setup.py

demo: setup
	@.venv/bin/e3rl train demo --again

test: python
	@"$(PYTHON)" tools/setup.py test peers docs
	.venv/bin/python -m pytest -n 2

test-peers: python
	@"$(PYTHON)" tools/setup.py test peers
	.venv/bin/python -m pytest -s tests/peers

test-browser: python
	@"$(PYTHON)" tools/setup.py test browser
	@command -v chromium >/dev/null || test -n "$(E3RL_BROWSER)" || { echo "a Chromium is needed: install one, or name it: make test-browser E3RL_BROWSER=/path/to/chromium" >&2; exit 2; }
	.venv/bin/python -m pytest tests/browser

test-vllm: python
	@E3RL_VENV=.venv-vllm "$(PYTHON)" tools/setup_vllm.py
	.venv-vllm/bin/python -m pytest -s tests/vllm

test-ranks: python
	@E3RL_VENV=.venv-ranks "$(PYTHON)" tools/setup_deepspeed.py
	E3RL_RANKS=all .venv-ranks/bin/python -m pytest -s tests/ranks

CHAOS ?= 1
.PHONY: test-chaos
test-chaos: python
	@"$(PYTHON)" tools/setup.py test
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.chaos --scale $(CHAOS)

test-ray: python
	@E3RL_VENV=.venv-ray "$(PYTHON)" tools/setup.py test ray
	.venv-ray/bin/python -m pytest -s tests/ray

.PHONY: test-clients
test-clients: python
	@E3RL_VENV=.venv-clients "$(PYTHON)" tools/setup.py test clients
	.venv-clients/bin/python -m pytest tests/clients
	@E3RL_VENV=.venv-openenv "$(PYTHON)" tools/setup.py test openenv
	.venv-openenv/bin/python -m pytest tests/clients/test_openenv.py

lint: python
	@"$(PYTHON)" tools/setup.py dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: python
	@"$(PYTHON)" tools/setup.py docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

dist: python
	@"$(PYTHON)" tools/setup.py dev
	.venv/bin/python -m build

check: lint test
