"use strict";
// Follows the selection (layer, token, expert) and the colour scheme. All text that comes from a
// model or a prompt enters the page as textContent.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const layers = data.names.length, tokens = data.tokens.length;
  const state = {layer: 0, token: 0, expert: 0};
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const byId = (id) => document.getElementById(id);
  const model = (name) => Bokeh.documents[0].get_model_by_name(name);
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

  const decode = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const decisions = decode(data.decisions);
  const starts = data.experts.reduce((sums, count) => [...sums, sums.at(-1) + count], [0]);
  const steps = new Uint16Array(decode(data.loads).buffer);
  const loads = data.experts.map((count, layer) => Array.from(steps.subarray(starts[layer], starts[layer] + count), (step) => step / 65535));
  const responses = data.responses;
  const Wide = responses.wide ? Uint32Array : Uint16Array;
  const windows = new Wide(decode(responses.windows).buffer);

  // What is invisible in a token is written as a sign of its own: marks that turn the direction of
  // the text around them, too. A long one is cut.
  const LONGEST = 200;
  const HIDDEN = /[\p{Cc}\p{Cs}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/gu;
  const code = (letter) => `<${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`;
  const visible = (token) => token.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replace(HIDDEN, code);
  const shown = (token) => visible(token.length > LONGEST ? `${token.slice(0, LONGEST)}\u2026` : token) || "\u2205";

  const decision = (layer, expert, token) => {
    const byte = decisions[(starts[layer] + expert) * tokens + token];
    if (byte === 0) return null;
    const on = byte > 127;
    const distance = (on ? byte - 128 : 127 - byte) / 126;
    return {on, side: on ? distance : -distance, margin: (on ? 1 : -1) * distance * data.scales[layer]};
  };

  // ---- colours ----
  const RAMPS = {
    light: {share: ["#eef3f4", "#9fd0cd", "#3b97a0", "#135e78", "#0c2f4f"],
            side: ["#3f66a6", "#b4c5e2", "#f4f4f2", "#f3c290", "#cf6a1b"]},
    dark: {share: ["#1d262e", "#17505a", "#1f8189", "#5cbcb3", "#d9f5e6"],
           side: ["#86adec", "#38527c", "#20262d", "#7a4d1b", "#f3a655"]},
  };
  const channels = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const ramp = (stops, steps = 101) => Array.from({length: steps}, (_, step) => {
    const place = step / (steps - 1) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    const [from, to] = [channels(stops[low]), channels(stops[low + 1])];
    return "#" + from.map((value, c) =>
      Math.round(value + (to[c] - value) * (place - low)).toString(16).padStart(2, "0")).join("");
  });
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  let shares = [];
  let order = [];  // the experts of the layer from the map's lowest row up

  const paint = () => {
    const ramps = RAMPS[dark.matches ? "dark" : "light"];
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const [ink, soft, line] = ["--ink", "--soft", "--line"].map(colour);
    shares = ramp(ramps.share);
    for (const name of ["tokens", "loads", "similarity"]) model(`${name}-colours`).palette = shares;
    // a gap around the threshold, so that a near decision still shows its side
    model("experts-colours").palette = ramp(ramps.side, 60);
    Object.assign(model("loads-colours"), {low_color: colour("--dead"), high_color: colour("--always")});
    document.querySelector(".ramp").style.background = `linear-gradient(90deg, ${ramps.share.join(",")})`;
    for (const plot of Bokeh.documents[0].roots()) {
      for (const part of [...plot.below, ...plot.left, ...plot.above]) {
        if (part.type.endsWith("Axis")) Object.assign(part, {axis_label_text_color: soft, major_label_text_color: soft});
        if (part.type === "Legend") Object.assign(part, {label_text_color: soft, background_fill_alpha: 0, border_line_alpha: 0});
      }
      for (const part of plot.center) if (part.type === "Grid") part.grid_line_color = line;
    }
    model("margins-tau").line_color = ink;
    for (const name of ["tokens", "experts", "loads", "similarity"]) model(`${name}-frame`).glyph.line_color = ink;
  };

  // ---- maps ----
  const grid = (rows, columns, cell) =>
    Array.from({length: rows}, (_, row) => Array.from({length: columns}, (_, column) => cell(row, column)));
  const put = (name, columns) => {
    const source = model(`${name}-data`);
    const before = source.data instanceof Map ? Object.fromEntries(source.data) : source.data;
    source.data = {...before, ...columns};
  };
  const frame = (name, x, y, w, h) => { model(`${name}-picked`).data = {x: [x], y: [y], w: [w], h: [h]}; };
  const matrix = (name, column) => {
    const source = model(`${name}-data`).data;
    return (source instanceof Map ? source.get(column) : source[column])[0];
  };

  const label = () => {
    const words = data.tokens.map(shown);
    put("tokens", {token: [Array(layers).fill(words)], layer: [grid(layers, 1, (row) => row).map(([row]) => Array(tokens).fill(`${row}, ${data.names[row]}`))]});
    put("loads", {layer: [data.names.map((name, row) => Array(matrix("loads", "load").shape[1]).fill(`${row}, ${name}`))]});
    put("similarity", {layer: [data.names.map((_, row) => Array(layers).fill(row))], other: [Array(layers).fill(data.names.map((_, row) => row))]});
  };

  const showExperts = () => {
    const {layer} = state, experts = data.experts[layer], tau = data.tau[layer];
    order = [...loads[layer].keys()].sort((one, other) => loads[layer][one] - loads[layer][other]);
    const cells = grid(experts, tokens, (row, token) => decision(layer, order[row], token));
    const ND = matrix("experts", "side").constructor;
    const flat = (pick) => new ND(cells.flat().map((cell) => cell === null ? NaN : pick(cell)), [experts, tokens]);
    // off the middle by a tenth: the two sides of the threshold never look the same
    put("experts", {
      side: [flat((cell) => cell.side * .9 + (cell.on ? .1 : -.1))],
      margin: [flat((cell) => cell.margin)],
      score: [cells.map((row) => row.map((cell) => cell === null || tau === null ? NaN : cell.margin + tau))],
      decision: [cells.map((row) => row.map((cell) => cell === null ? "not asked" : cell.on ? "on" : "off"))],
      token: [Array(experts).fill(data.tokens.map(shown))],
      expert: [order.map((expert) => Array(tokens).fill(expert))],
      layer: [Array(experts).fill(Array(tokens).fill(layer))],
    });
    model("experts").y_range.end = experts - .5;
    model("experts-image").dh = {value: experts};
  };

  const showMargins = () => {
    const {layer} = state, {width, first, counts} = data.margins[layer], tau = data.tau[layer] ?? 0;
    const total = counts.reduce((sum, count) => sum + count, 0) || 1;
    const low = counts.map((_, bin) => (first + bin) * width);
    model("margins-data").data = {
      low: low.map((edge) => edge + tau), high: low.map((edge) => edge + width + tau),
      top: counts.map((count) => count / total),
      colour: low.map((edge) => edge < 0 ? "#6f8fbf" : "#e08a3c"), side: low.map((edge) => edge < 0 ? "off" : "on"),
    };
    model("margins-tau").location = tau;
  };

  // ---- text ----
  const element = (tag, text, className = "") => {
    const made = document.createElement(tag);
    made.textContent = text;
    made.className = className;
    return made;
  };

  const strip = () => data.tokens.forEach((token, index) => {
    const made = element("button", shown(token));
    made.type = "button";
    made.addEventListener("click", () => select({token: index}));
    byId("strip").append(made);
    if (token.includes("\n")) byId("strip").append(document.createElement("br"));
  });

  const colourStrip = () => {
    const on = matrix("tokens", "on");
    [...byId("strip").querySelectorAll("button")].forEach((made, token) => {
      const share = on[state.layer * tokens + token];
      const colour = isNaN(share) ? null : shares[Math.round(100 * share)];
      made.style.background = colour ?? "transparent";
      made.style.color = colour === null ? "inherit" : luminance(colour) > .22 ? "#0c1117" : "#ffffff";
      made.title = isNaN(share) ? "the host sent it elsewhere" : `${percent(share)} of experts on`;
      made.setAttribute("aria-pressed", token === state.token);
    });
  };

  const readToken = () => {
    const {layer, token} = state, at = layer * tokens + token;
    const [on, margin, captured] = ["on", "margin", "captured"].map((name) => matrix("tokens", name)[at]);
    const into = byId("picked");
    into.replaceChildren(`Token ${token} `, element("q", shown(data.tokens[token])), ` in layer ${layer}: `);
    if (isNaN(on)) { into.append("the host sent it to other experts."); return; }
    const experts = data.experts[layer];
    into.append(element("b", `${Math.round(on * experts)} of ${experts} experts on`),
      ` (${percent(on)}); the nearest decision was ${margin.toFixed(4)} from the threshold`,
      isNaN(captured) ? "." : `; ${percent(captured)} of the output mass captured.`);
  };

  const readExpert = () => {
    const {layer, expert} = state, load = loads[layer][expert], {count, context, at} = responses;
    const use = load === 0 ? "dead: no token selects it" : load === 1 ? "always on" : `load ${percent(load)} of the tokens`;
    const list = document.createElement("ol");
    for (let rank = 0; rank < count; rank++) {
      const row = (starts[layer] + expert) * count + rank, score = responses.scores[row];
      if (score === null) continue;
      const words = [...windows.slice(row * context, (row + 1) * context)].map((word) => shownOrNothing(responses.words[word]));
      const item = document.createElement("li");
      item.append(words.slice(0, at).join(""), element("mark", words[at]), words.slice(at + 1).join(""), element("small", `score ${score.toFixed(3)}`));
      list.append(item);
    }
    byId("expert").replaceChildren(element("h3", `Expert ${expert} of layer ${layer}`), element("p", count ? `${use}. It scores these tokens highest:` : use), list);
  };
  const shownOrNothing = (word) => word === "" ? "" : shown(word);

  const listDead = () => {
    const dead = loads[state.layer].flatMap((load, expert) => load === 0 ? [expert] : []);
    const text = dead.length ? `Layer ${state.layer}, ${dead.length} dead of ${data.experts[state.layer]}:` : `Layer ${state.layer} has no dead expert.`;
    byId("dead").replaceChildren(element("span", text), ...dead.map((expert) => {
      const made = element("button", expert);
      made.type = "button";
      made.addEventListener("click", () => select({expert}));
      return made;
    }));
  };

  // ---- selection ----
  const select = (change) => {
    const layerChanges = "layer" in change && change.layer !== state.layer;
    Object.assign(state, change);
    if (layerChanges && !("expert" in change)) state.expert = Math.min(state.expert, data.experts[state.layer] - 1);
    show(layerChanges);
  };

  const show = (layerChanged) => {
    const {layer, token, expert} = state;
    if (layerChanged) {
      byId("layer").value = byId("name").value = layer;
      document.querySelectorAll("b.layer").forEach((place) => { place.textContent = layer; });
      showExperts();
      showMargins();
      listDead();
      frame("loads", matrix("loads", "load").shape[1] / 2 - .5, layer, matrix("loads", "load").shape[1], 1);
    }
    frame("tokens", token, layer, 1, 1);
    frame("experts", token, order.indexOf(expert), 1, 1);
    colourStrip();
    readToken();
    readExpert();
  };

  const tapped = (name, react) => model(name).on_event("tap", (event) => {
    const [x, y] = [Math.round(event.x), Math.round(event.y)];
    if (x >= 0 && y >= 0) react(x, y);
  });

  const listen = () => {
    const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);
    byId("layer").addEventListener("input", (event) => select({layer: +event.target.value}));
    byId("name").addEventListener("change", (event) => select({layer: +event.target.value}));
    byId("down").addEventListener("click", () => select({layer: clamp(state.layer - 1, layers)}));
    byId("up").addEventListener("click", () => select({layer: clamp(state.layer + 1, layers)}));
    byId("strip").addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (!step) return;
      select({token: clamp(state.token + step, tokens)});
      byId("strip").querySelectorAll("button")[state.token].focus();
    });
    tapped("tokens", (x, y) => x < tokens && y < layers && select({token: x, layer: y}));
    tapped("experts", (x, y) => x < tokens && y < data.experts[state.layer] && select({token: x, expert: order[y]}));
    tapped("sparsity", (x) => x < layers && select({layer: x}));
    tapped("loads", (x, y) => {
      const experts = matrix("loads", "expert"), expert = experts[y * experts.shape[1] + x];
      if (y < layers && !isNaN(expert)) select({layer: y, expert});
    });
    dark.addEventListener("change", () => { paint(); colourStrip(); });
  };

  const start = () => {
    if (!Bokeh.documents.length || !model("tokens-data")) return requestAnimationFrame(start);
    paint();
    label();
    strip();
    listen();
    show(true);
    document.documentElement.dataset.ready = "yes";
  };
  start();
})();
