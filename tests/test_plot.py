"""The picture of a run, looked at: what is in it has its place and its colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from pagecore.migrate import Outcome
from pagecore.migrate.plot import MAP_COLOURS, _binned, draw
from pagecore.migrate.travel import CLASSES
from report_rig import outcome

# One picture takes half a second: it is drawn once, and looked at by several tests.


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = tmp_path_factory.mktemp("plot") / "run.png"
    draw(outcome(), path)
    return imread(path)[:, :, :3]


def share(picture: np.ndarray, colour: str) -> float:
    return float((np.abs(picture - np.array(to_rgb(colour))).max(axis=2) < 0.01).mean())


def test_it_is_readable_at_its_size(picture: np.ndarray) -> None:
    height, width, _ = picture.shape
    assert width == 1000
    assert 900 <= height <= 1200


def test_every_class_has_its_part_of_the_map(picture: np.ndarray) -> None:
    height = picture.shape[0]
    bottom = picture[int(height * 0.75) : int(height * 0.97), 100:-20]
    shares = {name: share(bottom, colour) for (name, _), colour in zip(CLASSES.values(), MAP_COLOURS, strict=True)}
    # An eighth of the memory each, and the rest for the last.
    assert all(0.09 < shares[name] < 0.14 for name in list(shares)[:-1]), shares
    assert 0.2 < shares["missing"] < 0.28


def test_classes_are_apart_in_lightness_or_hue_for_every_eye() -> None:
    # The usual simulation of the absence of red or green cones, in linear light.
    colours = np.array([to_rgb(colour) for colour in MAP_COLOURS]) ** 2.2
    lms = np.array([[0.31399, 0.63951, 0.04650], [0.15537, 0.75789, 0.08670], [0.01775, 0.10944, 0.87257]])
    absent = {
        "protan": np.array([[0, 1.05118, -0.05116], [0, 1, 0], [0, 0, 1]]),
        "deutan": np.array([[1, 0, 0], [0.9513, 0, 0.04866], [0, 0, 1]]),
    }
    for name, missing in absent.items():
        seen = np.clip(colours @ (np.linalg.inv(lms) @ missing @ lms).T, 0, 1) ** (1 / 2.2)
        for one in range(len(seen)):
            for other in range(one):
                assert np.linalg.norm(seen[one] - seen[other]) > 0.12, (name, MAP_COLOURS[one], MAP_COLOURS[other])


def test_the_switch_is_marked_where_it_was(picture: np.ndarray) -> None:
    # Halfway to the right of the axes, and dark from top to bottom of the topmost panel.
    panel = picture[70:180, 100:-20].mean(axis=2)
    marked = np.flatnonzero((panel < 0.68).all(axis=0))
    assert len(marked)
    middle = panel.shape[1] * 1.01 / 2.1
    assert abs(marked.mean() - middle) < 25


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(outcome(postcopy=False), id="without postcopy", marks=pytest.mark.ci),
        pytest.param(outcome(drop=("result", "running", "map")), id="failed"),
        pytest.param(outcome(of="source"), id="a sender", marks=pytest.mark.ci),
        pytest.param(outcome(of="destination"), id="a receiver", marks=pytest.mark.ci),
        pytest.param(outcome(drop=("guest", "phase", "progress", "round", "running", "map", "result")), id="nothing"),
    ],
)
def test_whatever_there_is_is_drawn(given: Outcome, tmp_path: Path) -> None:
    given.report["outages"] = [[1.2, 1.3], [1.5, None]]
    given.report["pauses"] = [[0.2, 0.4], [1.6, None]]
    if "guest" in given.report:
        # The title from a file is no formula, and nothing that XML cannot hold.
        given.report["guest"]["kind"] = "$\\frac{$\x1b<"
    draw(given, tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    assert text.startswith("<?xml")
    assert text.rstrip().endswith("</svg>")


def test_a_format_that_is_none_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not supported"):
        draw(outcome(), tmp_path / "run.docx")
    assert not list(tmp_path.iterdir())


def test_a_mean_rate_keeps_the_sum() -> None:
    generator = np.random.default_rng(1)
    at = np.cumsum(generator.uniform(0.001, 0.2, 300))
    rates = generator.uniform(0, 100, 300)
    rates[0] = np.nan
    edges, means = _binned(at, rates, float(at[-1]))
    moved = np.nansum(means * np.diff(edges))
    assert moved == pytest.approx(np.sum(rates[1:] * np.diff(at)), rel=1e-9)
