#!/usr/bin/env bash
# One step of the installation into .venv: venv | torch | run | dev | rust | python | wheel-check.
# Called by the Makefile, which knows the order; each step that ends well leaves .venv/.done-STEP.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.13.0
PIP=(.venv/bin/python -m pip --disable-pip-version-check)

# On a terminal pip shows its progress; elsewhere it only speaks up when something goes wrong.
if [ -t 1 ]; then QUIET=; else QUIET=--quiet; fi

say() { printf '\n== %s\n' "$*"; }
fail() { printf '\nfledge cannot be installed: %s\n' "$*" >&2; exit 1; }

find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3.14 python3; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
      2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  return 1
}

step_venv() {
  local python
  python=$(find_python) || fail "it needs Python 3.11 to 3.14 and found none.
  Debian, Ubuntu:  sudo apt install python3 python3-venv   (Ubuntu 22.04: python3.11 python3.11-venv)
  Fedora:          sudo dnf install python3.12
  macOS:           brew install python@3.12"
  if [ -x .venv/bin/python ] && .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    && .venv/bin/python -m pip --version >/dev/null 2>&1; then
    say "reusing .venv ($(.venv/bin/python --version))"
    return
  fi
  say "creating .venv with $("$python" --version) ($python)"
  rm -rf .venv
  "$python" -m venv .venv || fail "$python cannot make a virtual environment.
  Debian, Ubuntu:  sudo apt install $(basename "$python")-venv"
}

has_nvidia_gpu() {
  command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

step_torch() {
  if .venv/bin/python -c "from importlib.metadata import version as v; import sys
sys.exit(v('torch').partition('+')[0] != '$TORCH')" 2>/dev/null; then
    say "torch $TORCH is already in .venv"
    return
  fi
  # torch brings dependencies of its own: take them in the versions of the lock file.
  grep -oE '^[a-z0-9-]+==[^ ]+' requirements.lock >.venv/pins.txt
  if [ "$(uname -s)" != Linux ]; then
    say "installing torch $TORCH (about 100 MB to download)"
  elif has_nvidia_gpu; then
    say "installing torch $TORCH for the NVIDIA GPU (530 MB and 2 GB of CUDA libraries to download)"
  else
    say "no NVIDIA GPU here: looking for the CPU build of torch $TORCH (190 MB to download)"
    if "${PIP[@]}" install $QUIET "torch==$TORCH+cpu" -c .venv/pins.txt 2>.venv/torch-cpu.log; then
      return
    fi
    grep -q 'No matching distribution' .venv/torch-cpu.log || {
      cat .venv/torch-cpu.log >&2
      fail "pip could not install torch (its message is above); is the network up?"
    }
    say "the package index has no CPU build: installing the usual torch $TORCH
   (530 MB and 2 GB of CUDA libraries to download, 5 GB on disk; this takes minutes).
   To save that, point pip at an index with the +cpu build and run make again."
  fi
  "${PIP[@]}" install $QUIET "torch==$TORCH" -c .venv/pins.txt ||
    fail "pip could not install torch (its message is above); is the network up?"
}

step_run() {
  say "installing the libraries that fledge stands on (requirements.lock, hashes checked)"
  "${PIP[@]}" install --quiet --require-hashes --no-deps -r requirements.lock
}

step_dev() {
  say "installing what the tests need (requirements-dev.lock, hashes checked)"
  "${PIP[@]}" install --quiet --require-hashes --no-deps -r requirements-dev.lock
}

site_packages() { .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

step_python() {
  say "installing fledge without its Rust part: the tokenizer runs in pure Python
   (same tokens, slower to train and encode). To have the fast one, install Rust
   (package rustc + cargo, or rustup) and run make again."
  link_sources
}

# What `pip install --editable` would do, which needs Rust for the build.
link_sources() {
  printf '%s\n' "$PWD/python" >"$(site_packages)/fledge.pth"
  cat >.venv/bin/fledge <<END
#!$PWD/.venv/bin/python
import sys

from fledge.cli import main

if __name__ == "__main__":
    sys.exit(main())
END
  chmod +x .venv/bin/fledge
}

step_rust() {
  say "building fledge's Rust part (a minute at most, then nothing until it changes)"
  rm -f "$(site_packages)/fledge.pth"
  # shellcheck disable=SC1091
  if PIP_QUIET=1 VIRTUAL_ENV="$PWD/.venv" .venv/bin/maturin develop --release --locked --quiet; then
    return
  fi
  say "the Rust part could not be built (see above): going on with the pure-Python tokenizer,
   the same tokens but slower; the next make tries again"
  link_sources
  exit 0 # without the stamp
}

# The abi3 wheel must install and train where there is no Rust at all.
wheel_check() {
  local place
  place=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$place'" EXIT
  say "building the wheel"
  .venv/bin/maturin build --release --locked --quiet --out "$place/wheels"
  ls "$place"/wheels/*abi3*.whl
  say "installing it in an environment of its own"
  .venv/bin/python -m venv "$place/venv"
  # torch and the libraries are borrowed from .venv: only fledge itself comes from the wheel.
  "$place/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps \
    "$place"/wheels/*.whl
  site_packages >"$("$place/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
  say "running fledge tiny from it, with no Rust on PATH"
  (
    cd "$place"
    env -i HOME="$place" PATH=/usr/bin:/bin "$place/venv/bin/python" - <<END
import fledge, fledge._bpe
assert fledge.__file__.startswith("$place"), fledge.__file__
assert fledge._bpe.__file__.startswith("$place"), fledge._bpe.__file__
END
    env -i HOME="$place" PATH=/usr/bin:/bin "$place/venv/bin/fledge" run tiny --out "$place/run"
  )
  say "the wheel works"
}

case ${1:-} in
  venv | torch | run | dev | python | rust)
    "step_$1"
    touch ".venv/.done-$1"
    ;;
  wheel-check) wheel_check ;;
  *) fail "tools/install.sh has no step called '${1:-}'" ;;
esac
