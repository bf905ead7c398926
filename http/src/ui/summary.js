// The row of numbers at the top. Used by app.js.

import { el, keyed, setText } from "./dom.js";
import { bytes, count, lasted, NONE, percent, rate, took } from "./format.js";
import { makes } from "./history.js";

const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);

function tile(item) {
  const [value, note] = [el("b", { class: "value" }), el("span", { class: "muted" })];
  const node = el("div", { class: "tile", "data-tile": item.key }, el("span", { class: "name" }, item.name), value, note);
  return {
    node,
    update(next) {
      setText(value, next.value);
      setText(note, next.note);
    },
  };
}

export function showSummary(parent, { host, sandboxes, total, points, quantiles }) {
  const running = sandboxes.filter((one) => one.state === "running").length;
  const memory = sum(host.nodes, (node) => node.memory_bytes ?? 0);
  const free = sum(host.nodes, (node) => node.free_bytes ?? 0);
  const held = sum(sandboxes, (one) => one.memory_bytes ?? 0);
  const [hits, misses] = [sum(host.shards, (one) => one.pool.hits), sum(host.shards, (one) => one.pool.misses)];
  const known = sandboxes.filter((one) => one.wrong_node_pages !== null);
  const wrong = sum(known, (one) => one.wrong_node_pages);
  const busiest = host.shards.reduce((best, one) => (one.busy_fraction > best.busy_fraction ? one : best), host.shards[0]);
  const tiles = [
    ["sandboxes", "Sandboxes", count(total), `${count(running)} running, ${count(sandboxes.length - running)} paused`],
    ["rate", "Creates per second", points.at(-1)?.rate === null || points.length === 0 ? NONE : rate(points.at(-1).rate), `${count(makes(host.shards))} since the start`],
    ["create", "Create, median", took(quantiles?.p50), quantiles ? `p95 ${took(quantiles.p95)}` : "none yet"],
    ["memory", "Memory in use", bytes(memory - free), `of ${bytes(memory)}; sandboxes ${bytes(held)}`],
    ["pool", "VMs held ready", count(sum(host.shards, (one) => one.pool.depth)), hits + misses === 0 ? "none asked for yet" : `${percent(hits / (hits + misses))} of starts found one`],
    ["busy", "Busiest shard", busiest ? percent(busiest.busy_fraction) : NONE, busiest ? `shard ${busiest.shard} on core ${busiest.core}` : ""],
    ["wrong", "Pages on a wrong node", known.length === 0 ? NONE : count(wrong), known.length === 0 ? "not known here" : `in ${count(known.filter((one) => one.wrong_node_pages > 0).length)} sandboxes`],
  ].map(([key, name, value, note]) => ({ key, name, value, note }));
  keyed(parent, tiles, (item) => item.key, tile);
}

export const hostLine = (host) => `${host.version} · Linux ${host.kernel} · up ${lasted(host.uptime_s)}`;
