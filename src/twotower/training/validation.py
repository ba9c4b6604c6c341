"""What a run measures between its steps, and what it concludes from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twotower.config import EvaluateConfig, ProbeConfig
from twotower.evaluation.retrieval import Measured, measure_pairs
from twotower.evaluation.zeroshot import measure_zeroshot
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

    def retrieval(self, where: EvaluationSet, bootstrap: int = 0) -> Measured:
        """Retrieval on a set of pairs, with 95 % intervals from so many resamples."""
        return measure_pairs(
            self.inputs.model,
            where.pairs,
            where.images,
            self.inputs.tokenizer,
            self.evaluate,
            self.device,
            self.precision,
            bootstrap,
        )

    def measure(self, where: EvaluationSet) -> tuple[dict[str, float], Measured]:
        """Retrieval and, where the images have classes, zero-shot metrics by name."""
        measured = self.retrieval(where)
        metrics = dict(measured.report.metrics)
        if where.prompts is not None:
            metrics |= measure_zeroshot(
                self.inputs.model,
                where.pairs,
                where.images,
                self.inputs.tokenizer,
                where.prompts,
                self.evaluate,
                self.device,
                self.precision,
                measured.features,
            ).metrics
        return metrics, measured

    def metrics(self) -> tuple[dict[str, float], Measured]:
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


def reason_to_end(
    state: Progress, metrics: dict[str, float], config: TrainConfig, probe: ProbeConfig
) -> str:
    """Why a run should end at this validation; empty if it should not."""
    if config.early_stopping and state.stale >= config.patience:
        return f"{config.watch} has not improved in {state.stale} validations"
    value = probe_metric(metrics, probe)
    if value is not None and state.probe is not None and config.stop_on_forgetting:
        fallen = state.probe - value
        if fallen > config.stop_on_forgetting:
            return (
                f"the probe's {probe.metric} has fallen by {fallen:.1f} points, more than "
                f"train.stop_on_forgetting={config.stop_on_forgetting:g}"
            )
    return ""
