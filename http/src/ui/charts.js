// Lines over time and columns of a histogram, drawn as SVG. Used by app.js and latency.js. Colours are the
// style sheet's, by class.

import { el, setText, svg } from "./dom.js";
import { clock } from "./format.js";

const HEIGHT = 132;
const [TOP, RIGHT, BOTTOM, LEFT] = [8, 8, 18, 52];
// The least time that is shown, so that the first points do not jump about.
const SPAN_MS = 120_000;

// A round number not below `value`, of 1, 2 or 5 times a power of `base` steps.
function roundUp(value, binary) {
  if (value <= 0) return 1;
  if (binary) return 2 ** Math.ceil(Math.log2(value));
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

// A chart of `series`: [{name, of(point)}], lines over time. `show` writes a value. The first one is filled.
export class TimeChart {
  constructor(parent, { series, show, binary = false, label }) {
    Object.assign(this, { series, show, binary, label, points: [], hovered: null });
    this.legend = el("div", { class: "legend" });
    this.values = series.map((one, index) => {
      const value = el("b");
      this.legend.append(el("span", { class: `series-${index}` }, el("i"), one.name, " ", value));
      return value;
    });
    this.time = el("span", { class: "muted at" });
    this.legend.append(this.time);
    this.svg = svg("svg", { role: "img", height: HEIGHT });
    this.hint = el("p", { class: "hint" }, "Drawn from when this page was opened.");
    parent.previousElementSibling.append(this.legend);
    parent.append(this.svg, this.hint);
    this.svg.addEventListener("pointermove", (event) => this.hover(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.hover(null));
    new ResizeObserver(() => this.draw()).observe(parent);
  }

  update(points) {
    this.points = points;
    this.draw();
  }

  hover(x) {
    this.hovered = x;
    this.draw();
  }

  draw() {
    const width = this.svg.clientWidth;
    if (width < 80) return;
    const last = this.points.at(-1);
    const end = last?.time ?? Date.now();
    const start = Math.min(this.points[0]?.time ?? end, end - SPAN_MS);
    const values = this.points.flatMap((point) => this.series.map(({ of }) => of(point) ?? 0));
    const top = roundUp(Math.max(...values, 0), this.binary);
    const x = (time) => LEFT + ((time - start) / (end - start)) * (width - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - TOP - BOTTOM);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const parts = [...this.grid(width, top, y), ...this.times(start, end, x)];
    this.series.forEach(({ of }, index) => parts.push(...line(this.points, of, x, y, index)));
    const shown = this.pick(x);
    if (shown !== null && this.hovered !== null) {
      parts.push(svg("line", { class: "cross", x1: x(shown.time), x2: x(shown.time), y1: TOP, y2: HEIGHT - BOTTOM }));
    }
    this.svg.replaceChildren(...parts);
    this.write(shown);
  }

  grid(width, top, y) {
    return [0, 0.5, 1].flatMap((share) => {
      const at = y(top * share);
      return [
        svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }),
        svg("text", { class: "tick", x: LEFT - 6, y: at + 3.5, "text-anchor": "end" }, this.show(top * share)),
      ];
    });
  }

  times(start, end, x) {
    const minutes = Math.round((end - start) / 60_000);
    return [
      svg("text", { class: "tick", x: x(start), y: HEIGHT - 4 }, `${minutes} min ago`),
      svg("text", { class: "tick", x: x(end), y: HEIGHT - 4, "text-anchor": "end" }, "now"),
    ];
  }

  // The point that is pointed at, or the last one.
  pick(x) {
    if (this.hovered === null) return this.points.at(-1) ?? null;
    const far = (point) => Math.abs(x(point.time) - this.hovered);
    return this.points.reduce((best, point) => (best === null || far(point) < far(best) ? point : best), null);
  }

  write(shown) {
    this.series.forEach(({ of }, index) => {
      const value = shown === null ? null : of(shown);
      setText(this.values[index], value === null || value === undefined ? "–" : this.show(value));
    });
    setText(this.time, shown === null || this.hovered === null ? "" : clock(shown.time));
    const now = this.series.map(({ name }, index) => `${name} ${this.values[index].textContent}`);
    this.svg.setAttribute("aria-label", `${this.label}: ${now.join(", ")}`);
    this.hint.hidden = this.points.length > 2;
  }
}

function line(points, of, x, y, index) {
  const known = points.filter((point) => of(point) !== null && of(point) !== undefined);
  if (known.length === 0) return [];
  const at = known.map((point) => `${x(point.time).toFixed(1)},${y(of(point)).toFixed(1)}`);
  const parts = [svg("path", { class: `line series-${index}`, d: `M${at.join("L")}` })];
  if (index === 0) {
    const [first, last] = [x(known[0].time).toFixed(1), x(known.at(-1).time).toFixed(1)];
    parts.unshift(svg("path", { class: `area series-${index}`, d: `M${first},${y(0)}L${at.join("L")}L${last},${y(0)}Z` }));
  }
  if (known.length === 1) {
    const [cx, cy] = at[0].split(",");
    parts.push(svg("circle", { class: `dot series-${index}`, cx, cy, r: 2.5 }));
  }
  return parts;
}

// Columns, one for each bin that is not far from what there is, with marks at some times. On a logarithmic scale,
// for that is how bins are spaced.
export function columns(bins, marks, { width, height, show, label }) {
  const held = bins.map((bin, index) => (bin.count > 0 ? index : -1)).filter((index) => index >= 0);
  if (held.length === 0) return null;
  const shown = bins.slice(Math.max(0, held[0] - 1), Math.min(bins.length, held.at(-1) + 2)).filter((bin) => bin.high !== Infinity || bin.count > 0);
  const most = Math.max(...shown.map((bin) => bin.count));
  const step = (width - 16) / shown.length;
  const [top, floor] = [18, height - 18];
  const x = (seconds) => {
    const index = Math.max(0, shown.findIndex((bin) => seconds <= bin.high));
    const { low, high } = shown[index];
    const from = low === 0 ? high / 2 : low;
    const part = high === Infinity ? 0 : Math.log(Math.max(seconds, from) / from) / Math.log(high / from);
    return 8 + step * (index + Math.min(1, part));
  };
  const parts = [svg("line", { class: "grid", x1: 8, x2: width - 8, y1: floor, y2: floor })];
  shown.forEach((bin, index) => {
    const tall = bin.count === 0 ? 0 : Math.max(1.5, (bin.count / most) * (floor - top));
    const title = `${bin.count} of ${show(bin.low)} to ${bin.high === Infinity ? "more" : show(bin.high)}`;
    parts.push(svg("rect", { class: "column", x: 8 + step * index + 1, y: floor - tall, width: Math.max(1, step - 2), height: tall, rx: 1.5 }, svg("title", {}, title)));
    const every = Math.ceil(shown.length / Math.max(2, Math.floor(width / 64)));
    if (bin.high !== Infinity && index % every === 0 && index < shown.length - 1) {
      parts.push(svg("text", { class: "tick", x: 8 + step * (index + 1), y: height - 5, "text-anchor": "middle" }, show(bin.high)));
    }
  });
  let free = -Infinity;
  for (const [name, seconds] of marks) {
    const at = x(seconds);
    parts.push(svg("line", { class: "mark", x1: at, x2: at, y1: 12, y2: floor }));
    // Names that would lie on one another are left out; the numbers stand beside the drawing.
    if (at - free > 26) {
      parts.push(svg("text", { class: "tick strong", x: at, y: 9, "text-anchor": "middle" }, name));
      free = at;
    }
  }
  return svg("svg", { role: "img", "aria-label": label, viewBox: `0 0 ${width} ${height}`, width, height, class: "columns" }, parts);
}
