"""The table client × feature, and what is wrong with it.

Used by matrix.py. Pure. Refuses a cell that is empty: every one passed, failed with what was seen, or has a
reason beside it.
"""


def complete(client, features, cells):
    """The client's cells, each with a status; what is missing, or absent without a reason, is a failure."""
    whole = {}
    for feature in features:
        cell = dict(cells.get(feature) or {"status": "fail", "reason": "the run left this cell out"})
        if cell["status"] == "absent" and not cell.get("reason"):
            cell = {"status": "fail", "reason": "absent without a reason"}
        if cell["status"] not in ("pass", "absent", "fail"):
            cell = {"status": "fail", "reason": f"the process ended in {cell['status']!r}"}
        whole[feature] = cell
    return {"client": client, "cells": whole}


def failures(rows):
    """Every failed cell, as (client, feature, cell)."""
    return [
        (row["client"], feature, cell)
        for row in rows
        for feature, cell in row["cells"].items()
        if cell["status"] == "fail"
    ]


def table(rows, features):
    """Markdown: a line for each feature, a column for each client, and the reasons below."""
    reasons = {}

    def shown(cell):
        if cell["status"] == "pass":
            return "yes"
        if cell["status"] == "fail":
            return "**FAIL**"
        number = reasons.setdefault(cell["reason"], len(reasons) + 1)
        return f"– ({number})"

    lines = ["| | " + " | ".join(row["client"] for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for feature, title in features.items():
        cells = " | ".join(shown(row["cells"][feature]) for row in rows)
        lines.append(f"| {title} | {cells} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines)


def details(failed):
    """What was seen in each failed cell; cells of a client with one reason are told together."""
    together = {}
    for client, feature, cell in failed:
        told = together.setdefault((client, cell["reason"]), ([], cell.get("detail", "")))
        told[0].append(feature)
    return "\n".join(
        f"\n=== {client}: {', '.join(features)}: {reason}\n{detail}"
        for (client, reason), (features, detail) in together.items()
    )
