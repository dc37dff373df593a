// Draws a report's figures from the JSON beside it as inline SVG. No library, and nothing is fetched.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const { figures, ramp } = JSON.parse(document.getElementById("figures").textContent);
  const tip = document.getElementById("tip");
  const REACH = 28; // pixels from which a point answers the pointer

  function add(parent, name, attributes = {}, text = null) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    parent.append(node);
    return node;
  }

  function put(parent, name, className, text = "") {
    const node = document.createElement(name);
    node.className = className;
    node.textContent = text;
    parent.append(node);
    return node;
  }

  const known = (value) => typeof value === "number";
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;

  // Ink follows the page, and so does a dark grey, which a dark page would swallow.
  function paint(color) {
    if (color === "ink") return "currentColor";
    const [, grey] = /^#([0-5].)\1\1$/.exec(color) ?? [];
    return dark && grey ? `#${(255 - parseInt(grey, 16)).toString(16).repeat(3)}` : color;
  }

  function shown(value) {
    if (!known(value)) return "undefined";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) {
      return value.toExponential(3).replace(/\.?0+e/, "e"); // 1e-6, not 1.000e-6
    }
    return String(Number(value.toPrecision(5)));
  }

  // A scale: `at` maps a value to pixels, `ticks` are the values to label.
  function linear(low, high, from, to, room, whole) {
    const span = high - low || 1;
    let step = 10 ** Math.floor(Math.log10(span / room));
    step *= [1, 2, 5, 10].find((k) => span / (k * step) <= room);
    if (whole) step = Math.max(1, Math.round(step));
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * span; k++) {
      ticks.push([k * step, shown(k * step)]);
    }
    return { at: (value) => from + ((value - low) / span) * (to - from), ticks };
  }

  function logarithmic(low, high, from, to, room) {
    const [a, b] = [Math.log10(low), Math.log10(high)];
    const span = b - a || 1;
    const every = Math.max(1, Math.ceil(span / room));
    const ticks = [];
    for (let power = Math.floor(a); power <= Math.ceil(b); power++) {
      for (const digit of span < 1.5 ? [1, 2, 5] : [1]) {
        const value = digit * 10 ** power;
        if (power % every === 0 && value >= low * 0.999 && value <= high * 1.001) {
          ticks.push([value, shown(value)]);
        }
      }
    }
    return { at: (value) => from + ((Math.log10(value) - a) / span) * (to - from), ticks };
  }

  function named(labels, from, to, size) {
    const cell = (to - from) / labels.length;
    const every = Math.max(1, Math.ceil(size / Math.abs(cell)));
    const ticks = labels.map((label, k) => [k, label]).filter(([k]) => k % every === 0);
    return { at: (value) => from + (value + 0.5) * cell, ticks };
  }

  function scale(axis, values, from, to, across) {
    const size = Math.abs(to - from);
    if (axis.labels) {
      const longest = Math.max(...axis.labels.map((label) => label.length));
      return named(axis.labels, from, to, across ? 8 * longest + 6 : 15);
    }
    const usable = values.filter((value) => known(value) && (!axis.log || value > 0));
    let low = Math.min(...usable, axis.low ?? Infinity);
    let high = Math.max(...usable, axis.high ?? -Infinity);
    if (!(low <= high)) return null;
    if (axis.log) {
      const room = Math.max(1.05, (high / low) ** 0.04);
      const made = logarithmic(low / room, high * room, from, to, size / (across ? 60 : 34));
      return axis.ticks ? { ...made, ticks: axis.ticks.map((value) => [value, shown(value)]) } : made;
    }
    const room = 0.05 * (high - low || Math.abs(high) || 1);
    if (axis.low === undefined || axis.low > low) low -= room;
    if (axis.high === undefined || axis.high < high) high += room;
    return linear(low, high, from, to, Math.max(2, size / (across ? 60 : 34)), axis.whole);
  }

  const tickOf = (axis, value) => axis.labels?.[Math.round(value)] ?? shown(value);

  function marker(parent, shape, x, y, size, attributes) {
    const s = size;
    const path = {
      square: `M${x - s} ${y - s}h${2 * s}v${2 * s}h${-2 * s}z`,
      diamond: `M${x} ${y - 1.4 * s}l${1.4 * s} ${1.4 * s}l${-1.4 * s} ${1.4 * s}l${-1.4 * s} ${-1.4 * s}z`,
      triangle: `M${x} ${y - 1.3 * s}l${1.3 * s} ${2.3 * s}h${-2.6 * s}z`,
    }[shape];
    if (path) return add(parent, "path", { class: "mark", d: path, ...attributes });
    return add(parent, "circle", { class: "mark", cx: x, cy: y, r: s, ...attributes });
  }

  function drawHeat(svg, panel, x, y, hits) {
    const { values, low, high, name, facts = [], counts } = panel.heat;
    const cells = new Map(); // one path a color, whatever the number of cells
    values.forEach((row, r) =>
      row.forEach((value, c) => {
        const lines = [`${panel.y.name} ${panel.y.labels[r]}`, `${panel.x.name} ${panel.x.labels[c]}`];
        lines.push(`${name} ${shown(value)}`, ...facts);
        if (counts) lines.push(`n = ${counts[r]?.[c] ?? counts[c]}`);
        hits.push({ x: x.at(c), y: y.at(r), reach: Infinity, lines, row: r });
        if (!known(value)) return;
        const share = high > low ? (value - low) / (high - low) : 0.5;
        const level = Math.round(Math.min(1, Math.max(0, share)) * (ramp.length - 1));
        // Whole pixels, so that neighbours neither overlap nor leave a seam.
        const [left, right] = [Math.round(x.at(c - 0.5)), Math.round(x.at(c + 0.5))];
        const [top, bottom] = [Math.round(y.at(r + 0.5)), Math.round(y.at(r - 0.5))];
        const box = `M${left} ${top}H${right}V${bottom}H${left}z`;
        cells.set(level, (cells.get(level) ?? "") + box);
      }),
    );
    for (const [level, d] of cells) add(svg, "path", { class: "mark cell", d, fill: ramp[level] });
    const [bottom, top] = [y.at(-0.5), y.at(values.length - 0.5)];
    const bar = x.at(values[0].length - 0.5) + 12;
    const step = (bottom - top) / ramp.length;
    ramp.forEach((color, k) => {
      add(svg, "rect", { x: bar, y: bottom - (k + 1) * step, width: 10, height: step + 0.6, fill: color });
    });
    add(svg, "text", { x: bar + 14, y: bottom, class: "tick" }, shown(Number(low.toPrecision(3))));
    add(svg, "text", { x: bar + 14, y: top + 9, class: "tick" }, shown(Number(high.toPrecision(3))));
  }

  function drawSeries(parent, panel, series, x, y, hits, row) {
    const svg = series.halo ? add(parent, "g", { class: "halo" }) : parent;
    const color = paint(series.color);
    const usable = ([a, b]) => known(a) && known(b) && !(panel.x.log && a <= 0) && !(panel.y.log && b <= 0);
    if (series.line) {
      let [path, open] = ["", false]; // a gap where a value is undefined
      for (const point of series.points) {
        if (usable(point)) path += `${open ? "L" : "M"}${x.at(point[0]).toFixed(1)} ${y.at(point[1]).toFixed(1)}`;
        open = usable(point);
      }
      const stroke = { d: path, stroke: color, "stroke-width": series.width ?? 2, fill: "none" };
      if (series.dash) stroke["stroke-dasharray"] = series.dash;
      if (path) add(svg, "path", { class: "line", ...stroke });
    }
    for (const [a, b, low, high, text] of series.points.filter(usable)) {
      const [left, top] = [x.at(a), y.at(b)];
      const spread = known(low) && known(high) && (!panel.y.log || low > 0);
      if (spread) {
        const ends = { x1: left, x2: left, y1: y.at(low), y2: y.at(high) };
        add(svg, "line", { ...ends, stroke: color, "stroke-width": 1.2, opacity: 0.6 });
      }
      const fill = series.open ? { fill: "none", stroke: color } : { fill: color };
      const opacity = series.faint ? 0.5 : 1;
      marker(svg, series.shape, left, top, series.size ?? (series.faint ? 2.5 : 3.5), { ...fill, opacity });
      const lines = [series.name, `${panel.x.name} ${tickOf(panel.x, a)}`];
      lines.push(`${panel.y.name} ${panel.heat ? tickOf(panel.y, b) : shown(b)}`);
      if (spread) lines.push(`${series.spread ?? "interval"} ${shown(low)} to ${shown(high)}`);
      if (text) lines.push(...text.split("\n"));
      hits.push({ x: left, y: top, reach: REACH, lines: [...lines, ...(series.facts ?? [])], row });
    }
  }

  function answer(svg, hits) {
    const ring = add(svg, "circle", { class: "ring", r: 7 });
    let current = -1;
    const hide = () => {
      tip.hidden = true;
      ring.classList.remove("on");
    };
    const show = (index) => {
      current = index;
      const hit = hits[index];
      tip.replaceChildren();
      hit.lines.forEach((line, k) => put(tip, "div", k ? "" : "head", line));
      tip.hidden = false;
      ring.setAttribute("cx", hit.x);
      ring.setAttribute("cy", hit.y);
      ring.classList.add("on");
      const box = svg.getBoundingClientRect();
      const left = Math.min(box.left + hit.x + 12, window.innerWidth - tip.offsetWidth - 6);
      const above = box.top + hit.y - tip.offsetHeight - 12;
      tip.style.left = `${Math.max(6, left) + window.scrollX}px`;
      tip.style.top = `${(above > 4 ? above : box.top + hit.y + 14) + window.scrollY}px`;
    };
    const point = (event) => {
      const box = svg.getBoundingClientRect();
      const [x, y] = [event.clientX - box.left, event.clientY - box.top];
      let [best, found] = [Infinity, -1];
      hits.forEach((hit, index) => {
        const far = Math.hypot(hit.x - x, hit.y - y);
        if (far < best && far <= hit.reach) [best, found] = [far, index];
      });
      if (found < 0) hide();
      else show(found);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const jump = { ArrowUp: 1, ArrowDown: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!hits.length || !(step || jump)) return;
      event.preventDefault();
      if (step || current < 0) return show((current + (step ?? 0) + hits.length) % hits.length);
      // The same place in the next series or row.
      const own = hits.filter((hit) => hit.row === hits[current].row).indexOf(hits[current]);
      const rows = [...new Set(hits.map((hit) => hit.row))];
      const row = rows[(rows.indexOf(hits[current].row) + jump + rows.length) % rows.length];
      const members = hits.filter((hit) => hit.row === row);
      show(hits.indexOf(members[Math.min(own, members.length - 1)]));
    });
  }

  // What a panel of a figure shows now: its series and rules, and the values on each axis.
  function contents(panel, hidden) {
    const series = (panel.series ?? []).filter((each) => !hidden.has(each.group ?? each.name));
    const rules = (panel.rules ?? []).filter((each) => !hidden.has(each.name));
    const points = series.flatMap((each) => each.points);
    const y = points.flatMap((p) => [p[1], p[2], p[3]]).concat(rules.map((rule) => rule.y));
    return { series, rules, x: points.map((p) => p[0]), y };
  }

  function drawPanel(panel, box, hidden, figure) {
    const width = Math.max(220, box.clientWidth);
    const rows = panel.heat?.values.length ?? 0;
    const height = panel.heat ? Math.min(440, Math.max(150, 22 * rows + 70)) : width < 420 ? 260 : 300;
    const names = panel.y.labels ? Math.max(...panel.y.labels.map((label) => label.length)) * 7 + 12 : 0;
    const frame = { left: Math.max(52, names), right: width - (panel.heat ? 66 : 12), top: 24, bottom: height - 42 };
    box.replaceChildren();
    const svg = add(box, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img" });
    const what = `${panel.title ?? ""} ${panel.y.label} by ${panel.x.label}`;
    svg.setAttribute("aria-label", `${what}. Arrow keys step through the values.`);
    const own = contents(panel, hidden);
    const { series, rules } = own;
    // On an axis that panels share, each has room for the values of all.
    const all = figure.panels.map((each) => contents(each, hidden));
    const on = (axis) => (figure.shared.includes(axis) ? all.flatMap((each) => each[axis]) : own[axis]);
    const x = scale(panel.x, on("x"), frame.left, frame.right, true);
    const y = scale(panel.y, on("y"), frame.bottom, frame.top, false);
    add(svg, "text", { x: 4, y: 13, class: "label" }, `↑ ${panel.y.label}`);
    if (!x || !y || !(panel.heat || own.y.some(known))) {
      add(svg, "text", { x: width / 2, y: height / 2, class: "label middle" }, "nothing to draw: no defined value");
      return;
    }
    for (const [value, label] of y.ticks) {
      const at = y.at(value);
      if (!panel.heat) add(svg, "line", { class: "grid", x1: frame.left, x2: frame.right, y1: at, y2: at });
      add(svg, "text", { x: frame.left - 7, y: at + 4, class: "tick end" }, label);
    }
    for (const [value, label] of x.ticks) {
      add(svg, "text", { x: x.at(value), y: frame.bottom + 16, class: "tick middle" }, label);
    }
    const middle = (frame.left + frame.right) / 2;
    add(svg, "text", { x: middle, y: height - 8, class: "label middle" }, panel.x.label);
    const hits = [];
    if (panel.heat) drawHeat(svg, panel, x, y, hits);
    for (const rule of rules) {
      const at = y.at(rule.y);
      const stroke = { stroke: paint(rule.color ?? "ink"), "stroke-dasharray": rule.dash ?? "none" };
      add(svg, "line", { class: "rule", x1: frame.left, x2: frame.right, y1: at, y2: at, ...stroke });
    }
    series.forEach((each, row) => drawSeries(svg, panel, each, x, y, hits, `series ${row}`));
    answer(svg, hits);
  }

  function swatch(parent, each) {
    const key = add(parent, "svg", { width: 26, height: 12, "aria-hidden": true });
    const svg = add(key, "g", each.halo ? { class: "halo" } : {});
    const color = paint(each.color ?? "ink");
    if (each.line || each.y !== undefined) {
      const dash = each.dash ?? "none";
      add(svg, "line", { x1: 1, x2: 25, y1: 6, y2: 6, stroke: color, "stroke-width": 2, "stroke-dasharray": dash });
    }
    const fill = each.open ? { fill: "none", stroke: color } : { fill: color };
    if (each.points) marker(svg, each.shape, 13, 6, 3.5, { ...fill, class: "key" });
  }

  for (const figure of figures) {
    const host = document.getElementById(figure.id);
    const [legend, panels] = [put(host, "div", "legend"), put(host, "div", "panels")];
    const hidden = new Set();
    const boxes = figure.panels.map((panel) => {
      const holder = put(panels, "div", "panel");
      if (panel.title) put(holder, "p", "title", panel.title);
      return put(holder, "div", "box");
    });
    const redraw = () => figure.panels.forEach((panel, k) => drawPanel(panel, boxes[k], hidden, figure));
    const entries = new Map();
    for (const panel of figure.panels) {
      for (const each of [...(panel.series ?? []), ...(panel.rules ?? [])]) {
        const name = each.group ?? each.name;
        if (name && !entries.has(name)) entries.set(name, each);
      }
    }
    for (const [name, each] of entries) {
      const button = put(legend, "button", "entry");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      swatch(button, each);
      put(button, "span", "", name);
      button.addEventListener("click", () => {
        if (!hidden.delete(name)) hidden.add(name);
        button.setAttribute("aria-pressed", String(!hidden.has(name)));
        redraw();
      });
    }
    let width = 0;
    const fit = () => {
      if (panels.clientWidth === width) return;
      width = panels.clientWidth;
      redraw();
    };
    fit();
    window.addEventListener("resize", () => requestAnimationFrame(fit));
  }
  // A table that is wider than the page says that it scrolls; one in a folded block, when it is opened.
  for (const region of document.querySelectorAll(".scroll")) {
    const fit = () => {
      region.previousElementSibling.hidden = region.scrollWidth <= region.clientWidth;
    };
    fit();
    new ResizeObserver(fit).observe(region);
  }
  document.documentElement.dataset.figures = String(figures.length);
})();
