"""What a run measures between its steps, and what it concludes from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twotower.config import EvaluateConfig, ProbeConfig
from twotower.evaluation.retrieval import Measured, measure_pairs
from twotower.evaluation.zeroshot import ZeroShotReport, measure_zeroshot
from twotower.metrics import signed
from twotower.settings import ConfigError
from twotower.train_config import Precision, TrainConfig
from twotower.training.inputs import EvaluationSet, TrainingInputs
from twotower.training.resume import Progress


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Measures the current weights, on all ranks together."""

    inputs: TrainingInputs
    evaluate: EvaluateConfig
    device: torch.device
    precision: Precision

    def reports(
        self, where: EvaluationSet, bootstrap: int = 0
    ) -> tuple[Measured | None, ZeroShotReport | None]:
        """Retrieval where there are captions, zero-shot classification where there are classes.

        With 95 % intervals of the former from so many resamples.
        """
        model, tokenizer = self.inputs.model, self.inputs.tokenizer
        how = (self.evaluate, self.device, self.precision)
        of = (model, where.pairs, where.images, tokenizer)
        measured = measure_pairs(*of, *how, bootstrap) if where.pairs.has_captions() else None
        if where.prompts is None:
            return measured, None
        features = measured.features if measured else None
        return measured, measure_zeroshot(*of, where.prompts, *how, features)

    def measure(self, where: EvaluationSet) -> tuple[dict[str, float], Measured | None]:
        """The metrics of both by name, and what retrieval was measured on."""
        measured, zeroshot = self.reports(where)
        found = {} if zeroshot is None else zeroshot.metrics
        return {**(measured.report.metrics if measured else {}), **found}, measured

    def metrics(self) -> tuple[dict[str, float], Measured | None]:
        """`val/<metric>` of the validation split and `probe/<metric>` of the probe, if any.

        With what was measured on the validation split, for figures.
        """
        values, measured = self.measure(self.inputs.val)
        named = {f"val/{name}": value for name, value in values.items()}
        if self.inputs.probe is not None:
            probe, _ = self.measure(self.inputs.probe)
            named |= {f"probe/{name}": value for name, value in probe.items()}
        return named, measured


def metric(metrics: dict[str, float], name: str, key: str) -> float:
    """A metric by its name, as the setting `key` gives it.

    Raises:
        ConfigError: it is not measured.
    """
    if name not in metrics:
        raise ConfigError(
            f"{key}: {name} is not measured; choose one of {', '.join(sorted(metrics))}"
        )
    return metrics[name]


def probe_metric(metrics: dict[str, float], config: ProbeConfig) -> float | None:
    """The probe's watched metric; None without a probe.

    Raises:
        ConfigError: `probe.metric` is not measured.
    """
    probe = {name: value for name, value in metrics.items() if name.startswith("probe/")}
    return metric(probe, f"probe/{config.metric}", "probe.metric") if probe else None


def watched(metrics: dict[str, float], config: TrainConfig) -> float:
    """The value that decides the best checkpoint, with the sign that makes more of it better.

    Raises:
        ConfigError: `train.watch` is not measured.
    """
    return signed(config.watch, metric(metrics, config.watch, "train.watch"))


def has_forgotten(
    state: Progress, metrics: dict[str, float], config: TrainConfig, probe: ProbeConfig
) -> bool:
    """Whether the probe has fallen by more than the run allows."""
    value = probe_metric(metrics, probe)
    if value is None or state.probe is None or not config.stop_on_forgetting:
        return False
    return signed(probe.metric, state.probe - value) > config.stop_on_forgetting


def reason_to_end(
    state: Progress, metrics: dict[str, float], config: TrainConfig, probe: ProbeConfig
) -> str:
    """Why a run should end at this validation; empty if it should not."""
    if config.early_stopping and state.stale >= config.patience:
        return f"{config.watch} has not improved in {state.stale} validations"
    if has_forgotten(state, metrics, config, probe):
        change = abs((state.probe or 0.0) - (probe_metric(metrics, probe) or 0.0))
        return (
            f"the probe's {probe.metric} is worse by {change:.1f} points, more than "
            f"train.stop_on_forgetting={config.stop_on_forgetting:g}"
        )
    return ""
