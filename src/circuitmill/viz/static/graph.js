/* The graph page: chooses a prompt, keeps the state in the address, answers mouse and keyboard. */
(function () {
  "use strict";
  const { el, load, readHash, writeHash, fail, number, graph: model, graphDraw, panel, subgraph } = window.circuitmill;
  const byId = (id) => document.getElementById(id);
  const view = {
    stage: byId("stage"),
    picture: byId("picture"),
    panel: byId("panel"),
    tip: byId("tip"),
    graph: null,
    entry: null,
    selected: null,
    pinned: new Set(),
    groups: [], // [{label, ids}]
    threshold: 1,
    errors: true,
    showLabels: true,
    query: "",
    visible: new Set(),
  };

  function save() {
    writeHash({
      prompt: view.entry.name,
      node: view.selected,
      pins: [...view.pinned].join(","),
      groups: view.groups.length ? JSON.stringify(view.groups.map((group) => [group.label, ...group.ids])) : "",
      influence: view.threshold < view.ceiling ? String(view.threshold) : "",
      errors: view.errors ? "" : "0",
      q: view.query,
    });
  }

  view.select = (id) => {
    view.selected = id;
    view.tip.hidden = true;
    graphDraw.edges(view, id);
    panel.draw(view);
    save();
  };
  view.togglePin = (id) => {
    if (view.pinned.has(id)) {
      view.pinned.delete(id);
      for (const group of view.groups) group.ids = group.ids.filter((other) => other !== id);
      view.groups = view.groups.filter((group) => group.ids.length);
    } else view.pinned.add(id);
    view.refresh();
  };
  /** After pins, groups or selection changed; the layout stays. */
  view.refresh = () => {
    graphDraw.edges(view, view.selected);
    panel.draw(view);
    subgraph.draw(view);
    save();
  };

  function redraw() {
    graphDraw.draw(view);
    if (view.selected && !view.visible.has(view.graph.byId.get(view.selected))) {
      view.selected = null;
      graphDraw.edges(view, null);
    }
    panel.draw(view);
    subgraph.draw(view);
    showCounts();
    save();
  }
  function showCounts() {
    byId("influence-value").textContent = number(view.threshold, 2);
    const found = graphDraw.search(view);
    byId("matches").textContent = found === null ? "" : found + (found === 1 ? " match" : " matches");
  }

  function parseGroups(text) {
    if (!text) return [];
    let list;
    try {
      list = JSON.parse(text);
    } catch (error) {
      if (error instanceof SyntaxError) return []; // a truncated link loses its groups, not the graph
      throw error;
    }
    return list.map(([label, ...ids]) => ({ label: String(label), ids }));
  }

  async function open(name, state) {
    const index = await load("graphs");
    const entry = index.find((candidate) => candidate.name === name) || index[0];
    if (!entry) throw new Error("this run traced no prompts");
    const ticket = (view.ticket = {}); // a prompt chosen while another still loads wins
    const raw = await load("graphs/" + entry.name);
    if (view.ticket !== ticket) return;
    view.entry = entry;
    view.graph = model.prepare(raw, Number(document.body.dataset.layers));
    const known = (id) => view.graph.byId.has(id);
    const saved = raw.qParams || {};
    view.ceiling = view.graph.ceiling;
    view.threshold = Math.min(view.ceiling, Number(state.influence) || view.ceiling);
    view.errors = state.errors !== "0";
    view.query = state.q || "";
    view.selected = known(state.node) ? state.node : null;
    view.pinned = new Set((state.pins !== undefined ? state.pins.split(",") : saved.pinnedIds || []).filter(known));
    view.groups = (state.groups ? parseGroups(state.groups) : (saved.supernodes || []).map(([label, ...ids]) => ({ label, ids })))
      .map((group) => ({ label: group.label, ids: group.ids.filter((id) => view.pinned.has(id)) }))
      .filter((group) => group.ids.length);
    byId("prompt").value = entry.name;
    byId("influence").max = String(view.ceiling);
    byId("influence").min = String(Math.min(view.graph.least, view.ceiling - 0.01));
    byId("influence").value = String(view.threshold);
    byId("errors").checked = view.errors;
    byId("q").value = view.query;
    document.title = entry.prompt + " – attribution graph";
    redraw();
    document.body.dataset.ready = entry.name;
  }

  function fillPrompts(index) {
    const circuits = new Map();
    for (const entry of index) {
      if (!circuits.has(entry.circuit)) circuits.set(entry.circuit, el("optgroup", { label: entry.circuit }));
      circuits.get(entry.circuit).append(el("option", { value: entry.name }, entry.prompt));
    }
    byId("prompt").append(...circuits.values());
  }

  const nodeOf = (event) => event.target.closest?.(".node")?.dataset.nodeId;

  function showTip(id, event) {
    const node = view.graph.byId.get(id);
    view.tip.textContent = graphDraw.describe(view, node);
    view.tip.hidden = false;
    const right = event.clientX > window.innerWidth - 340;
    const low = event.clientY > window.innerHeight - 90;
    view.tip.style.left = event.clientX + (right ? -12 : 14) + "px";
    view.tip.style.top = event.clientY + (low ? -10 : 14) + "px";
    view.tip.style.transform = "translate(" + (right ? "-100%" : "0") + ", " + (low ? "-100%" : "0") + ")";
  }

  function listen() {
    view.picture.addEventListener("pointerover", (event) => {
      const id = nodeOf(event);
      if (!id) return;
      showTip(id, event);
      graphDraw.edges(view, view.selected || id);
    });
    view.picture.addEventListener("pointerout", (event) => {
      if (!nodeOf(event)) return;
      view.tip.hidden = true;
      graphDraw.edges(view, view.selected);
    });
    view.picture.addEventListener("click", (event) => {
      // What is there now: a redraw between press and release leaves the event with the picture as its target.
      const id = document.elementFromPoint(event.clientX, event.clientY)?.closest(".node")?.dataset.nodeId || null;
      view.select(id === view.selected ? null : id);
      if (id) focusNode(id);
    });
    view.picture.addEventListener("keydown", onKey);
    view.picture.addEventListener("focusin", (event) => {
      const id = nodeOf(event);
      if (id && !view.selected) graphDraw.edges(view, id);
    });
    byId("influence").addEventListener("input", (event) => {
      view.threshold = Number(event.target.value);
      redraw();
    });
    byId("errors").addEventListener("input", (event) => {
      view.errors = event.target.checked;
      redraw();
    });
    byId("labels").addEventListener("input", (event) => {
      view.showLabels = event.target.checked;
      redraw();
    });
    byId("q").addEventListener("input", (event) => {
      view.query = event.target.value;
      showCounts();
      save();
    });
    byId("prompt").addEventListener("change", (event) => start(event.target.value, {}));
    window.addEventListener("hashchange", () => {
      const state = readHash();
      start(state.prompt, state);
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") view.select(null);
      if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
        event.preventDefault();
        byId("q").focus();
      }
    });
    // The observer also reports the size it starts with; drawing anew then would replace nodes under the pointer.
    new ResizeObserver(() => {
      if (view.graph && graphDraw.size(view) !== view.size) graphDraw.draw(view);
    }).observe(view.stage);
  }

  function focusNode(id) {
    for (const other of view.picture.querySelectorAll('.node[tabindex="0"]')) other.setAttribute("tabindex", "-1");
    const element = view.picture.querySelector('[data-node-id="' + CSS.escape(id) + '"]');
    element.setAttribute("tabindex", "0");
    element.focus({ preventScroll: false });
  }

  function onKey(event) {
    const id = nodeOf(event);
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!id) return;
    if (step) {
      const next = model.neighbour([...view.visible], view.graph.byId.get(id), ...step);
      if (next) focusNode(next.id);
    } else if (event.key === "Enter" || event.key === " ") view.select(id === view.selected ? null : id);
    else if (event.key === "p") view.togglePin(id);
    else return;
    event.preventDefault();
  }

  const start = (name, state) => open(name, state).catch((error) => fail(view.panel, error));
  load("graphs").then(
    (index) => {
      fillPrompts(index);
      listen();
      const state = readHash();
      start(state.prompt, state);
    },
    (error) => fail(view.panel, error)
  );
})();
