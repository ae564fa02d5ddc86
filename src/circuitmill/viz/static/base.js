/* Data registry and the few helpers every page shares.
 *
 * A page opened from disk may not fetch files, so data come as scripts: data/<key>.js calls
 * circuitmill.register(key, value), and circuitmill.load(key) adds the script tag and waits for that call.
 * Text from data reaches the page through textContent only, never as markup.
 */
(function () {
  "use strict";
  const values = new Map();
  const pending = new Map();
  const circuitmill = (window.circuitmill = window.circuitmill || {});

  circuitmill.register = (key, value) => values.set(key, value);

  circuitmill.load = (key) => {
    if (values.has(key)) return Promise.resolve(values.get(key));
    if (pending.has(key)) return pending.get(key);
    const promise = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = "data/" + key.split("/").map(encodeURIComponent).join("/") + ".js";
      script.onload = () =>
        values.has(key) ? resolve(values.get(key)) : reject(new Error("data/" + key + ".js registered nothing"));
      script.onerror = () => reject(new Error("data/" + key + ".js is missing from the report folder"));
      document.head.append(script);
    });
    pending.set(key, promise);
    return promise;
  };

  /** The chunk of feature pages that holds one feature. */
  circuitmill.loadFeature = async (layer, feature) => {
    const size = Number(document.body.dataset.chunk);
    const chunk = await circuitmill.load("features/" + layer + "-" + Math.floor(feature / size));
    const record = chunk.features[feature];
    if (!record) throw new Error("feature " + feature + " of layer " + layer + " has no page in this report");
    return { ...record, layer, feature, texts: chunk.texts };
  };

  const SVG = "http://www.w3.org/2000/svg";
  function build(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style")
        for (const [property, setting] of Object.entries(value))
          property.startsWith("--") ? node.style.setProperty(property, setting) : (node.style[property] = setting);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }
  circuitmill.el = (name, attributes, ...children) => build(document.createElement(name), attributes, children);
  circuitmill.svg = (name, attributes, ...children) =>
    build(document.createElementNS(SVG, name), attributes, children);

  const { el } = circuitmill;

  circuitmill.number = (value, digits = 3) => {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 10 ** -digits) return value.toExponential(1).replace("e+", "e");
    if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    return String(Number(value.toPrecision(digits)));
  };
  circuitmill.signed = (value, digits = 3) =>
    (value < 0 ? "−" : "+") + circuitmill.number(Math.abs(value), digits);
  circuitmill.percent = (value, digits = 0) =>
    value === null || value === undefined ? "–" : (100 * value).toFixed(digits) + "%";

  /** Token text with the characters one cannot see made visible. */
  circuitmill.visible = (text) =>
    text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (run) => "·".repeat(run.length));

  /** A token as nodes: leading space as a faint dot, the rest as plain text. */
  circuitmill.token = (text) => {
    const shown = circuitmill.visible(text);
    const lead = shown.match(/^·*/)[0];
    return [lead ? el("span", { class: "space" }, lead) : null, shown.slice(lead.length)];
  };

  /** Marks between texts (`<|endoftext|>`, `</s>`), which are no words of any text. */
  const SPECIAL = /^<(\|[^<>|]*\||\/?[a-z_]+)>$/;

  /** One window of text, each token shaded by its activation. */
  circuitmill.windowView = (window_, texts, top) => {
    const activations = new Map(window_.a);
    const spans = window_.t.map((index, place) => {
      const activation = activations.get(place) || 0;
      const share = top > 0 ? Math.min(1, activation / top) : 0;
      return el(
        "span",
        {
          class: (SPECIAL.test(texts[index]) ? "tok special" : "tok") + (activation > 0 ? (place === window_.p ? " hot peak" : " hot") : ""),
          style: activation > 0 ? { "--share": share.toFixed(3) } : null,
          title: activation > 0 ? "activation " + circuitmill.number(activation) : null,
        },
        texts[index].replace(/\n/g, "⏎")
      );
    });
    const peak = Math.max(0, ...window_.a.map((pair) => pair[1]));
    return el("div", { class: "window" }, el("span", { class: "max" }, peak > 0 ? circuitmill.number(peak) : "silent"), spans);
  };

  /** Rows of text, bar and signed value. `rows` is [[text, value, onclick], ...]. */
  circuitmill.bars = (rows, options = {}) => {
    const top = options.top || Math.max(1e-12, ...rows.map((row) => Math.abs(row[1])));
    return el(
      "ul",
      { class: "bars" },
      rows.map(([text, value, onclick, title]) =>
        el(
          "li",
          {},
          onclick
            ? el("button", { type: "button", title: title || text, onclick }, text)
            : el("span", { class: "text mono", title: title || text }, circuitmill.token(text)),
          el("span", { class: "track" }, el("i", { class: value < 0 ? "neg" : "", style: { width: (100 * Math.abs(value)) / top + "%" } })),
          el("span", { class: "value" }, circuitmill.signed(value))
        )
      )
    );
  };

  /** State in the address: #a=1&b=2. */
  circuitmill.readHash = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  circuitmill.writeHash = (state) => {
    const kept = Object.entries(state).filter(([, value]) => value !== "" && value !== null && value !== undefined);
    history.replaceState(null, "", "#" + new URLSearchParams(kept));
  };

  /** Say in the page what could not be shown, and why. */
  circuitmill.fail = (place, error) => {
    place.replaceChildren(el("p", { class: "noscript", role: "alert" }, error.message));
  };
})();
