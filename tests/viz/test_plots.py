import xml.etree.ElementTree as ET

import pytest

from circuitmill.viz import plots

DRAWN = {
    "explained_variance": lambda: plots.plot_explained_variance([0.98, None, 0.99], 0.985),
    "l0": lambda: plots.plot_l0([4.0, 5.0], [1, 2], [8, 9]),
    "l0_histogram": lambda: plots.plot_l0_histogram([0, 5, 9, 2, 0, 0]),
    "density": lambda: plots.plot_density([-3.0, -2.0, -1.0, 0.0], [[1, 5, 2], [0, 7, 1]]),
    "one_layer": lambda: plots.plot_one_layer([0.01, 0.02], [1.0, 2.0]),
    "tasks": lambda: plots.plot_tasks(["two_hop", "ioi"], {"original": [0.9, 1.0], "replacement": [0.8, 0.9]}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_whole_svg_without_a_date(name: str) -> None:
    svg = DRAWN[name]()
    root = ET.fromstring(svg)  # noqa: S314 - our own text
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "<dc:date>" not in svg


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_data_gives_the_same_bytes(name: str) -> None:
    assert DRAWN[name]() == DRAWN[name]()


def test_labels_are_text_that_can_be_searched() -> None:
    texts = "".join(ET.fromstring(DRAWN["tasks"]()).itertext())  # noqa: S314 - our own text
    for label in ("two hop", "ioi", "original", "replacement", "accuracy"):
        assert label in texts
    assert "pooled, 0.9850" in DRAWN["explained_variance"]()


def test_the_data_changes_the_figure() -> None:
    assert plots.plot_l0([4.0], [1], [8]) != plots.plot_l0([5.0], [1], [8])


def test_drawing_leaves_the_global_style_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    DRAWN["density"]()
    assert dict(matplotlib.rcParams) == before
