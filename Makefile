PYTHON = .venv/bin/python

.PHONY: help setup demo test check unit integration kernel systemd bench bench-quick endurance soak docs clean

help:
	@echo "make demo         mount a real EROFS image from a registry on loopback, and check every file of it"
	@echo "make test         everything: style, types, unit, integration with real servers, kernel suite"
	@echo "make setup        Debian packages and .venv, as demo and test do it themselves"
	@echo "make check        ruff, mypy"
	@echo "make unit | integration | kernel | systemd    a part of the tests"
	@echo "make bench        speed, side by side with other programs, in a table; bench-quick in two minutes"
	@echo "make endurance    faults, outages, expiries: what the registry's client lives through, in 35 minutes"
	@echo "make soak         a daemon with many mounts under all faults at once, for ten minutes"
	@echo "make docs         the manual, in docs/_build/html"

setup:
	scripts/setup test

demo:
	scripts/setup demo
	$(PYTHON) examples/demo.py

# Two side by side: the first one's kernel takes one processor, as does that of systemd; the last takes what it can get.
test: check
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target kernel unit systemd integration

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

unit: setup
	$(PYTHON) -m pytest -q tests/unit
	.venv/bin/trial --reporter=text tests.unit

integration: setup
	$(PYTHON) -m pytest -q tests/integration

kernel: setup
	tests/kernel/run

systemd: setup
	tests/kernel/run --systemd --seconds 1500
	$(PYTHON) -m tests.systemd.shutdown

bench: setup
	$(PYTHON) -m benchmarks.slow_disk
	$(PYTHON) -m benchmarks

endurance: setup
	$(PYTHON) -m benchmarks.endurance

soak: setup
	tests/kernel/run --seconds 1200 --shell $(PYTHON) -m benchmarks.soak

bench-quick: setup
	$(PYTHON) -m benchmarks --quick

docs: setup
	.venv/bin/sphinx-build -q -W -b html docs docs/_build/html

clean:
	rm -rf .venv docs/_build _trial_temp* .pytest_cache .mypy_cache .ruff_cache .hypothesis
