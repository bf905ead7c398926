"""Files where only root may make, read or remove them, by the default user, and whose they are then.

Called by features.py. Refuses to leave anything behind at the root of a disk.
"""

from cells import ISOLATED, PATIENCE_S, unique

SLOW = {"request_timeout": PATIENCE_S}


def check_owners(sandbox, user, write):
    """E2B works on files as root and gives what it makes to the user. `write` is as the client has it."""
    # The root of the stand-in's disk is that of this machine.
    where = f"/{unique('matrix')}" if ISOLATED else f"/tmp/{unique('matrix')}"
    files = sandbox.files

    def run(command, **options):
        return sandbox.commands.run(command, timeout=PATIENCE_S, **SLOW, **options).stdout

    write(sandbox, f"{where}/deep/a.txt", "a")
    assert files.make_dir(f"{where}/made/below", **SLOW) is True
    made = [where, *(f"{where}/{path}" for path in ("deep", "deep/a.txt", "made", "made/below"))]
    owners = run(f"stat -c %U:%G {' '.join(made)}").split()
    assert owners == [f"{user}:{user}"] * len(made), owners

    run(f"chown -R root:root {where}; chmod 700 {where}; chmod 600 {where}/deep/a.txt", user="root")
    assert files.read(f"{where}/deep/a.txt", **SLOW) == "a"
    assert sorted(entry.name for entry in files.list(where, **SLOW)) == ["deep", "made"]
    assert files.rename(f"{where}/deep/a.txt", f"{where}/b.txt", **SLOW).path == f"{where}/b.txt"
    mode = f"stat -c '%U %a' {where}/b.txt"
    assert run(mode, user="root") == "root 600\n", "a file that is moved stays whose it was"
    write(sandbox, f"{where}/b.txt", "b")
    assert run(mode, user="root") == f"{user} 600\n", "and is the user's when the user has written it"
    files.remove(where, **SLOW)
    assert files.exists(where, **SLOW) is False
