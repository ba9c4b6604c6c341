"""Memory and time of the contrastive loss and its gradient, ours beside open_clip's, by batch size.

    python benchmarks/contrastive_memory.py
    python benchmarks/contrastive_memory.py --sizes 1024 16384 --device cuda

Two tables. `loss`: unit-norm features in, their gradients out. `step`: the gradient of two small
towers from one batch, ours in micro-batches (GradCache) and open_clip's way of accumulating: cached
features, the full matrix for each micro-batch. Every cell runs in a process of its own; memory is
the peak of its resident set less the resident set before (on CUDA: of allocated memory). What
exceeds the machine's free memory prints `does not fit`, what takes longer than `--limit` says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DIM = 512
WIDTH = 256
MICRO_BATCHES = 16
SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
MIB = 2**20


def main() -> None:
    """Print both tables, or measure one cell (`--cell`, called by the former)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--tables", nargs="+", default=("loss", "step"), choices=("loss", "step"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are printed")
    parser.add_argument("--limit", type=float, default=300, help="seconds a cell may take")
    parser.add_argument("--cell", nargs=3, metavar=("KIND", "WHOSE", "SIZE"))
    options = parser.parse_args()
    if options.cell:
        kind, whose, size = options.cell
        measure(kind, whose, int(size), options.device, options.rounds)
        return
    write(f"{os.cpu_count()} cores, device {options.device}, dim {DIM}, fp32\n")
    for kind in options.tables:
        write(f"\n{kind:>8} {'open_clip':>24} {'twotower':>24} {'memory':>8} {'time':>6}\n")
        for size in options.sizes:
            cells = {
                whose: run_cell(kind, whose, size, options) for whose in ("open_clip", "twotower")
            }
            write(
                f"{size:>8} {show(cells['open_clip'])} {show(cells['twotower'])} {ratio(cells)}\n"
            )


def write(text: str) -> None:
    """Print at once: a run takes minutes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show(cell: dict[str, float] | str) -> str:
    """`1,234 MiB    5.67 s`."""
    if isinstance(cell, str):
        return f"{cell:>24}"
    return f"{cell['mib']:>10,.0f} MiB {cell['seconds']:>7.2f} s"


def ratio(cells: dict[str, dict[str, float] | str]) -> str:
    """Ours divided by theirs."""
    ours, theirs = cells["twotower"], cells["open_clip"]
    if isinstance(ours, str) or isinstance(theirs, str):
        return ""
    return f"{ours['mib'] / theirs['mib']:>8.3f} {ours['seconds'] / theirs['seconds']:>6.2f}"


def run_cell(
    kind: str, whose: str, size: int, options: argparse.Namespace
) -> dict[str, float] | str:
    """One measurement in a process of its own; why there is none where there is none."""
    command = [sys.executable, __file__, "--device", options.device]
    command += ["--rounds", str(options.rounds), "--cell", kind, whose, str(size)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=options.limit
        )
    except subprocess.TimeoutExpired:
        return f"over {options.limit:g} s"
    if done.returncode == 0:
        cell: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return cell
    if "emory" in done.stderr or done.returncode < 0:
        return "does not fit"
    raise SystemExit(done.stderr)


def measure(kind: str, whose: str, size: int, device: str, rounds: int) -> None:
    """Print the cell as a line of JSON."""
    import torch

    if device == "cpu":
        limit_memory()
    torch.manual_seed(0)
    work: Callable[[], None] = WORK[kind, whose](size, device)
    before = start_memory(device)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 60:
            break
    mib = (peak_memory(device) - before) / MIB
    sys.stdout.write(json.dumps({"mib": mib, "seconds": statistics.median(seconds)}) + "\n")


def limit_memory() -> None:
    """Let an allocation beyond the free memory fail instead of the machine."""
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (int(free * 0.9), resource.RLIM_INFINITY))


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def start_memory(device: str) -> int:
    """Begin to watch for the peak; the memory in use now."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    return status("VmRSS")


def peak_memory(device: str) -> int:
    """The peak since `start_memory`."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def make_features(size: int, device: str):  # type: ignore[no-untyped-def]
    """Two leaves (size, DIM) of unit norm."""
    import torch
    import torch.nn.functional as F

    return [
        F.normalize(torch.randn(size, DIM, device=device), dim=1).requires_grad_() for _ in range(2)
    ]


def our_loss(size: int, device: str) -> Callable[[], None]:
    """The loss a block of rows at a time."""
    import torch

    from twotower.training.loss import (
        LOSSES,
        ClipLossConfig,
        Pairs,
        Temperature,
        contrastive_loss,
    )

    image, text = make_features(size, device)
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    keys = torch.arange(size, device=device)[:, None].repeat(1, 2)
    loss = LOSSES.build(ClipLossConfig())
    pairs = Pairs(image, text, keys)

    def work() -> None:
        image.grad = text.grad = scale.grad = None
        contrastive_loss(loss, pairs, pairs, Temperature(scale, scale.new_zeros(()))).backward()

    return work


def their_loss(size: int, device: str) -> Callable[[], None]:
    """open_clip's ClipLoss: the whole matrix."""
    import torch
    from open_clip.loss import ClipLoss

    image, text = make_features(size, device)
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    loss = ClipLoss()

    def work() -> None:
        image.grad = text.grad = scale.grad = None
        loss(image, text, scale).backward()

    return work


def make_model(device: str):  # type: ignore[no-untyped-def]
    """Two towers of two layers, as a `DualEncoder`."""
    from torch import nn

    from twotower.models.dual_encoder import DualEncoder, Tower

    def tower() -> Tower:
        return Tower(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU()), nn.Linear(4 * WIDTH, DIM)
        )

    return DualEncoder(tower(), tower()).to(device)


def our_step(size: int, device: str) -> Callable[[], None]:
    """The gradient in micro-batches: features cached, the loss in blocks."""
    import torch

    from twotower.training.gradient import Gradient, Inputs
    from twotower.training.loss import LOSSES, ClipLossConfig

    model = make_model(device)
    inputs = Inputs(
        images=torch.randn(size, WIDTH, device=device),
        tokens=torch.randn(size, WIDTH, device=device),
        keys=torch.arange(size, device=device)[:, None].repeat(1, 2),
    )
    gradient = Gradient(
        model=model,
        parallel=model,
        loss=LOSSES.build(ClipLossConfig()),
        device=torch.device(device),
        micro_batch_size=size // MICRO_BATCHES,
    )

    def work() -> None:
        model.zero_grad()
        gradient.backward(inputs)

    return work


def their_step(size: int, device: str) -> Callable[[], None]:
    """Accumulation as open_clip's training loop does it (`--accum-freq`)."""
    import torch
    from open_clip.loss import ClipLoss

    model, loss = make_model(device), ClipLoss()
    images, texts = (torch.randn(size, WIDTH, device=device).chunk(MICRO_BATCHES) for _ in "it")

    def work() -> None:
        model.zero_grad()
        with torch.no_grad():
            cached = [model(image, text)[:2] for image, text in zip(images, texts, strict=True)]
        for number in range(MICRO_BATCHES):
            output = model(images[number], texts[number])
            image, text = (
                torch.cat(
                    [*(c[i] for c in cached[:number]), output[i]]
                    + [c[i] for c in cached[number + 1 :]]
                )
                for i in (0, 1)
            )
            loss(image, text, output.logit_scale).backward()

    return work


WORK = {
    ("loss", "twotower"): our_loss,
    ("loss", "open_clip"): their_loss,
    ("step", "twotower"): our_step,
    ("step", "open_clip"): their_step,
}

if __name__ == "__main__":
    main()
