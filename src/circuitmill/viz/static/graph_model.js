/* A graph file (circuit-tracer's JSON) as linked objects, and where each node goes on the page. No drawing here. */
(function () {
  "use strict";
  const KINDS = {
    "cross layer transcoder": "feature",
    "mlp reconstruction error": "error",
    embedding: "embedding",
    logit: "logit",
  };
  const GAP = 15; // between node centres in one cell
  const MARGIN = { left: 74, right: 22, top: 12, bottom: 44 };

  /** Row 0 holds the embeddings, row l + 1 layer l, the last row the logits. */
  function rowOf(kind, layer, nLayers) {
    if (kind === "embedding") return 0;
    return kind === "logit" ? nLayers + 1 : Number(layer) + 1;
  }

  function prepare(raw, nLayers) {
    const byId = new Map();
    const tokens = raw.metadata.prompt_tokens;
    for (const node of raw.nodes) {
      const kind = KINDS[node.feature_type];
      const parts = node.node_id.split("_");
      const label = {
        feature: node.clerp || "feature " + parts[1],
        error: "error of layer " + node.layer,
        embedding: tokens[node.ctx_idx],
        logit: (node.clerp || "").replace(/^Output\s+"(.*)"\s+\(p=.*$/s, "$1"),
      }[kind];
      byId.set(node.node_id, {
        id: node.node_id,
        kind,
        label,
        row: rowOf(kind, node.layer, nLayers),
        layer: kind === "feature" || kind === "error" ? Number(node.layer) : null,
        feature: kind === "feature" ? Number(parts[1]) : null,
        pos: node.ctx_idx,
        influence: node.influence,
        activation: node.activation,
        probability: node.token_prob,
        inputs: [],
        outputs: [],
      });
    }
    const links = [];
    for (const { source, target, weight } of raw.links) {
      const link = { source: byId.get(source), target: byId.get(target), weight };
      if (!link.source || !link.target) continue;
      link.source.outputs.push(link);
      link.target.inputs.push(link);
      links.push(link);
    }
    const strength = (link) => Math.abs(link.weight);
    const heavier = (a, b) => strength(b) - strength(a);
    for (const node of byId.values()) {
      node.inputs.sort(heavier);
      node.outputs.sort(heavier);
      node.inflow = node.inputs.reduce((sum, link) => sum + strength(link), 0);
    }
    links.sort(heavier);
    // Embeddings take the first shares of the cumulative influence; what tells features apart is the rest.
    const shares = [...byId.values()].filter((node) => node.kind === "feature").map((node) => node.influence ?? 1);
    const [least, most] = [Math.min(1, ...shares), Math.max(0, ...shares)];
    const prunable = [...byId.values()].filter((node) => node.kind === "feature" || node.kind === "error");
    const ceiling = Math.max(0, ...prunable.map((node) => node.influence ?? 0)) || 1;
    for (const node of byId.values()) node.rank = most > least ? ((node.influence ?? 1) - least) / (most - least) : 0;
    return { byId, nodes: [...byId.values()], links, tokens, nLayers, least, ceiling, typical: links.length ? strength(links[Math.floor(links.length / 50)]) : 1 };
  }

  /** Inputs and outputs are never hidden; the rest is, beyond the cumulative influence of the slider. */
  const isShown = (node, threshold, errors) =>
    node.kind === "embedding" || node.kind === "logit" || ((errors || node.kind !== "error") && (node.influence ?? 0) <= threshold + 1e-9);

  const importance = (a, b) => (a.influence ?? 1) - (b.influence ?? 1) || (a.id < b.id ? -1 : 1);

  function columnWidths(cells, tokens, nRows, inner) {
    const used = new Set([...cells.keys()].map((key) => Number(key.split(":")[1])));
    // A column without nodes (BOS has none) needs no more than a hint of its token.
    const least = tokens.map((token, pos) => (used.has(pos) ? Math.max(34, Math.min(96, token.length * 7.3 + 12)) : 34));
    const wanted = tokens.map((_, pos) => {
      let most = 1;
      for (let row = 0; row <= nRows; row += 1) most = Math.max(most, (cells.get(row + ":" + pos) || []).length);
      return used.has(pos) ? Math.min(most, 6) : 0;
    });
    const spare = inner - least.reduce((sum, width) => sum + width, 0);
    const total = Math.max(1, wanted.reduce((sum, count) => sum + count, 0));
    return least.map((width, pos) => width + (spare > 0 ? (spare * wanted[pos]) / total : 0));
  }

  /** Fixes x, y of every node; wide cells wrap into several lines, so nodes never overlap. */
  function layout(graph, shown, width, height) {
    const cells = new Map();
    for (const node of shown) {
      if (node.kind === "logit") continue;
      const key = node.row + ":" + node.pos;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(node);
    }
    const nRows = graph.nLayers + 1;
    const columns = columnWidths(cells, graph.tokens, nRows, width - MARGIN.left - MARGIN.right);
    const starts = [];
    columns.reduce((at, column, pos) => ((starts[pos] = at), at + column), MARGIN.left);
    const total = starts[starts.length - 1] + columns[columns.length - 1] + MARGIN.right;

    const lines = new Array(nRows + 1).fill(1);
    const perLine = columns.map((column) => Math.max(1, Math.floor((column - 8) / GAP)));
    for (const [key, nodes] of cells) {
      const [row, pos] = key.split(":").map(Number);
      lines[row] = Math.max(lines[row], Math.ceil(nodes.length / perLine[pos]));
    }
    const logits = shown.filter((node) => node.kind === "logit").sort((a, b) => b.probability - a.probability);
    const boxes = logitBoxes(logits, total - MARGIN.right, MARGIN.left);
    lines[nRows] = boxes.lines;
    const needed = lines.map((count, row) => (row === nRows ? count * 26 + 14 : row === 0 ? 34 : Math.max(46, count * GAP + 26)));
    const sum = needed.reduce((a, b) => a + b, 0);
    const room = Math.max(0, height - MARGIN.top - MARGIN.bottom - sum) / Math.max(1, nRows - 1);
    const rows = [];
    let bottom = MARGIN.top;
    for (let row = nRows; row >= 0; row -= 1) {
      const size = needed[row] + (row > 0 && row < nRows ? room : 0);
      rows[row] = { top: bottom, size, middle: bottom + size / 2 };
      bottom += size;
    }
    for (const [key, nodes] of cells) {
      const [row, pos] = key.split(":").map(Number);
      nodes.sort(importance);
      const count = Math.ceil(nodes.length / perLine[pos]);
      nodes.forEach((node, index) => {
        const line = Math.floor(index / perLine[pos]);
        const inLine = Math.min(perLine[pos], nodes.length - line * perLine[pos]);
        const step = Math.min(GAP * 1.6, (columns[pos] - 8) / inLine);
        node.x = starts[pos] + columns[pos] / 2 + ((index % perLine[pos]) - (inLine - 1) / 2) * step;
        node.y = rows[row].middle + (line - (count - 1) / 2) * GAP;
      });
    }
    for (const box of boxes.placed) Object.assign(box.node, { x: box.x, y: rows[nRows].top + 14 + box.line * 26, width: box.width });
    // A fraction of a pixel too much would bring scroll bars, and with them another size and another layout.
    return { width: Math.floor(total + 0.01), height: Math.floor(bottom + MARGIN.bottom + 0.01), rows, starts, columns, bottom };
  }

  /** The likeliest output stands furthest right, above the last token. */
  function logitBoxes(logits, right, left) {
    const placed = [];
    let edge = right;
    let line = 0;
    for (const node of logits) {
      const width = Math.min(150, Math.max(40, (node.label.length + 5) * 7 + 14));
      if (edge - width < left && edge < right) {
        edge = right;
        line += 1;
      }
      placed.push({ node, width, x: edge - width / 2, line });
      edge -= width + 6;
    }
    return { placed, lines: line + 1 };
  }

  const LABEL = { size: 6.1, height: 13, longest: 26, roomy: 40 };
  const FEW = 36; // so few features leave room for longer labels
  const LIST = /^("[^"]*"(, )?)+(\+\d+ more)?$/;

  const cut = (text, longest) => (text.length > longest ? text.slice(0, Math.max(1, longest - 1)).trimEnd() + "…" : text);

  /** An explanation in the room of a label: fires on "Dallas", "Waco"; promotes " Texas" becomes Dallas, Wa… → Texas. */
  function short(explanation, longest = LABEL.longest) {
    const bare = (text) => text.replace(/"\s?([\p{L}\p{N}][^"]*)"/gu, "$1");
    const [fires, promotes] = explanation.split("; promotes ");
    const cause = fires.replace(/^fires on /, "").trim();
    const left = LIST.test(cause) ? bare(cause) : cause; // inside a sentence quotes tell words from description
    if (!promotes) return cut(left, longest);
    const right = " → " + cut(bare(promotes).split(",")[0].trim(), Math.floor(longest / 2));
    return cut(left, longest - right.length) + right;
  }

  /** Most influential first: labels of nodes of `of`, each where it covers no shown node and no other label. */
  function placeLabels(shown, of, frame, limit) {
    const taken = shown.map((node) => {
      const half = node.kind === "logit" ? node.width / 2 : 7;
      return [node.x - half, node.y - 8, node.x + half, node.y + 8];
    });
    const placed = [];
    const longest = shown.filter((node) => node.kind === "feature").length > FEW ? LABEL.longest : LABEL.roomy;
    for (const node of [...of].filter((candidate) => candidate.kind === "feature").sort(importance)) {
      if (placed.length >= limit) break;
      const text = short(node.label, longest);
      const width = text.length * LABEL.size + 4;
      const centred = Math.max(MARGIN.left - 8, Math.min(frame.width - 2 - width, node.x - width / 2));
      const options = [
        [node.x + 9, node.y - 6, "start"],
        [node.x - 9 - width, node.y - 6, "end"],
        [centred, node.y - 22, "middle"],
        [centred, node.y + 9, "middle"],
      ];
      // Further away in the gap between two layers, with a line to the node.
      for (const step of [2, 3]) for (const side of [-1, 1]) options.push([centred, node.y - 6 + side * (1 + step * 15), "middle", true]);
      for (const [x, y, anchor, far] of options) {
        const box = [x, y, x + width, y + LABEL.height];
        const inside = box[0] >= MARGIN.left - 8 && box[2] <= frame.width - 2;
        const free = inside && !taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]);
        if (!free) continue;
        taken.push(box);
        placed.push({ node, text, anchor, width, far: Boolean(far), x: { start: x, end: x + width, middle: x + width / 2 }[anchor], y: y + 10 });
        break;
      }
    }
    return placed;
  }

  /** The next node in a direction, for the arrow keys. */
  function neighbour(shown, from, dx, dy) {
    let best = null;
    let least = Infinity;
    for (const node of shown) {
      const along = (node.x - from.x) * dx + (node.y - from.y) * dy;
      const across = Math.abs((node.x - from.x) * dy) + Math.abs((node.y - from.y) * dx);
      if (along > 1 && along + 2.5 * across < least) [least, best] = [along + 2.5 * across, node];
    }
    return best;
  }

  window.circuitmill.graph = { short, prepare, isShown, layout, placeLabels, neighbour, importance, MARGIN };
})();
