"""A run as asked for: reuse what is finished, refuse what is another's, go on or begin."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import torch

from twotower.checkpoint.atomic import replacing
from twotower.checkpoint.native import read_header
from twotower.config import Config, ZeroShotConfig
from twotower.data.pairs import PairTable, load_pairs
from twotower.distributed import (
    is_main_process,
    launch,
    on_main,
    rank,
    resolve_device,
    world_size,
)
from twotower.evaluation.prompts import zeroshot_prompts
from twotower.evaluation.report import describe, report_path, write_report
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.models.saved import load_weights, save_bundle
from twotower.provenance import PROVENANCE, record_attempt
from twotower.runs import NOTE, RunPaths
from twotower.settings import ConfigError, to_plain
from twotower.training.inputs import Examined, prepare_inputs
from twotower.training.kept import older_checkpoints
from twotower.training.loss import LOSSES
from twotower.training.trainer import Trainer, recalls
from twotower.training.wise_ft import choose, interpolate, put, sweep, write_sweep

log = logging.getLogger(__name__)


def asked_for(config: Config) -> dict[str, dict[str, object]]:
    """What decides a run's result, as JSON: the sections that the default name hashes."""
    train = to_plain(config.train)
    for key in config.train.not_in_run_name:
        train.pop(key)
    asked: dict[str, dict[str, object]] = {
        "": {"seed": config.seed},
        "model.": {"variant": config.model.registered_name, **to_plain(config.model)},
        "data.": {"source": config.data.registered_name, **to_plain(config.data)},
        "loss.": {"loss": config.loss.registered_name, **to_plain(config.loss)},
        "train.": train,
        "evaluate.": {"split": config.evaluate.split, "max_images": config.evaluate.max_images},
    }
    if config.train.stop_on_forgetting and config.probe.data is not None:
        source = {"source": config.probe.data.registered_name, **to_plain(config.probe.data)}
        asked["probe."] = {"data": source, "split": config.probe.split}
        asked["probe."] |= {"metric": config.probe.metric, "max_images": config.probe.max_images}
    return asked


def check_same_run(config: Config) -> None:
    """Refuse a run folder that holds a run with another config.

    Raises:
        ConfigError: it names the keys that differ.
    """
    paths = RunPaths.of(config)
    try:
        theirs = json.loads((paths.models / NOTE).read_text())
    except (OSError, ValueError):
        raise ConfigError(
            f"{paths.models} holds checkpoints, but its {NOTE} is missing or damaged; choose "
            "another run.name, or train.overwrite=true begins anew"
        ) from None
    ours = json.loads(json.dumps(asked_for(config)))
    changed = [
        f"{section}{key}"
        for section, values in ours.items()
        for key in values
        if theirs.get(section, {}).get(key) != values[key]
    ]
    if changed:
        raise ConfigError(
            f"{paths.models} holds a run with another config ({', '.join(changed)}); "
            "choose another run.name, or train.overwrite=true replaces it"
        )


def decide(config: Config) -> str:
    """What is to be done: `reuse` a finished run, `resume` one that was stopped, or `start`.

    Raises:
        ConfigError: the folder holds another run, or an unfinished one that is not to go on.
    """
    paths = RunPaths.of(config)
    if config.train.overwrite or not (paths.last.is_file() or paths.best.is_file()):
        return "start"
    check_same_run(config)
    if not paths.last.is_file():
        return "start"
    if read_header(paths.last)["finished"]:
        return "reuse"
    if config.train.resume:
        return "resume"
    raise ConfigError(
        f"{paths.models} holds an unfinished run; train.resume=true goes on with it, "
        "train.overwrite=true begins anew"
    )


def clear(config: Config) -> None:
    """Make room for a run that is ready to start: take away what an earlier one left.

    Raises:
        ConfigError: the folders cannot be written.
    """
    paths = RunPaths.of(config)
    try:
        paths.models.mkdir(parents=True, exist_ok=True)
        paths.logs.mkdir(parents=True, exist_ok=True)
        curves = [*paths.logs.glob("events.out.tfevents.*"), paths.logs / "metrics.jsonl"]
        reports = [*paths.logs.glob("evaluate/*.json")]
        for old in (
            *curves,
            *reports,
            *older_checkpoints(paths.models),
            paths.last,
            paths.best,
            paths.first,
        ):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from error
    with replacing(paths.models / NOTE) as partial:
        partial.write_text(json.dumps(asked_for(config), indent=2) + "\n")


def start_bundle(config: Config) -> ModelBundle:
    """The model as the run finds it: as `model=` says, with the weights of `train.start_from`.

    Raises:
        ConfigError: it cannot be built, or the checkpoint is of another variant.
    """
    bundle = MODELS.build(config.model)
    if config.train.start_from:
        load_weights(Path(config.train.start_from), bundle)
    return bundle


def examined(source: PairTable, split: str, max_images: int, zeroshot: ZeroShotConfig) -> Examined:
    """The pairs of a split that are measured on, and their classes' prompts."""
    pairs = source.split(split).with_captions().head(max_images)
    return Examined(pairs, zeroshot_prompts(zeroshot, source, pairs))


def probe_of(config: Config) -> Examined | None:
    """What the probe measures on, or None without a probe.

    Raises:
        ConfigError: the run is to end on forgetting and there is no probe, or its data is missing.
    """
    probe = config.probe
    if probe.data is None:
        if config.train.stop_on_forgetting:
            raise ConfigError(
                "train.stop_on_forgetting needs a probe; choose its data with data@probe.data=..."
            )
        return None
    return examined(load_pairs(probe.data), probe.split, probe.max_images, config.zeroshot)


def build_trainer(config: Config) -> Trainer:
    """Everything of a run, built the same way on every rank.

    Raises:
        ConfigError: the data or the model is not as asked for.
    """
    device = resolve_device(config.distributed)
    pairs = load_pairs(config.data).with_captions()
    torch.manual_seed(config.seed)
    bundle = start_bundle(config)
    loss = LOSSES.build(config.loss)
    if loss.initial is not None:
        bundle.model.start_temperature(*loss.initial)
    # From here on each rank draws its own dropout; the data's order is drawn by seed and epoch.
    torch.manual_seed(config.seed * 1009 + rank())
    cache = Path(config.run.models_dir) / "features"
    how = config.evaluate
    val = examined(pairs, how.split, how.max_images, config.zeroshot)
    inputs = prepare_inputs(
        bundle,
        pairs.split("train"),
        val,
        config.train,
        config.seed,
        device,
        cache,
        probe_of(config),
    )
    trainable = sum(p.numel() for p in inputs.model.parameters() if p.requires_grad)
    log.info(
        "%s: %d training and %d validation images, %s trainable parameters, on %d x %s",
        pairs.name,
        len(inputs.train),
        len(inputs.val.pairs),
        f"{trainable:,}",
        world_size(),
        device.type,
    )
    return Trainer(
        bundle,
        inputs,
        loss,
        config.train,
        config.evaluate,
        config.probe,
        config.seed,
        RunPaths.of(config),
        device,
    )


def train_on_rank(config: Config) -> str:
    """A whole run on this rank; every rank calls it. Returns what `decide` decided."""
    start = time.monotonic()
    paths = RunPaths.of(config)
    report = report_path(paths.logs, config)
    decision = on_main(decide, config)
    if decision == "reuse" and on_main(report.is_file):
        return decision
    trainer = build_trainer(config)
    if decision == "start":
        on_main(clear, config)
    elif decision == "resume":
        trainer.resume()
    if decision != "reuse":
        on_main(record_attempt, paths.models / PROVENANCE, config, decision)
    trainer.state.seconds += time.monotonic() - start
    if decision != "reuse":
        trainer.run()
        if config.train.wise_ft:
            write_wise_ft(trainer)
    # The report is of the best weights, which need not be the last. A finished run lacks it when
    # it was killed here.
    load_weights(paths.best, trainer.bundle)
    measured = trainer.validator.retrieval(trainer.inputs.val, config.evaluate.bootstrap).report
    if is_main_process():
        seconds = float(read_header(paths.last)["seconds"])
        about = describe(trainer.bundle, paths.best, config, seconds)
        write_report(report, measured, **about)
    return decision


def write_wise_ft(trainer: Trainer) -> None:
    """Measure between the first and the last weights; keep the chosen ones; every rank calls it."""
    paths, bundle = trainer.paths, trainer.bundle
    names = [trainer.config.watch]
    if trainer.inputs.probe is not None:
        names.append(f"probe/{trainer.probe.metric}")
    with trainer.stepper.averaged():
        last = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
        load_weights(paths.first, bundle)
        first = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
        points = sweep(bundle.model, first, last, lambda: trainer.validator.metrics()[0])
        chosen = choose(points, names)
        if is_main_process():
            write_sweep(paths.logs, points, names, chosen)
            put(bundle.model, interpolate(first, last, chosen))
            save_bundle(paths.wise_ft, bundle, run=paths.models.name, alpha=chosen)
            put(bundle.model, last)
            log.info(
                "WiSE-FT: alpha %g is in %s; all of them: %s", chosen, paths.wise_ft, paths.logs
            )


def train(config: Config) -> float | None:
    """Train the run of a config, or say that it is finished; its best watched metric.

    None on every rank but the first.

    Raises:
        ConfigError: the data, the model or the run's folder is not as asked for.
    """
    paths = RunPaths.of(config)
    decision = launch(train_on_rank, config.distributed, config)
    if not is_main_process():
        return None
    best, last = read_header(paths.best), read_header(paths.last)
    log.info(
        "%s %s: %d steps in %.0f s; best at step %d: text->image R@1/5/10 %s, image->text %s\n"
        "checkpoint %s; curves: tensorboard --logdir %s",
        "reusing the finished run" if decision == "reuse" else "finished",
        paths.models.name,
        last["step"],
        last["seconds"],
        best["step"],
        recalls(best["metrics"], "text_to_image"),
        recalls(best["metrics"], "image_to_text"),
        paths.best,
        config.run.logs_dir,
    )
    watched: float | None = best["metrics"].get(config.train.watch.removeprefix("val/"))
    return watched
