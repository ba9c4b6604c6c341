"""WiSE-FT (Wortsman et al. 2022): between the weights before a fine-tune and those after it.

Interpolated weights often keep most of what the fine-tune gained and of what it cost. The sweep
shows the trade: for each alpha what the run's validation and its probe measure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from twotower.checkpoint.atomic import replacing

ALPHAS = tuple(step / 10 for step in range(11))


def interpolate(
    first: Mapping[str, Tensor], last: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 - alpha) first + alpha last, tensor by tensor; 0 and 1 give the ends bit for bit.

    Tensors of integers (counters) are those of the nearer end.
    """
    if alpha in (0, 1):
        return dict(last if alpha else first)
    mixed = {}
    for name, end in last.items():
        if end.is_floating_point():
            mixed[name] = torch.lerp(first[name].float(), end.float(), alpha).to(end.dtype)
        else:
            mixed[name] = end if alpha >= 0.5 else first[name]
    return mixed


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model's own tensors, so that whoever shares them sees them."""
    own = model.state_dict()
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def sweep(
    model: nn.Module,
    first: Mapping[str, Tensor],
    last: Mapping[str, Tensor],
    measure: Callable[[], dict[str, float]],
    alphas: Sequence[float] = ALPHAS,
) -> list[dict[str, float]]:
    """Measure a model at each alpha; it has the last weights afterwards.

    Returns:
        For each alpha, {"alpha": alpha, metric: value}.
    """
    points = []
    for alpha in alphas:
        put(model, interpolate(first, last, alpha))
        points.append({"alpha": alpha, **measure()})
    put(model, last)
    return points


def choose(points: Sequence[dict[str, float]], names: Sequence[str]) -> float:
    """The alpha with the best mean of the named metrics; the larger one of equals."""
    best = max(points, key=lambda point: (sum(point[name] for name in names), point["alpha"]))
    return best["alpha"]


def write_sweep(
    folder: Path, points: Sequence[dict[str, float]], names: Sequence[str], chosen: float
) -> None:
    """Write `wise_ft.json`, `wise_ft.md` (the named metrics) and `wise_ft.png` (their curves).

    Raises:
        ConfigError: the folder cannot be written.
    """
    with replacing(folder / "wise_ft.json") as partial:
        partial.write_text(json.dumps({"chosen": chosen, "points": list(points)}, indent=2) + "\n")
    with replacing(folder / "wise_ft.md") as partial:
        partial.write_text(table(points, names, chosen), encoding="utf-8")
    with replacing(folder / "wise_ft.png") as partial:
        _plot(partial, points, names, chosen)


def table(points: Sequence[dict[str, float]], names: Sequence[str], chosen: float) -> str:
    """The sweep as a table in Markdown; the chosen alpha is marked."""
    lines = [f"| alpha | {' | '.join(names)} |", f"| ---: |{' ---: |' * len(names)}"]
    for point in points:
        mark = "**" if point["alpha"] == chosen else ""
        cells = " | ".join(f"{point[name]:.1f}" for name in names)
        lines.append(f"| {mark}{point['alpha']:g}{mark} | {cells} |")
    return "\n".join(lines) + "\n"


def _plot(
    path: Path, points: Sequence[dict[str, float]], names: Sequence[str], chosen: float
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    alphas = [point["alpha"] for point in points]
    for name in names:
        axes.plot(alphas, [point[name] for point in points], marker="o", label=name)
    axes.axvline(chosen, color="grey", linestyle=":", label=f"chosen: {chosen:g}")
    axes.set_xlabel("alpha: 0 the weights before, 1 the weights after")
    axes.set_ylabel("percent")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=130)
