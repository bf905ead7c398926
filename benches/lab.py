"""Times every operation through HTTP in the lab, and a cold boot of the same guest.

Called by tools/bench-lab, with the name of a JSON file or nothing. The cold boot is the one that makes
a template's running snapshot: from the first instruction of the kernel to the agent's word that it is
up, as the command's log has it. The host's own clock is used for it, and this machine's for the rest.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime

MICA = os.path.join(os.environ["MICA_BIN_DIR"], "mica")
NAME = "bench-lab"
PATIENCE_S = 600
ROUNDS = int(os.environ.get("MICA_BENCH_ROUNDS", "10"))


def lab(script: str) -> str:
    done = subprocess.run(
        [MICA, "lab", "exec", "--", "sh", "-euc", script],
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"in the lab: {script}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def api(method: str, path: str, body=None, expect: int = 200):
    request = urllib.request.Request(
        os.environ["E2B_API_URL"] + path,
        data=None if body is None else json.dumps(body).encode(),
        method=method,
        headers={"X-API-Key": os.environ["E2B_API_KEY"], "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    if status != expect:
        raise SystemExit(f"{method} {path}: {status} {text.decode()}")
    return json.loads(text) if text else None


def cold_boot_s() -> float:
    """Makes a template of `base`'s parts. It has to boot once."""
    listed = lab("mica template list --json")
    names = {entry["name"]: entry["templateId"] for entry in json.loads(listed)}
    if NAME in names:
        lab(f"mica template delete {NAME}")
    parts = f"/var/lib/mica/templates/{names['base']}"
    log = lab(
        f"NO_COLOR=1 mica template add --name {NAME} --kernel {parts}/kernel "
        f"--initramfs {parts}/initramfs --disk {parts}/disk --ready agent --vcpus 2 --memory 1024"
    )

    def at(word: str) -> float:
        line = next(line for line in log.splitlines() if word in line)
        stamp = re.search(r"\d{4}-\d\d-\d\dT[\d:.]+", line)
        if stamp is None:
            raise SystemExit(f"no time in: {line}")
        return datetime.fromisoformat(stamp.group()).timestamp()

    return at("warming up") - at("booting")


class Table:
    """Times of each operation, in the order in which they were first made."""

    def __init__(self):
        self.times: dict[str, list[float]] = {}

    def time(self, op: str, method: str, path: str, body=None, expect: int = 200):
        begun = time.monotonic()
        answer = api(method, path, body, expect)
        self.times.setdefault(op, []).append((time.monotonic() - begun) * 1000)
        return answer

    def results(self) -> list[dict]:
        def row(op: str, times: list[float]) -> dict:
            ordered = sorted(times)
            return {
                "op": op,
                "n": len(ordered),
                "p50_ms": round(statistics.median(ordered), 1),
                "max_ms": round(ordered[-1], 1),
            }

        return [row(op, times) for op, times in self.times.items()]


def round_trip(table: Table) -> None:
    made = table.time("create", "POST", "/v2/sandboxes", {"templateID": NAME, "timeout": 3600}, 201)
    path = f"/sandboxes/{made['sandboxID']}"
    first = table.time("snapshot", "POST", f"{path}/snapshots", {}, 201)["snapshotID"]
    second = table.time("snapshot, the next", "POST", f"{path}/snapshots", {}, 201)["snapshotID"]
    table.time("rollback", "POST", f"{path}/rollback", {"snapshotID": first})
    table.time("pause", "POST", f"{path}/pause", {}, 204)
    table.time("resume", "POST", f"{path}/resume", {"timeout": 3600}, 201)
    copies = table.time("clone, one", "POST", f"{path}/clone", {"count": 1}, 201)
    copy = table.time(
        "create from a snapshot", "POST", "/v2/sandboxes", {"templateID": second, "timeout": 3600}, 201
    )
    for sandbox in [*copies, copy, made]:
        table.time("kill", "DELETE", f"/sandboxes/{sandbox['sandboxID']}", expect=204)
    for snapshot in (first, second):
        table.time("delete a snapshot", "DELETE", f"/templates/{snapshot}", expect=204)


def main() -> None:
    boot_ms = cold_boot_s() * 1000
    # The first create of a size finds no process ready.
    warm_up, table = Table(), Table()
    round_trip(warm_up)
    for _ in range(ROUNDS):
        round_trip(table)
    lab(f"mica template delete {NAME}")
    results = table.results()
    create_ms = next(row["p50_ms"] for row in results if row["op"] == "create")
    ratio = boot_ms / create_ms
    print(f"{'operation, through HTTP':<26} {'n':>3} {'p50 ms':>9} {'max ms':>9}")
    for row in results:
        print(f"{row['op']:<26} {row['n']:>3} {row['p50_ms']:>9.1f} {row['max_ms']:>9.1f}")
    print(f"{'cold boot of the guest':<26} {1:>3} {boot_ms:>9.1f} {boot_ms:>9.1f}")
    print(f"a create is {ratio:.0f} times faster than a cold boot")
    if len(sys.argv) > 1 and sys.argv[1]:
        told = {
            "host": {"kind": "lab", "vcpus": 2, "memory_mib": 1024, "kernel": lab("uname -r").strip()},
            "cold_boot_ms": round(boot_ms, 1),
            "ratio_cold_boot_to_create": round(ratio, 1),
            "results": results,
        }
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(told, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
