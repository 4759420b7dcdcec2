"""What this machine has for fledge, what will be used, what is missing and how to get it.

Called by `fledge doctor`. Looks at files, metadata and nvidia-smi, and tries the sandbox layers
(about a second). It never imports torch and works on a half-installed machine.
"""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fledge
from fledge.plan import hardware
from fledge.sandbox import layers

_NEEDED = {
    "torch": "pip install torch (2.13.0+cpu where there is no GPU)",
    "numpy": "pip install numpy",
    "pyarrow": "pip install pyarrow",
    "safetensors": "pip install safetensors",
    "tyro": "pip install tyro",
    "tomli-w": "pip install tomli-w",
    "jinja2": "pip install jinja2",
    "rich": "pip install rich",
}
_OPTIONAL = {
    "pydantic-monty": ("runs Python that the model writes", "pip install pydantic-monty"),
    "matplotlib": ("draws the report's curves", "pip install 'fledge[report]'"),
    "huggingface_hub": ("streams public data sets", "pip install huggingface_hub"),
    "zstandard": ("reads .zst files", "pip install zstandard"),
}
_LEAST_MEMORY = 3_500_000_000
_LEAST_DISK = 4_000_000_000


def examine() -> dict[str, Any]:
    """Everything found, as one JSON-able dict."""
    machine = hardware.detect()
    versions = {name: _version(name) for name in (*_NEEDED, *_OPTIONAL)}
    rust = find_spec("fledge._bpe") is not None
    home = hardware.fledge_home()
    found = {
        "fledge": fledge.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "tier": _tier(),
        "hardware": machine.to_dict(),
        "gpus": [{"name": n, "memory_bytes": m} for n, m in hardware.nvidia_gpus()],
        "free_disk_bytes": _free(Path.cwd()),
        "fledge_home": str(home),
        "data_root": os.environ.get("FLEDGE_DATA"),
        "measured": (home / "machine.json").is_file(),
        "rust_extension": rust,
        "packages": versions,
        "sandbox": [layer.to_dict() for layer in layers.examine()],
    }
    return found | {"will_use": _will_use(found), "missing": _missing(found)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _tier() -> str:
    system = platform.system()
    if system in ("Linux", "Darwin"):
        return "full: every part of fledge is meant to work here"
    if system == "Windows":
        return "train and chat; the process sandbox is off"
    return "untried platform"


def _will_use(found: dict[str, Any]) -> list[str]:
    machine = found["hardware"]
    uses = [
        f"{machine['name']} for training ({machine['device']}, in {machine['dtype']})",
        f"about {machine['matmul_flops'] / 1e9:,.0f} GFLOP/s per device, "
        + ("measured" if found["measured"] else "assumed from tables"),
        "the compiled tokenizer"
        if found["rust_extension"]
        else "the tokenizer in plain Python (slow, same results)",
        "Monty for the model's Python"
        if _holds(found, "L1")
        else "the calculator only, no Python for the model",
    ]
    if machine["device"] == "cuda" and "+cpu" in (found["packages"]["torch"] or ""):
        uses[0] = "the CPU: torch is installed without CUDA"
    return uses


def _holds(found: dict[str, Any], layer: str) -> bool:
    return any(s["name"] == layer and s["holds"] for s in found["sandbox"])


def _missing(found: dict[str, Any]) -> list[dict[str, str]]:
    """What is not there: {what, why, fix}."""
    missing = []
    for name, fix in _NEEDED.items():
        if found["packages"][name] is None:
            missing.append({"what": name, "why": "fledge cannot work without it", "fix": fix})
    for name, (why, fix) in _OPTIONAL.items():
        if found["packages"][name] is None:
            missing.append({"what": name, "why": why, "fix": fix})
    if not found["rust_extension"]:
        missing.append(
            {
                "what": "the compiled tokenizer",
                "why": "training a tokenizer is many times faster with it",
                "fix": "install the wheel, or Rust and then `pip install .`",
            }
        )
    if found["gpus"] and "+cpu" in (found["packages"]["torch"] or ""):
        missing.append(
            {
                "what": "torch with CUDA",
                "why": "there is a GPU and torch cannot use it",
                "fix": "pip install --force-reinstall torch==2.13.0",
            }
        )
    if found["hardware"]["host_memory_bytes"] < _LEAST_MEMORY:
        missing.append(
            {
                "what": "memory",
                "why": f"{found['hardware']['host_memory_bytes'] / 1e9:.1f} GB is little",
                "fix": "the quickstart wants 4 GB; `fledge run tiny` needs 1 GB",
            }
        )
    if found["free_disk_bytes"] < _LEAST_DISK:
        missing.append(
            {
                "what": "disk space",
                "why": f"{found['free_disk_bytes'] / 1e9:.1f} GB free here",
                "fix": "free some, or run with --out DIR on another disk",
            }
        )
    return missing


def _layer_line(layer: dict[str, Any]) -> str:
    name = f"{layer['name']} {layer['what']}"
    if not layer["holds"]:
        return f"{name}: off; {layer['why']}"
    return f"{name}: holds; {layer['median_ms']:.2g} ms a call"


def findings_text(found: dict[str, Any]) -> str:
    """The findings for people."""
    machine = found["hardware"]
    packages = ", ".join(f"{n} {v}" for n, v in found["packages"].items() if v is not None)
    lines = [
        f"fledge {found['fledge']} on Python {found['python']}, {found['platform']}",
        f"  tier      {found['tier']}",
        f"  computes  {machine['name']}; {machine['host_memory_bytes'] / 1e9:.1f} GB of memory; "
        f"{found['free_disk_bytes'] / 1e9:.1f} GB of disk free here",
        f"  packages  {packages}",
        f"  home      {found['fledge_home']}",
        f"  data      {found['data_root'] or 'FLEDGE_DATA is not set (only real tasks need it)'}",
        "",
        "sandbox",
        *(f"  {_layer_line(layer)}" for layer in found["sandbox"]),
        "",
        "will use",
        *(f"  {line}" for line in found["will_use"]),
        "",
        "missing",
    ]
    for item in found["missing"]:
        lines.append(f"  {item['what']}: {item['why']}; {item['fix']}")
    if not found["missing"]:
        lines.append("  nothing")
    lines += ["", "next: fledge run quickstart"]
    return "\n".join(lines) + "\n"
