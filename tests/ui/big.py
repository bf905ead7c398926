"""The answers of a large host that is not there: two nodes, 24 shards, as many sandboxes as asked for.

Used by test_big.py, which puts them in place of a daemon's: a thousand sandboxes are for the page to bear, and starting
them is other tests' matter. Refuses chance: the same numbers each time.
"""

import random

OPERATIONS = {
    "create": (4000, {"route": 40, "layers": 310, "pool": 25, "state": 420, "run": 160, "ready": 1900}),
    "restore": (900, {"route": 41, "layers": 350, "pool": 30, "state": 460, "run": 170, "ready": 2300}),
    "snapshot": (260, {"freeze": 350, "scan": 210, "copy": 1900, "write": 2600, "sync": 5200, "commit": 700}),
    "pause": (700, {"freeze": 330, "scan": 200, "copy": 1800, "write": 2400, "sync": 5000, "commit": 650}),
    "resume": (650, {"layers": 300, "pool": 20, "state": 400, "run": 150, "ready": 900}),
    "rollback": (30, {"freeze": 320, "plan": 240, "state": 380, "run": 140, "ready": 800}),
    "clone": (12, {"snapshot": 9000, "copies": 5200}),
    "kill": (4400, {}),
}
BOUNDS_US = [2**exponent / 1000 for exponent in range(13, 37)]


def spread(chance, middle_us, count):
    """So many times around a middle, in microseconds."""
    return [middle_us * chance.lognormvariate(0, 0.45) for _ in range(count)]


def quantile(times, share):
    return round(sorted(times)[min(len(times) - 1, int(share * len(times)))]) if times else None


def summary(times):
    return {f"p{share}_us": quantile(times, share / 100) for share in (50, 95, 99)}


def histogram(name, labels, times):
    text = ",".join(f'{key}="{value}"' for key, value in labels.items())
    for bound in BOUNDS_US:
        yield f'{name}_bucket{{{text},le="{bound / 1e6}"}} {sum(time <= bound for time in times)}'
    yield f'{name}_bucket{{{text},le="+Inf"}} {len(times)}'
    yield f"{name}_sum{{{text}}} {sum(times) / 1e6}"
    yield f"{name}_count{{{text}}} {len(times)}"


class BigHost:
    """What `GET /ui/state` and `GET /metrics` of such a host would say."""

    def __init__(self, sandboxes, shards=24, nodes=2):
        chance = random.Random(1)
        lines, found = [], []
        for shard in range(shards):
            node = shard * nodes // shards
            ops = {}
            for operation, (total, phases) in OPERATIONS.items():
                count = total // shards
                by_phase = {phase: spread(chance, middle, count) for phase, middle in phases.items()}
                whole = [sum(one) for one in zip(*by_phase.values())] if phases else spread(chance, 9000, count)
                labels = {"shard": shard, "node": node, "operation": operation}
                lines.append(f'mica_operations_total{{shard="{shard}",node="{node}",operation="{operation}",result="ok"}} {count}')
                lines += histogram("mica_operation_seconds", labels, whole)
                shown = {}
                for order, (phase, times) in enumerate(by_phase.items()):
                    lines += histogram("mica_operation_phase_seconds", labels | {"phase": phase}, times)
                    shown[phase] = {"order": order} | summary(times)
                ops[operation] = {"count": count, "errors": 0, "phases": shown} | summary(whole)
            found.append(self.shard(chance, shard, node, ops, sandboxes // shards))
        self.metrics = "\n".join(lines) + "\n"
        gib = 2**30
        self.host = {
            "version": "0.1.0", "uptime_s": 86_400.0 * 3 + 7260, "kernel": "6.12.9", "metrics": True, "shards": found,
            "nodes": [
                {"node": node, "memory_bytes": 512 * gib, "free_bytes": (190 + 120 * node) * gib, "vcpus": 72}
                for node in range(nodes)
            ],
        }
        self.sandboxes = [self.sandbox(chance, number, shards, nodes) for number in range(sandboxes)]

    @staticmethod
    def shard(chance, shard, node, ops, sandboxes):
        return {
            "shard": shard, "node": node, "core": shard + 2, "busy_fraction": min(1.0, chance.betavariate(1.6, 4)),
            "mailbox_depth": chance.choice([0, 0, 0, 0, 1, 3]), "sandboxes": sandboxes, "ops": ops,
            "pool": {"depth": chance.randint(2, 8), "hits": 160 + chance.randint(0, 40), "misses": chance.randint(0, 6)},
        }

    @staticmethod
    def sandbox(chance, number, shards, nodes):
        paused = chance.random() < 0.2
        shard = number % shards
        return {
            "id": f"i{number:04d}{chance.getrandbits(75):016x}"[:20].ljust(20, "0") + "z", "template": chance.choice(["base", "code-interpreter-v1"]),
            "tenant": "default" if number % 3 else "acme", "state": "paused" if paused else "running", "shard": shard,
            "node": shard * nodes // shards, "started_at": f"2026-11-2{number % 5}T{number % 24:02d}:{number % 60:02d}:00Z",
            "memory_bytes": None if paused else int(chance.lognormvariate(18, 0.7)),
            "cpu": None if paused else round(chance.expovariate(4), 3),
            "wrong_node_pages": None if paused else chance.choice([0] * 9 + [chance.randint(1, 4000)]),
            "wrong_node_cpu_s": None if paused else chance.choice([0] * 9 + [round(chance.expovariate(0.1), 3)]),
        }

    def state(self, limit, token):
        """A page, and the token of the next."""
        start = int(token or 0)
        page = self.sandboxes[start : start + limit]
        following = start + limit if start + limit < len(self.sandboxes) else None
        return {"host": self.host, "sandboxes": page, "sandboxes_total": len(self.sandboxes)}, following
