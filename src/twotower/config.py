"""The config tree: every setting with its default, meaning, unit and range, and nothing else.

Hydra composes it (`hydra_app.py`), `to_config` checks it, and everything behind `commands/` takes
these typed values. Nothing writes into a config once it is made.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import ClassVar

from twotower.benchmark_config import BenchmarkConfig
from twotower.doctor_config import DoctorConfig
from twotower.encode_config import EncodeConfig, StoresConfig
from twotower.engine_config import EngineConfig
from twotower.index_config import IndexingConfig
from twotower.model_config import ModelConfig
from twotower.search_config import ClassifyConfig, FeedbackConfig, FilterConfig, SearchConfig
from twotower.settings import Choice, ConfigError, Section, setting
from twotower.train_config import LossConfig, TrainConfig

MAX_SEED = 2**32 - 1  # the largest that every library takes


class Device(enum.Enum):
    """Where the work runs; `auto` takes CUDA when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ExportFormat(enum.Enum):
    """What a checkpoint is written as for others."""

    openai = "openai"
    open_clip = "open_clip"
    hf = "hf"
    onnx = "onnx"


class Metric(enum.Enum):
    """How a query and a row are compared."""

    cosine = "cosine"
    ip = "ip"


@dataclass(kw_only=True)
class DataConfig(Choice):
    """What every data source shares; a source's own fields are in `data/<name>.py`."""

    section: ClassVar[str] = "data"


@dataclass(kw_only=True)
class IndexConfig(EngineConfig):
    """What every index shares; an index's own fields are in `retrieval/<name>.py`."""

    section: ClassVar[str] = "index"

    # What is searched together, where it lies and runs, and how it is searched; it changes no built
    # index.
    not_of_the_rows: ClassVar[tuple[str, ...]] = (
        "collections",
        "partition_by",
        "folder",
        *EngineConfig.not_of_the_answer,
    )

    metric: Metric = setting(Metric.cosine, "cosine, or ip for the plain inner product")
    collections: list[str] = setting(
        [],
        "what is searched, by name: stores in the folder store=..., or paths of stores; with "
        "partition_by values of its column; empty is all",
    )
    partition_by: str = setting(
        "", "column of the store of which each value makes a collection with an index of its own"
    )
    folder: str = setting(
        "",
        "folder of the saved index, which says by itself of what kind it is; by default the one "
        "beside the store",
    )


def check_run_name(name: str) -> None:
    """Make sure that a name is one folder below another.

    Raises:
        ConfigError: it is empty, has a slash in it, or means the folder itself or the one above.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ConfigError(
            f"run.name must be the name of one folder, without a slash, not {name!r}; "
            "run.models_dir and run.logs_dir say where it lies"
        )


@dataclass(kw_only=True)
class RunConfig(Section):
    """Where everything of a run is kept."""

    section: ClassVar[str] = "run"

    name: str = setting(
        "${twotower.run_name:}",
        "names logs/<name> and models/<name>; by default <model>-<data>-<hash of the config>",
    )
    wandb_project: str = setting("twotower", "Weights & Biases project of train.wandb=true")
    models_dir: str = setting("models", "folder of checkpoints and stores")
    logs_dir: str = setting("logs", "folder of logs, metrics and figures")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_run_name(self.name)


@dataclass(kw_only=True)
class DistributedConfig(Section):
    """Processes and devices of one machine; under torchrun its environment decides."""

    section: ClassVar[str] = "distributed"

    nproc_per_node: int = setting(
        1, "processes on this machine, one a GPU or a share of the cores", ge=1
    )
    device: Device = setting(Device.auto, "auto, cpu or cuda")
    num_threads: int = setting(0, "CPU threads a process; 0 shares the cores out evenly", ge=0)
    timeout_minutes: float = setting(
        30.0, "minutes that a collective may wait for a rank", gt=0, le=1_000_000
    )
    oversubscribe: bool = setting(False, "allow more processes than the machine has cores or GPUs")


@dataclass(kw_only=True)
class EvaluateConfig(Section):
    """Retrieval measured on one split."""

    section: ClassVar[str] = "evaluate"

    split: str = setting("val", "split to measure on")
    batch_size: int = setting(128, "images or captions a forward pass", ge=1)
    num_workers: int = setting(0, "processes that load images", ge=0)
    max_images: int = setting(0, "measure on the first so many images of the split; 0 is all", ge=0)
    bootstrap: int = setting(
        1000, "resamples over images behind the 95 % intervals; 0 gives none", ge=0
    )
    max_sentences: int = setting(20, "captions on the sheet of matches", ge=1, le=200)
    max_matches: int = setting(5, "pictures beside each of them", ge=1, le=50)


@dataclass(kw_only=True)
class ZeroShotConfig(Section):
    """Zero-shot classification of pictures whose class is known."""

    section: ClassVar[str] = "zeroshot"

    classes: str = setting(
        "",
        "file with a class a line (or the data's label, a tab, and words); empty: the data's own",
    )
    templates: str = setting(
        "openai80", "prompts: openai80, simple7 (quicker), or a file, one a line with {} in it"
    )
    top_k: list[int] = setting([1, 5], "classes that an image may be among to be a hit", ge=1)


@dataclass(kw_only=True)
class ProbeConfig(Section):
    """What a fine-tune should not forget: measured before the first step and at each validation.

    `data` is chosen like the training data, as in `data@probe.data=flickr8k`.
    """

    section: ClassVar[str] = "probe"

    data: DataConfig | None = dataclasses.field(
        default=None, metadata={"meaning": "a data source, chosen by data@probe.data=<name>"}
    )
    split: str = setting("val", "split of it to measure on")
    max_images: int = setting(0, "measure on the first so many of its images; 0 is all", ge=0)
    metric: str = setting("mean_recall", "watched metric, as text_to_image_R@10 or zeroshot_top1")


@dataclass(kw_only=True)
class ReportConfig(Section):
    """The comparison of runs."""

    section: ClassVar[str] = "report"

    runs: list[str] = setting([], "names of the runs to compare; empty is every measured run")


@dataclass(kw_only=True)
class Config:
    """Everything; each command reads its own sections."""

    model: ModelConfig
    data: DataConfig
    index: IndexConfig
    loss: LossConfig
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    doctor: DoctorConfig = dataclasses.field(default_factory=DoctorConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)
    zeroshot: ZeroShotConfig = dataclasses.field(default_factory=ZeroShotConfig)
    encode: EncodeConfig = dataclasses.field(default_factory=EncodeConfig)
    stores: StoresConfig = dataclasses.field(default_factory=StoresConfig)
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
    feedback: FeedbackConfig = dataclasses.field(default_factory=FeedbackConfig)
    classify: ClassifyConfig = dataclasses.field(default_factory=ClassifyConfig)
    filtering: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    indexing: IndexingConfig = dataclasses.field(default_factory=IndexingConfig)
    benchmark: BenchmarkConfig = dataclasses.field(default_factory=BenchmarkConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    seed: int = setting(1, "seed of everything random")
    checkpoint: str = setting(
        "",
        "checkpoint file, or wandb:<entity>/<project>/<name>:<version>; by default the run's best",
    )
    store: str = setting("", "embedding store folder; by default that of the run")
    format: ExportFormat = setting(
        ExportFormat.openai,
        "openai (a file for clip.load), open_clip, hf (folders), or onnx (one graph a tower)",
    )

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, not {self.seed}")
        if self.seed > MAX_SEED:
            raise ConfigError(f"seed must be at most {MAX_SEED}, not {self.seed}")


@dataclass(frozen=True, kw_only=True)
class FreeText:
    """Words that never pass through Hydra's grammar; None where not given."""

    verb: str | None = None
    query: str | None = None
    query_image: str | None = None
    query_file: str | None = None
    filter: str | None = None
    path: str | None = None
    output: str | None = None
    compare: str | None = None
