# Shorthand. Everything here also runs without make: see the commands on the right.
PYTHON ?= python3
VENV = .venv/bin/python

.PHONY: setup up test test-fast test-clients check format protos conformance fuzz-grpc fuzz-http fuzz-text lock clean

setup:  ## everything needed to develop, vLLM included
	$(PYTHON) bootstrap.py setup

up:  ## a cluster on this machine; pass arguments as ARGS="--engine sim"
	$(PYTHON) bootstrap.py up $(ARGS)

test:  ## the whole suite
	$(PYTHON) bootstrap.py test $(ARGS)

test-fast:  ## without real vLLM
	$(PYTHON) bootstrap.py test-fast $(ARGS)

test-clients:  ## programs of others against a live cluster, each in an environment of its own
	$(VENV) -m pytest -m clients tests/clients $(ARGS)

check:  ## formatting, lint, types, import rules, generated code
	$(PYTHON) bootstrap.py check

format:
	$(VENV) -m ruff format .
	$(VENV) -m ruff check --fix .

protos:  ## regenerate protos/*_pb2*
	$(VENV) -m protos.build

conformance:  ## what tenants were promised, on the production core in virtual time; ARGS="guarantee" runs one scenario
	$(VENV) -m benchmarks.conformance $(ARGS)

fuzz-grpc:  ## a cluster of its own, and messages that nobody would send; ARGS="--cases 1000 --only Generate"
	$(VENV) -m tests.fuzz.live grpc $(ARGS)

fuzz-http:  ## the same over HTTP, made from the OpenAPI document by schemathesis, in an environment of its own
	test -x .venv-fuzz/bin/python || $(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/pip install --quiet --disable-pip-version-check -r tests/fuzz/requirements.txt
	$(VENV) -m tests.fuzz.live http $(ARGS)

fuzz-text:  ## texts of every script through a router, with stop strings at every position
	$(VENV) -m tests.fuzz.text $(ARGS)

bench-%:  ## bench-router-core runs benchmarks/router_core.py
	$(VENV) -m benchmarks.$(subst -,_,$*) $(ARGS)

lock:  ## resolve requirements/*.txt again, to the newest versions pyproject.toml allows
	$(VENV) requirements/lock.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
