// The sandboxes: filtered, sorted, and no more rows than the page can hold. Used by app.js.

import { byId, el, keyed, press, setAttribute, setClass, setText } from "./dom.js";
import { bytes, count, lasted, NONE } from "./format.js";

// Rows at first, and with each wish for more; where they are cards, fewer.
const ROWS = matchMedia("(max-width: 640px)").matches ? 20 : 100;
const ROWS_MAX = 500;

const age = (one) => (Date.now() - Date.parse(one.started_at)) / 1000;
const shownNumber = (value) => (value === null ? NONE : count(value));

// What a column is called, shows, is sorted by, and whether the greatest comes first.
const COLUMNS = [
  { name: "Sandbox", key: (one) => one.id },
  { name: "State", key: (one) => one.state },
  { name: "Template", text: (one) => one.template, key: (one) => one.template },
  { name: "Age", text: (one) => lasted(age(one)), key: (one) => -Date.parse(one.started_at), class: "number" },
  { name: "Node", text: (one) => (one.node === null ? NONE : `${one.node} / ${one.shard}`), title: "memory node / shard", key: (one) => one.node * 65536 + one.shard, class: "number" },
  { name: "Memory", text: (one) => bytes(one.memory_bytes), key: (one) => one.memory_bytes ?? -1, class: "number", falls: true },
  { name: "CPU", text: (one) => (one.cpu === null ? NONE : one.cpu.toFixed(2)), title: "processors in use", key: (one) => one.cpu ?? -1, class: "number", falls: true },
  { name: "Wrong node", text: (one) => shownNumber(one.wrong_node_pages), title: "pages of its memory on another node", key: (one) => one.wrong_node_pages ?? -1, class: "number", falls: true },
  { name: "Tenant", text: (one) => one.tenant ?? NONE, key: (one) => one.tenant ?? "" },
];

// `node:0 shard:1 state:paused tenant:x template:y` and words that id, template or tenant have.
export function matcher(text) {
  const tests = text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const [, field, wanted] = /^(node|shard|state|tenant|template):(.*)$/.exec(word) ?? [];
    if (field === undefined) {
      return (one) => [one.id, one.template, one.tenant ?? ""].some((value) => value.toLowerCase().includes(word));
    }
    if (field === "node" || field === "shard") return (one) => wanted === "" || String(one[field]) === wanted;
    return (one) => (one[field] ?? "").toLowerCase().includes(wanted);
  });
  return (one) => tests.every((test) => test(one));
}

export class Table {
  // `actions`: {open(one), run(name, one), mayTouch(one)}.
  constructor(parent, actions) {
    this.actions = actions;
    this.all = [];
    this.total = 0;
    this.state = "";
    this.sort = { column: COLUMNS[3], falls: false };
    this.most = ROWS;
    // What is being done with a sandbox, by id, until the host has answered.
    this.busy = new Map();
    this.heads = COLUMNS.map((column) => {
      const button = el("button", { type: "button", class: "link", title: column.title, onclick: () => this.sortBy(column) }, column.name);
      return { column, node: el("th", { scope: "col", class: column.class }, button) };
    });
    this.body = el("tbody");
    this.empty = el("p", { class: "empty" });
    this.more = el("button", { type: "button", class: "quiet", onclick: () => { this.most += ROWS; this.draw(); } });
    const table = el("table", { class: "sandboxes" }, el("thead", {}, el("tr", {}, this.heads.map((head) => head.node), el("th", { scope: "col" }, "Actions"))), this.body);
    parent.append(el("div", { class: "scroll" }, table), this.empty, el("div", { class: "more" }, this.more));
    byId("filter").addEventListener("input", () => { this.most = ROWS; this.draw(); });
    const states = [...document.querySelectorAll("[data-state]")];
    for (const button of states) {
      button.addEventListener("click", () => {
        this.state = button.dataset.state;
        press(states, button);
        this.draw();
      });
    }
  }

  sortBy(column) {
    const again = this.sort.column === column;
    this.sort = { column, falls: again ? !this.sort.falls : Boolean(column.falls) };
    this.draw();
  }

  show(sandboxes, total) {
    this.all = sandboxes;
    this.total = total;
    this.draw();
  }

  mark(id, doing) {
    if (doing === null) this.busy.delete(id);
    else this.busy.set(id, doing);
    this.draw();
  }

  draw() {
    const { column, falls } = this.sort;
    for (const head of this.heads) {
      setAttribute(head.node, "aria-sort", head.column === column ? (falls ? "descending" : "ascending") : null);
    }
    const matches = matcher(byId("filter").value);
    const found = this.all.filter((one) => (this.state === "" || one.state === this.state) && matches(one));
    const compare = (a, b) => {
      const [x, y] = [column.key(a), column.key(b)];
      const order = x < y ? -1 : x > y ? 1 : a.id < b.id ? -1 : 1;
      return falls ? -order : order;
    };
    const rows = found.sort(compare).slice(0, Math.min(this.most, ROWS_MAX));
    keyed(this.body, rows, (one) => one.id, (one) => this.row(one));
    const seen = found.length === this.total ? count(this.total) : `${count(found.length)} of ${count(this.total)}`;
    setText(byId("sandboxes-count"), rows.length < found.length ? `${seen}, the first ${count(rows.length)} shown` : seen);
    this.empty.hidden = found.length > 0;
    setText(this.empty, this.total === 0 ? "No sandboxes yet. “Create sandbox” makes one." : "No sandbox is like that. Change the filter.");
    const left = Math.min(found.length, ROWS_MAX) - rows.length;
    this.more.hidden = left <= 0;
    setText(this.more, `Show ${Math.min(left, ROWS)} more`);
  }

  row(first) {
    let one = first;
    const open = el("button", { type: "button", class: "link id", onclick: () => this.actions.open(one) }, one.id);
    const state = el("span", { class: "badge" });
    const cells = COLUMNS.slice(2).map((column) => el("td", { class: column.class, "data-head": column.name }));
    const button = (name, text) => el("button", { type: "button", class: `quiet ${name}`, "data-action": name, onclick: () => this.actions.run(name, one) }, text);
    const buttons = { pause: button("pause", "Pause"), resume: button("resume", "Resume"), snapshot: button("snapshot", "Snapshot"), kill: button("kill", "Kill") };
    const node = el("tr", { "data-sandbox": one.id }, el("td", { "data-head": "Sandbox" }, open), el("td", { "data-head": "State" }, state), cells, el("td", { class: "actions" }, Object.values(buttons)));
    return {
      node,
      update: (next) => {
        one = next;
        const doing = this.busy.get(one.id);
        setText(state, doing ?? one.state);
        setAttribute(state, "data-is", doing === undefined ? one.state : "busy");
        COLUMNS.slice(2).forEach((column, index) => setText(cells[index], column.text(one)));
        setClass(cells[5], "warn", one.wrong_node_pages > 0);
        const may = this.actions.mayTouch(one);
        for (const [name, action] of Object.entries(buttons)) {
          action.hidden = (name === "resume" && one.state !== "paused") || ((name === "pause" || name === "snapshot") && one.state !== "running");
          action.disabled = doing !== undefined || !may;
          setAttribute(action, "title", may ? null : `of tenant ${one.tenant}: enter a key of that tenant`);
          setAttribute(action, "aria-label", `${action.textContent} ${one.id}`);
        }
      },
    };
  }
}
