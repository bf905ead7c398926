// The host as it is built: a panel for each memory node, a cell for each shard. Used by app.js.

import { el, keyed, setAttribute, setStyle, setText } from "./dom.js";
import { bytes, count, percent, took } from "./format.js";

// The shard whose numbers stand below the map: pointed at, focused, or chosen last.
let pointed = null;
let chosen = null;
let latest = null;
let shown = null;

function cell(shard) {
  const busy = el("b");
  const [pool, mail, held] = [el("span"), el("span"), el("span")];
  const point = () => {
    pointed = shard.shard;
    showShard();
  };
  const leave = () => {
    pointed = null;
    showShard();
  };
  const node = el(
    "button",
    { type: "button", class: "cell", "data-shard": shard.shard, onpointerenter: point, onpointerleave: leave, onfocus: point, onblur: leave, onclick: () => { chosen = chosen === shard.shard ? null : shard.shard; showShard(); mark(); } },
    el("span", { class: "row" }, el("span", { class: "number" }, String(shard.shard)), busy),
    el("span", { class: "bar" }, el("i")),
    el("span", { class: "row small" }, held, pool, mail),
  );
  return {
    node,
    update(next) {
      setStyle(node, "--load", next.busy_fraction.toFixed(3));
      setText(busy, percent(next.busy_fraction));
      setText(held, `${next.sandboxes} sbx`);
      setText(pool, `pool ${next.pool.depth}`);
      setText(mail, `mail ${next.mailbox_depth}`);
      const parts = `shard ${next.shard}, core ${next.core}: ${percent(next.busy_fraction)} busy, ${next.sandboxes} sandboxes, ${next.pool.depth} VMs ready, ${next.mailbox_depth} requests wait`;
      setAttribute(node, "aria-label", parts);
      setAttribute(node, "aria-pressed", String(chosen === next.shard));
    },
  };
}

function panel(first) {
  const [memory, meter, cells, vcpus] = [el("span", { class: "muted" }), el("span", { class: "bar memory" }, el("i")), el("div", { class: "cells" }), el("span", { class: "muted" })];
  const node = el("section", { class: "node", "data-node": first.node.node, "aria-label": `Node ${first.node.node}` },
    el("div", { class: "head" }, el("h3", {}, `Node ${first.node.node}`), vcpus, el("span", { class: "spring" }), memory), meter, cells);
  return {
    node,
    update({ node: now, shards }) {
      setText(vcpus, `${now.vcpus} threads for vCPUs`);
      const used = (now.memory_bytes ?? 0) - (now.free_bytes ?? 0);
      setText(memory, now.memory_bytes === null ? "memory not known" : `${bytes(used)} of ${bytes(now.memory_bytes)}`);
      setStyle(meter, "--load", now.memory_bytes ? (used / now.memory_bytes).toFixed(3) : "0");
      keyed(cells, shards, (shard) => shard.shard, cell);
    },
  };
}

function mark() {
  for (const node of document.querySelectorAll(".cell")) {
    setAttribute(node, "aria-pressed", String(Number(node.dataset.shard) === chosen));
  }
}

function showShard() {
  if (latest === null) return;
  const of = (number) => latest.host.shards.find((one) => one.shard === number);
  const shard = of(pointed) ?? of(chosen) ?? of(shown) ?? latest.host.shards[0];
  if (shard === undefined) return;
  shown = shard.shard;
  const fact = (name, value) => el("span", { class: "fact" }, el("span", { class: "muted" }, name), " ", el("b", {}, value));
  const { hits, misses, depth } = shard.pool;
  const facts = [
    fact("core", String(shard.core)),
    fact("busy", percent(shard.busy_fraction)),
    fact("sandboxes", count(shard.sandboxes)),
    fact("VMs ready", count(depth)),
    fact("starts that found one", hits + misses === 0 ? "–" : `${count(hits)} of ${count(hits + misses)}`),
    fact("requests that wait", count(shard.mailbox_depth)),
  ];
  const done = Object.entries(shard.ops).filter(([, one]) => one.count + one.errors > 0);
  const seconds = (us) => (us === null ? null : us / 1e6);
  const operations = done.map(([name, one]) =>
    fact(name, `${count(one.count)}${one.errors > 0 ? `, ${count(one.errors)} failed` : ""} · p50 ${took(seconds(one.p50_us))} · p95 ${took(seconds(one.p95_us))}`));
  latest.detail.replaceChildren(
    el("h3", {}, `Shard ${shard.shard}`, el("span", { class: "muted" }, ` · node ${shard.node}`)),
    el("div", { class: "facts" }, facts, operations.length > 0 ? operations : el("span", { class: "muted" }, "no operation yet")),
  );
}

export function showMap(map, detail, host) {
  latest = { host, detail };
  const panels = host.nodes.map((node) => ({ node, shards: host.shards.filter((shard) => shard.node === node.node) }));
  keyed(map, panels, (item) => item.node.node, panel);
  showShard();
}
