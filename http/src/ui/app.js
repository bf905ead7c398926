// The dashboard: asks the host every other second and shows what it says. Loaded by index.html.

import * as api from "./api.js";
import { TimeChart } from "./charts.js";
import { Detail } from "./detail.js";
import { ask, askCreate, askKey, askResume, askSnapshot, say } from "./dialogs.js";
import { byId, press, setAttribute, setClass, setText } from "./dom.js";
import { between, operations } from "./exposition.js";
import { bytes, clock, rate } from "./format.js";
import { History } from "./history.js";
import { showMap } from "./hostmap.js";
import { Latency, quantiles } from "./latency.js";
import { hostLine, showSummary } from "./summary.js";
import { Table } from "./table.js";

const ROUND_MS = 2000;
// Longest rest while the host does not answer.
const REST_MS_MAX = 15_000;
// Numbers of operations are asked for at every fifth look, and after each one that is done here.
const LOOKS_PER_METRICS = 5;
const OPERATOR = "default";
const INVALID = "This key is not valid here.";
// Why the key is asked for again, until it is said.
const WHY = "mica-why";

const history = new History();
let needsKey = true;
// A tenant's key shows its sandboxes alone.
let isOperator = true;
let host = null;
let sandboxes = [];
let counted = null;
let recent = false;
let looks = 0;
let failures = 0;
let lastGood = null;
let timer = null;
let looking = false;
let again = false;
let asking = false;

const mayTouch = (one) => one.tenant === null || one.tenant === OPERATOR;
const detail = new Detail(mayTouch);
const latency = new Latency(byId("latency"));
const table = new Table(byId("sandboxes"), { open: (one) => detail.open(one), run, mayTouch });
const rateChart = new TimeChart(byId("rate-chart"), { label: "Creates per second", show: rate, series: [{ name: "creates and restores", of: (point) => point.rate }] });
const memoryChart = new TimeChart(byId("memory-chart"), {
  label: "Memory", show: bytes, binary: true,
  series: [{ name: "host", of: (point) => point.used }, { name: "sandboxes", of: (point) => point.sandboxes }],
});

function drawHost(page) {
  host = page.host;
  setText(byId("host"), hostLine(host));
  showMap(byId("map"), byId("shard-detail"), host);
}

function drawAll(total) {
  const now = Date.now();
  table.show(sandboxes, total);
  detail.update(sandboxes);
  if (!isOperator) return;
  history.add(now, host, sandboxes);
  const create = counted?.get("create");
  const times = create === undefined || create.total.count === 0 ? null : quantiles(create.total, host.shards, (shard) => shard.ops.create);
  showSummary(byId("tiles"), { host, sandboxes, total, points: history.points, quantiles: times });
  rateChart.update(history.points);
  memoryChart.update(history.points);
}

function drawLatency() {
  if (host === null) return;
  if (!host.metrics) return latency.show(null, [], "Operations are not counted: the host was started with --metrics off.");
  if (counted === null) return;
  const before = history.before();
  const late = recent && before !== undefined ? between(counted, before) : null;
  if (late === null) latency.show(counted, host.shards);
  else latency.show(late, []);
}

async function lookAsOperator() {
  const { sandboxes: all, total } = await api.hostState((_, page) => drawHost(page));
  sandboxes = all;
  if (host.metrics && looks % LOOKS_PER_METRICS === 0) {
    counted = operations(await api.metrics());
    history.addOperations(Date.now(), counted);
  }
  looks += 1;
  drawAll(total);
  drawLatency();
}

async function lookAsTenant() {
  const { sandboxes: all, total } = await api.ownSandboxes();
  sandboxes = all;
  drawAll(total);
}

async function look() {
  if (isOperator) {
    try {
      await lookAsOperator();
    } catch (error) {
      // What only the operator may see is not there for others.
      if (error.status !== 404) throw error;
      isOperator = false;
      document.body.classList.add("tenant");
      byId("tenant-note").hidden = false;
      setText(byId("host"), "");
    }
  }
  if (!isOperator) await lookAsTenant();
}

function showConnection(error) {
  const banner = byId("banner");
  banner.hidden = error === null;
  setClass(document.body, "stale", error !== null);
  setAttribute(byId("live"), "data-is", error === null ? "on" : "off");
  setText(byId("live"), error === null ? "live" : "not connected");
  if (error === null) return;
  const since = lastGood === null ? "" : ` What you see is of ${clock(lastGood)}.`;
  setText(banner, `Not connected: ${error.message}.${since} Trying again.`);
}

async function round() {
  clearTimeout(timer);
  if (looking) {
    again = true;
    return;
  }
  if (asking || document.hidden) return;
  looking = true;
  let rest = ROUND_MS;
  try {
    await look();
    failures = 0;
    lastGood = Date.now();
    showConnection(null);
  } catch (error) {
    if (error.status === 401) return leave(api.key() ? INVALID : "");
    if (!(error instanceof api.Failure)) console.error(error);
    failures += 1;
    rest = Math.min(REST_MS_MAX, ROUND_MS * 2 ** Math.min(failures - 1, 4));
    showConnection(error);
  }
  looking = false;
  if (again) rest = 0;
  again = false;
  timer = setTimeout(round, rest);
}

// Looks at once, with the numbers of operations.
function lookNow() {
  looks = 0;
  round();
}

// Nothing that one key has shown stays for the next: the page begins anew.
function leave(why) {
  api.dropKey();
  if (why !== "") sessionStorage.setItem(WHY, why);
  location.reload();
}

async function signIn(why) {
  asking = true;
  setClass(document.body, "locked", true);
  await askKey(why, async (given) => {
    if (!/^[\x21-\x7e]+$/.test(given)) throw new Error("A key has letters, digits and underscores, and is on one line.");
    api.setKey(given);
    try {
      await look();
    } catch (error) {
      api.dropKey();
      throw error.status === 401 ? new Error(INVALID) : error;
    }
  });
  asking = false;
  begin();
}

function begin() {
  setClass(document.body, "locked", false);
  byId("sign-out").hidden = !needsKey;
  lookNow();
}

// What each button does: what the row shows meanwhile, how it is asked, and what is said when it is done.
const RUNS = {
  pause: { doing: "pausing", done: (one) => `${one.id} is paused.` },
  resume: { doing: "resuming", done: (one) => `${one.id} runs again.` },
  snapshot: { doing: "in a snapshot", done: (one, made) => `Snapshot ${made.snapshotID} of ${one.id} is taken.` },
  kill: { doing: "ending", done: (one) => `${one.id} is gone.` },
};

function run(name, one) {
  const { doing, done } = RUNS[name];
  const carry = async (work) => {
    table.mark(one.id, doing);
    try {
      const made = await work();
      say(done(one, made));
      return made;
    } finally {
      table.mark(one.id, null);
      lookNow();
    }
  };
  if (name === "resume") return askResume(one.id, (timeout) => carry(() => api.resume(one.id, timeout)));
  if (name === "snapshot") return askSnapshot(one.id, (label) => carry(() => api.snapshot(one.id, label)));
  if (name === "pause") return ask({ title: "Pause the sandbox?", text: `${one.id} stops until it is resumed. Its memory and disk are kept.`, verb: "Pause", submit: () => carry(() => api.pause(one.id)) });
  return ask({ title: "Kill the sandbox?", text: `${one.id} and what is in it are gone for good.`, verb: "Kill", danger: true, submit: () => carry(() => api.kill(one.id)) });
}

async function create() {
  let templates = [];
  try {
    templates = await api.templates();
  } catch (error) {
    return say(`Templates cannot be listed: ${error.message}`, true);
  }
  await askCreate(templates, async (wish) => {
    const made = await api.create(wish);
    say(`${made.sandboxID} runs.`);
    lookNow();
    return made;
  });
}

function theme() {
  const order = ["auto", "light", "dark"];
  const show = (name) => {
    document.documentElement.dataset.theme = name;
    setText(byId("theme"), name[0].toUpperCase() + name.slice(1));
    setAttribute(byId("theme"), "aria-label", `Colours: ${name === "auto" ? "as the system" : name}`);
  };
  let now = localStorage.getItem("mica-theme");
  if (!order.includes(now)) now = "auto";
  show(now);
  byId("theme").addEventListener("click", () => {
    now = order[(order.indexOf(now) + 1) % order.length];
    localStorage.setItem("mica-theme", now);
    show(now);
  });
}

async function start() {
  theme();
  const why = sessionStorage.getItem(WHY) ?? "";
  sessionStorage.removeItem(WHY);
  byId("create").addEventListener("click", create);
  byId("sign-out").addEventListener("click", () => leave(""));
  document.addEventListener("visibilitychange", () => document.hidden || round());
  byId("skip").addEventListener("click", () => byId("sandboxes-panel").focus());
  const windows = [byId("since-start"), byId("since-recent")];
  windows.forEach((button, index) => button.addEventListener("click", () => {
    recent = index === 1;
    press(windows, button);
    drawLatency();
  }));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    byId("filter").focus();
  });
  try {
    needsKey = await api.needsKey();
  } catch (error) {
    showConnection(error);
    timer = setTimeout(() => location.reload(), REST_MS_MAX);
    return;
  }
  if (needsKey && !api.key()) await signIn(why);
  else begin();
}

start();
