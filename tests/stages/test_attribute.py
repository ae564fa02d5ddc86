"""Stage attribute on a random model and transcoder, with features, explanations and truth made up."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.stages.small_graphs import (
    CFG,
    N_FEATURES,
    PROMPT,
    Upstreams,
    finish,
    make_graph_upstreams,
    random_transcoder,
    text_of,
    write_labels,
)

from circuitmill.config.attribute import AttributeConfig
from circuitmill.config.model import ModelConfig
from circuitmill.errors import ConfigError, DivergedError, UpstreamError
from circuitmill.graphs import interventions
from circuitmill.graphs.graph import EdgeCheck
from circuitmill.stages import attribute
from circuitmill.stores.graphs import cantor, read_json
from circuitmill.stores.manifest import Manifest, load_manifest


@pytest.fixture(scope="session")
def upstreams(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Upstreams:
    """Manifests of everything that attribute reads."""
    return make_graph_upstreams(tmp_path_factory.mktemp("upstreams"), tiny_model_dir, random_transcoder())


def make_units(cfg: AttributeConfig, upstreams: Upstreams, out: Path) -> None:
    for prompt in cfg.units():
        attribute.run_unit(cfg, prompt=prompt, **upstreams, out=out / "prompt" / prompt)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, upstreams: Upstreams) -> Path:
    """The whole stage's output."""
    out = tmp_path_factory.mktemp("attribute")
    make_units(CFG, upstreams, out)
    attribute.run(CFG, **upstreams, out=out)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    shutil.copytree(finished, tmp_path / "attribute")
    return tmp_path / "attribute"


def test_manifest_counts(finished: Path) -> None:
    manifest = load_manifest(finished / "manifest.json", "attribute")
    manifest.verify()
    counts = manifest.counts
    assert counts["n_graphs"] == 3
    assert set(counts["circuits"]) == {"two_hop"}
    assert counts["circuits"]["two_hop"]["graphs"] == counts["circuits"]["two_hop"]["concepts"] == 2
    assert 0 < counts["mean_replacement_score"] < 1 and 0 < counts["mean_completeness"] < 1
    assert 0 < counts["mean_unattributed"] < 1
    assert 0 <= counts["worst_edge_error"] < 1e-4


def test_index_lists_every_graph_in_order(finished: Path) -> None:
    graphs = read_json(finished / "graph-metadata.json")["graphs"]
    assert [graph["slug"] for graph in graphs] == list(CFG.units())
    assert graphs[0]["prompt"] == PROMPT
    assert "".join(graphs[0]["prompt_tokens"][1:]) == PROMPT
    assert {graph["scan"] for graph in graphs} == {"./data/features"}


def test_explanations_are_in_the_graphs(finished: Path) -> None:
    for name in CFG.units():
        document = read_json(finished / "graph_data" / f"{name}.json")
        labels = {
            node["node_id"]: node["clerp"]
            for node in document["nodes"]
            if node["feature_type"] == "cross layer transcoder"
        }
        assert len(labels) > 5
        for node_id, label in labels.items():
            layer, feature, _ = map(int, node_id.split("_"))
            assert label == text_of(layer, feature)


def test_there_is_a_file_for_every_feature_in_a_graph_and_no_other(finished: Path) -> None:
    wanted = {
        node["feature"]
        for name in CFG.units()
        for node in read_json(finished / "graph_data" / f"{name}.json")["nodes"]
        if node["feature_type"] == "cross layer transcoder"
    }
    assert {int(path.stem) for path in (finished / "features").iterdir()} == wanted
    names = {cantor(layer, feature): (layer, feature) for layer in range(2) for feature in range(N_FEATURES)}
    for index in wanted:
        document = read_json(finished / "features" / f"{index}.json")
        assert (document["layer"], document["feature"]) == names[index]
        assert document["explanation"] == text_of(*names[index])
        assert document["examples_quantiles"][0]["examples"][0]["tokens"] == [str(names[index]), "b"]
        assert document["top_logits"] == [" Texas"]


def test_the_page_finds_every_feature_through_the_scan(finished: Path) -> None:
    """As documented: the stage's folder is the page's ./data, and graphs are in ./graph_data."""
    for graph in read_json(finished / "graph-metadata.json")["graphs"]:
        document = read_json(finished / "graph_data" / f"{graph['slug']}.json")
        folder = finished / graph["scan"].removeprefix("./data/")
        features = [node for node in document["nodes"] if node["feature_type"] == "cross layer transcoder"]
        assert features
        assert all((folder / f"{node['feature']}.json").is_file() for node in features)


def test_summary_says_where_a_concept_is_named_and_how(finished: Path) -> None:
    summary = read_json(finished / "summary.json")
    first, second, mine = summary["graphs"]
    assert summary["undefined"] is None
    (texas,), (nowhere,) = first["concepts"], second["concepts"]
    assert texas["found"] and texas["expected_pos"] == len("The state of Dallas")
    assert (nowhere["found"], nowhere["best"]) == (False, None)
    assert texas["best"]["top_logits"] == [" Texas"]
    assert first["expected"]["answers"] == [" Austin"] and first["predicted"] is False
    assert (mine["kind"], mine["expected"], mine["predicted"], mine["concepts"]) == (None, None, None, [])
    counts = read_json(finished / "summary.json")["circuits"]["two_hop"]
    assert (counts["concepts"], counts["concepts_found"]) == (2, 1)


def test_a_prompt_has_its_graph_scores_and_edge_check(finished: Path, upstreams: Upstreams) -> None:
    unit = load_manifest(finished / "prompt" / "two_hop-00" / "manifest.json", "attribute", "two_hop-00")
    assert set(unit.files) == {"graph.json", "scores.json"}
    figures = read_json(unit.file("scores.json"))
    assert figures["prompt"] == "two_hop-00" and figures["text"] == PROMPT
    assert figures["edge_check"]["n_features"] == 2 and figures["edge_check"]["relative"] < 1e-4
    assert figures["prediction"] == figures["targets"][0]
    assert figures["n_nodes"] == unit.counts["n_nodes"] > figures["n_links"] ** 0.5
    assert set(unit.inputs) == set(upstreams)


def test_same_inputs_give_the_same_bytes(finished: Path, upstreams: Upstreams, tmp_path: Path) -> None:
    unit = attribute.run_unit(CFG, prompt="mine", **upstreams, out=tmp_path)
    there = load_manifest(finished / "prompt" / "mine" / "manifest.json", "attribute", "mine")
    assert unit.files == there.files and unit.digest == there.digest


def test_gathering_again_changes_nothing(copy: Path, upstreams: Upstreams) -> None:
    before = load_manifest(copy / "manifest.json")
    assert attribute.run(CFG, **upstreams, out=copy).digest == before.digest


def test_dtype_of_the_model_does_not_matter(finished: Path, upstreams: Upstreams, tmp_path: Path) -> None:
    cfg = replace(CFG, model=replace(CFG.model, dtype="bfloat16"))
    attribute.run_unit(cfg, prompt="mine", **upstreams, out=tmp_path)
    assert (tmp_path / "graph.json").read_bytes() == (finished / "prompt/mine/graph.json").read_bytes()


def test_graphs_without_features(upstreams: Upstreams, tmp_path: Path) -> None:
    cfg = replace(CFG, node_threshold=1e-6, edge_threshold=1e-6)
    make_units(cfg, upstreams, tmp_path)
    manifest = attribute.run(cfg, **upstreams, out=tmp_path)
    assert manifest.counts["n_features"] == 0 and manifest.counts["n_graphs"] == 3
    assert manifest.counts["circuits"]["two_hop"]["concepts_found"] == 0


def test_missing_graph_is_named_and_earlier_results_stay(copy: Path, upstreams: Upstreams) -> None:
    shutil.rmtree(copy / "prompt" / "mine")
    with pytest.raises(UpstreamError, match="no such file") as caught:
        attribute.run(CFG, **upstreams, out=copy)
    assert "prompt/mine/manifest.json" in str(caught.value)
    load_manifest(copy / "manifest.json", "attribute").verify()


def test_graph_of_another_configuration_is_refused(copy: Path, upstreams: Upstreams) -> None:
    with pytest.raises(UpstreamError, match="found one made with another configuration") as caught:
        attribute.run(replace(CFG, node_threshold=0.7), **upstreams, out=copy)
    assert "two_hop-00" in str(caught.value)
    load_manifest(copy / "manifest.json", "attribute").verify()


def test_graph_from_other_inputs_is_refused(copy: Path, upstreams: Upstreams, tmp_path: Path) -> None:
    inputs = {"features": load_manifest(upstreams["features"])}
    other = finish("interpret", tmp_path / "interpret", inputs, lambda out: write_labels(out, "other "))
    with pytest.raises(UpstreamError, match="found one made from other inputs"):
        attribute.run(CFG, **{**upstreams, "interpret": other.folder / "manifest.json"}, out=copy)


def unit(cfg: AttributeConfig, upstreams: Upstreams, out: Path, prompt: str, **other: Path | None) -> Manifest:
    return attribute.run_unit(cfg, prompt=prompt, **{**upstreams, **other}, out=out)


def test_prompt_longer_than_the_context(upstreams: Upstreams, tmp_path: Path) -> None:
    cfg = replace(CFG, prompts={"wordy": "a" * 50})
    with pytest.raises(ConfigError, match="at most 32 tokens.*found 51 tokens") as caught:
        unit(cfg, upstreams, tmp_path, "wordy")
    assert "prompt wordy" in str(caught.value)
    with pytest.raises(ConfigError, match="at most 32 tokens"):
        unit(replace(CFG, circuits={"long": 1}), upstreams, tmp_path, "long-00")
    assert not (tmp_path / "manifest.json").exists()


def test_empty_prompt(upstreams: Upstreams, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        unit(replace(CFG, prompts={"none": ""}), upstreams, tmp_path, "none")


def test_unknown_prompt(upstreams: Upstreams, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a prompt among two_hop-00, two_hop-01, mine; found two_hop-02"):
        unit(CFG, upstreams, tmp_path, "two_hop-02")


def test_more_circuits_than_there_are(upstreams: Upstreams, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 2 circuits; found 3"):
        unit(replace(CFG, circuits={"two_hop": 3}), upstreams, tmp_path, "two_hop-02")
    with pytest.raises(ConfigError, match="among long, two_hop; found ioi"):
        unit(replace(CFG, circuits={"ioi": 1}), upstreams, tmp_path, "ioi-00")


def test_circuits_without_toyworld(upstreams: Upstreams, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stage toyworld, which knows the circuits"):
        unit(CFG, upstreams, tmp_path, "two_hop-00", toyworld=None)


def test_a_run_without_toyworld(upstreams: Upstreams, tiny_model_dir: Path, tmp_path: Path) -> None:
    cfg = replace(CFG, model=ModelConfig("folder", str(tiny_model_dir), "", "float32"), circuits={})
    alone = {**upstreams, "toyworld": None}
    make_units(cfg, alone, tmp_path)
    assert attribute.run(cfg, **alone, out=tmp_path).counts["circuits"] == {}


def test_missing_upstream(upstreams: Upstreams, tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match="the manifest of stage train"):
        unit(CFG, upstreams, tmp_path, "mine", train=tmp_path / "train" / "manifest.json")


def test_edges_that_interventions_contradict_stop_the_stage(
    upstreams: Upstreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = EdgeCheck(2, worst_feature=0.01, worst_logit=0.0, largest_edge=2.0)
    monkeypatch.setattr(interventions, "verify_edges", lambda *arguments: wrong)
    with pytest.raises(DivergedError, match="found a difference of 0.005"):
        unit(CFG, upstreams, tmp_path, "mine")
    assert not (tmp_path / "manifest.json").exists()
    unit(replace(CFG, verify_edges=0), upstreams, tmp_path, "mine")
    assert read_json(tmp_path / "scores.json")["edge_check"] is None
