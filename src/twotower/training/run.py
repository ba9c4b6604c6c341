"""A run as asked for: reuse what is finished, refuse what is another's, go on or begin."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from twotower.checkpoint.atomic import replacing
from twotower.checkpoint.native import file_sha256, read_header
from twotower.config import Config
from twotower.data.pairs import load_pairs
from twotower.distributed import is_main_process, on_main
from twotower.evaluation.examined import examined
from twotower.evaluation.published import publish_checkpoint, publish_data
from twotower.evaluation.report import describe, report_path, write_report
from twotower.launch import launch
from twotower.models.saved import load_weights
from twotower.provenance import PROVENANCE, record_attempt
from twotower.runs import NOTE, RunPaths
from twotower.settings import ConfigError, to_plain
from twotower.training.build import build_trainer
from twotower.training.kept import older_checkpoints
from twotower.training.trainer import recalls
from twotower.training.wise_ft import write_wise_ft
from twotower.wandb_files import import_wandb
from twotower.wandb_run import wandb_run

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
    decides = config.train.stop_on_forgetting or config.train.wise_ft
    if (decides or config.train.watch.startswith("probe/")) and config.probe.data is not None:
        source = {"source": config.probe.data.registered_name, **to_plain(config.probe.data)}
        asked["probe."] = {"data": source, "split": config.probe.split}
        asked["probe."] |= {"metric": config.probe.metric, "max_images": config.probe.max_images}
    if "zeroshot" in config.train.watch + config.probe.metric:
        asked["zeroshot."] = to_plain(config.zeroshot)
    start = Path(config.train.start_from)
    if start.is_file():  # the same path may hold other weights; a run can go on without the file
        asked["the weights of "] = {"train.start_from": file_sha256(start)}
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


def remove_partial(paths: RunPaths) -> None:
    """Take away what a killed save left beside the checkpoints."""
    for partial in paths.models.glob(".*.tmp"):
        partial.unlink(missing_ok=True)


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
        figures = [*paths.logs.glob("figures/*.png"), *paths.logs.glob("wise_ft.*")]
        weights = [paths.last, paths.best, paths.first, paths.wise_ft]
        for old in (
            *(*curves, *reports, *figures, *weights, paths.logs / "wandb.json"),
            *older_checkpoints(paths.models),
        ):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from error
    with replacing(paths.models / NOTE) as partial:
        partial.write_text(json.dumps(asked_for(config), indent=2) + "\n")


def train_on_rank(config: Config) -> str:
    """A whole run on this rank; every rank calls it. Returns what `decide` decided."""
    start = time.monotonic()
    paths = RunPaths.of(config)
    report = report_path(paths.logs, config)
    decision = on_main(decide, config)
    # A finished run lacks its report or its sweep when it was killed over them.
    wanted = [report, *([paths.wise_ft] if config.train.wise_ft else [])]
    if decision == "reuse" and on_main(lambda: all(path.is_file() for path in wanted)):
        return decision
    source = load_pairs(config.data)
    trainer = build_trainer(config, source)
    if decision == "start":
        on_main(clear, config)
    else:
        trainer.resume()
    if decision != "reuse":
        on_main(remove_partial, paths)
        on_main(record_attempt, paths.models / PROVENANCE, config, decision)
    trainer.state.seconds += time.monotonic() - start
    if decision != "reuse":
        with wandb_run(config, resumed=decision == "resume") as online:
            if online is not None:
                publish_data(online, source, config.data.registered_name, paths.logs)
            trainer.run(online)
            if online is not None:
                publish_checkpoint(online, paths.best, paths.models.name)
    if config.train.wise_ft and not on_main(paths.wise_ft.is_file):
        write_wise_ft(trainer)
    # The report is of the best weights, which need not be the last.
    load_weights(paths.best, trainer.bundle)
    retrieval, zeroshot = trainer.validator.reports(trainer.inputs.val, config.evaluate.bootstrap)
    if is_main_process():
        seconds = float(read_header(paths.last)["seconds"])
        how = config.evaluate
        measured = examined(source, how.split, how.max_images, config.zeroshot).pairs
        about = describe(trainer.bundle, paths.best, config, seconds, measured)
        write_report(report, retrieval.report if retrieval else None, zeroshot, **about)
    return decision


def train(config: Config) -> float | None:
    """Train the run of a config, or say that it is finished; its best watched metric.

    None on every rank but the first.

    Raises:
        ConfigError: the data, the model or the run's folder is not as asked for.
    """
    if config.train.wandb:
        import_wandb("train.wandb=true")
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
    watched: float = best["watched"]
    return watched
