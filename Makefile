# fledge: a thin face. Everything lives in .venv and runs/; `make clean` removes what was built.
# The steps themselves are in tools/install.sh. A step that is done leaves a stamp in .venv.

SHELL := bash
PY := .venv/bin/python
RUST_SOURCES := $(wildcard rust/src/*.rs) rust/Cargo.toml rust/Cargo.lock
# With Rust the fast tokenizer is built, without it the pure-Python one is used; installing Rust
# later changes the stamp's name, so that the next `make` builds it.
ENGINE := $(if $(shell command -v cargo 2>/dev/null),rust,python)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check bench clean wheel-check lock

help: ## this list
	@echo "make TARGET, where TARGET is"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
	    awk -F'\t' '{ printf "  %-12s %s\n", $$1, $$2 }'

install: .venv/.done-$(ENGINE) ## create .venv with everything that fledge needs

quickstart: install ## raise a small model from nothing (about 12 minutes), then meet it on a page
	.venv/bin/fledge run quickstart
	@tools/meet.sh runs/quickstart

test: .venv/.done-$(ENGINE) .venv/.done-dev ## all tests (under 15 minutes on 2 cores)
	$(PY) -m pytest -q -n 2 --dist loadfile
	@if command -v cargo >/dev/null; then \
	    echo "cargo test --manifest-path rust/Cargo.toml"; \
	    cargo test --quiet --locked --manifest-path rust/Cargo.toml; \
	else \
	    echo "no Rust toolchain here: the crate's own tests are left out"; \
	fi

check: .venv/.done-$(ENGINE) .venv/.done-dev ## formatting, lint, types, layers (Python and Rust)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	PYTHONPATH=python .venv/bin/lint-imports --no-cache
	cargo fmt --manifest-path rust/Cargo.toml --check
	cargo clippy --locked --manifest-path rust/Cargo.toml --all-targets -- -D warnings
	cargo clippy --locked --manifest-path rust/Cargo.toml --features python -- -D warnings

bench: install ## measure this machine, each figure beside a peer
	.venv/bin/fledge bench sandbox
	.venv/bin/fledge bench tok

wheel-check: .venv/.done-rust .venv/.done-dev ## build the wheel and try it where there is no Rust
	tools/install.sh wheel-check

lock: .venv/.done-$(ENGINE) ## write the lock files anew from pyproject.toml
	$(PY) tools/lock.py

clean: ## remove .venv, built files and caches; runs/ stays
	rm -rf .venv dist rust/target .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f python/fledge/_bpe*.so python/fledge/_bpe*.pyd
	find python tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.done-venv: tools/install.sh
	tools/install.sh venv
.venv/.done-torch: .venv/.done-venv
	tools/install.sh torch
.venv/.done-run: requirements.lock .venv/.done-torch
	tools/install.sh run
.venv/.done-dev: requirements-dev.lock .venv/.done-run
	tools/install.sh dev
.venv/.done-rust: pyproject.toml $(RUST_SOURCES) .venv/.done-run
	tools/install.sh rust
.venv/.done-python: pyproject.toml .venv/.done-run
	tools/install.sh python
