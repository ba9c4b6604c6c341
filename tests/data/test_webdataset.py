import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import fsspec
import pytest
from torch.utils.data import DataLoader

from tests.data.pictures import png
from tests.data.test_tars import write_tar
from tests.helpers import HashTokenizer, SquareTransform
from twotower.data import webdataset
from twotower.data.images import decode_image
from twotower.data.pairs import Collate, ImageTextDataset, PairTable
from twotower.data.tar_names import expand_braces
from twotower.data.webdataset import WebdatasetConfig, load_webdataset
from twotower.settings import ConfigError
from twotower.training.sampler import GlobalBatchSampler

SAMPLES = 8  # a tar


def colour(number: int) -> tuple[int, int, int]:
    return (number * 5, 255 - number * 5, 100)


def members(tar: int) -> list[tuple[str, bytes]]:
    """What img2dataset writes."""
    made = []
    for sample in range(SAMPLES):
        key, number = f"{tar:05}{sample:04}", tar * SAMPLES + sample
        about = {"caption": f"square {number}", "url": f"http://x/{number}", "key": key}
        about |= {"status": "success", "error_message": None, "width": 4, "height": 4}
        made += [(f"{key}.jpg", png(colour(number)))]
        made += [(f"{key}.txt", f"square {number}".encode())]
        made += [(f"{key}.json", json.dumps(about).encode())]
    return made


def write_tars(folder: Path, count: int) -> None:
    for tar in range(count):
        write_tar(folder / f"{tar:05}.tar", members(tar))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(tars: str, **settings: object) -> PairTable:
    return load_webdataset(WebdatasetConfig(tars=tars, **settings))


def refusal(tars: str, **settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tars, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def colours(pairs: PairTable) -> list[object]:
    return [decode_image(pairs.path(row)).getpixel((1, 1)) for row in range(len(pairs))]


def test_what_img2dataset_writes(home: Path) -> None:
    write_tars(home / "data", 3)
    pairs = load("data/{00000..00002}.tar", val_fraction=0.25)
    numbers = range(3 * SAMPLES)
    assert pairs.table["captions"].to_pylist() == [[f"square {n}"] for n in numbers]
    assert pairs.table["url"].to_pylist() == [f"http://x/{n}" for n in numbers]
    assert colours(pairs) == [colour(n) for n in numbers]
    assert len(pairs.split("val")) == 6
    assert pairs.path(9).name == "000010001.jpg"
    assert "caption" not in pairs.table.column_names
    assert pairs.table["key"].to_pylist()[9] == "000010001"


def test_braces_stars_folders_and_tars_that_validate(home: Path) -> None:
    write_tars(home / "data", 3)
    assert expand_braces("{a,b}/{08..10}.tar")[2:4] == ["a/10.tar", "b/08.tar"]
    whole = load("data/{00000..00002}.tar").table
    for pattern in (
        "data",
        "data/*.tar",
        f"file://{home}/data",
        "data/00000.tar::data/{00001,00002}.tar",
    ):
        assert load(pattern).table == whole
    pairs = load("data/{00000..00001}.tar", val_tars="data/00002.tar")
    assert pairs.table["split"].to_pylist() == ["train"] * 2 * SAMPLES + ["val"] * SAMPLES


def test_every_sample_has_an_id_of_its_own(home: Path) -> None:
    for split in ("train", "val"):  # as many are laid out: the same names in two folders
        write_tar(home / split / "00000.tar", members(0))
    pairs = load("train", val_tars="val")
    ids = pairs.table["image_id"].to_pylist()
    assert ids[0] == "train/00000/000000000" and len(set(ids)) == 2 * SAMPLES
    write_tar(home / "twice.tar", [*members(0), *members(0)])
    assert len(set(load("twice.tar").table["image_id"].to_pylist())) == 2 * SAMPLES


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tars that are indexed, as it happens."""
    names: list[str] = []
    index_tar = webdataset.index_tar

    def told(path: Path, *keys: str) -> object:
        names.append(path.name)
        return index_tar(path, *keys)

    monkeypatch.setattr(webdataset, "index_tar", told)
    return names


def test_an_index_is_made_once_and_anew_when_the_tar_changes(
    home: Path, indexed: list[str]
) -> None:
    write_tars(home / "data", 2)
    first = load("data")
    assert load("data").table == first.table and len(indexed) == 2
    write_tar(home / "data/00001.tar", members(7)[:3])
    os.utime(home / "data/00001.tar", ns=(1, 1))
    assert len(load("data")) == SAMPLES + 1
    assert indexed[2:] == ["00001.tar"]
    assert len(load("data", caption_key="json.url")) == SAMPLES + 1 and len(indexed) == 5


def test_ranks_that_start_together_index_a_tar_once(home: Path, indexed: list[str]) -> None:
    write_tars(home / "data", 3)
    with ThreadPoolExecutor(3) as pool:
        tables = [pairs.table for pairs in pool.map(load, ["data"] * 3)]
    assert sorted(indexed) == ["00000.tar", "00001.tar", "00002.tar"]
    assert tables[0] == tables[1] == tables[2]


def test_remote_tars_are_copied_once(home: Path) -> None:
    system = fsspec.filesystem("memory")
    write_tars(home / "data", 2)
    system.put(str(home / "data"), "/bucket/set", recursive=True)
    local = load("data")
    remote = load("memory://bucket/set/{00000..00001}.tar")
    assert colours(remote) == colours(local)
    assert remote.table.drop_columns("filepath") == local.table.drop_columns("filepath")
    assert len(load("memory://bucket/set/*.tar")) == 2 * SAMPLES
    system.rm("/bucket", recursive=True)
    assert len(load("memory://bucket/set/{00000..00001}.tar")) == 2 * SAMPLES
    assert refusal("memory://bucket/set/00002.tar") == (
        "there is no tar memory://bucket/set/00002.tar"
    )
    assert "cannot be opened: Protocol not known: nowhere" in refusal("nowhere://x/0.tar")
    assert refusal("memory://none/*.tar").startswith("memory://none/*.tar has no tars")


def test_fields_whose_types_differ_between_tars_become_text(home: Path) -> None:
    for tar, width in enumerate([1, "wide", None]):
        about = {"width": width, f"only{tar}": tar}
        one = [("0.png", png((1, 1, 1))), ("0.json", json.dumps(about).encode())]
        write_tar(home / f"data/{tar}.tar", one)
    table = load("data").table
    assert table["width"].to_pylist() == ["1", "wide", None]
    assert table["only1"].to_pylist() == [None, 1, None]


def test_three_ranks_with_two_workers_each_give_every_sample_once_an_epoch(home: Path) -> None:
    write_tars(home / "data", 3)
    data = ImageTextDataset(load("data"), SquareTransform(4))

    def of_rank(rank: int, epoch: int, done: int = 0) -> list[list[int]]:
        """The numbers on the pictures that a rank gets, batch by batch."""
        sampler = GlobalBatchSampler(data.owner, 6, 0, rank=rank, world=3)
        sampler.set_position(epoch, done)
        collate = Collate(HashTokenizer())
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=2)
        return [(batch.images[:, 0, 0, 0] // 5).tolist() for batch in loader]

    ranks = [of_rank(rank, epoch=0) for rank in range(3)]
    assert sorted(chain(*chain(*ranks))) == list(range(3 * SAMPLES))
    assert [len(batches) for batches in ranks] == [4, 4, 4]
    next_epoch = of_rank(0, epoch=1)
    assert next_epoch != ranks[0]
    assert of_rank(0, epoch=1, done=3) == next_epoch[3:]


def test_each_mistake_has_its_sentence(home: Path) -> None:
    write_tars(home / "data", 1)
    assert refusal("").startswith("data.tars is not given; set it to tars, as in data.tars='data/{")
    assert refusal("data/{00000..00001}.tar").startswith("there is no tar data/00001.tar; data.t")
    assert refusal("no/*.tar").startswith("no/*.tar has no tars")
    assert "{3..1} runs backwards" in refusal("data/{3..1}.tar")
    assert refusal("data::data").endswith("00000.tar is named twice in data.tars and data.val_tars")
    assert refusal("data", image_key="webp") == (
        "no tar of data has pictures under data.image_key=webp"
    )
    assert refusal("data", image_key=" ").startswith("data.image_key is empty")
    (home / "file").touch()
    assert "data.cache=file/x cannot be written (Not a directory)" in refusal(
        "data", cache="file/x"
    )
