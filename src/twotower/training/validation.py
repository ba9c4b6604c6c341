"""What a run measures between its steps: retrieval on its own validation split, and on a probe."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twotower.config import EvaluateConfig, ProbeConfig
from twotower.evaluation.retrieval import RetrievalReport, measure_retrieval
from twotower.train_config import Precision
from twotower.training.inputs import EvaluationSet, TrainingInputs


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Measures the current weights, on all ranks together."""

    inputs: TrainingInputs
    evaluate: EvaluateConfig
    probe: ProbeConfig
    device: torch.device
    precision: Precision

    def measure(self, where: EvaluationSet, bootstrap: int = 0) -> RetrievalReport:
        """Retrieval on a set of pairs, with 95 % intervals from so many resamples."""
        return measure_retrieval(
            self.inputs.model,
            where.pairs,
            where.images,
            self.inputs.tokenizer,
            self.evaluate,
            self.device,
            self.precision,
            bootstrap,
        )

    def metrics(self) -> dict[str, float]:
        """`val/<metric>` of the validation split and `probe/<metric>` of the probe."""
        values = {f"val/{k}": v for k, v in self.measure(self.inputs.val).metrics.items()}
        if self.inputs.probe is not None:
            probe = self.measure(self.inputs.probe).metrics
            values |= {f"probe/{k}": v for k, v in probe.items()}
        return values
