"""Where numbers and figures go: TensorBoard events, `metrics.jsonl` and, if asked, W&B."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.wandb_run import WandbRun


def _is_kept(line: str, done: int, *, validated: bool) -> bool:
    """Whether a record stands after a resume; a line that a kill cut short does not."""
    try:
        record = json.loads(line)
        step = int(record["step"])
    except (ValueError, KeyError, TypeError):
        return False
    again = not validated and any(name.startswith(("val/", "probe/")) for name in record)
    return step < done or (step == done and not again)


class MetricWriter:
    """Writes what a run measures to `folder`; on other ranks than the first it writes nothing.

    A line of `metrics.jsonl` is one call of `write`: {"step": 1, "time": 1.7e9, name: value};
    times are seconds since the epoch. What a resumed run writes again replaces what was there:
    the steps after `done`, and step `done`'s validation if it is not `validated`. A `wandb` run
    gets everything too; who opened it closes it.
    """

    def __init__(
        self,
        folder: Path,
        done: int = 0,
        main: bool = True,
        wandb: WandbRun | None = None,
        *,
        validated: bool = True,
    ) -> None:
        self._tensorboard: Any = None
        self._wandb = wandb
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        purge = done + 1 if done else None
        self._tensorboard = SummaryWriter(str(folder), purge_step=purge)
        path = folder / "metrics.jsonl"
        kept = [] if not path.is_file() else path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in kept if _is_kept(line, done, validated=validated)]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._lines = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values by name (`train/loss`, `val/text_to_image_R@10`) at a step."""
        if self._tensorboard is None:
            return
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        record = {"step": step, "time": round(time.time(), 3), **values}
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        if self._wandb is not None:
            self._wandb.write(step, values)

    def image(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        """Record a picture (H, W, 3) by name (`figures/matches`) at a step."""
        if self._tensorboard is None:
            return
        self._tensorboard.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.image(name, pixels, step)

    @property
    def takes_tables(self) -> bool:
        """Whether `table` records anything: only W&B has tables."""
        return self._wandb is not None

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], step: int
    ) -> None:
        """Record a table by name at a step; its cells are text, numbers, pictures or None."""
        if self._wandb is not None:
            self._wandb.table(name, columns, rows, step)

    def close(self) -> None:
        """Flush and close both files."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._lines.close()
            self._tensorboard = None

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
