import html.parser
import json
import re
from pathlib import Path

import pytest
from tests.viz import synthetic
from tests.viz.conftest import Site

from circuitmill.errors import StoreError
from circuitmill.viz import curves, evaluation_view, feature_view, graph_view, pages
from circuitmill.viz.site import PAGES, data_script, environment


class Document(html.parser.HTMLParser):
    """Tags with their attributes, text, and whether every tag is closed."""

    VOID = frozenset({"meta", "link", "input", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def registered(path: Path) -> object:
    """What a data file registers, read as JSON."""
    match = re.fullmatch(r'window\.circuitmill\.register\((".*?"), (.*)\);\n', path.read_text(), re.DOTALL)
    return json.loads(match[2])


def overview(site: Site) -> Document:
    return Document((site.report / "index.html").read_text())


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_well_formed_and_refers_only_to_files_beside_it(site: Site, page: str) -> None:
    document = Document((site.report / page).read_text())
    assert document.open == []
    for tag, attributes in document.tags:
        for key in ("src", "href"):
            target = attributes.get(key)
            if target in (None, "data:,") or tag == "a":
                continue
            assert "//" not in target
            assert (site.report / target).is_file(), f"{page} refers to {target}"


def test_nothing_in_the_folder_refers_to_a_host(site: Site) -> None:
    for path in site.report.rglob("*"):
        if path.is_file():
            hosts = set(re.findall(r"https?://[^\"'\s)]+", path.read_text()))
            assert hosts <= {"http://www.w3.org/2000/svg"}, path


def test_overview_shows_headline_figures_and_tables(site: Site) -> None:
    text = overview(site).text
    for piece in ("95.8%", "0.9938", "99.1%", "22 of 512", "37,800 held-out tokens", "3 of 3", "150 MB"):
        assert piece in text, piece
    assert "two hop city" in text and "96.0%" in text


def test_time_and_memory_stand_in_two_files_alone(site: Site) -> None:
    said = registered(site.report / "data" / "usage.js")
    texts = [cell["text"] for row in said["rows"] for cell in row]
    for piece in ("46.0 s", "2 h 30 min", "1.2 GB", "700 MB"):
        assert piece in texts
    assert [chart["title"] for group in said["charts"] for chart in group["charts"]] == [
        "Tokens per second",
        "Share of time spent waiting for data",
        "Peak memory (GB)",
    ]
    other = "".join(
        path.read_text()
        for path in site.report.rglob("*")
        if path.is_file() and path.relative_to(site.report).as_posix() not in pages.VOLATILE
    )
    for piece in ("46.0 s", "2 h 30 min", "1.2 GB", "Tokens per second"):
        assert piece not in other, piece
    assert json.loads((site.report / "usage.json").read_text())["wall_seconds"] == 7246.0


def test_tables_need_no_other_file(site: Site) -> None:
    document = Document((site.report / "tables.html").read_text())
    assert not [tag for tag, _ in document.tags if tag in ("script", "img", "a")]
    for piece in ("95.8%", "0.9938", "two hop city", "Fit and sparsity per layer", "The capital of", "✓ Texas"):
        assert piece in document.text, piece
    assert synthetic.NASTY in document.text
    # the one sheet, so that it looks like the page
    assert (site.report / "static" / "style.css").read_text() in (site.report / "tables.html").read_text()


def test_overview_links_every_graph_and_the_other_variant(site: Site) -> None:
    links = [attributes.get("href") for tag, attributes in overview(site).tags if tag == "a"]
    for entry in site.content.entries:
        assert f"graph.html#prompt={entry['name']}" in links
        assert (site.report / "data" / "graphs" / f"{entry['name']}.js").is_file()
    assert "../../sparse/report/index.html" in links
    assert "../../main/report/index.html" not in links


def test_markup_in_tokens_stays_text(site: Site) -> None:
    document = overview(site)
    assert synthetic.NASTY in document.text
    assert not [tag for tag, attributes in document.tags if tag == "img" or "onerror" in attributes]


def test_markup_in_data_files_is_escaped(site: Site) -> None:
    found = 0
    for path in (site.report / "data").rglob("*.js"):
        text = path.read_text()
        assert "<" not in text, path
        found += synthetic.NASTY.replace("<", "\\u003c").replace(">", "\\u003e") in text
    assert found > 1


def test_data_file_round_trips() -> None:
    value = {"text": "</script> & \u2028 ünï", "n": [1, 2.5, None, True]}
    script = data_script("a/b", value)
    assert "\u2028" not in script and "<" not in script
    assert json.loads(script.removeprefix('window.circuitmill.register("a/b", ').removesuffix(");\n")) == value


def test_data_file_refuses_nan() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        data_script("a", float("nan"))


def test_templates_escape() -> None:
    template = environment().from_string("{{ text }}")
    assert template.render(text="<b>&") == "&lt;b&gt;&amp;"


def test_graph_file_is_the_graph_unchanged(site: Site) -> None:
    for document in site.content.graphs:
        assert registered(site.report / "data" / "graphs" / f"{document['metadata']['slug']}.js") == document


def test_entry_names_the_node_that_names_the_concept() -> None:
    document = synthetic.graph("two_hop-00", *synthetic.CITIES[0])
    entry = graph_view.graph_entry(document, synthetic.summary("two_hop-00", "two_hop", "Texas", "Austin", document))
    [concept] = entry["concepts"]
    node = next(node for node in document["nodes"] if node["node_id"] == concept["node"])
    assert "Texas" in node["clerp"]
    assert entry["circuit"] == "two hop" and entry["expected"] == "Austin" and entry["correct"]


def test_thumbnail_draws_every_feature_of_the_graph() -> None:
    document = synthetic.graph("two_hop-00", *synthetic.CITIES[0])
    picture = str(graph_view.thumbnail(document, synthetic.N_LAYERS))
    n_features = sum("cross" in node["feature_type"] for node in document["nodes"])
    assert picture.count("<circle") == n_features
    assert picture.count('class="logit"') == 4
    assert picture.count("<path") == graph_view.LINKS


def test_occurrences_lists_graphs_of_a_feature() -> None:
    document = synthetic.graph("two_hop-00", *synthetic.CITIES[0])
    found = graph_view.occurrences({"two_hop-00": document})
    for (layer, feature), places in found.items():
        for name, node, prompt in places:
            assert name == "two_hop-00" and node.startswith(f"{layer}_{feature}_") and "Dallas" in prompt
    assert sum(map(len, found.values())) == sum("cross" in node["feature_type"] for node in document["nodes"])


def test_feature_chunks_hold_what_the_index_lists(site: Site) -> None:
    index = registered(site.report / "data" / "features" / "index.js")
    assert len(index["layer"]) == synthetic.N_LAYERS * synthetic.N_FEATURES
    chunk = registered(site.report / "data" / "features" / "2-1.js")
    assert sorted(map(int, chunk["features"])) == list(range(64, 128))
    row = synthetic.feature_row(2, 70)
    record = chunk["features"]["70"]
    assert record["act_max"] == pytest.approx(row["act_max"], rel=1e-3)
    assert [entry[0] for entry in record["top"]] == [entry["text"] for entry in row["top_logits"]]


def test_windows_come_back_from_their_compact_form() -> None:
    [first, *_] = synthetic.windows(0, 3, 5.0)
    texts = feature_view.Texts()
    record = feature_view.window_record(first, texts)
    names = list(texts.numbers)
    assert [names[number] for number in record["t"]] == first["texts"]
    dense = dict(record["a"])
    for place, value in enumerate(first["activations"]):
        assert dense.get(place, 0) == pytest.approx(value, rel=1e-3)


def test_chosen_windows_are_the_strongest_and_then_from_high_to_low() -> None:
    windows = synthetic.windows(0, 3, 5.0)
    heldout = [window | {"split": "heldout"} for window in windows]
    chosen = feature_view.chosen_windows([*heldout, *reversed(windows)], top=3, quantile=2)
    assert [(w["kind"], w["quantile"], w["rank"]) for w in chosen] == [
        ("top", 0, 0),
        ("top", 0, 1),
        ("top", 0, 2),
        ("quantile", 75, 2),
        ("quantile", 75, 1),
        ("quantile", 50, 2),
        ("quantile", 50, 1),
    ]
    assert all(window["split"] == "train" for window in chosen)


def test_features_in_graphs_keep_their_pages_beyond_the_limit() -> None:
    n_active = {(0, 0): 100, (0, 1): 0, (0, 2): 0}
    assert feature_view.choose_pages(n_active, [(0, 1), (0, 2)], most=1) == {(0, 1), (0, 2)}


def drawn(rows: list[dict], groups: dict = curves.GROUPS) -> dict[str, dict]:
    """The training charts by title."""
    return {chart["title"]: chart for group in curves.training_charts(rows, groups) for chart in group["charts"]}


def names_of(chart: dict) -> list[str]:
    return [series["name"] for series in chart["series"]]


def test_every_active_term_of_the_loss_has_a_curve() -> None:
    rows = synthetic.metrics(1000)
    more = {"loss_kl": 0.5, "loss_own.losses:entropy": 2.0, "loss_scale": 65536.0}
    own = {"kl": 1.0, "own.losses:entropy": 1.0}
    charts = drawn([row | more | {"coefficients": row["coefficients"] | own} for row in rows])
    loss = charts["Loss and its terms before weighting"]
    known = ["loss", "reconstruction", "tanh sparsity", "pre-activation", "KL", "own.losses:entropy"]
    # the auxiliary term is zero throughout
    assert names_of(loss) == known
    assert len(loss["x"]) == curves.POINTS
    assert (loss["x"][0], loss["x"][-1]) == (rows[0]["tokens"], rows[-1]["tokens"])
    assert loss["series"][-1]["values"] == [2.0] * curves.POINTS
    coefficients = charts["Coefficients of the loss"]
    assert names_of(coefficients) == [*known[1:4], "auxiliary", *known[4:]]
    assert names_of(charts["Scale of the loss in float16"]) == ["scale"]
    assert coefficients["series"][1]["values"][-1] == 4.0
    ev = charts["Explained variance per layer"]
    assert names_of(ev) == [f"layer {i}" for i in range(synthetic.N_LAYERS)]


def test_what_is_measured_rarely_keeps_all_its_points() -> None:
    rows = synthetic.metrics(5000)
    ev = drawn(rows)["Explained variance"]
    batches, heldout = ev["series"]
    assert (batches["name"], heldout["name"]) == ("training batches", "held-out tokens")
    assert sum(value is not None for value in batches["values"]) == curves.POINTS
    expected = {row["tokens"]: row["heldout_ev"] for row in curves.thin([row for row in rows if "heldout_ev" in row])}
    found = {x: value for x, value in zip(ev["x"], heldout["values"], strict=True) if value is not None}
    assert found == expected and len(found) == curves.POINTS
    assert ev["x"] == sorted(set(ev["x"]))


def test_percentiles_are_averaged_over_layers_and_memory_is_in_gigabytes() -> None:
    rows = [
        {"tokens": 7, "heldout_l0": [1.0, 4.0], "heldout_l0_percentiles": {"p5": [0, 1], "p50": [1, None]}},
        {"tokens": 9, "peak_memory_bytes": 2_500_000_000},
    ]
    charts = drawn(rows, curves.GROUPS | curves.SPEED)
    l0 = charts["L0 on held-out tokens, averaged over layers"]
    assert {one["name"]: one["values"] for one in l0["series"]} == {
        "mean": [2.5],
        "5% of tokens": [0.5],
        "median": [1.0],
    }
    assert charts["Peak memory (GB)"]["series"][0]["values"] == [2.5]


def test_histograms_are_those_of_the_last_row_that_has_them() -> None:
    def row(tokens: int, counts: list[list[int]], **more: object) -> dict:
        return {"tokens": tokens, "cosine_histogram": {"edges": [-1.0, 0.0, 1.0], "counts": counts} | more}

    pair = ["shared", "exclusive"]
    chart = drawn([row(1, [[1, 0], [0, 0]]), row(2, [[5, 6], [7, 8]], names=pair), {"tokens": 3}])
    assert chart["Cosine of two models' decoders at the end"]["series"] == [
        {"name": "shared", "counts": [5, 6]},
        {"name": "exclusive", "counts": [7, 8]},
    ]
    logarithmic = {"tokens": 1, "density_histogram": {"log10_edges": [-1.0, 0.0], "counts": [[3], [4]]}}
    density = drawn([logarithmic])["Density at the end"]
    assert (density["kind"], density["edges"], names_of(density)) == ("histogram", [-1.0, 0.0], ["layer 0", "layer 1"])


def test_curves_pass_over_gaps_and_headings_without_charts_are_left_out() -> None:
    rows = [{"tokens": 1, "lr": 0.5}, {"tokens": 2, "lr": None}, {"tokens": 3, "lr": 0.1}]
    [group] = curves.training_charts(rows)
    assert (group["title"], [chart["title"] for chart in group["charts"]]) == ("Optimisation", ["Learning rate"])
    assert group["charts"][0]["x"] == [1, 3]
    rows = [{"tokens": 1, "decoder_norm_histogram": None}, {"tokens": 2, "ev_per_layer": [None, 0.5]}]
    [group] = curves.training_charts(rows)
    assert group["charts"][0]["series"] == [{"name": "layer 1", "values": [0.5]}]


def test_broken_metrics_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"tokens": 1}\n{"step": 2}\n')
    with pytest.raises(StoreError, match=r"metrics\.jsonl:2") as caught:
        curves.read_metrics(path)
    assert "expected" not in str(caught.value) and "rerun stage train" in str(caught.value)


def test_variants_are_drawn_only_when_there_are_several() -> None:
    rows = evaluation_view.variant_rows("main", {"main": synthetic.evaluation()})
    assert evaluation_view.variant_charts(rows) == []
    both = {"main": synthetic.evaluation(28.0), "sparse": synthetic.evaluation(14.0)}
    rows = evaluation_view.variant_rows("main", both)
    assert [(row["name"], row["here"]) for row in rows] == [("sparse", False), ("main", True)]
    assert len(evaluation_view.variant_charts(rows)) == 3


def test_overview_compares_variants_that_differ_in_a_shared_stage(site: Site) -> None:
    document = overview(site)
    for piece in ("Study: cache.codec", "bf16 (baseline)", "-0.0040 [-0.0090, +0.0010]", "0.41 ✓", "0.3 ✗", "400 MB"):
        assert piece in document.text, piece
    assert ("a", {"href": "#study"}) in document.tags
    assert "runs of the same seed paired" in document.text and "of 2 graphs" in document.text


def test_concepts_are_counted_over_graphs(site: Site) -> None:
    found, known = pages.concepts_found(site.content.entries)
    assert known == len(synthetic.CITIES)
    assert found == sum(entry["concepts"][0]["found"] for entry in site.content.entries if entry["concepts"])
