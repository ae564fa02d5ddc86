import torch

from circuitmill.core import summaries
from circuitmill.core.metrics import ExplainedVariance, Firing


def test_a_layer_that_never_varies_has_no_explained_variance() -> None:
    explained = ExplainedVariance(n_layers=2, d_model=1)
    y = torch.tensor([[[1.0], [0.0]], [[1.0], [2.0]]])
    explained.update(y, y)
    found = summaries.fit_summary(explained)
    assert found["per_layer"] == {"explained_variance": [None, 1.0], "nmse": [None, 0.0]}
    assert (found["explained_variance"], found["nmse"]) == (1.0, 0.0)


def test_sparsity_counts_tokens_and_features() -> None:
    firing = Firing(n_layers=2, n_features=2)
    firing.update(torch.tensor([[[1.0, 0.0], [2.0, 1.0]], [[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]]))
    found = summaries.sparsity_summary(firing)
    assert found["per_layer"]["l0"] == [1 / 3, 4 / 3] and abs(found["l0"] - 5 / 3) < 1e-12
    assert found["l0_percentiles"] == {"p5": 1, "p50": 1, "p95": 3, "p99": 3}
    assert (found["dead"], found["dead_share"], found["dead_window_tokens"]) == (1, 0.25, 3)
    assert found["per_layer"]["dead"] == [1, 0]


def test_density_histogram_puts_each_firing_feature_in_one_bar() -> None:
    n_active = torch.tensor([[0, 1, 5, 999, 1000], [10, 10, 100, 0, 0]])
    edges, counts = summaries.density_histogram(n_active, n_tokens=1000, per_decade=2)
    assert edges == [-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]
    assert counts == [[1, 1, 0, 0, 0, 2], [0, 0, 2, 0, 1, 0]]


def test_the_first_edge_is_never_above_the_rarest_density() -> None:
    for n_tokens in (1, 9, 10, 11, 12345):
        edges, counts = summaries.density_histogram(torch.tensor([[1]]), n_tokens, per_decade=3)
        assert 10 ** edges[0] <= 1 / n_tokens * (1 + 1e-9)
        assert sum(counts[0]) == 1


def test_figures_for_json_are_numbers_or_null() -> None:
    assert summaries.number(float("nan")) is None and summaries.number(float("inf")) is None
    assert str(summaries.number(-0.0)) == "0.0"


def document(n_layers: int, firing: Firing, one_layer: list[dict] | None) -> dict:
    """The parts of an evaluation that tables are made of."""
    explained = ExplainedVariance(n_layers, d_model=1)
    y = torch.randn(3, n_layers, 1, generator=torch.Generator().manual_seed(0))
    explained.update(y, 0.5 * y)
    sparsity = summaries.sparsity_summary(firing)
    return {"fit": summaries.fit_summary(explained), "sparsity": sparsity, "one_layer": one_layer, "tasks": None}


def test_tables_of_layers_with_features_of_their_own() -> None:
    firing = Firing(2, 2)
    firing.update(torch.tensor([[[1.0, 0.0], [2.0, 1.0]], [[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]]))
    rows = [{"replacement": dict.fromkeys(summaries.BEHAVIOUR, layer + 0.5)} for layer in range(2)]
    found = summaries.tables(document(2, firing, rows), firing)
    assert set(found) == {"layers", "features", "l0"}
    layers = found["layers"]
    assert layers["l0"] == [1 / 3, 4 / 3] and layers["dead"] == [1, 0] and layers["kl"] == [0.5, 1.5]
    assert found["features"]["layer"] == [0, 0, 1, 1] and found["features"]["n_active"] == [1, 0, 3, 1]
    assert found["l0"] == {"n_features": [0, 1, 2, 3, 4], "tokens": [0, 2, 0, 1, 0]}


def test_tables_of_features_that_read_all_layers_leave_sparsity_of_a_layer_undefined() -> None:
    firing = Firing(1, 2)
    firing.update(torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[2.0, 0.0]]]))
    found = summaries.tables(document(3, firing, None), firing)
    layers = found["layers"]
    assert layers["layer"] == [0, 1, 2] and len(layers["nmse"]) == 3 and None not in layers["nmse"]
    for key in ("l0", "l0_p5", "l0_p99", "dead", *summaries.BEHAVIOUR):
        assert layers[key] == [None] * 3, key
    assert found["features"] == {
        "layer": [0, 0],
        "feature": [0, 1],
        "n_active": [2, 0],
        "density": [2 / 3, 0.0],
    }
