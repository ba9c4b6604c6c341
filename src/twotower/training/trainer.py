"""The training loop: what a run does from its first step to its last, on every rank."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from twotower.config import EvaluateConfig
from twotower.console import ProgressLine, progress
from twotower.data.pairs import Batch, Collate
from twotower.data.workers import plain_signals
from twotower.distributed import (
    Stopped,
    all_gather_with_grad,
    barrier,
    is_main_process,
    rank,
    world_size,
)
from twotower.evaluation.retrieval import RetrievalReport, autocast, measure_retrieval
from twotower.models.dual_encoder import ModelBundle
from twotower.models.locking import apply_batch_norm_policy
from twotower.models.saved import load_weights, save_bundle
from twotower.runs import RunPaths
from twotower.settings import ConfigError
from twotower.tracking import MetricWriter
from twotower.train_config import Precision, TrainConfig
from twotower.training import resume
from twotower.training.inputs import TrainingInputs
from twotower.training.loss import clip_loss
from twotower.training.optim import build_optimizer
from twotower.training.sampler import GlobalBatchSampler, check_batch_size
from twotower.training.schedule import learning_rate

log = logging.getLogger(__name__)

WATCHED = "mean_recall"
AGREE_EVERY = 4  # steps between two questions among the ranks whether to save or stop


class Trainer:
    """One run: a bundle, its inputs, an optimiser, and where to write.

    Args:
        bundle: what is trained and saved.
        inputs: the model in the form that is stepped, and its data.
        config: the optimisation.
        evaluate: how validation measures.
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
        config: TrainConfig,
        evaluate: EvaluateConfig,
        seed: int,
        paths: RunPaths,
        device: torch.device,
    ) -> None:
        check_batch_size(config.batch_size, len(inputs.train), world_size())
        self.bundle, self.inputs, self.config, self.evaluate = bundle, inputs, config, evaluate
        self.paths, self.device = paths, device
        self.sampler = GlobalBatchSampler(
            len(inputs.train), config.batch_size, seed, rank(), world_size()
        )
        apply_batch_norm_policy(inputs.model, bundle.config.batch_norm, world_size())
        self.optimizer = build_optimizer(inputs.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision is Precision.fp16)
        self.parallel: nn.Module = inputs.model
        if world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(inputs.model, device_ids=ids)
        self.total_steps = config.epochs * len(self.sampler)
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.state = resume.Progress()
        self._unreadable: set[str] = set()
        self._clock = self._saved = time.monotonic()

    def run(self) -> resume.Progress:
        """Train to the last step, validating and saving on the way.

        Raises:
            Stopped: after Ctrl-C or SIGTERM, when the state is saved.
            ConfigError: the loss is no longer finite.
        """
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
                if self.state.step >= self.total_steps:
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

    def loss(self, batch: Batch) -> Tensor:
        """The contrastive loss of this rank's rows against all ranks' columns."""
        images = batch.images.to(self.device, non_blocking=True)
        tokens = batch.tokens.to(self.device, non_blocking=True)
        with autocast(self.device, self.config.precision):
            output = self.parallel(images, tokens)
        image_features, text_features = output.image_features.float(), output.text_features.float()
        return clip_loss(
            image_features,
            text_features,
            all_gather_with_grad(image_features),
            all_gather_with_grad(text_features),
            output.logit_scale.float(),
            first_row=rank() * len(images),
        )

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Forward, loss, backward, clip, step.

        Raises:
            ConfigError: the loss is not finite; the weights are those before the step.
        """
        rate = learning_rate(self.state.step, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.inputs.model.parameters(), limit)
        scale = self.inputs.model.logit_scale.detach().exp()
        # One wait for the device a step, before the weights change.
        value, size, factor = torch.stack([loss.detach(), norm, scale]).tolist()
        self.check_finite(value, size)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.inputs.model.clamp_logit_scale()
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

    def measure(self, bootstrap: int = 0) -> RetrievalReport:
        """Retrieval of the current weights on the validation split."""
        return measure_retrieval(
            self.inputs.model,
            self.inputs.val_pairs,
            self.inputs.val_images,
            self.inputs.tokenizer,
            self.evaluate,
            self.device,
            self.config.precision,
            bootstrap,
        )

    def validate(self, writer: MetricWriter) -> None:
        """Measure on the validation split; keep the best checkpoint."""
        report = self.measure()
        writer.write(self.state.step, {f"val/{k}": v for k, v in report.metrics.items()})
        better = report.metrics[WATCHED] > self.state.best
        self.state.validated = self.state.step
        if better:
            self.state.best = report.metrics[WATCHED]
            if is_main_process():
                save_bundle(self.paths.best, self.bundle, **self.about(), metrics=report.metrics)
        log.info(
            "step %d of %d: text->image R@1/5/10 %s, image->text %s%s",
            self.state.step,
            self.total_steps,
            recalls(report.metrics, "text_to_image"),
            recalls(report.metrics, "image_to_text"),
            "  (best so far)" if better else "",
        )
        barrier()

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
        """Save every `save_minutes`; save and stop after Ctrl-C or SIGTERM; on all ranks."""
        if world_size() > 1 and self.state.step % AGREE_EVERY:
            return
        late = time.monotonic() - self._saved > 60 * self.config.save_minutes
        signal_number, save = stop.agreed(late)
        if signal_number or save:
            self.save()
        if signal_number:
            again = " without train.overwrite" if self.config.overwrite else ""
            saved = f"saved step {self.state.step} to {self.paths.last}"
            raise Stopped(signal_number, f"{saved}; the same command{again} goes on")

    def save(self) -> None:
        """Write the newest checkpoint with all that a resumed run needs; every rank calls it."""
        about = self.about()
        tensors, training = resume.collect(self.state, self.optimizer, self.scaler)
        if is_main_process():
            finished = self.state.step >= self.total_steps == self.state.validated
            about |= {"finished": finished, "training": training}
            save_bundle(self.paths.last, self.bundle, training_tensors=tensors, **about)
        self._saved = time.monotonic()
        barrier()

    def resume(self) -> None:
        """Go on from the newest checkpoint, bit for bit as if the run had not stopped."""
        header, tensors = load_weights(self.paths.last, self.bundle)
        self.state = resume.restore(tensors, header["training"], self.optimizer, self.scaler)
        log.info("going on from step %d of %d", self.state.step, self.total_steps)


def recalls(metrics: dict[str, float], direction: str) -> str:
    """`24.6/52.6/62.9`: R@1, R@5 and R@10 of a direction, in percent."""
    return "/".join(f"{metrics[f'{direction}_R@{k}']:.1f}" for k in (1, 5, 10))
