"""What this machine offers and what is installed, for `twotower info`."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import torch

from twotower import __version__

GIB = 2**30
WIDTH = 16


def describe(models_dir: Path) -> list[tuple[str, str]]:
    """What `twotower info` shows, in its order: (name, facts).

    `models_dir` is where runs, stores and pretrained backbones are looked for.
    """
    rows = [
        ("twotower", __version__),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", torch_build()),
        ("GPUs", gpus()),
        *((name, _version(name)) for name in ("torchvision", "timm", "transformers")),
        ("open_clip", _version("open-clip-torch")),
        ("faiss", _faiss()),
        *((name, _optional(name)) for name in ("apex", "wandb")),
        ("cores", cores()),
        ("memory", memory()),
        ("disk", _disk(models_dir)),
        ("backbones", _backbones(models_dir)),
        ("runs", str(len(runs(models_dir)))),
        ("stores", str(len(stores(models_dir)))),
    ]
    names = {str(d.metadata["Name"]).lower().replace("_", "-") for d in distributions()}
    conflict = faiss_conflict(names)
    return [*rows, ("WARNING", conflict)] if conflict else rows


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    return "\n".join(f"{name:<{WIDTH}}{facts}" for name, facts in rows)


def runs(models_dir: Path) -> list[str]:
    """Names of the folders that hold a checkpoint, sorted."""
    names = ("best.safetensors", "last.safetensors")
    return sorted({path.parent.name for name in names for path in models_dir.glob(f"*/{name}")})


def stores(models_dir: Path) -> list[str]:
    """Names of the runs that have an embedding store, sorted."""
    return sorted(path.parent.parent.name for path in models_dir.glob("*/store/manifest.json"))


def faiss_conflict(installed: set[str]) -> str:
    """A warning where two builds of FAISS lie in one environment and overwrite each other.

    `installed` are distribution names; pip has no way to say that two of them exclude each other.
    """
    builds = sorted(n for n in installed if re.fullmatch(r"faiss-(cpu|gpu(-\w+)?)", n))
    if len(builds) < 2:
        return ""
    return (
        f"{' and '.join(builds)} are both installed and overwrite each other; "
        f"run: pip uninstall {' '.join(builds)}, then install one"
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _optional(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "not installed (optional)"
    try:
        return version(module)
    except PackageNotFoundError:
        return "installed"


def torch_build() -> str:
    """torch's version and what it computes with on this machine."""
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return ", ".join(
        [
            torch.__version__,
            f"CPU {torch.backends.cpu.get_cpu_capability()}",
            f"{torch.get_num_threads()} threads",
            f"BLAS {blas[1] if blas else 'unknown'}",
            f"CUDA {torch.version.cuda or 'not built in'}",
        ]
    )


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bf16; without, they are emulated."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def gpus() -> str:
    """The GPUs that torch sees, with their memory."""
    if not torch.cuda.is_available():
        return "none"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{d.name} ({d.total_memory / GIB:.0f} GiB)" for d in devices)


def _faiss() -> str:
    try:
        import faiss
    except ImportError as error:
        if importlib.util.find_spec("faiss") is not None:
            return f"installed, but it cannot be imported: {error}"
        return "not installed; pip install faiss-cpu, or faiss-gpu where there is a GPU"
    return f"{faiss.__version__}, built with {faiss.get_compile_options().strip()}"


def cores() -> str:
    """The cores that this process may use, of those there are."""
    return f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"


def processor() -> str:
    """The name of the CPU."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def memory() -> str:
    """Total and available bytes; a container's limit where it is lower than the machine's."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    text = (
        f"{kib['MemTotal'] * 1024 / GIB:.1f} GiB, {kib['MemAvailable'] * 1024 / GIB:.1f} GiB free"
    )
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text().strip() if limit_file.exists() else "max"
    if limit.isdigit() and int(limit) < kib["MemTotal"] * 1024:
        text += f", limited to {int(limit) / GIB:.1f} GiB"
    return text


def free_bytes() -> int | None:
    """Bytes of memory that are free, within a container's limit if any; None if unknown."""
    free = _number(Path("/proc/meminfo"), "MemAvailable:") * 1024
    if not free:
        return None
    group = Path("/sys/fs/cgroup")
    limit = _number(group / "memory.max", "")
    if limit:
        files = sum(
            _number(group / "memory.stat", f"{kind}_file") for kind in ("active", "inactive")
        )
        # What is only a copy of files is given back when it is needed.
        free = min(free, limit - _number(group / "memory.current", "") + files)
    return max(free, 0)


def _number(file: Path, name: str) -> int:
    """The number behind a name at the beginning of a line; 0 if there is none."""
    try:
        found = re.search(rf"^{name} *(\d+)", file.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _disk(models_dir: Path) -> str:
    folder = models_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB where {models_dir} is"


def _backbones(models_dir: Path) -> str:
    folder = models_dir / "pretrained"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    shown = [name for name in names if not name.startswith(".")]
    return ", ".join(shown) or "none; twotower prepare backbones lays them out"
