"""Runs every client through every feature, each client in its own process, and prints the table.

    matrix.py --standin target/mica [--fast]     a daemon with the stand-in VM, started here
    matrix.py --url URL --api-key KEY            a host with real guests
    … --only CLIENT,CLIENT --features a,b --json FILE

Started by `make test` (--fast, stand-in) and tools/test-clients. The exit code is 1 if any cell failed. A
process that dies or hangs in one cell loses that cell: another goes on with the rest.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import tomllib

import environments
import report
import standin

HERE = pathlib.Path(__file__).parent
# The end of what a process said, for a failed cell.
SAID_CHARS = 2000


class Host:
    """What clients need to know of a host."""

    def __init__(self, url, api_key, isolated, patience_s, domain=None, ca=None):
        self.url, self.api_key, self.isolated = url, api_key, isolated
        self.patience_s, self.domain, self.ca = patience_s, domain, ca

    def unreachable(self, client):
        """Why this client cannot reach it, if it cannot."""
        if client["reach"] == "domain" and not (self.domain and self.ca):
            return "this client needs TLS (E2B_DOMAIN), and the host was started without a certificate"
        return None

    def variables(self, client):
        """The environment of a client's process. Nothing of ours that would steer a client is passed on."""
        kept = ("PATH", "HOME", "LANG", "TMPDIR")
        variables = {name: os.environ[name] for name in kept if name in os.environ}
        variables |= {
            "MICA_CLIENTS_CLIENT": client["name"],
            "MICA_CLIENTS_TEMPLATE": client["template"],
            "MICA_CLIENTS_PACKAGE": client.get("package", ""),
            "MICA_CLIENTS_ISOLATED": "1" if self.isolated else "0",
            "MICA_CLIENTS_PATIENCE_S": str(self.patience_s),
            "PYTHONUNBUFFERED": "1",
        }
        if client["reach"] == "url":
            return variables | {
                "E2B_API_URL": self.url,
                "E2B_SANDBOX_URL": self.url,
                "E2B_API_KEY": self.api_key,
            }
        if client["reach"] == "domain":
            return variables | {
                "E2B_DOMAIN": self.domain,
                "E2B_API_KEY": self.api_key,
                "SSL_CERT_FILE": str(self.ca),
                "NODE_EXTRA_CA_CERTS": str(self.ca),
                "PYTHONPATH": str(HERE / "resolve"),
            }
        host, port = self.url.removeprefix("http://").split(":")
        return variables | {
            "CUBE_API_URL": self.url,
            "CUBE_API_KEY": self.api_key,
            "CUBE_TEMPLATE_ID": client["template"],
            "CUBE_PROXY_NODE_IP": host,
            "CUBE_PROXY_PORT_HTTP": port,
        }


def read_cells(path):
    """Cells by feature; of a feature that was begun and not ended, the beginning."""
    cells = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            # It is being written.
            break
        cell = json.loads(line)
        cells[cell.pop("feature")] = cell
    return cells


def wait_for(process, path, limit_s, told):
    """How the process ended, or that it came no further."""
    progress, since = 0, time.monotonic()
    while True:
        try:
            return f"the process ended with {process.wait(timeout=0.2)}"
        except subprocess.TimeoutExpired:
            size = path.stat().st_size
            if size != progress:
                progress, since = size, time.monotonic()
                told(read_cells(path))
            if time.monotonic() - since > limit_s:
                return f"no progress for {limit_s:.0f} s"


def run_process(words, cwd, variables, features, limit_s, told):
    """One process over `features`: its cells, and how it ended. Killed when a cell takes too long. What there
    is so far goes to `told`."""
    with tempfile.TemporaryDirectory() as scratch:
        path, said_path = pathlib.Path(scratch) / "cells", pathlib.Path(scratch) / "said"
        path.touch()
        with said_path.open("w") as said:
            process = subprocess.Popen(
                [*map(str, words), ",".join(features)],
                cwd=cwd,
                env=variables | {"MICA_CELLS": str(path)},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            ended = wait_for(process, path, limit_s, told)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return read_cells(path), f"{ended}\n{said_path.read_text(errors='replace')[-SAID_CHARS:]}"


def run_client(words, cwd, variables, features, limit_s, told=lambda cells: None):
    """All cells of a client, in as many processes as it takes."""
    cells, left = {}, list(features)
    while left:
        new, ended = run_process(words, cwd, variables, left, limit_s, told)
        for name, cell in new.items():
            if cell["status"] == "begun":
                cell = {"status": "fail", "reason": ended.splitlines()[0], "detail": ended}
            cells[name] = cell
        if not new:
            # It did not come as far as a feature, and will not the next time.
            cells |= {name: {"status": "fail", "reason": f"the client did not start: {ended}"} for name in left}
        left = [name for name in left if name not in cells]
    return cells


def teller(client):
    """Says of every cell that is done what came of it."""
    said = set()

    def told(cells):
        for name, cell in cells.items():
            if cell["status"] != "begun" and name not in said:
                said.add(name)
                print(f"  {client}: {name}: {cell['status']}, {cell['seconds']} s", file=sys.stderr, flush=True)

    return told


def earlier(path):
    """The rows of another run, which this one's are added to."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path else []


def run_matrix(host_of, clients, features, verbose, json_file, rows=()):
    """The rows of the table, behind those of before. Those that are done are written while the others run."""
    rows = list(rows)
    for client in clients:
        begun = time.monotonic()
        host = host_of(client)
        unreachable = host.unreachable(client) if host else None
        if host is None:
            reason = "the client sends no key, and the host wants one; see `mica serve --open`"
            cells = {name: {"status": "absent", "reason": reason} for name in features}
        elif unreachable:
            cells = {name: {"status": "fail", "reason": unreachable} for name in features}
        else:
            words, cwd = environments.command(client)
            told = teller(client["name"]) if verbose else lambda cells: None
            cells = run_client(words, cwd, host.variables(client), features, 2 * host.patience_s, told)
        row = report.complete(client["name"], features, cells)
        failed = [name for name, cell in row["cells"].items() if cell["status"] == "fail"]
        print(f"{client['name']}: {time.monotonic() - begun:.0f} s, failed: {', '.join(failed) or 'none'}", flush=True)
        rows.append(row)
        if json_file:
            found = {"rows": rows}
            json_file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return rows


def standin_hosts(stack, args):
    """Which daemon a client gets: the one, or, when it sends no key, another that asks for none."""
    started = {}

    def host_of(client):
        keyless = client.get("keyless", False)
        daemon = standin.Daemon(args.standin, keyless)
        if keyless and not daemon.can("--open"):
            return None
        if keyless not in started:
            stack.enter_context(daemon)
            started[keyless] = Host(daemon.url, daemon.api_key, False, args.patience, daemon.domain, daemon.ca)
        return started[keyless]

    return host_of


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--standin", type=pathlib.Path, help="folder of the programs; starts a daemon")
    parser.add_argument("--url", help="a host that runs: http://ADDRESS:PORT")
    parser.add_argument("--api-key")
    parser.add_argument("--domain", help="the domain that the host serves with TLS, with its port")
    parser.add_argument("--ca", type=pathlib.Path, help="the certificate that clients are to trust")
    parser.add_argument("--patience", type=int, default=60, help="seconds that a request may take")
    parser.add_argument("--fast", action="store_true", help="only the clients marked so")
    parser.add_argument("--keyless", action="store_true", help="the host at --url is open: clients that send no key")
    parser.add_argument("--rows", type=pathlib.Path, help="results of another run (its --json), to be shown with these")
    parser.add_argument("--only", help="clients, separated by commas")
    parser.add_argument("--features", help="features, separated by commas")
    parser.add_argument("--verbose", action="store_true", help="say of every cell when it is done")
    parser.add_argument("--json", type=pathlib.Path, help="write the results there")
    return parser.parse_args()


def chosen(wanted, known, what):
    """`known` without what is not wanted; an unknown wish is an error."""
    if not wanted:
        return known
    wishes = wanted.split(",")
    for wish in wishes:
        if wish not in known:
            sys.exit(f"there is no {what} {wish!r}; there are: {', '.join(known)}")
    return {name: value for name, value in known.items() if name in wishes}


def main():
    # Being told to end is no reason to leave a daemon behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    args = arguments()
    listed = tomllib.loads((HERE / "clients.toml").read_text(encoding="utf-8"))
    clients = {client["name"]: client for client in listed["client"]}
    clients = chosen(args.only, clients, "client")
    if args.fast:
        clients = {name: client for name, client in clients.items() if client.get("fast")}
    features = chosen(args.features, listed["features"], "feature")
    with contextlib.ExitStack() as stack:
        if args.standin:
            host_of = standin_hosts(stack, args)
        else:
            # One host either asks for keys or it does not.
            clients = {name: client for name, client in clients.items() if client.get("keyless", False) == args.keyless}
            host = Host(args.url, args.api_key or "none", True, args.patience, args.domain, args.ca)

            def host_of(_client):
                return host

        rows = run_matrix(host_of, clients.values(), features, args.verbose, args.json, earlier(args.rows))
    print("\n" + report.table(rows, features))
    failed = report.failures(rows)
    print(report.details(failed))
    print(f"\n{len(failed)} of {len(rows) * len(features)} cells failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
