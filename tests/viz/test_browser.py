"""The pages in a real browser: from disk and over the server, with an empty console and no outside request."""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.viz import synthetic
from tests.viz.conftest import Site, make_content, write_site

from circuitmill.viz.serve import FolderServer

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)
WAIT = 15
"""Seconds until a page that never gets ready fails the test."""


def programs() -> tuple[str, str]:
    """Browser and driver; without them the tests are skipped, but fail where CI promises to have them."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    program = shutil.which("chromedriver")
    if browser is None or program is None:
        missing = "chromium" if browser is None else "chromedriver"
        if os.environ.get("CI"):
            pytest.fail(f"{missing} is not installed, and CI is set")
        pytest.skip(f"{missing} is not installed")
    return browser, program


def test_a_missing_browser_fails_in_ci_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="chromium is not installed, and CI is set"):
        programs()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="chromium is not installed"):
        programs()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    browser, program = programs()
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=program))
    yield running
    running.quit()


@pytest.fixture(scope="module", params=["file", "server"])
def base(request: pytest.FixtureRequest, site: Site) -> Iterator[str]:
    """Where the report is: on disk, or behind the server."""
    if request.param == "file":
        yield site.report.as_uri()
        return
    with FolderServer(site.results, 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"{server.url}main/report"
        server.shutdown()


@pytest.fixture
def visit(driver, base: str) -> Iterator[Callable[[str, str], None]]:
    """Opens a page and waits until a script expression is true; checks console and requests afterwards."""
    driver.get_log("browser"), driver.get_log("performance")

    def open_page(page: str, ready: str) -> None:
        # A change of the fragment alone would not load the page again.
        driver.get("about:blank")
        driver.get(f"{base}/{page}")
        wait(driver, ready)

    yield open_page
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # What the browser asks of itself (its new-tab page) is not the page's doing.
    asked = [url for url in asked if url.startswith(("http", "file", "ws"))]
    assert asked and all(url.startswith(base) for url in asked)


def wait(driver, ready: str) -> None:
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    try:
        WebDriverWait(driver, WAIT).until(lambda it: it.execute_script(f"return Boolean({ready})"))
    except TimeoutException:
        text = driver.find_element("tag name", "body").text
        pytest.fail(f"{driver.current_url} never had {ready}; it shows:\n{text}\n{driver.get_log('browser')}")


def css(driver, selector: str) -> list:
    return driver.find_elements("css selector", selector)


def press(driver, key: str) -> None:
    driver.switch_to.active_element.send_keys(key)


def test_overview_draws_charts_and_links_graphs(driver, visit, site: Site) -> None:
    visit("index.html", "document.querySelectorAll('.chart > svg .line').length > 10")
    assert [tile.text for tile in css(driver, "#headline [data-key=agreement] .value")] == ["95.8%"]
    assert [heading.text for heading in css(driver, "#training-charts h3")] == ["Fit", "Features", "Optimisation"]
    assert len(css(driver, "#training-charts .chart")) == 14
    assert len(css(driver, "#evaluation-charts rect")) > 20
    assert len(css(driver, "#variant-charts circle")) == 6
    assert len(css(driver, "a.graph-row")) == len(site.content.entries)
    rows = css(driver, "#study tbody tr")
    assert [row.text.split()[0] for row in rows] == ["bf16", "int8", "int2"] and "✗" in rows[2].text
    css(driver, "a.graph-row")[0].click()
    wait(driver, "document.body.dataset.ready === 'two_hop-00'")


def test_overview_says_what_jobs_used_of_what_they_asked_for(driver, visit) -> None:
    visit("index.html", "document.querySelectorAll('#speed-charts .line').length == 3")
    heads, cache, train, total = (row.text.split("\n") for row in css(driver, "#used tr"))
    assert heads == ["Stage Jobs Wall time Longest job CPU time Peak memory GPU hours On disk"]
    assert "700 MB of 4 GB" in " ".join(cache) and "2 h 0 min of 24 h" in " ".join(train)
    assert total[0].startswith("Sum 5 2 h 0 min")
    shares = [bar.get_attribute("style") for bar in css(driver, "#used .meter i")]
    assert shares == ["width: 17.5%;", "width: 8.3%;", "width: 92.3%;"]
    assert len(css(driver, "#used .meter.high")) == 1
    assert "no benchmark file of cache (1 of 4 jobs)" in css(driver, "#usage .notes")[0].text
    css(driver, "#suggestions summary")[0].click()
    assert "run_train asks 1300 MB, used at most 1200 MB; asks 1440 min" in css(driver, "#usage")[0].text


def test_a_page_without_its_figures_of_time_says_so(driver, copied_site: Site) -> None:
    (copied_site.report / "data" / "usage.js").unlink()
    driver.get((copied_site.report / "index.html").as_uri())
    wait(driver, "document.querySelector('#usage [role=alert]')")
    assert css(driver, "#usage [role=alert]")[0].text == "data/usage.js is missing from the report folder"
    assert len(css(driver, "#training-charts .chart")) == 14
    driver.get_log("browser")


def test_hovering_a_training_chart_shows_all_its_series_and_rare_ones_have_marks(driver, visit, site: Site) -> None:
    from selenium.webdriver import ActionChains

    visit("index.html", "document.querySelectorAll('#training-charts .chart').length")
    chart = next(one for one in css(driver, "#training-charts .chart") if one.text.startswith("Explained variance\n"))
    rows = [row for row in site.content.metrics if "heldout_ev" in row]
    assert len(chart.find_elements("css selector", "circle")) == len(rows) > 1
    ActionChains(driver).move_to_element(chart.find_element("css selector", "svg")).perform()
    legend = chart.find_element("css selector", ".legend").text
    found = re.search(r"training batches (\S+)\s+held-out tokens (\S+)\s+at \S+ tokens", legend)
    assert found and 0 < float(found[2]) < float(found[1]) <= 1


def test_many_layers_have_a_short_legend_and_the_pointer_names_the_nearest(driver, visit) -> None:
    from selenium.webdriver import ActionChains

    visit("index.html", "document.querySelectorAll('#training-charts .chart').length")
    values = [0.02 * (1 + layer / 25) for layer in range(26)]
    series = [{"name": f"layer {layer}", "values": [value, value]} for layer, value in enumerate(values)]
    spec = {"title": "many", "x": [1, 9], "x_label": "tokens", "log": True, "series": series}
    driver.execute_script("circuitmill.charts.lines(document.getElementById('training-charts'), arguments[0])", spec)
    chart = css(driver, "#training-charts > .chart")[0]
    legend = chart.find_element("css selector", ".legend")
    assert legend.text.split("\n") == ["layer 0", "to", "layer 25"]
    curves = chart.find_elements("css selector", "path.line")
    assert len({curve.value_of_css_property("stroke") for curve in curves}) == 26
    # less than a factor of ten still has round ticks
    ticks = [text.text for text in chart.find_elements("css selector", ".axis text")]
    assert ticks[:3] == ["0.02", "0.03", "0.04"]
    ActionChains(driver).move_to_element(curves[3]).perform()
    assert legend.text.split("\n")[0] == f"layer 3 {values[3]:.3g}"


def test_graph_shows_every_node_with_labels(driver, visit, site: Site) -> None:
    document = site.content.graphs[0]
    visit("graph.html#prompt=two_hop-00", "document.body.dataset.ready")
    shown = {node.get_attribute("data-node-id") for node in css(driver, "#picture .node")}
    assert shown == {node["node_id"] for node in document["nodes"]}
    labels = [label.text for label in css(driver, "#picture .labels text")]
    assert len(labels) > 10
    assert any("Texas" in label for label in labels)
    assert [text.text for text in css(driver, "#picture .token")][-2:] == ["as", "·is"]
    assert "Austin" in css(driver, "#picture .logit .logit-text")[-4].text
    assert len(css(driver, "#picture .edge")) > 50


def test_nodes_do_not_overlap(driver, visit, site: Site) -> None:
    visit("graph.html#prompt=two_hop-01", "document.body.dataset.ready")
    script = """return [...document.querySelectorAll('#picture .node:not(.logit)')].map(
        node => node.getAttribute('transform').match(/[-\\d.]+/g).map(Number))"""
    places = driver.execute_script(script)
    closest = min(max(abs(x1 - x2), abs(y1 - y2)) for i, (x1, y1) in enumerate(places) for x2, y2 in places[i + 1 :])
    assert closest > 9


def test_click_opens_the_panel_and_the_address_keeps_it(driver, visit, site: Site) -> None:
    visit("graph.html#prompt=two_hop-00", "document.body.dataset.ready")
    concept = site.content.entries[0]["concepts"][0]["node"]
    css(driver, f'[data-node-id="{concept}"]')[0].click()
    layer, feature, _ = concept.split("_")
    wait(driver, "document.querySelectorAll('#panel .window').length")
    panel = css(driver, "#panel")[0].text
    assert "Texas" in css(driver, "#panel .node-title")[0].text
    assert "Activation" in panel and "Promotes" in panel and "Detection score" in panel
    assert f"node={concept}" in driver.current_url
    link = css(driver, "#feature-link")[0].get_attribute("href")
    assert link.endswith(f"feature.html#{layer}/{feature}")
    document = site.content.graphs[0]
    inputs = [link for link in document["links"] if link["target"] == concept]
    assert len(css(driver, "#panel .links.source li")) == len(inputs)
    strongest = max(abs(link["weight"]) for link in inputs)
    first = css(driver, "#panel .links.source .value")[0].text
    assert float(first.replace("−", "-")) == pytest.approx(
        next(link["weight"] for link in inputs if abs(link["weight"]) == strongest), rel=0.01
    )


def test_hovering_shows_a_tip_and_leaves_the_picture_alone(driver, visit) -> None:
    from selenium.webdriver import ActionChains

    visit("graph.html#prompt=two_hop-00", "document.body.dataset.ready")
    driver.execute_script("""window.rebuilt = 0;
        new MutationObserver(() => window.rebuilt++).observe(document.getElementById('picture'), {childList: true})""")
    script = """return [...document.querySelectorAll('.node')].sort(
        (a, b) => b.getBoundingClientRect().x - a.getBoundingClientRect().x)"""
    for node in driver.execute_script(script)[:4]:
        ActionChains(driver).move_to_element(node).perform()
        wait(driver, "!document.getElementById('tip').hidden")
        tip = css(driver, "#tip")[0]
        assert tip.text and tip.rect["x"] >= 0 and tip.rect["x"] + tip.rect["width"] <= 1280
    assert driver.execute_script("return window.rebuilt") == 0


def test_address_restores_the_view(driver, visit, site: Site) -> None:
    features = [n["node_id"] for n in site.content.graphs[1]["nodes"] if "cross" in n["feature_type"]][:3]
    state = f"prompt=two_hop-01&node={features[0]}&pins={','.join(features)}&influence=0.5"
    visit(f"graph.html#{state}", "document.body.dataset.ready === 'two_hop-01'")
    assert len(css(driver, "#picture .node.selected")) == 1
    assert len(css(driver, ".subgraph-picture .box")) == 3
    assert css(driver, "#influence-value")[0].text == "0.5"


def test_slider_hides_less_influential_nodes(driver, visit, site: Site) -> None:
    visit("graph.html#prompt=two_hop-00&influence=0.3", "document.body.dataset.ready")
    shown = {node.get_attribute("data-node-id") for node in css(driver, "#picture .node")}
    expected = {
        node["node_id"]
        for node in site.content.graphs[0]["nodes"]
        if node["feature_type"] in ("embedding", "logit") or node["influence"] <= 0.3
    }
    assert shown == expected


def test_search_marks_matching_nodes(driver, visit, site: Site) -> None:
    visit("graph.html#prompt=two_hop-00&q=Texas", "document.body.dataset.ready")
    marked = {node.get_attribute("data-node-id") for node in css(driver, "#picture .node.match")}
    texts = {n["node_id"]: n["clerp"] for n in site.content.graphs[0]["nodes"]}
    assert marked and all("Texas" in texts[node] for node in marked)
    assert css(driver, "#matches")[0].text.startswith(str(len(marked)))


def test_keyboard_moves_opens_pins_and_closes(driver, visit) -> None:
    visit("graph.html#prompt=two_hop-00", "document.body.dataset.ready")
    driver.execute_script("document.querySelector('.node[tabindex=\"0\"]').focus()")
    first = driver.switch_to.active_element.get_attribute("data-node-id")
    press(driver, "\ue015")  # arrow down
    second = driver.switch_to.active_element.get_attribute("data-node-id")
    assert second and second != first
    press(driver, "\ue007")  # enter
    assert f"node={second}" in driver.current_url
    press(driver, "p")
    assert f"pins={second}" in driver.current_url
    press(driver, "\ue00c")  # escape
    assert "node=" not in driver.current_url


def test_pinned_nodes_join_into_a_supernode(driver, visit, site: Site) -> None:
    features = [n["node_id"] for n in site.content.graphs[0]["nodes"] if "cross" in n["feature_type"]][:3]
    visit(f"graph.html#prompt=two_hop-00&pins={','.join(features)}", "document.querySelector('.box')")
    for place in range(2):
        driver.execute_script(
            "document.querySelectorAll('.box')[arguments[0]].dispatchEvent(new MouseEvent('click'))", place
        )
    name = css(driver, "#group-name")[0]
    name.clear()
    name.send_keys("Texas <evidence>")
    css(driver, "#join")[0].click()
    assert [box.text for box in css(driver, ".box.group text")] == ["Texas <evidence>"]
    assert len(css(driver, ".box")) == 2
    assert "groups=" in driver.current_url


def test_prompt_can_be_changed(driver, visit) -> None:
    visit("graph.html", "document.body.dataset.ready === 'two_hop-00'")
    driver.execute_script(
        "const s = document.getElementById('prompt'); s.value = 'own'; s.dispatchEvent(new Event('change'))"
    )
    wait(driver, "document.body.dataset.ready === 'own'")
    assert "prompt=own" in driver.current_url


def test_feature_page_shows_windows_as_text(driver, visit) -> None:
    visit("feature.html#1/20", "document.querySelectorAll('.window').length > 10")
    assert css(driver, "#explanation")[0].text == synthetic.explanation(1, 20)
    assert css(driver, ".tok.peak")
    assert synthetic.NASTY in css(driver, "#feature")[0].text
    assert css(driver, "main img, main script") == []
    assert len(css(driver, ".chart rect")) > 5


def test_unknown_feature_says_so(driver, visit) -> None:
    visit("feature.html#1/999", "document.querySelector('[role=alert]')")
    assert css(driver, "[role=alert]")[0].text == "feature 999 of layer 1 has no page in this report"


def test_features_are_found_by_their_explanation(driver, visit) -> None:
    visit("features.html#q=end Texas&layer=2", "document.querySelectorAll('#results tr').length")
    rows = [row.text for row in css(driver, "#results tr")]
    expected = [f for f in range(synthetic.N_FEATURES) if synthetic.explanation(2, f) == "end of city names in Texas"]
    assert len(rows) == len(expected)
    assert all(row.startswith("2 / ") and "Texas" in row for row in rows)


def test_script_in_data_does_not_run(driver, visit) -> None:
    visit("graph.html#prompt=own", "document.body.dataset.ready")
    assert synthetic.NASTY in css(driver, "#panel")[0].text
    assert css(driver, "main img, main script") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_their_window(driver, visit, width: int) -> None:
    driver.set_window_size(width, 900)
    try:
        for page in ("index.html", "tables.html", "features.html", "feature.html#1/20"):
            visit(page, "document.querySelector('main').children.length > 2")
            wide, window = driver.execute_script(
                "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert wide <= window, page
    finally:
        driver.set_window_size(1280, 900)


def test_a_run_without_graphs_has_pages(driver, tmp_path: Path) -> None:
    import dataclasses

    content = dataclasses.replace(make_content(), graphs=[], entries=[], evaluations={"main": synthetic.evaluation()})
    write_site(tmp_path, content)
    driver.get_log("browser")
    driver.get((tmp_path / "index.html").as_uri())
    wait(driver, "document.querySelectorAll('.chart > svg').length > 5")
    assert "traced no prompts" in css(driver, "#graphs")[0].text
    driver.get((tmp_path / "graph.html").as_uri())
    wait(driver, "document.querySelector('[role=alert]')")
    assert driver.get_log("browser") == []
