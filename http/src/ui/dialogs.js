// What the page asks and says: the key, a wish for a sandbox, whether it is meant, what came of it. Used by app.js.

import { byId, el, setText } from "./dom.js";

const SAID_MS = 6000;
const SAID_MAX = 5;

// Says what came of something. What went wrong stays until it is put away.
export function say(text, bad = false) {
  const away = el("button", { type: "button", class: "quiet", "aria-label": "Put away", onclick: () => node.remove() }, "×");
  const node = el("div", { class: bad ? "toast bad" : "toast", role: bad ? "alert" : "status" }, el("span", {}, text), away);
  const toasts = byId("toasts");
  toasts.append(node);
  while (toasts.childElementCount > SAID_MAX) toasts.firstElementChild.remove();
  if (!bad) setTimeout(() => node.remove(), SAID_MS);
}

// A dialog with fields. `submit(values)` may throw, and its message is shown in the dialog, which stays.
export function ask({ title, text, fields = [], verb, danger = false, required = false, submit }) {
  return new Promise((resolve) => {
    const error = el("p", { class: "error", role: "alert" });
    const go = el("button", { type: "submit", class: danger ? "danger" : "primary" }, verb);
    const cancel = el("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Cancel");
    const inputs = fields.map((field) => {
      const input = field.input;
      return el("label", {}, el("span", {}, field.name), input, field.hint && el("small", { class: "muted" }, field.hint));
    });
    const form = el("form", {}, el("h2", { id: "dialog-title" }, title), text && el("p", {}, text), inputs, error, el("div", { class: "buttons" }, !required && cancel, go));
    const dialog = el("dialog", { "aria-labelledby": "dialog-title" }, form);
    let done = null;
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      go.disabled = true;
      setText(error, "");
      try {
        done = await submit();
        dialog.close();
      } catch (failure) {
        setText(error, failure.message);
        dialog.querySelector("input, select, textarea")?.focus();
      } finally {
        go.disabled = false;
      }
    });
    // Without a key there is nothing behind this dialog.
    if (required) dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(done);
    });
    document.body.append(dialog);
    dialog.showModal();
    (fields.length > 0 ? fields[0].input : danger ? cancel : go).focus();
  });
}

export function askKey(why, take) {
  const input = el("input", { type: "password", id: "key", autocomplete: "off", spellcheck: "false", required: true });
  const asked = ask({
    title: "API key",
    text: "It stays in this tab, and is sent to this host alone.",
    fields: [{ name: "Key", input, hint: "`mica serve` says where its keys are; `mica key create` makes more." }],
    verb: "Open",
    required: true,
    submit: async () => {
      await take(input.value.trim());
      return true;
    },
  });
  setText(document.querySelector("dialog .error"), why);
  return asked;
}

function metadataOf(text) {
  const metadata = {};
  for (const line of text.split("\n").filter((line) => line.trim() !== "")) {
    const at = line.indexOf("=");
    if (at < 1) throw new Error(`metadata is name=value, one on each line, and this is not: ${line}`);
    metadata[line.slice(0, at).trim()] = line.slice(at + 1).trim();
  }
  return metadata;
}

export function askCreate(templates, make) {
  // One is listed from its first announcement on.
  const names = templates.filter((one) => one.buildStatus === "ready").map((one) => one.aliases?.[0] ?? one.templateID);
  const template = el("input", { id: "template", list: "template-names", required: true, autocomplete: "off", spellcheck: "false", value: names.includes("base") ? "base" : (names[0] ?? "") });
  const timeout = el("input", { id: "timeout", type: "number", min: "-1", step: "1", value: "300", required: true });
  const metadata = el("textarea", { id: "metadata", rows: "3", spellcheck: "false", placeholder: "owner=me" });
  const asked = ask({
    title: "Create a sandbox",
    fields: [
      { name: "Template", input: template, hint: "the name of a template, or the id of a snapshot" },
      { name: "Lives for, in seconds", input: timeout, hint: "-1: until it is killed" },
      { name: "Metadata", input: metadata, hint: "name=value, one on each line" },
    ],
    verb: "Create",
    submit: () => make({ templateID: template.value.trim(), timeout: Number(timeout.value), metadata: metadataOf(metadata.value) }),
  });
  document.querySelector("dialog form").append(el("datalist", { id: "template-names" }, names.map((name) => el("option", { value: name }))));
  return asked;
}

export function askResume(id, run) {
  const timeout = el("input", { id: "timeout", type: "number", min: "-1", step: "1", value: "300", required: true });
  return ask({
    title: "Resume the sandbox?",
    text: id,
    fields: [{ name: "Lives for, in seconds", input: timeout, hint: "-1: until it is killed" }],
    verb: "Resume",
    submit: () => run(Number(timeout.value)),
  });
}

export function askSnapshot(id, run) {
  const name = el("input", { id: "name", autocomplete: "off", spellcheck: "false" });
  return ask({
    title: "Take a snapshot?",
    text: `${id} goes on; the snapshot's id can be used like a template.`,
    fields: [{ name: "Name", input: name, hint: "may be left empty" }],
    verb: "Snapshot",
    submit: () => run(name.value.trim()),
  });
}
