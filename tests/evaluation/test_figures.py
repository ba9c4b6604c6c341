"""What the figures show is what the metrics say, at the same places at every validation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from twotower import metrics
from twotower.config import EvaluateConfig
from twotower.data.pairs import Pair, PairTable
from twotower.drawing import default_font, line_height, wrap
from twotower.evaluation import figures
from twotower.evaluation.features import PairFeatures
from twotower.evaluation.figures import draw_figures, draw_matches, draw_matrix, match_table
from twotower.evaluation.matches import (
    choose_captions,
    cosines,
    distinct_pairs,
    find_matches,
)
from twotower.settings import ConfigError
from twotower.tracking import MetricWriter

IMAGES = 30
SENTENCE = (
    "a small brown and white dog with a red collar jumps over a wooden fence in a green "
    "field behind an old house while two children in blue jackets and a woman with straw hat "
    "watch from the other side"
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairTable:
    """Thirty pictures, each of one colour that tells its number, two captions each."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(IMAGES):
        Image.new("RGB", (40, 40), colour(number)).save(folder / f"{number}.png")
        texts = (f"picture {number}", "one of those that are alike" if number % 5 else SENTENCE)
        rows += [Pair(f"{number}.png", text, "val", str(number)) for text in texts]
    return PairTable.from_pairs(rows, folder, "colours")


def colour(number: int) -> tuple[int, int, int]:
    return (40 + 5 * number, 255 - 8 * number, 100)


def features(pairs: PairTable, noise: float = 0.8, *, skip: int = 0) -> PairFeatures:
    """As measured, with the first `skip` pictures unreadable."""
    generator = torch.Generator().manual_seed(0)
    captions, owner = pairs.all_captions()
    kept = (owner >= skip).nonzero()[:, 0]
    images = F.normalize(torch.randn(len(pairs) - skip, 8, generator=generator), dim=1)
    owner = owner[kept] - skip
    texts = images[owner] + noise * torch.randn(len(kept), 8, generator=generator)
    return PairFeatures(
        images=images,
        texts=F.normalize(texts, dim=1),
        owner=owner,
        rows=torch.arange(skip, len(pairs)),
        captions=[captions[number] for number in kept],
        unreadable=skip,
    )


def test_captions_are_of_different_images_as_long_as_there_are_any() -> None:
    owner = torch.arange(60) // 3
    for seed in range(5):
        twenty = choose_captions(owner, 20, seed)
        assert len({int(owner[number]) for number in twenty}) == 20
        assert twenty == choose_captions(owner, 20, seed) != choose_captions(owner, 20, seed + 1)
        assert choose_captions(owner, 7, seed) == twenty[:7]
        many = choose_captions(owner, 50, seed)
        assert many[:20] == twenty and len(set(many)) == 50
        assert sorted(choose_captions(owner, 99, seed)) == list(range(60))
    assert distinct_pairs(owner, 8, 0) == choose_captions(owner, 8, 0)
    few = distinct_pairs(torch.tensor([0, 0, 1, 1, 1]), 8, 0)
    assert few == choose_captions(torch.tensor([0, 0, 1, 1, 1]), 2, 0)


def test_matches_are_those_of_a_loop_and_ranks_those_of_the_metrics(pairs: PairTable) -> None:
    found = features(pairs, skip=3)
    chosen = choose_captions(found.owner, 20, seed=4)
    matches = find_matches(found, pairs, chosen, 5)
    ranks = metrics.text_to_image_ranks(found.images, found.texts, found.owner)
    assert [match.rank for match in matches] == ranks[chosen].tolist()
    assert 1 in ranks and max(ranks) > 5
    for number, match in zip(chosen, matches, strict=True):
        scores = {
            pairs.path(int(found.rows[image])): float(found.texts[number] @ found.images[image])
            for image in range(len(found.images))
        }
        best = sorted(scores, key=lambda path: -scores[path])[:5]
        own = pairs.path(int(found.rows[found.owner[number]]))
        assert [shown.path for shown in match.found] == best
        assert [shown.score for shown in match.found] == pytest.approx([scores[p] for p in best])
        assert [shown.own for shown in match.found] == [path == own for path in best]
        assert match.own.path == own and match.own.own
        assert any(shown.own for shown in match.found) == (match.rank <= 5)
        texts = {path: pairs.captions(int(path.stem)) for path in best}
        alike = [path != own and match.caption in texts[path] for path in best]
        assert [shown.same for shown in match.found] == alike
    assert any(shown.same for match in matches for shown in match.found)


def test_equal_scores_come_in_the_order_of_their_rank(pairs: PairTable) -> None:
    found = features(pairs)
    collapsed = PairFeatures(
        images=torch.ones(IMAGES, 8),
        texts=torch.ones(2 * IMAGES, 8),
        owner=found.owner,
        rows=found.rows,
        captions=found.captions,
        unreadable=0,
    )
    for match in find_matches(collapsed, pairs, [2, 50], 5):
        assert [shown.path.stem for shown in match.found] == ["0", "1", "2", "3", "4"]
        assert match.rank == int(match.own.path.stem) + 1


def place(number: int) -> int:
    """Where the middle of a column is."""
    left = 2 * figures.GAP + figures.CAPTION
    return left + number * (figures.PICTURE + figures.GAP) + figures.PICTURE // 2


def framed(pixels: np.ndarray, x: int, y: int) -> str:
    """The colour of the frame above the middle (x, y) of a picture."""
    top = y - figures.PICTURE // 2
    above = {tuple(pixel) for pixel in pixels[top - 3 : top, x].tolist()}
    below_edge = tuple(pixels[top - figures.THIN, x].tolist())
    for name, code in (("right", figures.RIGHT), ("wrong", figures.WRONG)):
        value = tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))
        if above == {value}:
            return name
        if value in above or below_edge == value:
            return "thin"
    return ""


def test_the_sheet_shows_each_match_at_its_place(pairs: PairTable) -> None:
    found = features(pairs)
    chosen = choose_captions(found.owner, 20, seed=1)
    matches = find_matches(found, pairs, chosen, 5)
    sheet = np.array(draw_matches(matches, IMAGES, "colours, step 3"))
    height = figures.PICTURE + figures.THICK + figures.LINE + figures.GAP
    top = figures.HEAD + figures.LINE + figures.GAP
    assert sheet.shape == (
        top + 20 * height + figures.GAP,
        place(5) + 2 * figures.GAP + figures.PICTURE // 2 + figures.GAP,
        3,
    )
    for row, match in enumerate(matches):
        y = top + row * height + figures.PICTURE // 2
        for column, shown in enumerate(match.found):
            x = place(column)
            assert sheet[y, x].tolist() == list(colour(int(shown.path.stem)))
            assert framed(sheet, x, y) == ("right" if shown.own else "thin" if shown.same else "")
        x = place(5) + 2 * figures.GAP
        if match.rank > 5:
            assert sheet[y, x].tolist() == list(colour(int(match.own.path.stem)))
            assert framed(sheet, x, y) == "wrong"
        else:
            assert (sheet[y, x - 20 : x + 20] == 255).all()


def test_the_matrix_shades_by_cosine_and_frames_the_diagonal(pairs: PairTable) -> None:
    found = features(pairs)
    eight = distinct_pairs(found.owner, 8, seed=1)
    scores = cosines(found, eight)
    assert torch.equal(scores, found.texts[eight] @ found.images[found.owner[eight]].T)
    paths = [pairs.path(int(found.owner[number])) for number in eight]
    matrix = np.array(draw_matrix(scores, ["a"] * 8, paths, "colours")).astype(int)
    left, step = 2 * figures.GAP + figures.CAPTION, figures.PICTURE + 4
    top = figures.HEAD + figures.GAP + step
    blue = np.array(
        [
            [matrix[top + row * step + 12, left + column * step + 12, 0] for column in range(8)]
            for row in range(8)
        ]
    )
    order = scores.flatten().argsort(descending=True).numpy()
    assert (np.diff(blue.flatten()[order]) >= 0).all()  # the higher, the darker
    assert blue.max() - blue.min() > 100
    thumbnails = [matrix[figures.HEAD + 40, left + column * step + 60] for column in range(8)]
    assert [t.tolist() for t in thumbnails] == [list(colour(int(p.stem))) for p in paths]
    best = scores.argmax(1).tolist()
    for row in range(8):
        x, y = left + row * step + 60, top + row * step + 60
        assert framed(matrix, x, y + 0) == ("right" if best[row] == row else "wrong")


def test_a_caption_of_forty_words_is_whole() -> None:
    assert len(SENTENCE.split()) == 40
    font = ImageFont.truetype(default_font(), figures.TEXT)
    room = figures.PICTURE // line_height(figures.TEXT)
    assert " ".join(wrap(SENTENCE, font, figures.CAPTION, room)) == SENTENCE
    assert wrap(SENTENCE * 2, font, figures.CAPTION, room)[-1].endswith("…")


def test_figures_are_written_and_handed_on(pairs: PairTable, tmp_path: Path) -> None:
    found, config = features(pairs), EvaluateConfig(max_sentences=3, max_matches=2)
    tables = []

    class Writer(MetricWriter):
        takes_tables = True

        def table(self, *table: object) -> None:
            tables.append(table)

    with Writer(tmp_path / "logs") as writer:
        for step in (0, 12):
            draw_figures(found, pairs, config, 5, tmp_path / "figures", writer, step)
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == [
        f"{name}-{step}.png" for name in ("matches", "matrix") for step in ("000000", "000012")
    ]
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    for name in ("matches", "matrix"):
        assert [event.step for event in events.Images(f"figures/{name}")] == [0, 12]
        event = events.Images(f"figures/{name}")[1]
        assert Image.open(tmp_path / "figures" / f"{name}-000012.png").size == (
            event.width,
            event.height,
        )
    name, columns, rows, step = tables[1]
    matches = find_matches(found, pairs, choose_captions(found.owner, 3, 5), 2)
    assert (name, step) == ("figures/match_table", 12)
    assert columns == ["caption", "rank", "own picture", "match 1", "match 2"]
    assert [row[:2] for row in rows] == [[match.caption, match.rank] for match in matches]
    for row, match in zip(rows, matches, strict=True):
        shown = [match.own, *match.found]
        assert [cell.getpixel((9, 9)) for cell in row[2:]] == [
            colour(int(item.path.stem)) for item in shown
        ]
    assert json.loads(json.dumps(columns)) == columns


def test_two_runs_of_one_seed_draw_the_same_captions(pairs: PairTable, tmp_path: Path) -> None:
    found, config = features(pairs), EvaluateConfig(max_sentences=4)
    for name in ("a", "b"):
        with MetricWriter(tmp_path / name) as writer:
            draw_figures(found, pairs, config, 5, tmp_path / name, writer, 7)
    for name in ("matches-000007.png", "matrix-000007.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_hard_cases_are_drawn(tmp_path: Path) -> None:
    """Odd shapes, missing and broken files, other scripts, no words; broken features too."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (2000, 2), "red").save(tmp_path / "wide.png")
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    files = ("broken.png", "wide.png", "clear.png", "missing.png")
    texts = ("浜辺を走る犬", "كلب يجري", "x" * 999, " ")
    rows = [Pair(file, text, "", file) for file, text in zip(files, texts, strict=True)]
    pairs = PairTable.from_pairs(rows, tmp_path, "odd")
    whole = PairFeatures(
        images=torch.eye(4),
        texts=torch.eye(4),
        owner=torch.arange(4),
        rows=torch.arange(4),
        captions=list(texts),
        unreadable=0,
    )
    with MetricWriter(tmp_path / "logs") as writer:
        draw_figures(whole, pairs, EvaluateConfig(), 0, tmp_path / "figures", writer, 1)
        broken = whole.__class__(**{**whole.__dict__, "texts": torch.full((4, 4), torch.nan)})
        draw_figures(broken, pairs, EvaluateConfig(), 0, tmp_path / "figures", writer, 2)
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="cannot write .*file/matrix-000003.png"):
            draw_figures(whole, pairs, EvaluateConfig(), 0, tmp_path / "file", writer, 3)
    assert len(list((tmp_path / "figures").iterdir())) == 4
    _, rows_of_table = match_table(find_matches(whole, pairs, [0, 3], 4))
    assert rows_of_table[0][2] is None
