import pytest

from twotower.data import DATASETS
from twotower.hydra_app import compose


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_source_can_be_chosen_by_its_name(name: str) -> None:
    data = compose([f"data={name}"]).data
    assert type(data) is DATASETS.config_class(name)
    assert data == DATASETS.config_class(name)()
