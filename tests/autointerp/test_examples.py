import pyarrow as pa

from circuitmill.autointerp.examples import examples_of

FEATURES = [
    {"layer": 1, "feature": 0, "n_active": 2, "top_logits": [], "bottom_logits": []},
    {
        "layer": 0,
        "feature": 4,
        "n_active": 9,
        "top_logits": [{"token": 3, "text": " a", "value": 2.0}],
        "bottom_logits": [{"token": 4, "text": " b", "value": -1.0}],
    },
    {"layer": 0, "feature": 2, "n_active": 0, "top_logits": [], "bottom_logits": []},
]


def row(layer, feature, split, kind, rank, activations):
    texts = [f" {layer}{feature}{rank}"] * len(activations)
    return {
        **{"layer": layer, "feature": feature, "split": split, "kind": kind, "rank": rank, "quantile": -1},
        **{"sequence": rank, "start": 0, "texts": texts, "activations": activations},
    }


WINDOWS = [
    row(1, 0, "train", "top", 1, [0.0, 1.0, 0.0]),
    row(0, 4, "heldout", "silent", 0, [0.0]),
    row(0, 4, "train", "top", 1, [2.0]),
    row(0, 4, "train", "top", 0, [3.0, 0.5]),
    row(0, 4, "heldout", "top", 0, [1.5]),
]


def test_every_feature_gets_its_windows():
    found = list(examples_of(pa.Table.from_pylist(FEATURES), pa.Table.from_pylist(WINDOWS)))
    assert [(one.layer, one.feature, one.n_active) for one in found] == [(0, 2, 0), (0, 4, 9), (1, 0, 2)]
    dead, full, other = found
    assert (dead.train, dead.heldout) == ((), ())
    assert [window.activations.tolist() for window in full.train] == [[3.0, 0.5], [2.0]]
    assert [window.texts for window in full.train] == [(" 040", " 040"), (" 041",)]
    assert [window.fires for window in full.heldout] == [False, True]
    assert [(logit.text, logit.value) for logit in full.top_logits] == [(" a", 2.0)]
    assert [(logit.text, logit.value) for logit in full.bottom_logits] == [(" b", -1.0)]
    assert other.train[0].activations.tolist() == [0.0, 1.0, 0.0]


def test_the_order_of_rows_does_not_matter():
    one = list(examples_of(pa.Table.from_pylist(FEATURES), pa.Table.from_pylist(WINDOWS)))
    two = list(examples_of(pa.Table.from_pylist(FEATURES[::-1]), pa.Table.from_pylist(WINDOWS[::-1])))
    assert [[window.texts for window in each.train] for each in one] == [
        [window.texts for window in each.train] for each in two
    ]
