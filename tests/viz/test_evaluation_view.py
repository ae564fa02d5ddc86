"""The evaluation of transcoders that do not stand for MLPs, or whose features are no layer's."""

import pytest
from tests.viz import synthetic

from circuitmill.viz import evaluation_view, plots
from circuitmill.viz.evaluation_view import Evaluation


@pytest.fixture
def crosscoder() -> Evaluation:
    return evaluation_view._evaluation(synthetic.unreplaceable_document("crosscoder"))


def test_a_crosscoder_s_features_are_no_layer_s(crosscoder: Evaluation) -> None:
    assert (crosscoder.n_layers, crosscoder.n_sources, crosscoder.all_features) == (4, 1, synthetic.N_FEATURES)
    assert crosscoder.size == "crosscoder, 4 layers read together × 128 features"
    tables = evaluation_view.evaluation_tables(crosscoder, {})
    row = tables["layers"][3]
    assert (row["place"], row["ev"], row["kl"]) == ("resid_post.3", 0.993, None)
    assert row["l0"] is row["l0_p5"] is None and row["dead"] == "–"
    assert tables["total"]["dead"] == "3 (2.3%)" and tables["models"] == tables["tasks"] == []
    assert tables["unreplaceable"] == "topology crosscoder writes what it reads, not what MLPs write"
    (chart,) = evaluation_view.density_charts(crosscoder)
    assert [series["name"] for series in chart["series"]] == ["all layers"]


def test_autoencoders_have_sparsity_by_place() -> None:
    found = evaluation_view._evaluation(synthetic.unreplaceable_document("sae"))
    assert found.all_features == synthetic.N_LAYERS * synthetic.N_FEATURES
    assert [row.dead for row in found.layers] == [3, 0, 7, 12]
    (chart,) = evaluation_view.density_charts(found)
    assert chart["series"][1]["name"] == "resid_post.1"
    (chart,) = evaluation_view.density_charts(synthetic.evaluation())
    assert chart["series"][1]["name"] == "layer 1"


def test_figures_that_are_undefined_are_no_points(crosscoder: Evaluation) -> None:
    two = {"a": synthetic.evaluation(20.0), "b": crosscoder}
    rows = evaluation_view.variant_rows("b", two)
    assert [row["kl"] is None for row in rows] == [False, True]
    assert [chart["title"] for chart in evaluation_view.variant_charts(rows)] == ["Explained variance against L0"]
    three = evaluation_view.variant_charts(evaluation_view.variant_rows("b", two | {"c": synthetic.evaluation(30.0)}))
    assert [[point["name"] for point in chart["points"]] for chart in three] == [
        ["a", "b", "c"],
        ["a", "c"],
        ["a", "c"],
    ]


@pytest.mark.parametrize("topology", ["sae", "crosscoder"])
def test_plots_of_what_is_undefined_are_left_out(topology: str) -> None:
    document = synthetic.unreplaceable_document(topology)
    assert set(plots.plot_evaluation(document, [3, 2, 1])) == {"explained_variance", "l0", "l0_histogram", "density"}
