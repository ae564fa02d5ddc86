"""Stage attribute on transcoders of every architecture: the graph of the CLT that it is, or why there is none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.stages.small_graphs import CFG, make_graph_upstreams, random_transcoder

from circuitmill.config.architecture import ArchitectureConfig
from circuitmill.errors import ConfigError
from circuitmill.stages import attribute
from circuitmill.stores.graphs import read_json
from circuitmill.stores.transcoders import as_clt
from circuitmill.stores.verify import verify

TRACEABLE = [
    {"topology": "plt"},
    {"decoder": "source", "pair_scale": True},
    {"decoder": "target"},
    {"decoder": "low_rank", "rank": 3},
]


@pytest.mark.parametrize("form", TRACEABLE, ids=lambda form: "-".join(map(str, form.values())))
def test_what_can_be_traced_has_the_graph_of_the_clt_that_it_is(
    tiny_model_dir: Path, tmp_path: Path, form: dict
) -> None:
    transcoder, graphs = random_transcoder(**form), []
    for name, kind in (("own", transcoder), ("clt", as_clt(transcoder))):
        made = make_graph_upstreams(tmp_path / name, tiny_model_dir, kind)
        assert (made["train"].parent / "circuit_tracer").exists() == (name == "own")
        attribute.run_unit(CFG, prompt="mine", **made, out=tmp_path / name / "unit")
        graphs.append((tmp_path / name / "unit" / "graph.json").read_bytes())
    assert graphs[0] == graphs[1]
    kinds = {node["feature_type"] for node in json.loads(graphs[0])["nodes"]}
    assert "cross layer transcoder" in kinds


UNTRACEABLE = [
    ({"topology": "molt", "ranks": (2,)}, "topology molt does not replace MLPs"),
    ({"topology": "acausal"}, "topology acausal does not replace MLPs"),
    ({"skip": True}, "the linear skip connection has no place"),
    ({"decoder": "target", "pair_offset": True}, "offsets on active features are not linear"),
]


@pytest.mark.parametrize(("form", "reason"), UNTRACEABLE, ids=[reason.split(" ")[1] for _, reason in UNTRACEABLE])
def test_what_cannot_be_traced_has_no_graphs_and_says_why(
    tiny_model_dir: Path, tmp_path: Path, form: dict, reason: str
) -> None:
    made = make_graph_upstreams(tmp_path, tiny_model_dir, random_transcoder(**form))
    with pytest.raises(ConfigError, match=f"a transcoder that can be traced; found {reason}"):
        attribute.run_unit(CFG, prompt="mine", **made, out=tmp_path / "unit")
    with pytest.raises(ConfigError, match=r"as the architecture of the transcoder has it; found ''"):
        attribute.run(CFG, **made, out=tmp_path / "attribute")
    assert not (tmp_path / "attribute").exists()
    cfg = replace(CFG, undefined=ArchitectureConfig(**form).untraceable)
    assert cfg.units() == ()
    manifest = attribute.run(cfg, **made, out=tmp_path / "attribute")
    manifest.verify()
    summary = read_json(manifest.file("summary.json"))
    assert summary["graphs"] == [] and summary["undefined"].startswith(reason)
    assert summary["mean_replacement_score"] is summary["worst_edge_error"] is None and summary["circuits"] == {}
    assert read_json(manifest.file("graph-metadata.json")) == {"graphs": []}
    assert manifest.counts["n_graphs"] == manifest.counts["n_features"] == 0
    assert manifest.counts["undefined"] == summary["undefined"]
    report = verify(tmp_path / "attribute")
    assert not report.problems, report.text()


def test_a_configuration_for_no_graphs_is_refused_with_a_transcoder_that_has_some(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    upstreams = make_graph_upstreams(tmp_path, tiny_model_dir, random_transcoder())
    with pytest.raises(ConfigError, match=r"^'', as the architecture.*\n  where: attribute.undefined"):
        attribute.run(replace(CFG, undefined="topology molt"), **upstreams, out=tmp_path / "out")
