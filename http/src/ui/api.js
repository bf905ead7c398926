// Requests to the host. Used by app.js and the dialogs. The key is kept for this tab alone, and goes nowhere
// but to where this page came from.

const KEY = "mica-key";
// An answer to a look; an operation may have to wait for a guest.
const LOOK_MS = 15_000;
const OPERATION_MS = 150_000;
// As many pages of sandboxes as a host with the default limits can fill, and some more.
const PAGES_MAX = 50;
const PAGE = 100;

export class Failure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (value) => sessionStorage.setItem(KEY, value);
export const dropKey = () => sessionStorage.removeItem(KEY);

// Relative to the page, so that it works behind a prefix, too.
const at = (path) => new URL(`../${path}`, document.baseURI);

async function send(method, path, body, patience, by = key()) {
  const headers = {};
  if (by) headers["X-API-Key"] = by;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const request = { method, headers, cache: "no-store", signal: AbortSignal.timeout(patience) };
  if (body !== undefined) request.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(at(path), request);
  } catch (error) {
    throw new Failure(0, error.name === "TimeoutError" ? "the host does not answer" : "the host cannot be reached");
  }
  if (response.ok) return response;
  let message = `the host answered ${response.status}`;
  try {
    message = (await response.json()).message ?? message;
  } catch {
    // Whatever stands between may answer something else than JSON; the status says enough.
  }
  throw new Failure(response.status, message);
}

const look = (path) => send("GET", path, undefined, LOOK_MS);

export const needsKey = async () => (await (await send("GET", "ui/access.json", undefined, LOOK_MS, "")).json()).key;
export const metrics = async () => (await look("metrics")).text();
export const templates = async () => (await look("templates")).json();
export const detail = async (id) => (await look(`sandboxes/${encodeURIComponent(id)}`)).json();
export const logs = async (id) =>
  (await (await look(`v2/sandboxes/${encodeURIComponent(id)}/logs?limit=1000&direction=backward`)).json()).logs;

async function pages(path, first, each) {
  const query = new URLSearchParams(first);
  query.set("limit", PAGE);
  for (let page = 0; page < PAGES_MAX; page += 1) {
    const response = await look(`${path}?${query}`);
    each(await response.json());
    const next = response.headers.get("x-next-token");
    if (!next) return;
    query.set("nextToken", next);
  }
}

// The state of the host: `first` gets it with a page of sandboxes; the answer is all of them.
export async function hostState(first) {
  const sandboxes = [];
  let total = 0;
  await pages("ui/state", {}, (page) => {
    if (sandboxes.length === 0) first(page.host, page);
    sandboxes.push(...page.sandboxes);
    total = page.sandboxes_total;
  });
  return { sandboxes, total };
}

// A tenant's own, in the same form as the operator's.
export async function ownSandboxes() {
  const sandboxes = [];
  await pages("v2/sandboxes", { state: "running,paused" }, (page) => {
    for (const one of page) {
      sandboxes.push({
        id: one.sandboxID, template: one.alias ?? one.templateID, tenant: null, state: one.state, shard: null,
        node: null, started_at: one.startedAt, memory_bytes: null, cpu: null, wrong_node_pages: null, wrong_node_cpu_s: null,
      });
    }
  });
  return { sandboxes, total: sandboxes.length };
}

const act = async (method, path, body) => {
  const response = await send(method, path, body, OPERATION_MS);
  const text = await response.text();
  return text === "" ? null : JSON.parse(text);
};

const about = (id, action) => `sandboxes/${encodeURIComponent(id)}${action}`;

export const create = (wish) => act("POST", "v2/sandboxes", wish);
export const kill = (id) => act("DELETE", about(id, ""));
export const pause = (id) => act("POST", about(id, "/pause"));
export const resume = (id, timeout) => act("POST", about(id, "/resume"), { timeout });
export const snapshot = (id, name) => act("POST", about(id, "/snapshots"), name === "" ? {} : { name });
