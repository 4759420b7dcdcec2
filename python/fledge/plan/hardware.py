"""What computes: this machine, or one that is only named ("8xh100"), in figures the planner uses.

Knows the machine without torch: /proc, sysctl, nvidia-smi, and what `fledge bench` measured
(FLEDGE_HOME/machine.json). Called by the planner, doctor and the report. It never measures
anything itself and never touches a network.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.errors import UserError


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU. peak_flops: dense bf16; matmul_flops: best that a plain matmul reaches."""

    name: str
    peak_flops: float
    matmul_flops: float
    memory_bytes: int
    memory_bandwidth: float
    dollars_per_hour: float | None
    dtype: str = "bfloat16"
    """The 16-bit type that its matrix units multiply."""


def _gpu(
    name: str,
    peak: float,
    matmul: float,
    gigabytes: float,
    bandwidth: float,
    price: float | None,
    dtype: str = "bfloat16",
) -> Accelerator:
    memory = int(gigabytes * 1e9)
    return Accelerator(name, peak * 1e12, matmul * 1e12, memory, bandwidth, price, dtype)


# Data sheets, and matmul ceilings and mid-2026 rental prices collected in reference/planner.md
# sections 1 and 2; a price is per GPU and hour and only as good as its date.
ACCELERATORS: dict[str, Accelerator] = {
    "a100": _gpu("A100", 312, 271, 80, 2.0e12, 1.79),
    "h100": _gpu("H100", 989, 794, 80, 3.35e12, 3.00),
    "h200": _gpu("H200", 989, 794, 141, 4.8e12, 3.50),
    "b200": _gpu("B200", 2250, 1745, 180, 8e12, 5.98),
    "b300": _gpu("B300", 2250, 1769, 288, 8e12, None),
    "gb200": _gpu("GB200", 2500, 1822, 186, 8e12, None),
    "l40s": _gpu("L40S", 362, 290, 48, 0.86e12, None),
    "mi300x": _gpu("MI300X", 1307, 668, 192, 5.3e12, None),
    "t4": _gpu("T4", 65, 40, 16, 0.32e12, None, "float16"),  # it has no bfloat16
    "rtx3090": _gpu("RTX 3090", 71, 57, 24, 0.94e12, None),
    "rtx4090": _gpu("RTX 4090", 165.2, 132, 24, 1.01e12, 0.60),
    "rtx5090": _gpu("RTX 5090", 209.5, 168, 32, 1.79e12, None),
}

CORE_FLOPS = 110e9
"""fp32 matmul rate of one server core (measured on a Xeon with AVX-512: reference/measured.md)."""
CORE_BANDWIDTH = 10e9
"""Bytes per second that one core streams from memory (20 GB/s on two: reference/measured.md)."""


@dataclass(frozen=True)
class Hardware:
    """What a run computes on. Rates are totals of one device, in FLOP/s and byte/s."""

    name: str
    device: str
    device_count: int
    cpu_cores: int
    host_memory_bytes: int
    device_memory_bytes: int
    peak_flops: float
    matmul_flops: float
    memory_bandwidth: float
    dollars_per_hour: float | None
    """Of all devices together; None = no price known (your own machine costs nothing extra)."""
    source: str
    """Where the figures come from: "detected", "measured" (machine.json) or "named"."""
    dtype: str = "float32"
    """What it trains in unless hardware.dtype says otherwise."""
    training_flops: float | None = None
    """FLOP/s that training this plan's network was seen to reach here; None = not measured."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for resolved.json and --json."""
        return dataclasses.asdict(self)

    def without_gpus(self) -> Hardware:
        """Its processor alone, at the same price: what `hardware.device = "cpu"` leaves."""
        return _cpu(
            f"{self.cpu_cores} CPU cores of {self.name}",
            self.cpu_cores,
            self.host_memory_bytes,
            source="named" if self.source == "named" else "detected",
            dollars_per_hour=self.dollars_per_hour,
        )


def fledge_home() -> Path:
    """Where downloads and machine.json live: FLEDGE_HOME, by default ~/.cache/fledge."""
    return Path(os.environ.get("FLEDGE_HOME") or Path.home() / ".cache" / "fledge")


def detect() -> Hardware:
    """This machine."""
    cores, memory = cpu_cores(), host_memory_bytes()
    gpus = nvidia_gpus()
    if gpus:
        name, gpu_memory = gpus[0]
        known = lookup(name)
        count = len(gpus)
        accelerator = known or Accelerator(
            name, 100e12, 60e12, gpu_memory, 1e12, None, _dtype_of_unknown()
        )
        return _with_gpus(accelerator, count, cores, memory, "detected", gpu_memory)
    measured = _machine_json()
    rates = {k: float(measured[k]) for k in ("matmul_flops", "memory_bandwidth") if k in measured}
    if "matmul_flops" in rates:
        rates["peak_flops"] = rates["matmul_flops"]
    source = "measured" if "matmul_flops" in rates else "detected"
    here = _cpu(f"{cores} CPU cores", cores, memory, source=source)
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        here = dataclasses.replace(
            here, name=f"Apple GPU, {cores} cores", device="mps", dtype="float32"
        )
    return dataclasses.replace(here, **rates)


def parse(text: str) -> Hardware:
    """The hardware that a name like "8xh100", "rtx4090" or "4xcpu" (four cores) means."""
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?([a-z][a-z0-9 ]*)", text.strip().lower())
    name = match.group(2).replace(" ", "") if match else text
    count = int(match.group(1) or 1) if match else 0
    if name == "cpu" and count > 0:
        return _cpu(f"{count} CPU cores", count, 4_000_000_000 * count, source="named")
    if name not in ACCELERATORS or count < 1:
        near = difflib.get_close_matches(name, [*ACCELERATORS, "cpu"], n=1)
        raise UserError(
            f"unknown hardware {text!r}",
            f"known are {', '.join(ACCELERATORS)} and cpu, with a count before: 8xh100",
            f"did you mean {near[0]}?" if near else "choose one of them",
        )
    return _with_gpus(ACCELERATORS[name], count, 16 * count, 128_000_000_000 * count, "named", None)


def lookup(name: str) -> Accelerator | None:
    """The table's row for a name as a driver gives it ("NVIDIA H100 80GB HBM3")."""
    squeezed = re.sub(r"[^a-z0-9]", "", name.lower())
    keys = sorted(ACCELERATORS, key=len, reverse=True)
    return next((ACCELERATORS[key] for key in keys if key in squeezed), None)


def _cpu(
    name: str, cores: int, memory: int, *, source: str, dollars_per_hour: float | None = None
) -> Hardware:
    """So many cores at the assumed rates; the kind of those at hand is known, of others not."""
    return Hardware(
        name=name,
        device="cpu",
        device_count=1,
        cpu_cores=cores,
        host_memory_bytes=memory,
        device_memory_bytes=memory,
        peak_flops=CORE_FLOPS * cores,
        matmul_flops=CORE_FLOPS * cores,
        memory_bandwidth=CORE_BANDWIDTH * cores,
        dollars_per_hour=dollars_per_hour,
        source=source,
        dtype="float32" if source == "named" else _cpu_dtype(_read("/proc/cpuinfo")),
    )


def _with_gpus(
    gpu: Accelerator, count: int, cores: int, memory: int, source: str, gpu_memory: int | None
) -> Hardware:
    price = gpu.dollars_per_hour
    return Hardware(
        name=f"{count} x {gpu.name}" if count > 1 else gpu.name,
        device="cuda",
        device_count=count,
        cpu_cores=cores,
        host_memory_bytes=memory,
        device_memory_bytes=gpu_memory or gpu.memory_bytes,
        peak_flops=gpu.peak_flops,
        matmul_flops=gpu.matmul_flops,
        memory_bandwidth=gpu.memory_bandwidth,
        dollars_per_hour=None if price is None else price * count,
        source=source,
        dtype=gpu.dtype,
    )


def cpu_cores() -> int:
    """Cores this process may use: the affinity mask and the container's quota respected."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def host_memory_bytes() -> int:
    """Memory of the machine or of the container, whichever is smaller."""
    found = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo"))
    total = int(found.group(1)) * 1024 if found else _sysctl_memory()
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _sysctl_memory() -> int:
    output = _run(["sysctl", "-n", "hw.memsize"]).strip()
    return int(output) if output.isdigit() else 8_000_000_000


def nvidia_gpus() -> list[tuple[str, int]]:
    """(name, memory bytes) of each NVIDIA GPU that the driver shows and CUDA_VISIBLE_DEVICES lets.

    Respects an empty CUDA_VISIBLE_DEVICES; the list is empty when there is no driver.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    gpus = []
    for line in _run(query).splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name and mebibytes.strip().isdigit():
            gpus.append((name.strip(), int(mebibytes) * 1024 * 1024))
    return gpus[: len(visible.split(","))] if visible else gpus


def _cpu_dtype(cpuinfo: str) -> str:
    """What a CPU trains in, by /proc/cpuinfo.

    AMD's with these instructions (Zen 4 and later) are taken to multiply bfloat16 twice as fast as
    float32: 870 and 430 GFLOP/s on two Zen 5 cores (docs/log.md), Zen 4 was not tried. Intel's with
    the same instructions but without AMX were half as fast in bfloat16 (133 and 244 GFLOP/s on two
    cores of a Sapphire Rapids, AMX hidden by a hypervisor); AMX is not tried.
    """
    fast = "AuthenticAMD" in cpuinfo and "avx512_bf16" in cpuinfo
    return "bfloat16_products" if fast else "float32"


def _dtype_of_unknown() -> str:
    """Of a GPU that the table lacks: bfloat16 came with compute capability 8.0 (Ampere)."""
    found = _run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]).split()
    old = bool(found) and found[0].partition(".")[0].isdigit() and float(found[0]) < 8.0
    return "float16" if old else "bfloat16"


def _machine_json() -> dict[str, Any]:
    try:
        found = json.loads((fledge_home() / "machine.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
