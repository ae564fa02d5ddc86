/* Line charts, histograms and scatters in plain SVG, drawn from data and redrawn when the width changes. */
(function () {
  "use strict";
  const { el, svg, number } = window.circuitmill;
  const HEIGHT = 204;
  /** Most points of a curve that are drawn as such. */
  const FEW = 24;
  /** Most series that can be told apart by colours of their own. */
  const COLOURS = 6;
  /** Radius of such a point. */
  const MARK = 2.5;
  const PAD = { left: 46, right: 12, top: 8, bottom: 38 };
  /** Of one series among `count`; many go from one colour to another. */
  const colour = (index, count) =>
    count <= COLOURS
      ? "var(--series-" + (index + 1) + ")"
      : "color-mix(in oklch, var(--series-2) " + Math.round((100 * index) / (count - 1)) + "%, var(--series-1))";

  function niceTicks(low, high, count) {
    if (!(high > low)) return [low];
    const raw = (high - low) / count;
    const magnitude = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * magnitude).find((candidate) => candidate >= raw * 0.999);
    const ticks = [];
    for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step) ticks.push(Number(tick.toPrecision(12)));
    return ticks;
  }
  function logTicks(low, high) {
    const inside = (factors) => {
      const ticks = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
        ticks.push(...factors.map((factor) => Number((factor * 10 ** power).toPrecision(12))));
      return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    };
    const powers = inside([1]);
    if (powers.length >= 2) return powers.filter((_, index) => index % Math.ceil(powers.length / 5) === 0);
    const finer = inside([1, 2, 5]);
    return finer.length >= 2 ? finer : niceTicks(low, high, 3);
  }
  function shortTick(value) {
    const size = Math.abs(value);
    if (size >= 1e9) return number(value / 1e9) + "B";
    if (size >= 1e6) return number(value / 1e6) + "M";
    if (size >= 1e4) return number(value / 1e3) + "k";
    return size > 0 && size < 1e-3 ? value.toExponential(0) : number(value, 4);
  }

  function scale(low, high, start, end, log) {
    const map = log ? Math.log10 : (value) => value;
    const from = map(low);
    const span = map(high) - from || 1;
    return (value) => start + ((map(value) - from) / span) * (end - start);
  }
  function domain(values, log, zero) {
    const finite = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
    if (!finite.length) return log ? [0.1, 1] : [0, 1];
    let low = Math.min(...finite);
    let high = Math.max(...finite);
    if (log) {
      // As the margin of a linear axis, so that no curve lies on the frame.
      const factor = low === high ? 2 : (high / low) ** 0.05;
      return [low / factor, high * factor];
    }
    if (zero && low > 0) low = 0;
    const margin = (high - low || Math.abs(high) || 1) * 0.05;
    return [zero && low === 0 ? 0 : low - margin, high + margin];
  }

  function frame(width, xs, ys, xTicks, yTicks, xLabel) {
    const bottom = HEIGHT - PAD.bottom;
    const axis = svg("g", { class: "axis" });
    for (const tick of yTicks) {
      axis.append(
        svg("line", { x1: PAD.left, x2: width - PAD.right, y1: ys(tick), y2: ys(tick) }),
        svg("text", { x: PAD.left - 6, y: ys(tick) + 4, "text-anchor": "end" }, shortTick(tick))
      );
    }
    for (const tick of xTicks)
      axis.append(svg("text", { x: xs(tick), y: bottom + 16, "text-anchor": "middle" }, shortTick(tick)));
    if (xLabel) axis.append(svg("text", { x: (PAD.left + width - PAD.right) / 2, y: bottom + 32, "text-anchor": "middle" }, xLabel));
    axis.append(svg("line", { class: "base", x1: PAD.left, x2: width - PAD.right, y1: bottom, y2: bottom }));
    return axis;
  }

  /** Draw now and whenever the figure's width changes. */
  function responsive(figure, draw) {
    const measure = () => Math.max(220, Math.round(figure.clientWidth));
    let last = measure();
    draw(last);
    new ResizeObserver(() => {
      const width = measure();
      // Drawing changes the figure's height, which an observer may not do while it is being told of sizes.
      if (width !== last) requestAnimationFrame(() => draw((last = width)));
    }).observe(figure);
  }

  const entry = (series, index, text) =>
    el("span", {}, el("span", { class: "swatch", style: { backgroundColor: colour(index, series.length) } }), series[index].name + text);

  /** A legend; of many numbered series the first and the last. */
  function names(series) {
    const all = series.map((_, index) => entry(series, index, ""));
    return series.length > COLOURS && series.every(({ name }) => / \d+$/.test(name)) ? [all[0], "to", all[all.length - 1]] : all;
  }

  function shell(place, spec) {
    const legend = el("div", { class: "legend", "aria-live": "off" });
    const figure = el("figure", { class: "chart" }, el("figcaption", {}, spec.title), legend);
    place.append(figure);
    return { figure, legend };
  }

  /** The place nearest to `at` where a series was measured. */
  function measured(values, at) {
    for (let off = 0; off < values.length; off += 1) {
      if (values[at - off] !== null && values[at - off] !== undefined) return at - off;
      if (values[at + off] !== null && values[at + off] !== undefined) return at + off;
    }
    return at;
  }

  /** spec: {title, x, x_label, log, zero, settled, legend, series: [{name, values}]}; values are null where nothing was
   *  measured, which a curve passes over; legend: names a single series too. */
  function lines(place, spec) {
    const { figure, legend } = shell(place, spec);
    const many = spec.series.length;
    const valueAt = (index, at) => spec.series[index].values[measured(spec.series[index].values, at)];
    const showLegend = (at, only) => {
      if (at === undefined) return legend.replaceChildren(...(many > 1 || spec.legend ? names(spec.series) : []));
      const shown = only === undefined ? [...spec.series.keys()] : [only];
      const entries = shown.map((index) => entry(spec.series, index, " " + number(valueAt(index, at))));
      legend.replaceChildren(...entries, el("span", {}, "at " + shortTick(spec.x[at]) + " " + (spec.x_label || "")));
    };
    responsive(figure, (width) => {
      figure.querySelector("svg")?.remove();
      showLegend();
      const bottom = HEIGHT - PAD.bottom;
      const [x0, x1] = [spec.x[0], spec.x[spec.x.length - 1]];
      // The first tenth of a training would stretch the axis of a fit until nothing later can be told apart.
      const from = spec.settled ? Math.floor(spec.x.length / 10) : 0;
      const [y0, y1] = domain(spec.series.flatMap((series) => series.values.slice(from).filter((value) => value !== null)), spec.log, spec.zero);
      const xs = scale(x0, x1, PAD.left, width - PAD.right, false);
      const ys = scale(y0, y1, bottom, PAD.top, spec.log);
      const picture = svg("svg", { viewBox: "0 0 " + width + " " + HEIGHT, role: "img", "aria-label": spec.title });
      picture.append(frame(width, xs, ys, niceTicks(x0, x1, 4), spec.log ? logTicks(y0, y1) : niceTicks(y0, y1, 4), spec.x_label));
      const curves = svg("svg", { x: PAD.left - MARK, y: 0, width: width - PAD.left + MARK, height: bottom + 1, viewBox: [PAD.left - MARK, 0, width - PAD.left + MARK, bottom + 1].join(" "), overflow: "hidden" });
      spec.series.forEach((series, index) => {
        const places = series.values.map((value, at) => [spec.x[at], value]).filter(([, value]) => value !== null && (!spec.log || value > 0));
        const path = places.map(([x, value], at) => (at ? "L" : "M") + xs(x).toFixed(1) + " " + ys(value).toFixed(1)).join("");
        curves.append(svg("path", { class: "line", d: path, style: { stroke: colour(index, many) } }));
        // What is measured rarely is shown where it was measured.
        if (places.length <= FEW) for (const [x, value] of places) curves.append(svg("circle", { cx: xs(x), cy: ys(value), r: MARK, style: { fill: colour(index, many) } }));
      });
      picture.append(curves);
      const cursor = svg("line", { class: "cursor", y1: PAD.top, y2: bottom, visibility: "hidden" });
      picture.append(cursor);
      picture.addEventListener("pointermove", (event) => {
        const box = picture.getBoundingClientRect();
        const target = ((event.clientX - box.left) / box.width) * width;
        let best = 0;
        spec.x.forEach((value, at) => {
          if (Math.abs(xs(value) - target) < Math.abs(xs(spec.x[best]) - target)) best = at;
        });
        cursor.setAttribute("x1", xs(spec.x[best]));
        cursor.setAttribute("x2", xs(spec.x[best]));
        cursor.setAttribute("visibility", "visible");
        const y = ((event.clientY - box.top) / box.height) * HEIGHT;
        // Zero is nowhere on a logarithmic axis.
        const gaps = spec.series.map((_, index) => Math.abs(ys(valueAt(index, best)) - y)).map((gap) => (Number.isFinite(gap) ? gap : Infinity));
        // Beyond a handful the legend has room for the nearest alone.
        showLegend(best, many > COLOURS ? gaps.indexOf(Math.min(...gaps)) : undefined);
      });
      picture.addEventListener("pointerleave", () => {
        cursor.setAttribute("visibility", "hidden");
        showLegend();
      });
      figure.append(picture);
    });
  }

  /** spec: {title, edges, series: [{name, counts}], x_label, log}; series are stacked. */
  function histogram(place, spec) {
    const { figure, legend } = shell(place, spec);
    if (spec.series.length > 1) legend.append(...names(spec.series));
    responsive(figure, (width) => {
      figure.querySelector("svg")?.remove();
      const bottom = HEIGHT - PAD.bottom;
      const { edges } = spec;
      const totals = edges.slice(1).map((_, bin) => spec.series.reduce((sum, series) => sum + series.counts[bin], 0));
      const high = Math.max(1, ...totals);
      const map = spec.log ? (value) => Math.log10(1 + value) : (value) => value;
      const xs = scale(edges[0], edges[edges.length - 1], PAD.left, width - PAD.right, false);
      const ys = (value) => bottom - (map(value) / map(high * 1.05)) * (bottom - PAD.top);
      const picture = svg("svg", { viewBox: "0 0 " + width + " " + HEIGHT, role: "img", "aria-label": spec.title });
      const yTicks = spec.log ? [0, ...logTicks(1, Math.max(10, high)).map(Math.round)].filter((tick) => tick <= high * 1.05) : niceTicks(0, high, 4);
      picture.append(frame(width, xs, ys, niceTicks(edges[0], edges[edges.length - 1], 5), yTicks, spec.x_label));
      totals.forEach((total, bin) => {
        let below = 0;
        spec.series.forEach((series, index) => {
          const above = below + series.counts[bin];
          if (above > below)
            picture.append(
              svg(
                "rect",
                { x: xs(edges[bin]) + 0.5, width: Math.max(0.5, xs(edges[bin + 1]) - xs(edges[bin]) - 1), y: ys(above), height: Math.max(0.5, ys(below) - ys(above)), style: { fill: colour(index, spec.series.length) } },
                svg("title", {}, (spec.series.length > 1 ? series.name + ": " : "") + series.counts[bin].toLocaleString("en-US") + " from " + number(edges[bin]) + " to " + number(edges[bin + 1]))
              )
            );
          below = above;
        });
      });
      figure.append(picture);
    });
  }

  /** spec: {title, x_label, y_label, points: [{name, x, y, here}]} */
  function scatter(place, spec) {
    const { figure, legend } = shell(place, spec);
    legend.append(spec.y_label || "");
    responsive(figure, (width) => {
      figure.querySelector("svg")?.remove();
      const bottom = HEIGHT - PAD.bottom;
      const [x0, x1] = domain(spec.points.map((point) => point.x), false, false);
      const [y0, y1] = domain(spec.points.map((point) => point.y), false, false);
      const xs = scale(x0, x1, PAD.left + 8, width - PAD.right - 8, false);
      const ys = scale(y0, y1, bottom - 4, PAD.top + 6, false);
      const picture = svg("svg", { viewBox: "0 0 " + width + " " + HEIGHT, role: "img", "aria-label": spec.title });
      picture.append(frame(width, xs, ys, niceTicks(x0, x1, 4), niceTicks(y0, y1, 4), spec.x_label));
      const sorted = [...spec.points].sort((a, b) => a.x - b.x);
      picture.append(svg("path", { class: "line", style: { stroke: "var(--line)" }, d: sorted.map((point, index) => (index ? "L" : "M") + xs(point.x) + " " + ys(point.y)).join("") }));
      for (const point of sorted) {
        const left = xs(point.x) > width * 0.7;
        picture.append(
          svg("circle", { cx: xs(point.x), cy: ys(point.y), r: 5, style: { fill: point.here ? "var(--mark)" : "var(--series-1)" } }, svg("title", {}, point.name + ": " + number(point.x, 4) + ", " + number(point.y, 4))),
          svg("text", { class: "point-label", x: xs(point.x) + (left ? -9 : 9), y: ys(point.y) + 4, "text-anchor": left ? "end" : "start" }, point.name)
        );
      }
      figure.append(picture);
    });
  }

  window.circuitmill.charts = { lines, histogram, scatter };
})();
