"""Stage report on a made-up run in the formats of the stages before it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.viz import synthetic
from tests.viz.run_on_disk import stage_config, write_run

from circuitmill import cli
from circuitmill.errors import ConfigError, StoreError, UpstreamError
from circuitmill.stages import report
from circuitmill.stores.manifest import NAME, Manifest, load_manifest
from circuitmill.stores.metrics import THROUGHPUT
from circuitmill.stores.timing import TIMING
from circuitmill.stores.verify import verify
from circuitmill.viz.summary import headline
from circuitmill.viz.summary import study as study_table

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


def slower(upstreams: dict[str, Path]) -> None:
    """Other times of the same work: all stages and units took an hour more, and 95 GB."""
    run = upstreams["tokenize"].parents[1]
    for path in run.rglob(TIMING):
        raw = json.loads(path.read_text())
        raw["wall_seconds"] += 3600
        raw["peak_memory_bytes"] = 95_000_000_000
        path.write_text(json.dumps(raw | {"device": "NVIDIA H200"}))
    path = run / "main/train" / THROUGHPUT
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"tokens_per_second": 7.5}) + "\n" for row in rows))


def write_benchmark(run: Path, place: str, seconds: float, **more: object) -> None:
    """A benchmark file as Snakemake writes it with --benchmark-extended; more memory than this process has."""
    resources = {"mem_mb": 4000, "runtime": 60, "tmpdir": "/tmp"}
    row = {"s": seconds, "cpu_time": 2 * seconds, "max_rss": 3900.0, "threads": 2, "resources": resources} | more
    path = run / "benchmarks" / f"{place}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row) + "\n")


def test_times_and_benchmarks_change_no_digest(
    finished: Manifest, made: tuple[dict[str, Path], Path], upstreams: dict[str, Path], tmp_path: Path
) -> None:
    slower(upstreams)
    run = upstreams["tokenize"].parents[1]
    for place in ("cache", "main/train", "main/features/block/0000"):
        write_benchmark(run, place, 5000.0)
    again = report.run(CFG, **upstreams, siblings=(made[1],), benchmarks=run / "benchmarks", out=run / "main/report")
    first, second = finished.folder, again.folder
    assert again.digest == finished.digest
    assert (first / NAME).read_bytes() == (second / NAME).read_bytes()
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    other = {str(name) for name in files if (first / name).read_bytes() != (second / name).read_bytes()}
    assert other == {TIMING, *again.volatile}
    assert verify(second).findings == ()
    took = [json.loads((folder / "usage.json").read_text()) for folder in (first, second)]
    assert took[1]["wall_seconds"] > took[0]["wall_seconds"] + 3 * 3600
    assert data(again, "usage")["rows"][0][5]["text"] == "95 GB"
    assert headline(second / NAME) != headline(first / NAME)


def test_used_stands_beside_what_was_asked_for(upstreams: dict[str, Path]) -> None:
    run = upstreams["tokenize"].parents[1]
    for name in ("0000", "0001"):
        write_benchmark(run, f"main/features/block/{name}", 90.0 if name == "0000" else 1800.0)
    write_benchmark(run, "main/train", 60.0, max_rss="NA", cpu_time="NA", resources={"gpu": 4, "runtime": 60})
    manifest = report.run(CFG, **upstreams, benchmarks=run / "benchmarks", out=run / "main/report")
    said = data(manifest, "usage")
    columns = {row[0]["text"]: dict(zip(said["heads"], row, strict=True)) for row in said["rows"]}
    features = columns["features"]
    # two blocks, and the gathering job, of which there is no benchmark file
    assert features["Jobs"]["text"] == "3" and features["Wall time"]["text"].startswith("31 min 3")
    assert features["Longest job"] == {"text": "30 min 0 s", "detail": "of 1 h", "share": 0.5}
    assert features["Peak memory"]["detail"] == "of 4 GB"
    assert columns["train"]["GPU hours"]["text"] == "0.0667"
    assert columns["tokenize"]["Longest job"]["detail"] == ""
    (missing,) = [note for note in said["notes"] if "no benchmark file" in note]
    assert "toyworld, tokenize, cache and 4 other stages" in missing
    assert [what for what, *_ in said["predictions"]] == [
        "cache: codes and scales on disk",
        "train of main: memory of the process",
    ]
    assert said["charts"][0]["charts"][0]["title"] == "Tokens per second"


def test_without_benchmarks_and_times_the_page_says_so(upstreams: dict[str, Path]) -> None:
    run = upstreams["tokenize"].parents[1]
    for path in (*run.rglob(TIMING), run / "main/train" / THROUGHPUT):
        path.unlink()
    manifest = report.run(CFG, **upstreams, out=run / "main/report")
    said = data(manifest, "usage")
    for row in said["rows"]:
        assert [cell["text"] for cell in row[2:-1]] == ["–"] * 4
    assert "There are no benchmark files of this run" in said["notes"][0]
    assert said["charts"] == []
    assert "Nothing says what was used by toyworld, tokenize, cache and 5 other stages" in said["notes"][1]
    (manifest.folder / TIMING).unlink()
    assert "not noted" in headline(manifest.folder / NAME)


def test_a_folder_of_benchmarks_that_is_not_there_stops_it(upstreams: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="benchmark files; found no such folder"):
        report.run(CFG, **upstreams, benchmarks=tmp_path / "nowhere", out=tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_closing_text_has_figures_page_and_time(finished: Manifest) -> None:
    text = headline(finished.folder / "manifest.json", elapsed_seconds=754)
    assert text.startswith("demo / main\n")
    assert str(finished.folder / "index.html") in text
    assert "95.8%" in text and "12 min 34 s" in text and "Known concepts found" in text


def test_a_run_without_replacement_and_graphs_says_why(made: tuple[dict[str, Path], Path], tmp_path: Path) -> None:
    paths = write_run(tmp_path / "demo", "autoencoders", topology="sae")
    manifest = report.run(CFG, **paths, siblings=(made[0]["evaluate"],), out=tmp_path / "demo/autoencoders/report")
    assert (manifest.counts["graphs"], manifest.counts["variants"]) == (0, 2)
    page = manifest.file("index.html").read_text()
    assert "There are no graphs: topology sae does not replace MLPs." in page
    assert "No MLPs are replaced: topology sae writes what it reads, not what MLPs write." in page
    assert 'id="models"' not in page and 'id="tasks"' not in page and "<td>resid_post.3</td>" in page
    assert "sae, 4 layers × 128 features" in page
    tiles = {tile["key"]: tile for tile in json.loads(manifest.file("summary.json").read_text())["tiles"]}
    assert tiles["kl"]["value"] == tiles["agreement"]["value"] == tiles["concepts"]["value"] == "–"
    assert tiles["kl"]["note"].startswith("topology sae") and tiles["graphs"]["note"].startswith("topology sae")
    assert tiles["graphs"]["value"] == "0"
    # the variant that it stands beside has figures, alone, so only the fit is drawn against L0
    assert [chart["title"] for chart in data(manifest, "run")["variants"]] == ["Explained variance against L0"]
    assert "topology sae writes what it reads" in headline(manifest.folder / "manifest.json")


def test_a_study_of_variants_of_which_some_have_no_graphs(tmp_path: Path) -> None:
    results = tmp_path / "mixed"
    runs = {
        f"{codec}-{topology}": write_run(results, f"{codec}-{topology}", codec=codec, topology=topology)
        for codec in ("int4", "bf16")
        for topology in ("clt", "acausal")
    }
    study = [paths[stage] for stage in ("train", "evaluate", "attribute") for paths in runs.values()]
    caches = dict.fromkeys(paths["cache"] for paths in runs.values())
    manifest = report.run(CFG, **runs["int4-acausal"], study=(*caches, *study), out=results / "int4-acausal/report")
    document = json.loads(manifest.file("study.json").read_text())
    int4, bf16 = document["groups"]
    assert len(document["prompts"]) == 3
    assert int4["overlaps"]["by_id"] == {"mean": 1.0, "pairs": 1}
    assert int4["means"]["kl"] == bf16["means"]["kl"] and int4["differences"]["kl"] is None
    assert study_table(manifest.folder / "manifest.json").count("–") > 0


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Upstream manifests of two seeds on each of two caches."""
    results = tmp_path_factory.mktemp("results") / "codecs"
    return {
        f"{codec}-{seed}": write_run(results, f"{codec}-{seed}", l0 + seed, seed=seed, codec=codec)
        for codec, l0 in (("int4", 30.0), ("bf16", 28.0))
        for seed in (0, 1)
    }


def study_of(codecs: dict[str, dict[str, Path]]) -> tuple[Path, ...]:
    """The manifests that the workflow passes."""
    shared = dict.fromkeys(paths["cache"] for paths in codecs.values())
    return (*shared, *(codecs[name][stage] for stage in ("train", "evaluate", "attribute") for name in codecs))


def test_variants_on_different_caches_are_compared(
    codecs: dict[str, dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, study = codecs["int4-1"], study_of(codecs)
    manifest = report.run(CFG, **paths, study=study, out=tmp_path / "int4-1/report")
    document = json.loads(manifest.file("study.json").read_text())
    assert (document["keys"], document["baseline"]) == (["cache.codec"], "bf16")
    int4, bf16 = document["groups"]
    assert (int4["variants"], bf16["variants"]) == (["int4-0", "int4-1"], ["bf16-0", "bf16-1"])
    assert bf16["means"]["l0"] == 28.5 and bf16["differences"] is None
    assert int4["differences"]["l0"] == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 2, "method": "paired"}
    assert int4["differences"]["replacement_score"]["mean"] == 0.0
    # the same seed has the same features and graphs here, another seed others
    assert int4["overlaps"]["by_id"] == int4["overlaps"]["matched"] == {"mean": 1.0, "pairs": 2}
    assert bf16["overlaps"]["by_id"]["mean"] < 0.2 and bf16["overlaps"]["by_id"]["pairs"] == 1
    assert bf16["overlaps"]["matched"]["mean"] == int4["overlaps"]["matched_other_seed"]["mean"] == 0.0
    assert int4["no_lower"] == {"by_id": True, "matched": True, "matched_other_seed": True}
    page = manifest.file("index.html").read_text()
    assert "<title>codecs / int4-1</title>" in page
    assert "Study: cache.codec" in page and "(baseline)" in page and "[+2, +2]" in page
    # every variant's report holds the same study, and the summary of the run prints it once
    other = report.run(CFG, **codecs["bf16-0"], study=study, out=tmp_path / "bf16-0/report")
    assert other.files["study.json"] == manifest.files["study.json"]
    assert cli.main(["summary", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("Study: cache.codec") == text.count("bf16 (baseline)") == 1
    assert text.index("codecs / int4-1") < text.index("Study: cache.codec")


def test_a_run_whose_variants_share_everything_has_no_study(finished: Manifest) -> None:
    assert "study.json" not in finished.files and study_table(finished.folder / "manifest.json") is None
    assert 'id="study"' not in finished.file("index.html").read_text()


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ("evaluate", r"stage evaluate of variant int4-0[\s\S]*--study"),
        ("cache", "the cache that variant int4-0 was trained on"),
    ],
)
def test_a_study_needs_every_variant_whole(
    codecs: dict[str, dict[str, Path]], tmp_path: Path, left_out: str, words: str
) -> None:
    study = [path for path in study_of(codecs) if path != codecs["int4-0"][left_out]]
    with pytest.raises(UpstreamError, match=words):
        report.run(CFG, **codecs["bf16-0"], study=tuple(study), out=tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_study_refuses_figures_of_another_transcoder(codecs: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    later = write_run(tmp_path / "codecs", "int4-0", seed=5, codec="int4")["train"]
    study = [later if path == codecs["int4-0"]["train"] else path for path in study_of(codecs)]
    with pytest.raises(UpstreamError, match="stage evaluate of variant int4-0, made from its transcoder"):
        report.run(CFG, **codecs["bf16-0"], study=tuple(study), out=tmp_path / "report")


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
