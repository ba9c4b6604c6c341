from pathlib import Path

import pytest

from twotower.data import DATASETS
from twotower.data.folder import CaptionsFrom, FolderConfig
from twotower.hydra_app import compose


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_source_can_be_chosen_by_its_name(name: str) -> None:
    data = compose([f"data={name}"]).data
    assert type(data) is DATASETS.config_class(name)
    assert data == DATASETS.config_class(name)()


def test_every_yaml_of_the_group_is_a_source_or_a_preset() -> None:
    folder = Path(__file__).parents[2] / "conf/data"
    assert {path.stem for path in folder.glob("*.yaml")} == {*DATASETS, "image_text"}
    assert compose(["data=image_text"]).data == FolderConfig(captions=CaptionsFrom.text)


def test_every_source_stands_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    made_here = {"openmoji", "synthetic"}
    assert [name for name in {*DATASETS} - made_here if f"`{name}`" not in page] == []
