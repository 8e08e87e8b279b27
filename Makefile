# One command for each thing a developer does; continuous integration runs `make test` and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LOCKS := requirements-build.lock requirements.lock requirements-dev.lock
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --no-input
COMPILE := .cache/lock/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-annotate \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host

# How long `make chaos` and `make fuzz` run, and which chaos; with OLD_KERNEL=1 as before Linux 6.9.
SECONDS ?= 600
SEED ?= 7
CYCLES ?= 1000

.PHONY: help setup system lint format test demo bench chaos fuzz leaks deb lock clean distclean

help:
	@echo "make setup   system packages and .venv, from the lock files (idempotent)"
	@echo "make test    every gate and every test; needs root and /dev/fuse"
	@echo "make demo    a real image, pulled in full and lazily, through a real containerd"
	@echo "make chaos   SECONDS=600 SEED=7: kills, broken registries and links under readers; ends with a line of JSON"
	@echo "make fuzz    SECONDS=600: every parser of foreign bytes, guided by coverage; a line of JSON for each"
	@echo "make leaks   CYCLES=1000: mount cycles and many reads; ends with a line of JSON"
	@echo "make deb     the Debian package, into dist/"
	@echo "make bench   every figure of the README, in half an hour; the machine should do nothing else"
	@echo "make lint    format check, lint, types"
	@echo "make format  rewrite to the house format"
	@echo "make lock    choose the newest allowed versions again"
	@echo "make clean   everything that can be made again; distclean: .venv too"

setup: system .venv/.installed

system:
	@tests/support/system_packages.sh $(PYTHON)

# The build tools come first and by hand: pyfuse3 is compiled from its sdist, with exactly what the lock names.
.venv/.installed: $(LOCKS) pyproject.toml | system
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setup: installing into .venv"
	@$(PIP) install --require-hashes -r requirements-build.lock
	@$(PIP) install --require-hashes --no-build-isolation -r requirements-dev.lock
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The report comes to a file, so that the closing line of the tests stays in sight.
test: lint
	@mkdir -p .cache
	@$(BIN)/coverage erase
	$(BIN)/python -m coverage run -m pytest
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --skip-covered --show-missing >.cache/coverage.txt
	@grep '^TOTAL' .cache/coverage.txt | sed 's/^TOTAL/coverage (branches included):/'

demo: setup
	@$(BIN)/python -m bench.demo

bench: setup
	@$(BIN)/python -m bench --readme

chaos: setup
	@$(BIN)/python -m tests.chaos.run --seconds $(SECONDS) --seed $(SEED) $(if $(OLD_KERNEL),--old-kernel)

fuzz: setup
	@$(BIN)/python -m tests.fuzz.run --seconds $(SECONDS)

leaks: setup
	@$(BIN)/python -m tests.chaos.leaks --cycles $(CYCLES)

deb: setup
	@$(BIN)/python -m deb.build dist

lock:
	@test -x .cache/lock/bin/pip-compile || { $(PYTHON) -m venv .cache/lock && .cache/lock/bin/pip install --quiet pip-tools==7.6.2; }
	@rm -f $(LOCKS)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["build"], sep="\n")' \
		| CUSTOM_COMPILE_COMMAND="make lock" $(COMPILE) -o requirements-build.lock -
	@CUSTOM_COMPILE_COMMAND="make lock" $(COMPILE) -c requirements-build.lock -o requirements.lock pyproject.toml
	@CUSTOM_COMPILE_COMMAND="make lock" $(COMPILE) --all-extras -c requirements.lock -c requirements-build.lock \
		-o requirements-dev.lock pyproject.toml

clean:
	rm -rf .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist ./*.egg-info
	rm -f .coverage .coverage.*
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
