// From the text of `GET /metrics` to what operations came to, over all shards. Used by app.js. Pure.

const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { n: "\n", "\\": "\\", '"': '"' };

function labelsOf(text) {
  const labels = {};
  for (const [, name, value] of text.matchAll(LABEL)) {
    labels[name] = value.replace(/\\(.)/g, (_, escaped) => ESCAPES[escaped] ?? escaped);
  }
  return labels;
}

const empty = () => ({ buckets: new Map(), count: 0, sum: 0 });
const nothing = () => ({ ok: 0, error: 0, refused: 0, total: empty(), phases: new Map() });

function add(histogram, suffix, labels, value) {
  if (suffix === "count") histogram.count += value;
  else if (suffix === "sum") histogram.sum += value;
  else {
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    histogram.buckets.set(bound, (histogram.buckets.get(bound) ?? 0) + value);
  }
}

// By name, in the order of the text: each with its counts, its times, and those of its phases.
export function operations(text) {
  const found = new Map();
  const of = (labels) => {
    if (!found.has(labels.operation)) found.set(labels.operation, nothing());
    return found.get(labels.operation);
  };
  for (const line of text.split("\n")) {
    if (!line.startsWith("mica_operation")) continue;
    const [open, close] = [line.indexOf("{"), line.lastIndexOf("}")];
    const name = line.slice(0, open);
    const labels = labelsOf(line.slice(open + 1, close));
    const value = Number(line.slice(close + 2));
    if (name === "mica_operations_total") {
      of(labels)[labels.result] += value;
      continue;
    }
    const [, phase, suffix] = /^mica_operation_(phase_)?seconds_(bucket|sum|count)$/.exec(name) ?? [];
    if (suffix === undefined) continue;
    if (phase === undefined) {
      add(of(labels).total, suffix, labels, value);
      continue;
    }
    const { phases } = of(labels);
    if (!phases.has(labels.phase)) phases.set(labels.phase, empty());
    add(phases.get(labels.phase), suffix, labels, value);
  }
  return found;
}

function less(histogram, before) {
  const buckets = new Map();
  for (const [bound, below] of histogram.buckets) buckets.set(bound, below - (before?.buckets.get(bound) ?? 0));
  return { buckets, count: histogram.count - (before?.count ?? 0), sum: histogram.sum - (before?.sum ?? 0) };
}

// What happened between two looks. Null when the counters began anew in between.
export function between(now, before) {
  const result = new Map();
  for (const [name, operation] of now) {
    const old = before.get(name);
    const phases = new Map();
    for (const [phase, histogram] of operation.phases) phases.set(phase, less(histogram, old?.phases.get(phase)));
    const rise = (what) => operation[what] - (old?.[what] ?? 0);
    const one = { ok: rise("ok"), error: rise("error"), refused: rise("refused"), total: less(operation.total, old?.total), phases };
    if (one.ok < 0 || one.error < 0 || one.refused < 0) return null;
    result.set(name, one);
  }
  return result;
}

// The buckets apart: [{low, high, count}], in seconds, those that hold nothing included.
export function bins(histogram) {
  const result = [];
  let [low, before] = [0, 0];
  for (const [high, below] of [...histogram.buckets].sort(([a], [b]) => a - b)) {
    result.push({ low, high, count: below - before });
    [low, before] = [high, below];
  }
  return result;
}

// The time that this share did not exceed, read off the buckets on the scale that they are spaced by. `known`
// are the quantiles of the parts it is made of, which are finer: it lies between the least and the greatest.
export function quantile(histogram, share, known = []) {
  if (histogram.count === 0) return null;
  const wanted = share * histogram.count;
  let [below, value] = [0, null];
  for (const { low, high, count } of bins(histogram)) {
    if (count > 0 && below + count >= wanted) {
      const part = (wanted - below) / count;
      const from = low === 0 ? high / 2 : low;
      value = high === Infinity ? low : from * (high / from) ** part;
      break;
    }
    below += count;
  }
  const parts = known.filter((one) => one !== null && one !== undefined);
  if (value === null || parts.length === 0) return value;
  return Math.min(Math.max(value, Math.min(...parts)), Math.max(...parts));
}

export const mean = (histogram) => (histogram.count === 0 ? null : histogram.sum / histogram.count);
