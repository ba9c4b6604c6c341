"""The training loop: what a run does from its first step to its last, on every rank."""

from __future__ import annotations

import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from twotower.config import EvaluateConfig, ProbeConfig
from twotower.console import ProgressLine, progress
from twotower.data.pairs import Batch, Collate
from twotower.data.workers import plain_signals
from twotower.distributed import Stopped, barrier, is_main_process, rank, world_size
from twotower.models.dual_encoder import ModelBundle
from twotower.models.locking import apply_batch_norm_policy
from twotower.models.saved import load_weights, save_bundle
from twotower.runs import RunPaths
from twotower.settings import ConfigError
from twotower.tracking import MetricWriter
from twotower.train_config import Precision, TrainConfig
from twotower.training import resume
from twotower.training.average import WeightAverage
from twotower.training.gradient import Gradient, Inputs
from twotower.training.inputs import TrainingInputs
from twotower.training.kept import save_last
from twotower.training.loss import Loss
from twotower.training.optim import build_optimizer, set_learning_rate
from twotower.training.sampler import GlobalBatchSampler, check_batch_size
from twotower.training.schedule import Plateau, learning_rate
from twotower.training.towers import compile_towers, enable_grad_checkpointing
from twotower.training.validation import Validator, metric, probe_metric, reason_to_end

log = logging.getLogger(__name__)

AVERAGE = "average."  # begins the names of the averaged weights among the tensors of a resume
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
        world, micro = world_size(), config.micro_batch_size
        check_batch_size(config.batch_size, len(inputs.train), world, micro)
        self.bundle, self.inputs, self.config = bundle, inputs, config
        self.probe, self.paths, self.device = probe, paths, device
        self.sampler = GlobalBatchSampler(
            inputs.train.owner, config.batch_size, seed, rank(), world, config.pairing
        )
        in_parts = 0 < micro < config.batch_size // world
        apply_batch_norm_policy(inputs.model, bundle.config.batch_norm, world, in_parts)
        if config.grad_checkpointing:
            enable_grad_checkpointing(inputs.model)
        if config.compile:
            compile_towers(inputs.model, device)
        self.optimizer = build_optimizer(inputs.model, config)
        self.plateau = Plateau.of(config)
        self.average = WeightAverage.of(inputs.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision is Precision.fp16)
        self.parallel: nn.Module = inputs.model
        if world > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(inputs.model, device_ids=ids)
        self.gradient = Gradient(
            model=inputs.model,
            parallel=self.parallel,
            loss=loss,
            device=device,
            precision=config.precision,
            micro_batch_size=micro,
            scale=self.scaler.scale,
        )
        self.validator = Validator(
            inputs=inputs,
            evaluate=evaluate,
            device=device,
            precision=config.precision,
        )
        self.total_steps = config.epochs * len(self.sampler)
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.state = resume.Progress()
        self._unreadable: set[str] = set()
        self._clock = self._saved = time.monotonic()

    @property
    def finished(self) -> bool:
        """Whether there is no step left to do."""
        return bool(self.state.ended) or self.state.step >= self.total_steps

    def run(self) -> resume.Progress:
        """Train to the last step, validating and saving on the way.

        Raises:
            Stopped: after Ctrl-C or SIGTERM, when the state is saved.
            ConfigError: the loss is no longer finite.
        """
        if self.config.wise_ft and self.state.step == 0 and is_main_process():
            save_bundle(self.paths.first, self.bundle, **self.about())
        what = f"training {self.bundle.config.registered_name}"
        total = self.total_steps * self.config.batch_size
        with (
            MetricWriter(self.paths.logs, self.state.step, is_main_process()) as writer,
            progress(what, total, "samples", is_main_process()) as bar,
            resume.stop_after_step() as stop,
        ):
            bar.skip(self.state.step * self.config.batch_size)
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
        self.parallel.train()
        epoch = self.state.step // len(self.sampler)
        for batch in self.loader():
            values = self.train_step(batch)
            self.report_unreadable(batch)
            note = f"epoch {epoch + 1}/{self.config.epochs} loss {values['train/loss']:.3f}"
            bar.advance(self.config.batch_size, note)
            if self.state.step % self.config.log_every == 0 or self.state.step == 1:
                writer.write(self.state.step, {**values, "train/samples_per_second": bar.rate})
            self.save_if_asked(stop)
            if self.state.step >= self.total_steps:
                return

    def report_unreadable(self, batch: Batch) -> None:
        """Say once of each unreadable picture that another one took its place."""
        for path, reason in batch.unreadable:
            if path not in self._unreadable:
                self._unreadable.add(path)
                log.warning("%s cannot be read (%s); another picture takes its place", path, reason)

    def loader(self) -> DataLoader[Any]:
        """The batches of this rank that are left of the current epoch."""
        epoch, done = divmod(self.state.step, len(self.sampler))
        self.sampler.set_position(epoch, done)
        self.inputs.train.set_epoch(epoch)
        return DataLoader(
            self.inputs.train,
            batch_sampler=self.sampler,
            collate_fn=Collate(self.inputs.tokenizer),
            num_workers=self.config.num_workers,
            worker_init_fn=plain_signals,
            pin_memory=self.device.type == "cuda",
            # Its own generator: starting a loader must not move the random state of the model.
            generator=torch.Generator().manual_seed(epoch),
        )

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Forward, loss, backward, clip, step.

        Raises:
            ConfigError: the loss is not finite; the weights are those before the step.
        """
        rate = learning_rate(self.state.step, self.total_steps, self.config)
        rate *= self.plateau.scale if self.plateau else 1.0
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        inputs = Inputs(
            images=batch.images.to(self.device, non_blocking=True),
            tokens=batch.tokens.to(self.device, non_blocking=True),
            keys=batch.keys.to(self.device, non_blocking=True),
        )
        loss, output = self.gradient.backward(inputs)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.inputs.model.parameters(), limit)
        # One wait for the device a step, before the weights change.
        value, size, factor = torch.stack([loss, norm, output.logit_scale]).tolist()
        self.check_finite(value, size)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.inputs.model.clamp_logit_scale()
        if self.average is not None:
            self.average.update()
        self.state.step += 1
        return {
            "train/loss": value,
            "train/lr": rate,
            "train/grad_norm": size,
            "train/logit_scale": factor,
        }

    def check_finite(self, loss: float, grad_norm: float) -> None:
        """Stop before a step that would ruin the weights; the fp16 scaler skips its own.

        Raises:
            ConfigError: the loss or a gradient is NaN or infinite.
        """
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self.scaler.is_enabled()):
            return
        saved = [path for path in (self.paths.best, self.paths.last) if path.is_file()]
        good = f"; the last good checkpoint is {saved[-1]}" if saved else ""
        raise ConfigError(
            f"the loss is {loss} and the gradient's norm {grad_norm} at step "
            f"{self.state.step + 1}; lower train.lr, or use train.precision=fp32{good}"
        )

    def validation_is_due(self) -> bool:
        """Before the first step, every `eval_every` epochs, and at the end; once each."""
        step = self.state.step
        if self.state.validated == step:
            return False
        every = self.config.eval_every * len(self.sampler)
        return step in (0, self.total_steps) or bool(every and step % every == 0)

    def validate(self, writer: MetricWriter) -> None:
        """Measure, keep the best checkpoint, and see whether the run should end here.

        Raises:
            ConfigError: a metric that is to be watched is not measured.
        """
        state = self.state
        with self.averaged():
            metrics, measured = self.validator.metrics()
            watched = metric(metrics, self.config.watch, "train.watch")
            better = state.observe(watched, self.config.min_change)
            if better and is_main_process():
                report = {k.removeprefix("val/"): v for k, v in metrics.items() if "val/" in k}
                save_bundle(self.paths.best, self.bundle, **self.about(), metrics=report)
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
        self.conclude(metrics, watched)
        barrier()

    def conclude(self, metrics: dict[str, float], watched: float) -> None:
        """Let a validation change the learning rate, or end the run."""
        state = self.state
        if self.plateau is not None and self.plateau.observe(watched):
            log.info("the learning rate is lowered to %.3g of its schedule", self.plateau.scale)
        probe = probe_metric(metrics, self.probe)
        if probe is not None:
            state.probe = probe if state.probe is None else state.probe
            change = probe - state.probe
            log.info("probe: %s %.1f, %+.1f since the start", self.probe.metric, probe, change)
        reason = reason_to_end(state, metrics, self.config, self.probe)
        if reason and not self.finished:
            state.ended = reason
            log.warning("ending at step %d of %d: %s", state.step, self.total_steps, reason)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the model has the averaged weights, where there are any."""
        return nullcontext() if self.average is None else self.average.swapped()

    def about(self) -> dict[str, Any]:
        """What a checkpoint's header says of the run."""
        now = time.monotonic()
        self.state.seconds += now - self._clock
        self._clock = now
        return {
            "run": self.paths.models.name,
            "step": self.state.step,
            "epoch": self.state.step / len(self.sampler),
            "seconds": round(self.state.seconds, 1),
        }

    def save_if_asked(self, stop: resume.StopRequest) -> None:
        """Save when it is time; save and stop after Ctrl-C or SIGTERM; on all ranks."""
        every = self.config.save_steps
        by_steps = bool(every and self.state.step and self.state.step % every == 0)
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
        tensors, training = resume.collect(self.state, self.optimizer, self.scaler)
        if self.average is not None:
            tensors |= {f"{AVERAGE}{k}": v for k, v in self.average.state_dict().items()}
        if is_main_process():
            finished = self.finished and self.state.step == self.state.validated
            about |= {"finished": finished, "training": training}
            save_last(self.paths, self.bundle, tensors, about, self.config.keep_last)
        self._saved = time.monotonic()
        barrier()

    def resume(self) -> None:
        """Go on from the newest checkpoint, bit for bit as if the run had not stopped."""
        header, tensors = load_weights(self.paths.last, self.bundle)
        self.state = resume.restore(tensors, header["training"], self.optimizer, self.scaler)
        if self.plateau is not None and self.state.schedule:
            self.plateau.load_state_dict(self.state.schedule)
        if self.average is not None:
            own = {k: v for k, v in tensors.items() if k.startswith(AVERAGE)}
            self.average.load_state_dict({k.removeprefix(AVERAGE): v for k, v in own.items()})
        log.info("going on from step %d of %d", self.state.step, self.total_steps)


def recalls(metrics: dict[str, float], direction: str) -> str:
    """`24.6/52.6/62.9`: R@1, R@5 and R@10 of a direction, in percent."""
    return "/".join(f"{metrics[f'{direction}_R@{k}']:.1f}" for k in (1, 5, 10))
