/* Draws the layered graph: tokens from left to right, layers from bottom to top. */
(function () {
  "use strict";
  const { svg, visible, percent, number, graph: model, panel } = window.circuitmill;
  const STRONGEST = 140; // edges drawn while no node is chosen

  function edgePath({ source, target }) {
    const end = target.kind === "logit" ? target.y + 10 : target.y; // a box is entered from below
    const lift = Math.max(18, Math.abs(source.y - end) * 0.45);
    const points = [[source.x, source.y], [source.x, source.y - lift], [target.x, end + lift], [target.x, end]];
    const [start, ...rest] = points.map((point) => point.map((value) => value.toFixed(1)).join(" "));
    return "M" + start + "C" + rest.join(" ");
  }

  function edge(link, top, strong) {
    const share = Math.min(1, Math.abs(link.weight) / top);
    return svg("path", {
      class: "edge " + (link.weight < 0 ? "negative" : "positive"),
      d: edgePath(link),
      "stroke-width": (strong ? 0.8 + 4.2 * share : 0.5 + 2.2 * share).toFixed(2),
      "stroke-opacity": (strong ? 0.35 + 0.55 * share : 0.12 + 0.38 * share).toFixed(3),
    });
  }

  function shape(node) {
    if (node.kind === "logit") {
      const room = Math.floor((node.width - 12) / 7) - 5;
      const text = visible(node.label);
      return [
        svg("rect", { class: "shape", x: -node.width / 2, y: -10, width: node.width, height: 20, rx: 4 }),
        svg("text", { class: "logit-text", y: 4, "text-anchor": "middle" }, text.length > room ? text.slice(0, Math.max(1, room - 1)) + "…" : text, svg("tspan", { class: "probability", dx: 5 }, percent(node.probability))),
      ];
    }
    const hit = svg("circle", { class: "hit", r: 9 });
    if (node.kind === "embedding") return [hit, svg("rect", { class: "shape", x: -5, y: -5, width: 10, height: 10, rx: 1.5 })];
    if (node.kind === "error") return [hit, svg("path", { class: "shape", d: "M0 -6L6 0L0 6L-6 0Z" })];
    const weight = 1 - Math.min(1, Math.max(0, node.rank));
    const radius = 4 + 2.5 * weight;
    return [hit, svg("circle", { class: "shape", r: radius.toFixed(2), style: { fillOpacity: (0.3 + 0.7 * weight).toFixed(2) } })];
  }

  function describe(view, node) {
    const amount = node.kind === "logit" ? ", probability " + percent(node.probability, 1) : node.kind === "feature" ? ", activation " + number(node.activation) : "";
    return panel.brief(view.graph, node) + amount;
  }

  function ground(view, frame) {
    const layer = svg("g", { class: "ground", "aria-hidden": "true" });
    const { graph } = view;
    frame.rows.forEach((row, index) => {
      const name = index === 0 ? "tokens" : index === graph.nLayers + 1 ? "outputs" : "layer " + (index - 1);
      layer.append(
        svg("text", { class: "row-name", x: 8, y: row.middle + 4 }, name),
        index ? svg("line", { x1: 0, x2: frame.width, y1: row.top + row.size, y2: row.top + row.size }) : ""
      );
    });
    frame.starts.forEach((start, pos) => {
      if (pos) layer.append(svg("line", { class: "column", x1: start, x2: start, y1: frame.rows[graph.nLayers + 1].size + model.MARGIN.top, y2: frame.bottom }));
      const room = Math.floor((frame.columns[pos] - 6) / 7.3);
      const text = visible(graph.tokens[pos]);
      layer.append(
        svg("text", { class: "token", x: start + frame.columns[pos] / 2, y: frame.bottom + 16, "text-anchor": "middle" }, text.length > room ? text.slice(0, Math.max(1, room - 1)) + "…" : text, svg("title", {}, text)),
        svg("text", { class: "position", x: start + frame.columns[pos] / 2, y: frame.bottom + 32, "text-anchor": "middle" }, String(pos))
      );
    });
    return layer;
  }

  function nodeElement(view, node) {
    const classes = ["node", node.kind];
    if (view.pinned.has(node.id)) classes.push("pinned");
    if (view.selected === node.id) classes.push("selected");
    return svg(
      "g",
      {
        class: classes.join(" "),
        "data-node-id": node.id,
        transform: "translate(" + node.x.toFixed(1) + " " + node.y.toFixed(1) + ")",
        tabindex: "-1",
        role: "button",
        "aria-label": describe(view, node),
      },
      shape(node)
    );
  }

  const size = (view) => view.stage.clientWidth + "x" + view.stage.clientHeight;

  /** Rebuilds the picture; cheap enough to run on every change of size, slider or switch. */
  function draw(view) {
    const { graph } = view;
    const shown = graph.nodes.filter((node) => model.isShown(node, view.threshold, view.errors));
    view.visible = new Set(shown);
    const frame = model.layout(graph, shown, view.stage.clientWidth, view.stage.clientHeight);
    view.frame = frame;
    view.size = size(view);
    const picture = view.picture;
    picture.setAttribute("width", frame.width);
    picture.setAttribute("height", frame.height);
    picture.setAttribute("viewBox", "0 0 " + frame.width + " " + frame.height);
    view.edges = svg("g", { class: "edges", "aria-hidden": "true" });
    view.labels = svg("g", { class: "labels", "aria-hidden": "true" });
    const nodes = svg("g", { class: "nodes" }, shown.map((node) => nodeElement(view, node)));
    picture.replaceChildren(ground(view, frame), view.edges, nodes, view.labels);
    const entry = picture.querySelector('[data-node-id="' + CSS.escape(view.selected || "") + '"]') || picture.querySelector(".node.logit") || picture.querySelector(".node");
    if (entry) entry.setAttribute("tabindex", "0");
    edges(view, view.selected);
    search(view);
  }

  function labels(view, of) {
    const placed = view.showLabels ? model.placeLabels([...view.visible], of, view.frame, 60) : [];
    view.labels.replaceChildren(
      ...placed.filter((label) => label.far).map((label) => svg("line", { x1: label.node.x, x2: Math.max(label.x - label.width / 2, Math.min(label.x + label.width / 2, label.node.x)), y1: label.node.y, y2: label.y - 4 })),
      ...placed.map((label) => svg("text", { x: label.x.toFixed(1), y: label.y.toFixed(1), "text-anchor": label.anchor, "data-label-of": label.node.id }, label.text))
    );
  }

  /** Edges of one node, or lightly the strongest of all; its neighbours take the colour of the edge's sign. */
  function edges(view, id) {
    const node = id && view.graph.byId.get(id);
    const links = (node ? [...node.inputs, ...node.outputs] : view.graph.links).filter((link) => view.visible.has(link.source) && view.visible.has(link.target));
    const top = node ? Math.max(1e-12, ...links.map((link) => Math.abs(link.weight))) : view.graph.typical;
    view.edges.replaceChildren(...(node ? links : links.slice(0, STRONGEST)).map((link) => edge(link, top, Boolean(node))).reverse());
    const signs = new Map();
    if (node) for (const link of links) signs.set(link.source === node ? link.target.id : link.source.id, link.weight);
    labels(view, node ? new Set([node, ...links.flatMap((link) => [link.source, link.target])]) : view.visible);
    view.picture.classList.toggle("focused", Boolean(node));
    for (const element of view.picture.querySelectorAll(".node")) {
      const weight = signs.get(element.dataset.nodeId);
      element.classList.toggle("raises", weight > 0);
      element.classList.toggle("lowers", weight < 0);
      element.classList.toggle("focus", element.dataset.nodeId === id);
      element.classList.toggle("selected", element.dataset.nodeId === view.selected);
      element.classList.toggle("pinned", view.pinned.has(element.dataset.nodeId));
    }
  }

  function search(view) {
    const words = view.query.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const element of view.picture.querySelectorAll(".node")) {
      const text = describe(view, view.graph.byId.get(element.dataset.nodeId)).toLowerCase();
      const hit = words.length > 0 && words.every((word) => text.includes(word));
      element.classList.toggle("match", hit);
      found += hit ? 1 : 0;
    }
    view.picture.classList.toggle("searching", words.length > 0);
    return words.length ? found : null;
  }

  window.circuitmill.graphDraw = { draw, edges, search, describe, size };
})();
