/* The figures of the overview page; its tables are in the page itself and need no script. */
(function () {
  "use strict";
  const { load, charts, fail } = window.circuitmill;

  load("run").then(
    (run) => {
      const training = document.getElementById("training-charts");
      for (const chart of run.curves) charts.lines(training, chart);
      const evaluation = document.getElementById("evaluation-charts");
      for (const chart of run.histograms) charts.histogram(evaluation, chart);
      const variants = document.getElementById("variant-charts");
      if (variants) for (const chart of run.variants) charts.scatter(variants, chart);
    },
    (error) => fail(document.getElementById("training-charts"), error)
  );
})();
