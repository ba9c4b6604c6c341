"""The training loop: what a run does from its first step to its last, on every rank."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch

from twotower.config import EvaluateConfig, ProbeConfig
from twotower.console import ProgressLine, progress
from twotower.distributed import Stopped, barrier, is_main_process, world_size
from twotower.evaluation.figures import draw_figures
from twotower.models.dual_encoder import ModelBundle
from twotower.models.saved import load_weights, save_bundle
from twotower.runs import RunPaths
from twotower.settings import Diverged
from twotower.tracking import MetricWriter
from twotower.train_config import TrainConfig
from twotower.training import resume
from twotower.training.feed import Feed
from twotower.training.gradient import Inputs
from twotower.training.health import CollapseAlarm
from twotower.training.inputs import TrainingInputs
from twotower.training.kept import save_last
from twotower.training.loss import Loss
from twotower.training.schedule import Plateau, learning_rate
from twotower.training.stepper import Stepper
from twotower.training.validation import (
    Validator,
    has_forgotten,
    probe_metric,
    reason_to_end,
    watched,
)
from twotower.training.wise_ft import keep_first
from twotower.wandb_run import WandbRun

log = logging.getLogger(__name__)

AGREE_EVERY = 4  # steps between two questions among the ranks whether to save or stop


class Trainer:
    """One run: a bundle, its inputs, an optimiser, and where to write.

    Args:
        bundle: what is trained and saved.
        inputs: the model in the form that is stepped, and its data.
        loss: what is minimised.
        config: the optimisation.
        evaluate, probe: how validation measures.
        seed: decides the order of the data and the captions drawn.
        paths: where checkpoints and metrics go.
        device: where the steps run.

    Raises:
        ConfigError: the batch does not fit the ranks or the data.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        inputs: TrainingInputs,
        loss: Loss,
        config: TrainConfig,
        evaluate: EvaluateConfig,
        probe: ProbeConfig,
        seed: int,
        paths: RunPaths,
        device: torch.device,
    ) -> None:
        self.bundle, self.inputs, self.config = bundle, inputs, config
        self.probe, self.paths = probe, paths
        self.feed = Feed(inputs, config, seed, device)
        self.stepper = Stepper(inputs.model, bundle.config.batch_norm, loss, config, device)
        self.plateau = Plateau.of(config)
        self.validator = Validator(
            inputs=inputs,
            evaluate=evaluate,
            device=device,
            precision=config.precision,
        )
        self.total_steps = config.epochs * self.feed.steps_an_epoch
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.state = resume.Progress()
        self.alarm = CollapseAlarm(config, self.total_steps)
        self._chance = math.log(config.batch_size) if loss.chance_is_log_n else None
        self._clock = self._saved = time.monotonic()
        self._saved_step = -1

    @property
    def finished(self) -> bool:
        """Whether there is no step left to do."""
        return bool(self.state.ended) or self.state.step >= self.total_steps

    def run(self, online: WandbRun | None = None) -> resume.Progress:
        """Train to the last step, validating and saving on the way; W&B gets the metrics too.

        Raises:
            Stopped: after Ctrl-C or SIGTERM, when the state is saved.
            ConfigError: the loss is no longer finite.
        """
        if self.config.wise_ft and self.state.step == 0 and is_main_process():
            keep_first(self)
        what = f"training {self.bundle.config.registered_name}"
        total = self.total_steps * self.config.batch_size
        done, validated = self.state.step, self.state.validated == self.state.step
        main = is_main_process()
        with (
            MetricWriter(self.paths.logs, done, main, online, validated=validated) as writer,
            progress(what, total, "samples", main) as bar,
            resume.stop_after_step() as stop,
        ):
            bar.skip(done * self.config.batch_size)
            self._clock = self._saved = time.monotonic()
            while True:
                self.save_if_asked(stop)
                if self.validation_is_due():
                    self.validate(writer)
                if self.finished:
                    self.save()
                    return self.state
                self.train_epoch(writer, bar, stop)

    def train_epoch(
        self, writer: MetricWriter, bar: ProgressLine, stop: resume.StopRequest
    ) -> None:
        """The steps from where the run stands to the end of the epoch or of the run."""
        self.stepper.train()
        epoch = self.state.step // self.feed.steps_an_epoch
        for inputs in self.feed.rest_of_epoch(self.state.step):
            values = self.train_step(inputs)
            note = f"epoch {epoch + 1}/{self.config.epochs} loss {values['train/loss']:.3f}"
            bar.advance(self.config.batch_size, f"{note}  {self.feed.clock.note()}")
            if self.state.step % self.config.log_every == 0 or self.state.step == 1:
                values |= {"train/samples_per_second": bar.rate, **self.feed.clock.values()}
                writer.write(self.state.step, values)
            self.save_if_asked(stop)
            if self.state.step >= self.total_steps:
                return

    def train_step(self, inputs: Inputs) -> dict[str, float]:
        """One step, and its values by name.

        Raises:
            Diverged: the loss is not finite; the weights are those before the step.
        """
        rate = learning_rate(self.state.step, self.total_steps, self.config)
        rate *= self.plateau.scale if self.plateau else 1.0
        try:
            done = self.stepper.step(inputs, rate)
        except Diverged as error:
            saved = [path for path in (self.paths.best, self.paths.last) if path.is_file()]
            good = f"; the last good checkpoint is {saved[-1]}" if saved else ""
            raise Diverged(
                f"step {self.state.step + 1}: {error}; lower train.lr, or use "
                f"train.precision=fp32{good}"
            ) from error
        self.state.step += 1
        self.alarm.step(self.state.step, done.loss, self._chance, done.logit_scale)
        values = {
            "train/loss": done.loss,
            "train/lr": rate,
            "train/grad_norm": done.grad_norm,
            "train/logit_scale": done.logit_scale,
        }
        if self.state.step % self.config.log_every == 0:
            features = done.output.image_features, done.output.text_features
            values |= self.alarm.features(self.state.step, *features)
        return values

    def validation_is_due(self) -> bool:
        """Before the first step, every `eval_every` epochs, and at the end; once each."""
        step = self.state.step
        if self.state.validated == step:
            return False
        every = self.config.eval_every * self.feed.steps_an_epoch
        return step in (0, self.total_steps) or bool(every and step % every == 0)

    def validate(self, writer: MetricWriter) -> None:
        """Measure, keep the best checkpoint, and see whether the run should end here.

        Raises:
            ConfigError: a metric that is to be watched is not measured.
        """
        state = self.state
        with self.stepper.averaged():
            metrics, measured = self.validator.metrics()
            probe = probe_metric(metrics, self.probe)
            state.probe = probe if state.probe is None else state.probe
            value = watched(metrics, self.config)
            # Weights that have forgotten too much are not the best ones, whatever they gained.
            forgotten = has_forgotten(state, metrics, self.config, self.probe)
            better = not forgotten and state.observe(value, self.config.min_change)
            if better and is_main_process():
                report = {k.removeprefix("val/"): v for k, v in metrics.items() if "val/" in k}
                about = {**self.about(), "metrics": report, "watched": value}
                save_bundle(self.paths.best, self.bundle, **about)
        state.validated = state.step
        writer.write(state.step, metrics)
        log.info(
            "step %d of %d: text->image R@1/5/10 %s, image->text %s%s",
            state.step,
            self.total_steps,
            recalls(metrics, "val/text_to_image"),
            recalls(metrics, "val/image_to_text"),
            "  (best so far)" if better else "",
        )
        if self.config.figures and measured and is_main_process():
            draw_figures(
                measured.features,
                self.inputs.val.pairs,
                self.validator.evaluate,
                self.feed.seed,
                self.paths.logs / "figures",
                writer,
                state.step,
            )
        self.conclude(metrics, value)
        barrier()

    def conclude(self, metrics: dict[str, float], value: float) -> None:
        """Let a validation change the learning rate, or end the run."""
        state = self.state
        if self.plateau is not None and self.plateau.observe(value):
            log.info("the learning rate is lowered to %.3g of its schedule", self.plateau.scale)
        probe = probe_metric(metrics, self.probe)
        if probe is not None and state.probe is not None:
            change = probe - state.probe
            log.info("probe: %s %.1f, %+.1f since the start", self.probe.metric, probe, change)
        reason = reason_to_end(state, metrics, self.config, self.probe)
        if reason and not self.finished:
            state.ended = reason
            log.warning("ending at step %d of %d: %s", state.step, self.total_steps, reason)

    def about(self) -> dict[str, Any]:
        """What a checkpoint's header says of the run."""
        now = time.monotonic()
        self.state.seconds += now - self._clock
        self._clock = now
        return {
            "run": self.paths.models.name,
            "step": self.state.step,
            "epoch": self.state.step / self.feed.steps_an_epoch,
            "seconds": round(self.state.seconds, 1),
        }

    def save_if_asked(self, stop: resume.StopRequest) -> None:
        """Save when it is time; save and stop after Ctrl-C or SIGTERM; on all ranks."""
        every = self.config.save_steps
        step = self.state.step
        by_steps = bool(every and step % every == 0 and step not in (0, self._saved_step))
        signal_number, save = 0, by_steps
        if world_size() == 1 or self.state.step % AGREE_EVERY == 0:
            late = time.monotonic() - self._saved > 60 * self.config.save_minutes
            signal_number, save = stop.agreed(late or by_steps)
        if signal_number or save:
            self.save()
        if signal_number:
            again = " without train.overwrite" if self.config.overwrite else ""
            saved = f"saved step {self.state.step} to {self.paths.last}"
            raise Stopped(signal_number, f"{saved}; the same command{again} goes on")

    def save(self) -> None:
        """Write the newest checkpoint with all that a resumed run needs; every rank calls it."""
        about = self.about()
        self.state.schedule = self.plateau.state_dict() if self.plateau else {}
        tensors, training = resume.collect(self.state, self.stepper)
        if is_main_process():
            finished = self.finished and self.state.step == self.state.validated
            about |= {"finished": finished, "training": training}
            save_last(self.paths, self.bundle, tensors, about, self.config.keep_last)
        self._saved, self._saved_step = time.monotonic(), self.state.step
        barrier()

    def resume(self) -> None:
        """Go on from the newest checkpoint, bit for bit as if the run had not stopped."""
        header, tensors = load_weights(self.paths.last, self.bundle)
        self.state = resume.restore(tensors, header["training"], self.stepper)
        if self.plateau is not None and self.state.schedule:
            self.plateau.load_state_dict(self.state.schedule)
        log.info("going on from step %d of %d", self.state.step, self.total_steps)


def recalls(metrics: dict[str, float], direction: str) -> str:
    """`24.6/52.6/62.9`: R@1, R@5 and R@10 of a direction, in percent."""
    return "/".join(f"{metrics[f'{direction}_R@{k}']:.1f}" for k in (1, 5, 10))
