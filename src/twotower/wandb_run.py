"""A run at Weights & Biases: metrics, figures, tables, and what went in and came out."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from twotower.config import Config
from twotower.distributed import is_main_process
from twotower.runs import RunPaths
from twotower.settings import Choice, ConfigError, Section, to_plain
from twotower.wandb_files import import_wandb, parse_reference

log = logging.getLogger(__name__)

NOTE = "wandb.json"
SECTIONS = ("model", "data", "loss", "train", "evaluate", "zeroshot", "distributed", "seed")


class WandbRun:
    """One run at W&B, or in `folder`/wandb where WANDB_MODE=offline (`wandb sync` sends it later).

    Args:
        folder: of the run's logs; a file in it keeps the id, so that a resumed run goes on there.
        config: what was asked for, as JSON can hold it.
        resumed: go on with the run of that id; else it is a new one.

    Raises:
        ConfigError: wandb is not installed, or W&B cannot be reached or does not know who asks.
    """

    def __init__(
        self,
        project: str,
        name: str,
        folder: Path,
        config: Mapping[str, Any],
        *,
        resumed: bool = False,
    ) -> None:
        self._wandb = import_wandb("train.wandb=true")
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / NOTE
        known = json.loads(note.read_text()) if resumed and note.is_file() else {}
        run_id = str(known.get("id") or secrets.token_hex(8))
        try:
            self._run = self._wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=dict(config),
                # The run has its own log; its lines are not for W&B to catch.
                settings=self._wandb.Settings(console="off", silent=True),
            )
        except self._wandb.errors.Error as error:
            raise ConfigError(
                f"Weights & Biases cannot be used ({str(error).strip().splitlines()[0]}); run "
                "`wandb login`, or set WANDB_MODE=offline, or leave train.wandb=true away"
            ) from error
        note.write_text(json.dumps({"id": run_id, "project": project}) + "\n")
        # A step of our own: a resumed run may come past steps again, which W&B's refuses.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values by name at a step."""
        self._run.log({**values, "step": step})

    def image(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        """Record a picture (H, W, 3) at a step."""
        self._run.log({name: self._wandb.Image(pixels), "step": step})

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], step: int
    ) -> None:
        """Record a table at a step; its cells are text, numbers, pictures or None."""
        cells = [
            [self._wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row]
            for row in rows
        ]
        table = self._wandb.Table(columns=list(columns), data=cells)
        self._run.log({name: table, "step": step})

    def uses(self, given: str) -> None:
        """Say that the run reads an artifact (`wandb:...`); offline, nothing can be said."""
        reference = parse_reference(given)
        if reference is None or self._run.offline:
            return
        try:
            self._run.use_artifact(reference.artifact)
        except self._wandb.errors.Error as error:  # what is read is there all the same
            log.warning("W&B does not note that %s is read: %s", reference.artifact, error)

    def artifact(
        self,
        file: Path,
        name: str,
        kind: str,
        metadata: Mapping[str, Any],
        aliases: Sequence[str] = ("latest",),
    ) -> None:
        """Hand over a file as a version of the artifact `name`; a copy is taken at once."""
        artifact = self._wandb.Artifact(
            artifact_name(name), type=kind, metadata=json.loads(json.dumps(dict(metadata)))
        )
        artifact.add_file(str(file))
        self._run.log_artifact(artifact, aliases=list(aliases))

    def finish(self, *, failed: bool = False) -> None:
        """Send what is left and close the run."""
        self._run.finish(exit_code=int(failed))


def artifact_name(name: str) -> str:
    """A name that W&B takes: letters, digits, dots, dashes and underscores, at most 128."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:128]


def _asked_for(config: Config) -> dict[str, Any]:
    """What training reads of a config, as JSON can hold it; a choice with the name of it."""
    asked: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(config) if field.name in SECTIONS):
        value = getattr(config, name)
        asked[name] = to_plain(value) if isinstance(value, Section) else value
        if isinstance(value, Choice):
            asked[name]["name"] = value.registered_name
    return asked


@contextmanager
def wandb_run(config: Config, *, resumed: bool) -> Iterator[WandbRun | None]:
    """The W&B run of a training run, closed at the end; None where it is not asked for.

    Every rank may enter it; the first alone gets a run.

    Raises:
        ConfigError: as `WandbRun`.
    """
    if not config.train.wandb or not is_main_process():
        yield None
        return
    asked = _asked_for(config)
    logs = RunPaths.of(config).logs
    run = WandbRun(config.run.wandb_project, config.run.name, logs, asked, resumed=resumed)
    failed = True
    try:
        for value in (*asked["model"].values(), *asked["data"].values()):
            if isinstance(value, str):
                run.uses(value)
        yield run
        failed = False
    finally:
        run.finish(failed=failed)
