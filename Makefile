.PHONY: demo test test-browser check fix bench image clean

demo: .venv/ready image  ## A guarded self-training loop with a planted fault, from nothing.
	.venv/bin/loopguard demo

test: .venv/ready  ## All tests. Without a Docker engine it runs the rest and says so at the end.
	@sandbox_images/setup.sh || echo "make test: going on without a sandbox" >&2
	.venv/bin/pytest

test-browser: .venv/ready  ## The report in a real browser. Without Chromium it says loudly that nothing was looked at.
	@tests/browser/setup.sh || echo "make test-browser: going on without Chromium" >&2
	.venv/bin/pytest tests/browser

check: .venv/ready  ## Format, lint, types.
	.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy

fix: .venv/ready  ## Format, and mend what the linter can mend.
	.venv/bin/ruff format . && .venv/bin/ruff check --fix .

bench: .venv/ready image  ## What we claim about speed and limits. A few minutes. TRACES=DIR, HUMANEVAL=FILE and GSM8K=FILE add what needs data.
	.venv/bin/python benchmarks/sandbox_latency.py
	.venv/bin/python benchmarks/sandbox_limits.py
	.venv/bin/python benchmarks/audit_append.py
	.venv/bin/python benchmarks/audit_million.py
	.venv/bin/python benchmarks/gate_cost.py
	.venv/bin/python benchmarks/trainer_cost.py
	.venv/bin/python benchmarks/snapshots.py
	.venv/bin/python benchmarks/reduction.py
	@[ -z "$(TRACES)" ] || .venv/bin/python benchmarks/detection.py --data "$(TRACES)" --cross-validate
	@[ -z "$(HUMANEVAL)" ] || .venv/bin/python benchmarks/humaneval.py --data "$(HUMANEVAL)"
	@[ -z "$(GSM8K)" ] || { .venv/bin/python benchmarks/toolformer.py --data "$(GSM8K)" \
	  && .venv/bin/python benchmarks/faults.py --data "$(GSM8K)"; }  # about an hour; each goes on where it stopped

image:  ## The Docker engine and the sandbox image, where they are missing.
	@sandbox_images/setup.sh

clean:  ## What was built here. Leaves runs/ and the sandbox image alone.
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis && find . -name __pycache__ -prune -exec rm -rf {} +

.venv/ready: pyproject.toml constraints.txt
	@echo "Installing Python packages into .venv (a few minutes, once)" >&2
	@python3 -m venv .venv || { apt-get update -qq && apt-get install -y -qq python3-venv && python3 -m venv .venv; }
	@.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]' && touch $@
