/* The figures of the overview page; its tables are in the page itself and need no script. */
(function () {
  "use strict";
  const { load, charts, el, fail } = window.circuitmill;

  load("run").then(
    (run) => {
      const training = document.getElementById("training-charts");
      for (const group of run.training) {
        const place = el("div", { class: "charts" });
        training.append(el("h3", {}, group.title), place);
        for (const chart of group.charts) charts[chart.kind](place, chart);
      }
      const evaluation = document.getElementById("evaluation-charts");
      for (const chart of run.histograms) charts.histogram(evaluation, chart);
      const variants = document.getElementById("variant-charts");
      if (variants) for (const chart of run.variants) charts.scatter(variants, chart);
    },
    (error) => fail(document.getElementById("training-charts"), error)
  );
})();
