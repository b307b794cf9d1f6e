# make demo    a booted test host, the whole playbook on it, and a streamed answer through HTTPS
# make test    all tests
# make clean   takes away all that the two have made, but for the packages that they have installed
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: demo test clean lint unit lock venv

VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)

demo: $(VENV)/.demo
	tests/demo/demo.sh

test: $(VENV)/.test
	python tests/run.py

lint: $(VENV)/.test
	python tests/run.py lint

unit: $(VENV)/.test
	python tests/run.py unit

clean:
	tests/demo/clean.sh

# Every package that the controller and the tests use, with hashes. Run it after changing a requirements*.in.
lock: $(VENV)/.test
	for name in requirements requirements-test; do \
	    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	        --no-annotate --no-header $$name.in --output-file $$name.txt; \
	done
	cd roles/litellm/files/requirements && uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --no-annotate --no-header litellm.in \
	    --output-file "$$(sed -n 's/^litellm.*==//p' litellm.in).txt"
	cd roles/litellm/files/prisma && npm install --package-lock-only --ignore-scripts --no-audit --no-fund
	cd tests/standin/prisma && npm install --package-lock-only --ignore-scripts --no-audit --no-fund

$(VENV)/.demo: requirements.txt
	tests/bootstrap.sh requirements.txt
	touch $@

$(VENV)/.test: requirements-test.txt
	tests/bootstrap.sh requirements-test.txt
	touch $@
