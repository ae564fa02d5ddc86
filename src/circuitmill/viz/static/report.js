/* The figures of the overview page, and the table of what the run took; other tables are in the page itself. */
(function () {
  "use strict";
  const { load, charts, el, fail } = window.circuitmill;

  const drawCharts = (place, groups) => {
    for (const group of groups) {
      const grid = el("div", { class: "charts" });
      place.append(el("h3", {}, group.title), grid);
      for (const chart of group.charts) charts[chart.kind](grid, chart);
    }
  };

  load("run").then(
    (run) => {
      drawCharts(document.getElementById("training-charts"), run.training);
      const evaluation = document.getElementById("evaluation-charts");
      for (const chart of run.histograms) charts.histogram(evaluation, chart);
      const variants = document.getElementById("variant-charts");
      if (variants) for (const chart of run.variants) charts.scatter(variants, chart);
    },
    (error) => fail(document.getElementById("training-charts"), error)
  );

  /** A figure, what it is of, and a bar of its share; more than was asked for fills the bar in another colour. */
  const cell = (one, first) =>
    el(
      first ? "th" : "td",
      { class: first ? null : "n" },
      one.text,
      one.detail ? el("span", { class: "of" }, " " + one.detail) : null,
      one.share === null
        ? null
        : el(
            "span",
            { class: one.share > 0.9 ? "meter used high" : "meter used" },
            el("i", { style: { width: Math.min(100, 100 * one.share).toFixed(1) + "%" } })
          )
    );
  const row = (cells) => el("tr", {}, cells.map((one, place) => cell(one, place === 0)));

  load("usage").then(
    (usage) => {
      const place = document.getElementById("usage");
      const head = usage.heads.map((text, column) => el("th", { class: column ? "n" : null }, text));
      place.replaceChildren(
        el(
          "div",
          { class: "scroll" },
          el(
            "table",
            { id: "used" },
            el("thead", {}, el("tr", {}, head)),
            el("tbody", {}, usage.rows.slice(0, -1).map(row)),
            el("tfoot", {}, row(usage.rows[usage.rows.length - 1]))
          )
        ),
        el("ul", { class: "notes" }, usage.notes.map((note) => el("li", {}, note)))
      );
      if (usage.predictions.length)
        place.append(
          el(
            "div",
            { class: "scroll" },
            el(
              "table",
              { id: "predicted", class: "narrow" },
              el("caption", {}, "What the plan said, and what it came to"),
              el("thead", {}, el("tr", {}, el("th", {}, ""), ...["Planned", "Used"].map((text) => el("th", { class: "n" }, text)))),
              el("tbody", {}, usage.predictions.map(([what, ...sizes]) => el("tr", {}, el("td", {}, what), sizes.map((size) => el("td", { class: "n" }, size)))))
            )
          )
        );
      if (usage.suggestions.length)
        place.append(
          el(
            "details",
            { id: "suggestions" },
            el("summary", {}, "Requests that are far from what was used (" + usage.suggestions.length + ")"),
            el("ul", { class: "notes" }, usage.suggestions.map((text) => el("li", {}, text)))
          )
        );
      drawCharts(document.getElementById("speed-charts"), usage.charts);
    },
    (error) => fail(document.getElementById("usage"), error)
  );
})();
