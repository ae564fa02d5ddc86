"""Stage report on a made-up run in the formats of the stages before it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.viz import synthetic
from tests.viz.run_on_disk import stage_config, write_run

from circuitmill.errors import ConfigError, StoreError, UpstreamError
from circuitmill.stages import report
from circuitmill.stores.manifest import Manifest, load_manifest
from circuitmill.viz.summary import headline

CFG = stage_config("report")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    """Upstream manifests of variant main, and the evaluate manifest of variant sparse."""
    results = tmp_path_factory.mktemp("results") / "demo"
    sparse = write_run(results, "sparse", 14.0)["evaluate"]
    return write_run(results), sparse


@pytest.fixture
def upstreams(made: tuple[dict[str, Path], Path], tmp_path: Path) -> dict[str, Path]:
    """A copy that a test may damage."""
    paths, _ = made
    root = paths["tokenize"].parents[1]
    shutil.copytree(root, tmp_path / "demo")
    return {name: tmp_path / "demo" / path.relative_to(root) for name, path in paths.items()}


@pytest.fixture(scope="module")
def finished(made: tuple[dict[str, Path], Path]) -> Manifest:
    """The report of variant main."""
    paths, sparse = made
    return report.run(CFG, **paths, siblings=(sparse,), out=paths["train"].parents[1] / "report")


def data(manifest: Manifest, key: str) -> object:
    """What a data file registers."""
    text = manifest.file(f"data/{key}.js").read_text()
    return json.loads(text.removeprefix(f'window.circuitmill.register("{key}", ').removesuffix(");\n"))


def test_manifest_lists_the_site_and_verifies(finished: Manifest) -> None:
    load_manifest(finished.folder / "manifest.json", "report").verify()
    for name in ("index.html", "graph.html", "feature.html", "features.html", "static/graph.js", "plots/l0.svg"):
        assert name in finished.files
    known = len(synthetic.CITIES) - 1
    found = finished.counts["concepts_found"]
    assert 0 < found <= known
    assert finished.counts == {
        "graphs": 3,
        "feature_pages": synthetic.N_LAYERS * synthetic.N_FEATURES,
        "concepts_found": found,
        "concepts_known": known,
        "variants": 2,
    }


def test_overview_names_run_variant_and_what_stages_took(finished: Manifest) -> None:
    text = finished.file("index.html").read_text()
    assert "<title>demo / main</title>" in text
    for stage in ("toyworld", "tokenize", "cache", "train", "evaluate", "features", "interpret", "attribute"):
        assert f"<summary>{stage}</summary>" in text
    assert "capital of a &lt;city&gt;" in text
    assert "../../sparse/report/index.html" in text
    assert 'src="plots/l0.svg"' in text


def test_features_come_from_the_stores(finished: Manifest) -> None:
    index = data(finished, "features/index")
    assert index["layer"] == sorted(index["layer"])
    place = next(i for i, key in enumerate(zip(index["layer"], index["feature"], strict=True)) if key == (2, 100))
    assert index["explanation"][place] == synthetic.explanation(2, 100)
    chunk = data(finished, f"features/2-{100 // CFG.chunk_features}")
    record = chunk["features"]["100"]
    top = max(synthetic.windows(2, 100, synthetic.feature_row(2, 100)["act_max"])[0]["activations"])
    assert max(value for _, value in record["windows"][0]["a"]) == pytest.approx(top, rel=1e-3)


def test_features_in_graphs_have_pages_whatever_the_limit(upstreams: dict[str, Path], tmp_path: Path) -> None:
    manifest = report.run(replace(CFG, feature_pages=0), **upstreams, out=tmp_path / "report")
    index = data(manifest, "features/index")
    pages = set(zip(index["layer"], index["feature"], strict=True))
    in_graphs = set()
    for name in ("two_hop-00", "two_hop-01", "own"):
        for node in data(manifest, f"graphs/{name}")["nodes"]:
            if "cross" in node["feature_type"]:
                layer, feature, _ = node["node_id"].split("_")
                in_graphs.add((int(layer), int(feature)))
    assert pages == in_graphs
    assert manifest.counts["variants"] == 1


def test_same_inputs_give_the_same_bytes(
    finished: Manifest, made: tuple[dict[str, Path], Path], tmp_path: Path
) -> None:
    paths, sparse = made
    again = report.run(CFG, **paths, siblings=(sparse,), out=tmp_path / "report")
    assert again.files == finished.files and again.digest == finished.digest


def test_closing_text_has_figures_page_and_time(finished: Manifest) -> None:
    text = headline(finished.folder / "manifest.json", elapsed_seconds=754)
    assert text.startswith("demo / main\n")
    assert str(finished.folder / "index.html") in text
    assert "95.8%" in text and "12 min 34 s" in text and "Known concepts found" in text


def test_run_without_the_embedded_model(upstreams: dict[str, Path], tmp_path: Path) -> None:
    manifest = report.run(CFG, **{**upstreams, "toyworld": None}, out=tmp_path / "report")
    assert "toyworld" not in manifest.inputs


def test_damaged_upstreams_stop_it_before_anything_is_written(upstreams: dict[str, Path], tmp_path: Path) -> None:
    path = upstreams["train"].parent / "metrics.jsonl"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(UpstreamError, match=r"metrics\.jsonl[\s\S]*run stage train again"):
        report.run(CFG, **upstreams, out=tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_upstreams_that_do_not_belong_together_are_refused(upstreams: dict[str, Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", steps=30)
    with pytest.raises(UpstreamError, match=r"made from the given train[\s\S]*one made from"):
        report.run(CFG, **{**upstreams, "train": other["train"]}, out=tmp_path / "report")


def test_a_damaged_graph_leaves_no_manifest(upstreams: dict[str, Path], tmp_path: Path) -> None:
    path = upstreams["attribute"].parent / "graph_data" / "own.json"
    text = path.read_text()
    path.write_text("x" + text[1:])
    with pytest.raises(StoreError, match=r"own\.json"):
        report.run(CFG, **upstreams, out=tmp_path / "report")
    assert not (tmp_path / "report" / "manifest.json").exists()


@pytest.mark.parametrize("key", ["feature_pages", "chunk_features", "top_windows", "quantile_windows"])
def test_senseless_options_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"report\.{key}"):
        replace(CFG, **{key: -1})
