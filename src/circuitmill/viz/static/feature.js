/* One feature: feature.html#<layer>/<feature>. */
(function () {
  "use strict";
  const { el, load, loadFeature, number, percent, bars, windowView, charts, fail } = window.circuitmill;
  const QUARTER = 25; // quantile windows are named by the lower end of their quarter
  const place = document.getElementById("feature");

  const section = (title, note, ...children) =>
    el("section", {}, el("h2", {}, title), note ? el("p", { class: "muted small" }, note) : null, ...children);
  const tile = (label, value, note) =>
    el("div", { class: "tile" }, el("dt", {}, label), el("dd", {}, el("div", { class: "value" }, value), el("div", { class: "note" }, note)));

  function neighbours(index, at) {
    const link = (step, text) =>
      at + step in index.layer
        ? el("a", { href: "#" + index.layer[at + step] + "/" + index.feature[at + step] }, text)
        : el("span", { class: "muted" }, text);
    return el("p", { class: "small" }, link(-1, "← previous"), " · ", link(1, "next →"));
  }

  function windows(record, kind) {
    const chosen = record.windows.filter((window_) => window_.k === kind);
    const views = [];
    let quantile;
    for (const window_ of chosen) {
      if (kind === "quantile" && window_.q !== quantile) {
        quantile = window_.q;
        views.push(el("h3", { style: { margin: "1rem 0 .1rem" } }, "Percentiles " + quantile + " to " + (quantile + QUARTER) + " of its activations"));
      }
      views.push(windowView(window_, record.texts, record.act_max));
    }
    return views;
  }

  /** A link per graph, to the first of the nodes it is there. */
  function inGraphs(graphs) {
    const byName = new Map();
    for (const [name, node, prompt] of graphs) byName.set(name, [...(byName.get(name) || []), { node, prompt }]);
    const items = [...byName].map(([name, places]) =>
      el(
        "li",
        {},
        el("a", { href: "graph.html#" + new URLSearchParams({ prompt: name, node: places[0].node }) }, places[0].prompt),
        places.length > 1 ? " at " + places.length + " positions" : ""
      )
    );
    return el("ul", { class: "facts" }, items);
  }

  function view(record, index, at) {
    const { layer, feature } = record;
    document.title = "Feature " + layer + "/" + feature;
    const scored = record.detection !== null;
    place.replaceChildren(
      el("p", { class: "muted", style: { margin: 0 } }, "Layer " + layer + " · feature " + feature),
      el("h1", { id: "explanation" }, record.explanation),
      neighbours(index, at),
      el(
        "dl",
        { class: "tiles" },
        tile("Detection", scored ? number(record.detection) : "–", scored ? "balanced accuracy, " + record.n_scored + " windows" : "too few windows to score"),
        tile("Precision / recall", scored ? number(record.precision, 2) + " / " + number(record.recall, 2) : "–", "explained by: " + record.explainer),
        tile("Density", percent(record.density, record.density < 0.001 ? 4 : 2), record.n_active.toLocaleString("en-US") + " tokens"),
        tile("Largest activation", number(record.act_max), "mean where it fires " + number(record.act_mean))
      )
    );
    if (record.graphs.length) place.append(section("In graphs", null, inGraphs(record.graphs)));
    // A feature that writes no vector to the residual stream has none.
    if (record.top.length)
      place.append(
        el(
          "div",
          { class: "two" },
          section("Promotes", "Output tokens this feature's decoder raises most, by direct effect on the logits.", bars(record.top)),
          section("Suppresses", "Output tokens it lowers most.", bars(record.bottom))
        )
      );
    const top = windows(record, "top");
    place.append(section("Strongest activations", "Text windows shaded by activation; the underlined token is the peak.", top.length ? top : el("p", { class: "muted" }, "It never fired on the tokens that were searched.")));
    const samples = windows(record, "quantile");
    if (samples.length) place.append(section("Across its range", "Windows sampled by activation quantile.", samples));
    if (record.histogram.length) {
      const holder = el("div", { class: "charts" });
      place.append(section("Distribution", null, holder));
      charts.histogram(holder, { title: "Activation where it fires", edges: record.edges, log: true, x_label: "activation", series: [{ name: "tokens", counts: record.histogram }] });
    }
  }

  async function show() {
    const [layer, feature] = location.hash.slice(1).split("/").map(Number);
    if (!Number.isInteger(layer) || !Number.isInteger(feature)) throw new Error("choose a feature from the list: feature.html#<layer>/<feature>");
    const index = await load("features/index");
    const at = index.layer.findIndex((value, place) => value === layer && index.feature[place] === feature);
    if (at < 0) throw new Error("feature " + feature + " of layer " + layer + " has no page in this report");
    view(await loadFeature(layer, feature), index, at);
    window.scrollTo(0, 0);
  }
  const refresh = () => show().catch((error) => fail(place, error));
  window.addEventListener("hashchange", refresh);
  refresh();
})();
