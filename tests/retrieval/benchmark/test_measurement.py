from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from twotower.retrieval.benchmark.contenders import Cell
from twotower.retrieval.benchmark.measurement import (
    Measurement,
    Results,
    on_front,
    pareto_front,
    recall_of,
)
from twotower.retrieval.benchmark.plots import (
    RECALLS,
    _from_nines,
    _nines,
    chosen_settings,
    plot_bars,
    plot_bytes,
    plot_recall,
    plotted,
)


def row(
    index: str, setting: str, recall: float | None, rate: float | None, **others: int
) -> Measurement:
    return Measurement(
        **{"index": index, "setting": setting, "queries": 1, "k": 10, **others},  # type: ignore[arg-type]
        text_recall=recall,
        image_recall=recall,
        queries_per_second=rate,
        bytes_per_vector=100.0,
    )


def test_the_front_is_what_no_other_point_beats() -> None:
    assert pareto_front([]) == []
    assert pareto_front([(1, 1)]) == [0]
    points = [(1.0, 5.0), (0.5, 9.0), (0.5, 8.0), (0.9, 6.0), (0.9, 4.0), (1.0, 5.0), (0.2, 9.0)]
    assert pareto_front(points) == [0, 1, 3, 5]
    rng = np.random.default_rng(0)
    many = [(float(x), float(y)) for x, y in rng.integers(0, 12, (60, 2))]
    front = pareto_front(many)
    for place, (x, y) in enumerate(many):
        beaten = any((a >= x and b > y) or (a > x and b >= y) for a, b in many)
        assert (place in front) == (not beaten)


def test_the_front_is_drawn_within_a_cell() -> None:
    rows = [
        row("exact", "", 1.0, 10),
        row("IVF8,Flat", "nprobe=1", 0.5, 20),
        row("IVF8,Flat", "nprobe=8", 0.5, 5),
        row("exact", "", 1.0, 1, queries=2),
        row("SQ8", "", None, None),
    ]
    assert on_front(rows) == {
        ("exact", Cell(1, 10)),
        ("IVF8,Flat nprobe=1", Cell(1, 10)),
        ("exact", Cell(2, 10)),
    }
    only_pictures = Measurement("a", "", 1, 1, image_recall=0.3)
    assert recall_of(only_pictures) == 0.3


def test_the_share_is_the_larger_one() -> None:
    assert Measurement("a", "", 1, 1).share is None
    assert Measurement("a", "", 1, 1, read_share=0.5).share == (0.5, "read")
    both = Measurement("a", "", 1, 1, read_share=0.5, arithmetic_share=0.7)
    assert both.share == (0.7, "arith")


def test_an_index_is_plotted_at_its_fastest_good_setting() -> None:
    rows = [
        row("IVF", "nprobe=1", 0.5, 30),
        row("IVF", "nprobe=4", 0.96, 20),
        row("IVF", "nprobe=8", 0.99, 10),
        row("PQ", "nprobe=1", 0.2, 30),
        row("PQ", "nprobe=8", 0.4, 9),
        row("Flat", "", 1.0, 5),
        row("Flat", "tuned", 1.0, 6),
    ]
    assert [chosen.label for chosen in chosen_settings(rows)] == [
        *("IVF nprobe=4", "PQ nprobe=8", "Flat", "Flat tuned")
    ]
    many_k = [row("a", "", 1.0, 1, k=k) for k in (1, 10, 100)]
    assert [each.k for each in plotted(many_k)] == [10]
    assert [each.k for each in plotted([many_k[0], many_k[2]])] == [1]


def test_the_scale_of_recall_goes_back_and_forth() -> None:
    recalls = np.array(RECALLS)
    np.testing.assert_allclose(_from_nines(_nines(recalls)), recalls, atol=1e-12)
    assert (np.diff(_nines(recalls)) > 0.1).all()


@pytest.mark.parametrize(
    ("recall", "sizes"), [(None, [1]), (0.0, [1]), (1.0, [1, 4, 16, 64, 256]), (1.0, [])]
)
def test_plots_are_drawn_of_little_and_of_much(
    recall: float | None, sizes: list[int], tmp_path: Path
) -> None:
    about = {"rows": 10, "dim": 4, "torch_threads": 2, "timed_queries": "some"}
    rows = [row("exact", "", recall, 5.0, queries=size) for size in sizes]
    rows += [row("SQ8", "", recall, None, queries=size) for size in sizes]
    for plot in (plot_bars, plot_bytes, plot_recall):
        plot(Results(about, None, rows, []), tmp_path / "plot.png")
        assert Image.open(tmp_path / "plot.png").size[0] > 100
