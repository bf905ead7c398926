// What was seen since the page was opened, for the charts: no more than the last ten minutes. Used by app.js.
// Pure but for what it keeps.

const KEPT_MS = 10 * 60_000;
const KEPT_MAX = 600;
const RECENT_MS = 5 * 60_000;

const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);

export function makes(shards) {
  return sum(shards, (shard) => (shard.ops.create?.count ?? 0) + (shard.ops.restore?.count ?? 0));
}

export class History {
  points = [];
  looks = [];

  clear() {
    this.points.length = 0;
    this.looks.length = 0;
  }

  // A state of the host, at `time`.
  add(time, host, sandboxes) {
    const last = this.points.at(-1);
    // A new daemon counts from nothing.
    if (last !== undefined && host.uptime_s < last.uptime) this.clear();
    const before = this.points.at(-1);
    const made = makes(host.shards);
    const seconds = before === undefined ? 0 : (time - before.time) / 1000;
    this.points.push({
      time,
      uptime: host.uptime_s,
      made,
      rate: seconds > 0 ? Math.max(0, made - before.made) / seconds : null,
      used: sum(host.nodes, (node) => (node.memory_bytes ?? 0) - (node.free_bytes ?? 0)),
      sandboxes: sum(sandboxes, (one) => one.memory_bytes ?? 0),
    });
    while (this.points.length > KEPT_MAX || this.points[0].time < time - KEPT_MS) this.points.shift();
  }

  // What operations had come to, at `time`.
  addOperations(time, operations) {
    this.looks.push({ time, operations });
    // One that is older than what is recent stays, to count from.
    while (this.looks.length > 2 && this.looks[1].time < time - RECENT_MS) this.looks.shift();
  }

  // The look that recent operations are counted from.
  before() {
    return this.looks[0]?.operations;
  }
}
