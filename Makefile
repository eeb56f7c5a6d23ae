# Two commands matter: `make demo` shows a stream, `make test` proves the rest. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ONCE ?=

.PHONY: demo test soak fuzz promises bench check lint types clean

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # half of one would be taken for a whole one next time

# The product alone: what `make demo` needs.
$(VENV)/.product: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# The product with the runner, the real clients and the real servers it is tested against.
$(VENV)/.tests: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary xllamacpp,pycurl --editable '.[test]'
	@touch $@ $(VENV)/.product

# The product with what fuzzing needs.
$(VENV)/.fuzz: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary atheris --editable '.[fuzz]'
	@touch $@ $(VENV)/.product

# The product with what the load tests need.
$(VENV)/.bench: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@ $(VENV)/.product

# `exec`, so that a signal reaches the gateway itself and its exit code is ours. (After a Ctrl-C in the terminal make
# waits for the drain, too, and then says 130 of itself.)
demo: $(VENV)/.product
	@exec $(BIN)/canal-trio demo $(if $(ONCE),--once)

lint: $(VENV)/.tests
	$(BIN)/ruff check canal_trio tests loadtest

types: $(VENV)/.tests
	$(BIN)/mypy

# Two halves at once, for two cores: what needs no socket, and the rest.
SIMULATED := tests/sim tests/wire tests/relay tests/policy tests/fuzz
test: $(VENV)/.tests lint types
	$(BIN)/coverage erase
	@mkdir -p tests/.cache
	@echo "pytest $(SIMULATED), beside all the others"
	@$(BIN)/coverage run -p -m pytest $(SIMULATED) > tests/.cache/simulated.log 2>&1 & beside=$$!; \
	$(BIN)/coverage run -p -m pytest $(addprefix --ignore=,$(SIMULATED)); status=$$?; \
	wait $$beside || status=1; cat tests/.cache/simulated.log; exit $$status
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=100 --include='canal_trio/errors.py,canal_trio/messages.py,canal_trio/settings.py,canal_trio/hooks.py,canal_trio/wire/*,canal_trio/policy/*,canal_trio/relay/*,canal_trio/upstream/*'

# For MINUTES the whole gateway simulated from seeds, on all cores (docs/simulation.md), then for as long under chaos on
# real sockets (docs/measuring.md). Fails if a promise breaks.
soak: MINUTES ?= 10
soak: $(VENV)/.tests
	$(BIN)/python -m canal_trio.testing.simulate --minutes $(MINUTES)
	$(BIN)/python -m loadtest chaos --minutes $(MINUTES)

# What nobody thought of: coverage-guided fuzzing of everything that reads a stranger's bytes, for MINUTES in all. Fails
# if it finds something. KEEP=1 merges what is new into the corpus (docs/fuzzing.md).
fuzz: MINUTES ?= 5
KEEP ?=
fuzz: $(VENV)/.fuzz
	$(BIN)/python tests/fuzz/fuzz_run.py --minutes $(MINUTES) $(if $(KEEP),--keep)

# A minute: what the README promises, measured on this machine. Fails if a promise breaks.
promises: $(VENV)/.bench
	$(BIN)/python -m loadtest promises

# A few minutes: gateways side by side, the promises, and a page with both. Fails if a promise breaks.
PEERS ?= nginx,envoy,caddy,canal,direct
bench: $(VENV)/.bench
	$(BIN)/python -m loadtest compare --peers $(PEERS) --json loadtest/out/compare.json
	@$(BIN)/python -m loadtest promises --json loadtest/out/promises.json; status=$$?; \
	$(BIN)/python -m loadtest report loadtest/out/compare.json loadtest/out/promises.json && exit $$status

check: lint types

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage tests/.cache
