/* The side panel of the graph page: the prompt as a whole, or one node. */
(function () {
  "use strict";
  const { el, number, percent, signed, bars, visible, windowView, loadFeature, graph: model } = window.circuitmill;

  const KIND = { feature: "Feature", error: "Reconstruction error", embedding: "Token embedding", logit: "Output" };
  const place = (graph, node) =>
    node.kind === "logit" ? "" : (node.layer === null ? "" : "layer " + node.layer + ", ") + "position " + node.pos + " “" + visible(graph.tokens[node.pos]) + "”";
  const caption = (node) => (node.kind === "logit" ? "Output “" + visible(node.label) + "”" : node.kind === "embedding" ? "Token “" + visible(node.label) + "”" : node.label);

  /** "L2 · Texas @ las": layer, label (cut to `longest` if given), token. */
  function brief(graph, node, longest) {
    const where = node.kind === "embedding" || node.kind === "logit" ? "" : "L" + node.layer + " · ";
    const at = node.kind === "feature" || node.kind === "error" ? " @ " + visible(graph.tokens[node.pos].trim() || graph.tokens[node.pos]) : "";
    return where + (longest && node.kind === "feature" ? model.short(node.label, longest) : caption(node)) + at;
  }

  function fact(name, value) {
    return [el("dt", {}, name), el("dd", {}, value)];
  }

  function linkList(view, title, links, end) {
    const rows = links
      .filter((link) => view.visible.has(link[end]))
      .slice(0, 60)
      .map((link) => [brief(view.graph, link[end], 26), link.weight, () => view.select(link[end].id), brief(view.graph, link[end])]);
    return el(
      "section",
      { class: "links " + end },
      el("h3", {}, title, el("span", { class: "muted" }, " " + rows.length)),
      rows.length ? bars(rows) : el("p", { class: "muted small" }, end === "source" ? "Nothing flows into it." : "Nothing flows out of it within the pruned graph.")
    );
  }

  /** Filled in when the chunk of feature pages has loaded, if the same node is still open. */
  function featureDetails(view, node) {
    const holder = el("div", {}, el("p", { class: "muted small" }, "Loading examples…"));
    loadFeature(node.layer, node.feature).then(
      (record) => {
        const windows = record.windows.filter((window_) => window_.k === "top").slice(0, 5);
        holder.replaceChildren(
          el("h3", {}, "Promotes"),
          bars(record.top.slice(0, 5)),
          el("h3", {}, "Suppresses"),
          bars(record.bottom.slice(0, 3)),
          el("h3", {}, "Strongest activations"),
          ...windows.map((window_) => windowView(window_, record.texts, record.act_max))
        );
        const score = view.panel.querySelector("[data-detection]");
        if (score) score.textContent = record.detection === null ? "too few windows" : number(record.detection);
      },
      (error) => holder.replaceChildren(el("p", { class: "muted small" }, error.message))
    );
    return holder;
  }

  function nodeView(view, node) {
    const { graph } = view;
    const pinned = view.pinned.has(node.id);
    const isFeature = node.kind === "feature";
    return [
      el("p", { class: "muted small", style: { margin: 0 } }, KIND[node.kind] + (place(graph, node) ? " · " + place(graph, node) : "")),
      el("h2", { class: "node-title" }, caption(node)),
      el(
        "div",
        { class: "controls" },
        el("button", { type: "button", class: "plain", id: "pin", "aria-pressed": String(pinned), onclick: () => view.togglePin(node.id) }, pinned ? "Pinned" : "Pin"),
        isFeature ? el("a", { id: "feature-link", href: "feature.html#" + node.layer + "/" + node.feature }, "Feature " + node.layer + "/" + node.feature) : null,
        el("button", { type: "button", class: "plain", onclick: () => view.select(null) }, "Close")
      ),
      el(
        "dl",
        { class: "pairs" },
        node.kind === "logit" ? fact("Probability", percent(node.probability, 1)) : null,
        isFeature ? fact("Activation", number(node.activation)) : null,
        isFeature ? fact("Detection score", el("span", { "data-detection": true }, "…")) : null,
        node.influence === null || node.influence === undefined ? null : fact("Cumulative influence", number(node.influence))
      ),
      node.kind === "embedding" ? null : linkList(view, "Inputs", node.inputs, "source"),
      node.kind === "logit" ? null : linkList(view, "Outputs", node.outputs, "target"),
      isFeature ? featureDetails(view, node) : null,
    ];
  }

  function conceptView(view, concept) {
    const text = concept.name + (concept.found ? "" : " not found");
    const chip = el("span", { class: "chip " + (concept.found ? "yes" : "no") }, (concept.found ? "✓ " : "✗ ") + text);
    const node = concept.node && view.graph.byId.get(concept.node);
    return el(
      "li",
      {},
      chip,
      node ? [" ", el("button", { type: "button", class: "linkish", onclick: () => view.select(node.id) }, brief(view.graph, node, 40))] : null
    );
  }

  function graphView(view) {
    const { entry, graph } = view;
    const logits = graph.nodes.filter((node) => node.kind === "logit").sort((a, b) => b.probability - a.probability);
    const strongest = graph.nodes.filter((node) => node.kind === "feature" && view.visible.has(node)).sort(model.importance).slice(0, 12);
    return [
      el("p", { class: "muted small", style: { margin: 0 } }, entry.name),
      el("h2", { class: "node-title" }, entry.prompt, el("span", { class: "answer" }, visible(entry.prediction).replace(/^·+/, " "))),
      el("p", { class: "muted small" }, "Hover a node to see its edges; click it to keep them and read what it stands for."),
      el(
        "dl",
        { class: "pairs" },
        fact("Replacement score", number(entry.replacement_score)),
        fact("Completeness", number(entry.completeness)),
        fact("Unattributed", percent(entry.unattributed, 1)),
        entry.edge_error === null ? null : fact("Edges against interventions", "within " + number(entry.edge_error, 2)),
        fact("In this view", view.visible.size + " nodes of " + graph.nodes.length + ", " + graph.links.length.toLocaleString("en-US") + " edges"),
        entry.expected === null ? null : fact("Expected answer", el("span", { class: entry.correct ? "good" : "bad" }, entry.expected + (entry.correct ? " ✓" : " ✗")))
      ),
      entry.concepts.length ? el("section", {}, el("h3", {}, "Known intermediate concepts"), el("ul", { class: "concepts" }, entry.concepts.map((concept) => conceptView(view, concept)))) : null,
      el("section", {}, el("h3", {}, "Outputs"), el("ul", { class: "bars" }, logits.map((node) =>
        el("li", {}, el("button", { type: "button", onclick: () => view.select(node.id) }, visible(node.label)),
          el("span", { class: "track" }, el("i", { style: { width: 100 * node.probability + "%" } })), el("span", { class: "value" }, percent(node.probability, 1)))))),
      el("section", {}, el("h3", {}, "Most influential features"), el("ol", { class: "strongest" }, strongest.map((node) =>
        el("li", {}, el("button", { type: "button", class: "linkish", title: brief(graph, node), onclick: () => view.select(node.id) }, brief(graph, node, 32)))))),
    ];
  }

  function draw(view) {
    const node = view.selected && view.graph.byId.get(view.selected);
    view.panel.replaceChildren(...(node ? nodeView(view, node) : graphView(view)).flat(3).filter(Boolean));
    view.panel.scrollTop = 0;
  }

  window.circuitmill.panel = { draw, brief, caption };
})();
