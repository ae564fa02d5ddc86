/* Browse and search the explanations of all features that have a page. */
(function () {
  "use strict";
  const { el, load, number, percent, readHash, writeHash, fail } = window.circuitmill;
  const PAGE = 100;
  const byId = (id) => document.getElementById(id);
  const place = byId("results");
  let shown = PAGE;

  const ORDERS = {
    graphs: (index) => (a, b) => index.graphs[b] - index.graphs[a] || index.density[b] - index.density[a],
    detection: (index) => (a, b) => (index.detection[b] ?? -1) - (index.detection[a] ?? -1) || index.density[b] - index.density[a],
    density: (index) => (a, b) => index.density[b] - index.density[a],
    place: () => (a, b) => a - b,
  };

  function matches(index, state) {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [];
    for (let at = 0; at < index.layer.length; at += 1) {
      if (state.layer !== "" && index.layer[at] !== Number(state.layer)) continue;
      if (state.graphs === "1" && !index.graphs[at]) continue;
      const text = index.lower[at];
      if (words.every((word) => text.includes(word) || word === String(index.feature[at]))) rows.push(at);
    }
    return rows.sort(ORDERS[state.sort](index));
  }

  function row(index, at) {
    const href = "feature.html#" + index.layer[at] + "/" + index.feature[at];
    return el(
      "tr",
      {},
      el("td", { class: "num" }, el("a", { href }, index.layer[at] + " / " + index.feature[at])),
      el("td", { style: { overflowWrap: "anywhere" } }, index.explanation[at]),
      el("td", { class: "n" }, number(index.detection[at], 2)),
      el("td", { class: "n" }, percent(index.density[at], 2)),
      el("td", { class: "n" }, number(index.act_max[at], 2)),
      el("td", { class: "n" }, index.graphs[at] ? String(index.graphs[at]) : "")
    );
  }

  function draw(index) {
    const state = { q: byId("q").value, layer: byId("layer").value, sort: byId("sort").value, graphs: byId("in-graphs").checked ? "1" : "" };
    writeHash(state);
    const rows = matches(index, state);
    byId("count").textContent = rows.length.toLocaleString("en-US") + " of " + index.layer.length.toLocaleString("en-US") + " features";
    place.replaceChildren(...rows.slice(0, shown).map((at) => row(index, at)));
    byId("more").hidden = rows.length <= shown;
  }

  load("features/index").then(
    (index) => {
      index.lower = index.explanation.map((text) => text.toLowerCase());
      for (const layer of [...new Set(index.layer)]) byId("layer").append(el("option", { value: layer }, "layer " + layer));
      const state = readHash();
      byId("q").value = state.q || "";
      byId("layer").value = state.layer || "";
      byId("sort").value = state.sort in ORDERS ? state.sort : "graphs";
      byId("in-graphs").checked = state.graphs === "1";
      for (const id of ["q", "layer", "sort", "in-graphs"])
        byId(id).addEventListener("input", () => {
          shown = PAGE;
          draw(index);
        });
      byId("more").addEventListener("click", () => {
        shown += PAGE;
        draw(index);
      });
      draw(index);
    },
    (error) => fail(byId("feature-table"), error)
  );
})();
