// What operations came to and what their time went into. Used by app.js.

import { columns } from "./charts.js";
import { el, keyed, setAttribute, setClass, setStyle, setText } from "./dom.js";
import { bins, mean, quantile } from "./exposition.js";
import { count, percent, took } from "./format.js";

// What the page shows below the table.
let chosen = "create";
// Of the operation; null: all of it.
let chosenPhase = null;

const SHARES = { p50: 0.5, p95: 0.95, p99: 0.99 };

// The quantiles of a histogram over all shards. `of` finds the same in one shard's own summary, in microseconds.
export function quantiles(histogram, shards, of) {
  const result = {};
  for (const [name, share] of Object.entries(SHARES)) {
    const known = shards.map((shard) => of(shard)?.[`${name}_us`]).filter((us) => us !== null && us !== undefined);
    result[name] = quantile(histogram, share, known.map((us) => us / 1e6));
  }
  return result;
}

// The phases of an operation with their means, and what no phase has.
function phasesOf(operation) {
  const whole = mean(operation.total);
  if (whole === null) return [];
  const phases = [...operation.phases].map(([name, histogram]) => ({ name, histogram, mean: mean(histogram) ?? 0 }));
  const rest = whole - phases.reduce((sum, phase) => sum + phase.mean, 0);
  if (phases.length === 0 || rest > whole * 0.0005) phases.push({ name: "other", histogram: null, mean: Math.max(0, rest) });
  return phases.map((phase) => ({ ...phase, share: whole === 0 ? 0 : phase.mean / whole }));
}

function segment(phase) {
  const node = el("i", { class: `phase-${phase.name}`, "data-phase": phase.name });
  return {
    node,
    update(now) {
      setStyle(node, "--share", now.share.toFixed(5));
      setAttribute(node, "data-mean-us", (now.mean * 1e6).toFixed(3));
      setAttribute(node, "title", `${now.name} ${took(now.mean)}, ${percent(now.share)}`);
    },
  };
}

const HEADS = ["Operation", "Done", "Failed", "p50", "p95", "p99", "Mean", "What the mean goes into"];

function row(first, choose) {
  const cells = HEADS.slice(1, -1).map((name) => el("td", { class: "number", "data-head": name }));
  const bar = el("div", { class: "phases", role: "img" });
  const name = el("button", { type: "button", class: "link", onclick: () => choose(first.name) }, first.name);
  const node = el("tr", { "data-operation": first.name, onclick: () => choose(first.name) }, el("th", { scope: "row" }, name), cells, el("td", { class: "wide" }, bar));
  return {
    node,
    update({ name: operation, now, times }) {
      const phases = phasesOf(now);
      const failed = now.refused > 0 ? `${count(now.error)} + ${count(now.refused)} refused` : count(now.error);
      const texts = [count(now.ok), failed, took(times.p50), took(times.p95), took(times.p99), took(mean(now.total))];
      texts.forEach((text, index) => setText(cells[index], text));
      setClass(cells[1], "bad", now.error > 0);
      setClass(node, "chosen", operation === chosen);
      setAttribute(name, "aria-pressed", String(operation === chosen));
      setAttribute(bar, "aria-label", phases.map((phase) => `${phase.name} ${percent(phase.share)}`).join(", ") || "none yet");
      keyed(bar, phases, (phase) => phase.name, segment);
    },
  };
}

const PHASE_HEADS = ["Phase", "p50", "p95", "p99", "Mean", "Share"];

// A row of the phases: a click on it, or Enter on its name, shows how its times are spread. What no phase has is
// only a mean.
function phaseRow(first, choose) {
  const cells = PHASE_HEADS.slice(1).map(() => el("td", { class: "number" }));
  const can = first.histogram !== null;
  const name = can ? el("button", { type: "button", class: "link" }, first.name) : first.name;
  const head = el("th", { scope: "row" }, el("i", { class: `swatch phase-${first.name}` }), name);
  // One listener: a click on the button comes here, too.
  const node = el("tr", { "data-phase-row": first.name, onclick: can && (() => choose(first.name)) }, head, cells);
  return {
    node,
    update({ times, mean: average, share, isChosen }) {
      const texts = [took(times.p50), took(times.p95), took(times.p99), took(average), percent(share)];
      texts.forEach((text, index) => setText(cells[index], text));
      setClass(node, "chosen", isChosen);
      if (can) setAttribute(name, "aria-pressed", String(isChosen));
    },
  };
}

export class Latency {
  constructor(parent) {
    this.parent = parent;
    this.body = el("tbody");
    const heads = HEADS.map((text, index) => el("th", { scope: "col", class: index > 0 && index < HEADS.length - 1 ? "number" : "" }, text));
    this.table = el("div", { class: "scroll" }, el("table", { class: "operations" }, el("thead", {}, el("tr", {}, heads)), this.body));
    this.none = el("p", { class: "empty" });
    [this.title, this.drawing, this.phaseBody] = [el("h3"), el("div"), el("tbody")];
    this.shape = el("div", {}, this.title, this.drawing);
    const phaseHead = el("tr", {}, PHASE_HEADS.map((text) => el("th", { scope: "col" }, text)));
    const phases = el("table", { class: "small-table phase-table" }, el("thead", {}, phaseHead), this.phaseBody);
    this.phases = el("div", { class: "scroll" }, el("h3", {}, "Its phases"), phases);
    this.detail = el("div", { class: "operation-detail" }, this.none, this.shape, this.phases);
    this.empty = el("p", { class: "empty" });
    parent.append(this.empty, this.table, this.detail);
    new ResizeObserver(() => this.last && this.showDetail()).observe(parent);
  }

  // `operations` by name, of all time or of late; null where nothing is counted. `shards`: for finer quantiles, or none.
  show(operations, shards, reason) {
    this.empty.hidden = operations !== null;
    this.table.hidden = this.detail.hidden = operations === null;
    this.last = operations === null ? null : { operations, shards };
    if (operations === null) return setText(this.empty, reason);
    const rows = [...operations].map(([name, now]) => ({ name, now, times: quantiles(now.total, shards, (shard) => shard.ops[name]) }));
    const choose = (name) => {
      if (name !== chosen) chosenPhase = null;
      chosen = name;
      this.show(operations, shards, reason);
    };
    keyed(this.body, rows, (item) => item.name, (item) => row(item, (name) => this.choose(name)));
    this.choose = choose;
    this.showDetail();
  }

  // Once more on the phase that is shown: all of the operation again.
  choosePhase(name) {
    chosenPhase = name === chosenPhase ? null : name;
    this.showDetail();
  }

  showDetail() {
    const { operations, shards } = this.last;
    const operation = operations.get(chosen);
    const none = operation === undefined || operation.total.count === 0;
    this.none.hidden = !none;
    this.shape.hidden = this.phases.hidden = none;
    if (none) return setText(this.none, `No ${chosen} in this time.`);
    const phases = phasesOf(operation).map((phase) => {
      const of = (shard) => shard.ops[chosen]?.phases[phase.name];
      const times = phase.histogram === null ? {} : quantiles(phase.histogram, shards, of);
      return { ...phase, times, isChosen: phase.name === chosenPhase && phase.histogram !== null };
    });
    const phase = phases.find((one) => one.isChosen);
    const choose = (name) => this.choosePhase(name);
    keyed(this.phaseBody, phases, (one) => `${chosen} ${one.name} ${one.histogram === null}`, (one) => phaseRow(one, choose));
    const whole = { histogram: operation.total, times: quantiles(operation.total, shards, (shard) => shard.ops[chosen]) };
    this.draw(phase === undefined ? `How long ${chosen} took` : `How long ${phase.name} took of ${chosen}`, phase ?? whole);
  }

  draw(title, { histogram, times }) {
    const width = Math.max(260, Math.min(560, this.parent.clientWidth - 24));
    const marks = Object.entries(times).filter(([, value]) => value !== null);
    const drawn = columns(bins(histogram), marks, {
      width, height: 150, show: took,
      label: `${title}: ${marks.map(([name, value]) => `${name} ${took(value)}`).join(", ")}`,
    });
    setText(this.title, title);
    this.drawing.replaceChildren(...(drawn === null ? [] : [drawn]));
  }
}
