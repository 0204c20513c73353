"""command: versions and hardware, for bug reports."""

import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from distilllens import __version__

GB = 1e9


def environment() -> dict[str, Any]:
    """Facts for a bug report, ready for JSON; sizes in GB (1e9 bytes); what cannot be told is None."""
    core, extras = _requirements()
    gpus, gpu_problem = _gpus()
    return {
        "distilllens": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu": {"name": _cpu_name(), "num_cores": len(os.sched_getaffinity(0))},
        "memory_gb": _memory_gb(),
        "gpus": gpus,
        "gpu_problem": gpu_problem,
        "disk": {"folder": os.getcwd(), "free_gb": round(shutil.disk_usage(".").free / GB, 1)},
        "packages": {name: _version(name) for name in core},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in extras.items()},
    }


def render_environment(facts: dict[str, Any]) -> str:
    """The same facts as lines to paste."""
    memory = "unknown" if facts["memory_gb"] is None else f"{facts['memory_gb']} GB"
    rows = [
        ("distilllens", facts["distilllens"]),
        ("python", f"{facts['python']} ({facts['executable']})"),
        ("platform", facts["platform"]),
        ("cpu", f"{facts['cpu']['name']}, {facts['cpu']['num_cores']} cores"),
        ("memory", memory),
        ("gpu", "; ".join(facts["gpus"]) or facts["gpu_problem"] or "none"),
        ("disk", f"{facts['disk']['free_gb']} GB free in {facts['disk']['folder']}"),
        *((name, found or "not installed") for name, found in facts["packages"].items()),
    ]
    for extra, packages in facts["extras"].items():
        found = ", ".join(f"{name} {number or 'not installed'}" for name, number in packages.items())
        rows.append((f"[{extra}]", found))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Packages that the installed metadata asks for: always, and per extra (those of developers left out)."""
    core: list[str] = []
    extras: dict[str, list[str]] = {}
    try:
        lines = requires("distilllens") or []
    except PackageNotFoundError:
        return core, extras
    for line in lines:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        extra = re.search(r"""extra == ['"](\w+)['"]""", line)
        if extra is None:
            core.append(name)
        elif extra[1] != "dev":
            extras.setdefault(extra[1], []).append(name)
    return core, extras


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> tuple[list[str], str | None]:
    """Names and memory of the GPUs torch sees, or why it cannot be asked."""
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = [torch.cuda.get_device_properties(index) for index in range(count)]
    except Exception as error:  # a broken torch is what many reports are about
        return [], f"unknown: torch fails with {type(error).__name__}: {error}"
    return [f"{gpu.name}, {gpu.total_memory / GB:.0f} GB, CUDA {torch.version.cuda}" for gpu in found], None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB, 1)
    except (ValueError, OSError, AttributeError):
        return None
