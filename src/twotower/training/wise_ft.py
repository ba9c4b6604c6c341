"""WiSE-FT (Wortsman et al. 2022): between the weights before a fine-tune and those after it.

Interpolated weights often keep most of what the fine-tune gained and of what it cost. The sweep
shows the trade: for each alpha what the run's validation and its probe measure.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twotower.checkpoint.atomic import replacing
from twotower.distributed import is_main_process
from twotower.metrics import signed
from twotower.models.saved import load_weights, save_bundle
from twotower.settings import ConfigError

if TYPE_CHECKING:
    from twotower.training.trainer import Trainer

log = logging.getLogger(__name__)

ALPHAS = tuple(step / 10 for step in range(11))


def interpolate(
    first: Mapping[str, Tensor], last: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 - alpha) first + alpha last, tensor by tensor; 0 and 1 give the ends bit for bit.

    Tensors of integers (counters) are those of the nearer end. Adapters (LoRA) that began at
    nothing are scaled by their second factor alone, which is the line between the merged weights.
    """
    if alpha in (0, 1):
        return dict(last if alpha else first)
    mixed = {}
    for name, end in last.items():
        if ".lora_A." in name:
            mixed[name] = end
        elif end.is_floating_point():
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

    def quality(point: Mapping[str, float]) -> tuple[float, float]:
        return sum(signed(name, point[name]) for name in names), point["alpha"]

    return max(points, key=quality)["alpha"]


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


def keep_first(trainer: Trainer) -> None:
    """Keep the weights before the first step; the first rank alone calls it.

    Raises:
        ConfigError: they are adapted already, so that their line to others is none of factors.
    """
    weights = trainer.bundle.model.state_dict()
    if any(".lora_B." in name and bool(tensor.any()) for name, tensor in weights.items()):
        raise ConfigError(
            "train.wise_ft cannot go on with adapters that are trained already; start from a "
            "checkpoint without LoRA, or leave train.wise_ft away"
        )
    save_bundle(trainer.paths.first, trainer.bundle, **trainer.about())


def write_wise_ft(trainer: Trainer) -> None:
    """Measure between the first and the last weights; keep the chosen ones; every rank calls it."""
    paths, bundle = trainer.paths, trainer.bundle
    names = [trainer.config.watch]
    if trainer.inputs.probe is not None:
        names.append(f"probe/{trainer.probe.metric}")
    with trainer.stepper.averaged():
        last = _copied(bundle.model)
        load_weights(paths.first, bundle)
        first = _copied(bundle.model)
        points = sweep(bundle.model, first, last, lambda: trainer.validator.metrics()[0])
        chosen = choose(points, names)
        if is_main_process():
            write_sweep(paths.logs, points, names, chosen)
            put(bundle.model, interpolate(first, last, chosen))
            save_bundle(paths.wise_ft, bundle, run=paths.models.name, alpha=chosen)
            put(bundle.model, last)
            log.info(
                "WiSE-FT: alpha %g has the best mean of %s; its weights are %s, all points in %s",
                *(chosen, " and ".join(names), paths.wise_ft, paths.logs / "wise_ft.md"),
            )


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
