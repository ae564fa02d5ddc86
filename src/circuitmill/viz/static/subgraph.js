/* Pinned nodes as a small graph of their own; several can be joined into one named supernode. */
(function () {
  "use strict";
  const { el, svg, number, panel, graph: model } = window.circuitmill;
  const BOX = { height: 30, gap: 16, rowGap: 30, longest: 30 };

  const name = (node) => (node.kind === "feature" ? model.short(node.label) : panel.caption(node));

  /** One box per group and per single pinned node. */
  function boxes(view) {
    const grouped = new Set(view.groups.flatMap((group) => group.ids));
    const single = [...view.pinned].filter((id) => !grouped.has(id)).map((id) => ({ label: name(view.graph.byId.get(id)), ids: [id] }));
    const named = view.groups.map((group) => ({ ...group, group }));
    return [...named, ...single].map((box) => {
      const nodes = box.ids.map((id) => view.graph.byId.get(id));
      const mean = (key) => nodes.reduce((sum, node) => sum + node[key], 0) / nodes.length;
      return { ...box, nodes, row: Math.round(mean("row")), pos: mean("pos") };
    });
  }

  /** Share of the target's absolute input that comes from the source, signed, averaged over the target's nodes. */
  function weights(all) {
    const owner = new Map(all.flatMap((box) => box.nodes.map((node) => [node, box])));
    const edges = new Map();
    for (const box of all)
      for (const node of box.nodes)
        for (const link of node.inputs) {
          const source = owner.get(link.source);
          if (!source || source === box || !node.inflow) continue;
          const key = all.indexOf(source) + ">" + all.indexOf(box);
          edges.set(key, (edges.get(key) || 0) + link.weight / node.inflow / box.nodes.length);
        }
    return [...edges].map(([key, weight]) => {
      const [source, target] = key.split(">").map(Number);
      return { source: all[source], target: all[target], weight };
    });
  }

  function arrange(all, width) {
    const rows = [...new Set(all.map((box) => box.row))].sort((a, b) => b - a);
    rows.forEach((row, index) => {
      const line = all.filter((box) => box.row === row).sort((a, b) => a.pos - b.pos);
      const room = (width - BOX.gap * (line.length + 1)) / line.length;
      line.forEach((box, at) => {
        box.text = box.label.length > BOX.longest ? box.label.slice(0, BOX.longest - 1) + "…" : box.label;
        box.width = Math.min(room, box.text.length * 6.7 + 24);
        box.x = BOX.gap + (room + BOX.gap) * (at + 0.5) - BOX.gap / 2;
        box.y = 24 + index * (BOX.height + BOX.rowGap);
      });
    });
    return 24 + rows.length * (BOX.height + BOX.rowGap) - BOX.rowGap / 2;
  }

  function drawBoxes(view, holder) {
    const all = boxes(view);
    const width = Math.max(280, holder.clientWidth);
    const height = arrange(all, width);
    const picture = svg("svg", { class: "subgraph-picture", width, height, viewBox: "0 0 " + width + " " + height, role: "img", "aria-label": "Subgraph of pinned nodes" });
    for (const { source, target, weight } of weights(all)) {
      const [y1, y2] = [source.y - BOX.height / 2, target.y + BOX.height / 2];
      const middle = (y1 + y2) / 2;
      picture.append(
        svg("path", { class: "edge " + (weight < 0 ? "negative" : "positive"), d: "M" + source.x + " " + y1 + "C" + source.x + " " + middle + " " + target.x + " " + middle + " " + target.x + " " + y2, "stroke-width": 1 + 6 * Math.min(1, Math.abs(weight)), "stroke-opacity": 0.65 }, svg("title", {}, number(100 * weight, 2) + "% of the input"))
      );
    }
    for (const box of all) {
      const chosen = box.ids.some((id) => view.chosen.has(id));
      picture.append(
        svg(
          "g",
          { class: "box" + (box.group ? " group" : "") + (chosen ? " chosen" : ""), transform: "translate(" + box.x + " " + box.y + ")", tabindex: 0, role: "button", "aria-pressed": String(chosen), onclick: () => choose(view, box), onkeydown: (event) => event.key === "Enter" && choose(view, box) },
          box.group ? svg("rect", { class: "shadow", x: -box.width / 2 + 3, y: -BOX.height / 2 + 3, width: box.width, height: BOX.height, rx: 7 }) : "",
          svg("rect", { class: "shape", x: -box.width / 2, y: -BOX.height / 2, width: box.width, height: BOX.height, rx: 7 }),
          svg("text", { y: 4, "text-anchor": "middle" }, box.text),
          svg("title", {}, box.nodes.map((node) => panel.brief(view.graph, node)).join("\n"))
        )
      );
    }
    holder.replaceChildren(picture);
  }

  function choose(view, box) {
    const on = box.ids.every((id) => view.chosen.has(id));
    for (const id of box.ids) on ? view.chosen.delete(id) : view.chosen.add(id);
    draw(view);
  }

  function join(view, label) {
    const ids = [...view.chosen];
    for (const group of view.groups) group.ids = group.ids.filter((id) => !view.chosen.has(id));
    view.groups = [...view.groups.filter((group) => group.ids.length), { label, ids }];
    view.chosen.clear();
    view.refresh();
  }
  function split(view) {
    view.groups = view.groups.filter((group) => !group.ids.some((id) => view.chosen.has(id)));
    view.chosen.clear();
    view.refresh();
  }

  function draw(view) {
    view.chosen = view.chosen || new Set();
    for (const id of view.chosen) if (!view.pinned.has(id)) view.chosen.delete(id);
    const place = document.getElementById("subgraph");
    place.hidden = view.pinned.size === 0;
    if (place.hidden) return;
    const first = [...view.chosen][0];
    const field = el("input", { type: "text", id: "group-name", "aria-label": "Name of the supernode", placeholder: "Name", size: 16, value: first ? name(view.graph.byId.get(first)) : "" });
    const holder = el("div", { class: "scroll" });
    place.replaceChildren(
      el(
        "div",
        { class: "controls" },
        el("h2", {}, "Pinned"),
        el("span", { class: "muted small" }, view.chosen.size ? view.chosen.size + " chosen" : "Click boxes to choose them, then join them into a supernode."),
        view.chosen.size ? [field, el("button", { type: "button", class: "plain", id: "join", onclick: () => join(view, field.value || "supernode") }, "Join")] : null,
        view.groups.some((group) => group.ids.some((id) => view.chosen.has(id))) ? el("button", { type: "button", class: "plain", onclick: () => split(view) }, "Split") : null,
        el("button", { type: "button", class: "plain", onclick: () => { view.pinned.clear(); view.groups = []; view.refresh(); } }, "Unpin all")
      ),
      holder
    );
    drawBoxes(view, holder);
  }

  window.circuitmill.subgraph = { draw };
})();
