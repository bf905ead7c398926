// One sandbox: what it was made with, what it uses, its log. Opened from the table. Used by app.js.

import * as api from "./api.js";
import { el, keyed, setAttribute, setText } from "./dom.js";
import { bytes, count, lasted, NONE, took } from "./format.js";

const LOG_MS = 2000;

function facts(one, detail) {
  const rows = [
    ["State", one.state],
    ["Template", one.template],
    ["Started", new Date(one.started_at).toLocaleString("en-GB")],
    ["Ends", detail === null ? NONE : detail.endAt.startsWith("9999-") ? "never by itself" : `in ${lasted((Date.parse(detail.endAt) - Date.now()) / 1000)}, then ${detail.lifecycle?.onTimeout ?? "kill"}`],
    ["Size", detail === null ? NONE : `${detail.cpuCount} vCPU, ${bytes(detail.memoryMB * 2 ** 20)}`],
    ["Memory of its own", bytes(one.memory_bytes)],
    ["CPU", one.cpu === null ? NONE : one.cpu.toFixed(2)],
    ["Node and shard", one.node === null ? NONE : `${one.node}, ${one.shard}`],
    ["Pages on a wrong node", count(one.wrong_node_pages)],
    ["vCPU time on a wrong node", took(one.wrong_node_cpu_s)],
    ["Tenant", one.tenant ?? NONE],
  ];
  return rows.map(([key, value]) => ({ key, value }));
}

function fact(first) {
  const value = el("dd");
  return { node: el("div", {}, el("dt", {}, first.key), value), update: (next) => setText(value, next.value) };
}

function logLine(first) {
  const node = el("div", { class: "line", "data-level": first.level }, el("time", {}, first.timestamp.slice(11, 23)), el("span", { class: "source" }, first.fields?.source ?? ""), el("span", {}, first.message));
  return { node, update() {} };
}

export class Detail {
  // `may`: whether this key may ask about a sandbox.
  constructor(may) {
    this.may = may;
    this.one = null;
  }

  open(one) {
    this.close();
    this.one = one;
    this.detail = null;
    this.facts = el("dl", { class: "facts-list" });
    this.labels = el("dl", { class: "facts-list metadata" });
    this.labelsTitle = el("h3", { hidden: true }, "Metadata");
    this.log = el("div", { class: "log", role: "log", tabindex: "0", "aria-label": "Log" });
    this.note = el("p", { class: "empty" }, "Reading…");
    const close = el("button", { type: "button", class: "quiet", onclick: () => this.close() }, "Close");
    const dialog = el("dialog", { class: "drawer", "aria-labelledby": "drawer-title" },
      el("div", { class: "head" }, el("h2", { id: "drawer-title", class: "id" }, one.id), el("span", { class: "spring" }), close),
      this.facts, this.labelsTitle, this.labels, el("h3", {}, "Log"), this.note, this.log);
    this.dialog = dialog;
    dialog.addEventListener("close", () => {
      dialog.remove();
      if (this.dialog === dialog) this.one = null;
    });
    document.body.append(dialog);
    dialog.showModal();
    this.draw();
    this.follow(one.id);
  }

  close() {
    if (this.one !== null) this.dialog.close();
    this.one = null;
  }

  // The newest state of all sandboxes.
  update(sandboxes) {
    if (this.one === null) return;
    const now = sandboxes.find((one) => one.id === this.one.id);
    if (now === undefined) setText(this.note, "This sandbox is gone.");
    else this.one = now;
    this.gone = now === undefined;
    this.draw();
  }

  draw() {
    keyed(this.facts, facts(this.one, this.detail), (item) => item.key, fact);
    const metadata = Object.entries(this.detail?.metadata ?? {}).map(([key, value]) => ({ key, value }));
    this.labelsTitle.hidden = metadata.length === 0;
    keyed(this.labels, metadata, (item) => item.key, fact);
  }

  async follow(id) {
    this.gone = false;
    if (!this.may(this.one)) {
      return setText(this.note, `It is of tenant ${this.one.tenant}: with a key of that tenant its metadata and log are here.`);
    }
    const here = () => this.one?.id === id && this.dialog.open && !this.gone;
    while (here()) {
      try {
        const [detail, lines] = await Promise.all([api.detail(id), api.logs(id)]);
        if (!here()) return;
        this.detail = detail;
        this.draw();
        this.showLog(lines.reverse());
      } catch (error) {
        if (here()) setText(this.note, error.message);
        if (error.status === 404 || error.status === 401) return;
      }
      await new Promise((resolve) => setTimeout(resolve, LOG_MS));
    }
  }

  showLog(lines) {
    setText(this.note, lines.length === 0 ? "Nothing was written yet." : "");
    this.note.hidden = lines.length > 0;
    const { scrollTop, scrollHeight, clientHeight } = this.log;
    const atEnd = scrollTop + clientHeight >= scrollHeight - 8;
    const seen = new Map();
    const items = lines.map((line) => {
      const name = `${line.timestamp} ${line.message}`;
      const times = (seen.get(name) ?? 0) + 1;
      seen.set(name, times);
      return { ...line, key: `${times} ${name}` };
    });
    keyed(this.log, items, (item) => item.key, logLine);
    setAttribute(this.log, "data-lines", lines.length);
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }
}
