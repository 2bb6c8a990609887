// Draws the charts of a report, and filters the completions to read. Text only ever enters the page as text nodes.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const MARGIN = { left: 46, right: 12, top: 8, bottom: 34 };
  const live = document.getElementById("live"); // in a page that a running comparison serves
  const POLL = 2000, PAUSE = 15000; // milliseconds between looks at the runs, and at least between two reports
  const groups = JSON.parse(document.getElementById("data").textContent);
  const chosen = groups.map((group) => ({ axis: Object.keys(group.axes)[0], off: new Set(), step: "", verdict: "" }));
  const agreements = []; // what sets each input to the present choice
  const charts = []; // what draws each chart anew

  function make(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function draw(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // Such as 12.5k or 0.031: four digits at most.
  function short(value) {
    const size = Math.abs(value);
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
    return `${+value.toPrecision(size >= 1000 ? 4 : 3)}`;
  }

  function ticks(low, high, most) {
    const rough = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((one) => one * power >= rough);
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) found.push(n * step);
    return found;
  }

  // Choices: the budget, the arms, and for completions the step and the verdict.

  function choice(label, options, state, key) {
    const select = make("select");
    for (const [value, name] of options) select.append(make("option", { value }, name));
    select.addEventListener("change", () => { state[key] = select.value; show(); });
    agreements.push(() => { select.value = state[key]; });
    return make("label", {}, `${label} `, select);
  }

  function arms(number) {
    const { off } = chosen[number];
    return groups[number].arms.map((arm, n) => {
      const box = make("input", { type: "checkbox" });
      box.addEventListener("change", () => { off[box.checked ? "delete" : "add"](n); show(); });
      agreements.push(() => { box.checked = !off.has(n); });
      return make("label", {}, box, swatch(arm), arm.label);
    });
  }

  function swatch(arm) {
    const made = make("span", { class: arm.dashed ? "swatch dashed" : "swatch" });
    made.style.borderColor = arm.colour;
    return made;
  }

  // Charts

  function chart(number, key, box) {
    const about = groups[number].charts[key];
    const figure = make("figure", { class: "chart" }, make("figcaption", {}, about.label));
    const svg = draw("svg", { role: "img", "aria-label": about.label, tabindex: "0" });
    const tip = make("div", { class: "tip", hidden: "" });
    figure.append(svg, tip);
    box.append(figure);
    let scene = null;

    function paint() {
      svg.replaceChildren();
      tip.hidden = true;
      const state = chosen[number];
      const lines = about.lines.filter((line) => line.axis === state.axis && !state.off.has(line.arm));
      const width = Math.max(figure.clientWidth, 200), height = Math.round(Math.min(300, Math.max(210, width * 0.62)));
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.setAttribute("height", height);
      scene = null;
      if (!lines.length) {
        const middle = { x: width / 2, y: height / 2, "text-anchor": "middle" };
        svg.append(draw("text", middle, "not measured of these agents"));
        return;
      }
      const xs = lines.flatMap((line) => line.x);
      const ys = lines.flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])]);
      const left = Math.min(0, ...xs), right = Math.max(...xs) || 1;
      let low = Math.min(...ys), high = Math.max(...ys);
      const room = 0.06 * (high - low) || Math.abs(high) * 0.1 || 1;
      low = low >= 0 && low - room < 0 ? 0 : low - room;
      high += room;
      const wide = width - MARGIN.left - MARGIN.right, tall = height - MARGIN.top - MARGIN.bottom;
      const x = (value) => MARGIN.left + (value - left) / (right - left) * wide;
      const y = (value) => height - MARGIN.bottom - (value - low) / (high - low) * tall;
      for (const at of ticks(low, high, 5)) {
        svg.append(draw("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(at), y2: y(at) }));
        svg.append(draw("text", { x: MARGIN.left - 6, y: y(at) + 4, "text-anchor": "end" }, short(at)));
      }
      for (const at of ticks(left, right, width / 90)) {
        svg.append(draw("text", { x: x(at), y: height - MARGIN.bottom + 16, "text-anchor": "middle" }, short(at)));
      }
      const middle = (MARGIN.left + width - MARGIN.right) / 2;
      svg.append(draw("text", { x: middle, y: height - 4, "text-anchor": "middle" }, groups[number].axes[state.axis]));
      const points = (first, second) => first.map((at, n) => `${x(at).toFixed(1)} ${y(second[n]).toFixed(1)}`);
      for (const line of lines) {
        const arm = groups[number].arms[line.arm];
        if (line.low) {
          const edge = [...points(line.x, line.high), ...points(line.x, line.low).reverse()];
          const area = draw("path", { class: "band", d: `M${edge.join("L")}Z` });
          area.style.fill = arm.colour;
          svg.append(area);
        }
        const name = line.seed === undefined ? "mean" : "run";
        const drawn = draw("path", { class: name, d: `M${points(line.x, line.y).join("L")}` });
        drawn.style.stroke = arm.colour;
        if (arm.dashed) drawn.setAttribute("stroke-dasharray", "5 3");
        svg.append(drawn);
        if (line.seed === undefined && line.x.length <= 30) {
          line.x.forEach((at, n) => {
            const dot = draw("circle", { cx: x(at), cy: y(line.y[n]), r: 2.5 });
            dot.style.fill = arm.colour;
            svg.append(dot);
          });
        }
      }
      const rule = draw("line", { class: "rule", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
      svg.append(rule);
      const means = lines.filter((line) => line.seed === undefined);
      const stops = [...new Set(means.flatMap((line) => line.x))].sort((one, other) => one - other);
      scene = { means, x, width, rule, stops, at: -1 };
    }

    // The values of all arms nearest to one of the stops.
    function tell(n) {
      const { means, x, width, rule, stops } = scene;
      scene.at = Math.max(0, Math.min(stops.length - 1, n));
      const at = stops[scene.at];
      rule.setAttribute("x1", x(at));
      rule.setAttribute("x2", x(at));
      rule.setAttribute("visibility", "visible");
      const said = means.filter((line) => at <= line.x[line.x.length - 1]).map((line) => {
        const place = line.x.reduce((best, one, k) => Math.abs(one - at) < Math.abs(line.x[best] - at) ? k : best, 0);
        const edges = line.low ? ` [${short(line.low[place])}, ${short(line.high[place])}]` : "";
        return { arm: groups[number].arms[line.arm], value: line.y[place], text: short(line.y[place]) + edges };
      }).sort((one, other) => other.value - one.value);
      tip.replaceChildren(make("b", {}, `${short(at)} ${groups[number].axes[chosen[number].axis]}`));
      for (const one of said) {
        tip.append(make("div", {}, swatch(one.arm), `${one.arm.label}: ${one.text}`));
      }
      tip.hidden = false;
      const beside = x(at) < width / 2 ? x(at) + 10 : x(at) - 10 - tip.offsetWidth;
      tip.style.left = `${Math.max(0, Math.min(width - tip.offsetWidth, beside))}px`;
    }

    function leave() {
      tip.hidden = true;
      if (scene) scene.rule.setAttribute("visibility", "hidden");
    }

    svg.addEventListener("pointermove", (event) => {
      if (!scene) return;
      const at = (event.clientX - svg.getBoundingClientRect().left) / svg.getBoundingClientRect().width * scene.width;
      const { stops, x } = scene;
      tell(stops.reduce((best, one, n) => Math.abs(x(one) - at) < Math.abs(x(stops[best]) - at) ? n : best, 0));
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!scene || !step) return;
      event.preventDefault();
      tell(scene.at + step);
    });
    return paint;
  }

  // Completions

  const VERDICTS = [
    ["", "all"], ["right", "right"], ["wrong", "wrong"], ["cut", "cut off"], ["apart", "agents disagree"],
  ];

  function filter(reader) {
    const state = chosen[+reader.dataset.group];
    for (const step of reader.querySelectorAll(".step")) {
      const cells = [...step.querySelectorAll("article")].filter((cell) => {
        cell.hidden = state.off.has(+cell.dataset.arm);
        return !cell.hidden;
      });
      const apart = new Set(cells.map((cell) => cell.dataset.verdict)).size > 1;
      for (const cell of cells) {
        const others = { "": true, cut: "cut" in cell.dataset, apart };
        cell.hidden = !(others[state.verdict] ?? cell.dataset.verdict === state.verdict);
      }
      step.hidden = (state.step !== "" && state.step !== step.dataset.step) || cells.every((cell) => cell.hidden);
    }
    for (const problem of reader.querySelectorAll(".problem")) {
      problem.hidden = [...problem.querySelectorAll(".step")].every((step) => step.hidden);
    }
  }

  function stepNames(reader) {
    const steps = [...reader.querySelector(".problem").querySelectorAll(".step")];
    return [["", "all"], ...steps.map((step) => [step.dataset.step, step.querySelector("h4").textContent])];
  }

  // A comparison that still runs

  function kept() {
    const open = [...document.querySelectorAll("details")].map((one) => one.open);
    return { open, chosen: chosen.map((state) => ({ ...state, off: [...state.off] })) };
  }

  function restore({ open, chosen: states }) {
    document.querySelectorAll("details").forEach((one, n) => { one.open = open[n] ?? one.open; });
    states.forEach((state, n) => {
      if (n < chosen.length && state.axis in groups[n].axes) {
        Object.assign(chosen[n], state, { off: new Set(state.off) });
      }
    });
  }

  function follow() {
    const made = Date.now();
    let told = "";
    const [status, table, wanted] = ["[role=status]", "table", "input"].map((name) => live.querySelector(name));
    async function look() {
      try {
        const said = await (await fetch("/progress.json", { cache: "no-store" })).json();
        status.textContent = told = said.headline;
        const line = (name, cells) => make("tr", {}, ...cells.map((cell) => make(name, {}, cell)));
        table.replaceChildren(line("th", said.heads), ...said.rows.map((row) => line("td", row)));
        if (said.version !== live.dataset.version && wanted.checked && Date.now() - made > PAUSE) {
          sessionStorage.setItem("kept", JSON.stringify(kept()));
          location.reload();
        }
      } catch {
        status.textContent = `No answer: the comparison is over or stopped (the same command goes on). Last: ${told}`;
      }
    }
    look();
    setInterval(look, POLL);
  }

  // The page

  function show() {
    agreements.forEach((agree) => agree());
    document.querySelectorAll(".reader").forEach(filter);
    charts.forEach((paint) => paint());
  }

  if (live && sessionStorage.getItem("kept")) restore(JSON.parse(sessionStorage.getItem("kept")));
  for (const place of document.querySelectorAll(".charts")) {
    const number = +place.dataset.group, box = make("div", { class: "figures" });
    const against = choice("against", Object.entries(groups[number].axes), chosen[number], "axis");
    place.replaceChildren(make("div", { class: "choices" }, against, ...arms(number)), box);
    for (const key of place.dataset.charts.split(" ")) charts.push(chart(number, key, box));
  }
  for (const reader of document.querySelectorAll(".reader")) {
    const number = +reader.dataset.group, state = chosen[number];
    const inputs = [choice("step", stepNames(reader), state, "step"), choice("verdict", VERDICTS, state, "verdict")];
    reader.querySelector(".choices").append(...inputs, ...arms(number));
  }
  if (live) follow();
  show();
  let width = document.body.clientWidth;
  addEventListener("resize", () => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    charts.forEach((paint) => paint());
  });
})();
