"""The BERT that the model tests make, for these tests too."""

from tests.models.conftest import bert

__all__ = ["bert"]
