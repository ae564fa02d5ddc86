import json
from pathlib import Path

import pytest

from circuitmill.errors import ConfigError, StoreError
from circuitmill.graphs.truth import Concept, Named, check_concept, find_circuit, load_circuits, names

TEXAS = Concept("Texas", ("Texas", "Lone Star"), "Dallas")


def node(layer: int, feature: int, pos: int, influence: float) -> dict:
    return {
        "layer": layer,
        "feature": feature,
        "pos": pos,
        "influence": influence,
        "activation": 1.0,
        "clerp": "",
    }


@pytest.mark.parametrize(
    ("named", "evidence"),
    [
        (Named("fires on Texas", ()), "explanation"),
        (Named("“Texas”, Austin", ()), "explanation"),
        (Named("the Lone Star state", ()), "explanation"),
        (Named("fires on Dallas", (" Austin", " Texas")), "top_logits"),
        (Named("fires on Texasville", (" Texasville",)), None),
        (Named("fires on texas", ("texas",)), None),
        (Named("fires on NewTexas", ()), None),
        (Named("", ()), None),
    ],
)
def test_whole_words_with_their_capitals(named: Named, evidence: str | None) -> None:
    assert names(TEXAS, named) == evidence


def test_words_with_signs_are_taken_literally() -> None:
    assert names(Concept("c", ("C.",), "x"), Named("fires on Cx", ())) is None
    assert names(Concept("c", (" Texas",), "x"), Named("", ("Texas",))) == "top_logits"


def test_feature_at_the_expected_position_comes_first() -> None:
    named = {(0, 1): Named("Texas", ()), (1, 2): Named("", (" Texas",)), (2, 3): Named("other", (" other",))}
    nodes = [node(0, 1, 9, 0.1), node(1, 2, 7, 0.6), node(1, 2, 8, 0.2), node(2, 3, 7, 0.01)]
    found = check_concept(TEXAS, 7, nodes, named)
    assert (found["found"], found["at_expected_pos"], found["n_features"]) == (True, True, 3)
    assert found["best"] == {
        "layer": 1,
        "pos": 7,
        "feature": 2,
        "influence": 0.6,
        "evidence": "top_logits",
        "explanation": "",
        "top_logits": [" Texas"],
    }
    elsewhere = check_concept(TEXAS, 3, nodes, named)
    assert (elsewhere["found"], elsewhere["at_expected_pos"], elsewhere["best"]["feature"]) == (
        True,
        False,
        1,
    )


def test_concept_that_no_feature_names() -> None:
    found = check_concept(TEXAS, 7, [node(2, 3, 7, 0.5)], {(2, 3): Named("other", ())})
    assert found == {
        "name": "Texas",
        "expected_pos": 7,
        "found": False,
        "at_expected_pos": False,
        "n_features": 0,
        "best": None,
    }


def truth(**circuits: list) -> str:
    return json.dumps({"format": 1, "tasks": {}, "circuits": circuits})


def test_circuits_are_read(tmp_path: Path) -> None:
    item = {"prompt": "p", "answer": " a", "concepts": [{"name": "n", "words": ["w"], "after": "p"}]}
    (tmp_path / "truth.json").write_text(truth(two_hop=[item], years=[{**item, "answers": [" b", " c"]}]))
    circuits = load_circuits(tmp_path / "truth.json")
    found = find_circuit(circuits, "two_hop", 0)
    assert (found.prompt, found.answers, found.concepts) == ("p", (" a",), (Concept("n", ("w",), "p"),))
    assert find_circuit(circuits, "years", 0).answers == (" b", " c")
    with pytest.raises(ConfigError, match="at most 1 circuits; found 2") as caught:
        find_circuit(circuits, "two_hop", 1)
    assert "attribute.circuits.two_hop" in str(caught.value)
    with pytest.raises(ConfigError, match="among two_hop, years; found ioi"):
        find_circuit(circuits, "ioi", 0)


@pytest.mark.parametrize(
    "text", ["{", '{"format": 2, "circuits": {}}', '{"format": 1}', truth(two_hop=[{"prompt": "p"}])]
)
def test_damaged_truth_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "truth.json").write_text(text)
    with pytest.raises(StoreError, match=r"truth\.json"):
        load_circuits(tmp_path / "truth.json")
