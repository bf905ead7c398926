"""The daemon is killed a hundred times while clients work, at instants drawn from a printed seed.

Every client knows what was acknowledged to it. After each kill everything acknowledged is there; at
the end every snapshot is restored and compared, and nothing else is left. `MICA_E2E_SEED` replays the
draws (not the timing of the machine), `MICA_E2E_KILLS` makes it shorter or longer.
"""

import os
import random
import threading
import time
import traceback
import uuid

from conftest import PATIENCE_S, api, connect, lab, make, run, wait_until
from e2b import Sandbox
from inside import STORE, answers, at_rest, group_of, sandboxes, settled, state_of

SLOW = {"request_timeout": PATIENCE_S}

KILLS = int(os.environ.get("MICA_E2E_KILLS", "100"))
CLIENTS = 3
BOXES_PER_CLIENT = 2
SNAPSHOTS_PER_CLIENT = 4
VM_KILLS = 6

# How many answers a daemon gives before it dies, and how much longer it lives then: so that the load
# gets somewhere on a slow machine, and the instant still is anywhere in an operation.
ANSWERS = (0, 8)
LONGER_S = (0.0, 0.7)
LIFE_MAX_S = 20

# How often the next one is not even waited for, so that it dies while it takes over.
AT_ONCE = 0.15

# Words start with a number that grows. A command whose client was cut off may still run in the guest,
# later than the one that followed it: it takes its turn, and changes nothing any more.
TAKE_TURN = "exec 9>/tmp/turn; flock 9; "

# Keeps a word in its memory, and tells it. Asked for again, because the answer was lost, it stays the
# one keeper that there is: the pipe that is made last says that all is there.
KEEPER = TAKE_TURN + """
test -p /tmp/told && exit; rm -f /tmp/ask; mkfifo /tmp/ask
setsid sh -c 'exec 3<>/tmp/ask; while read -r verb value <&3; do
  [ "$verb" = set ] && word=$value; echo "$word" > /tmp/told; done' >/dev/null 2>&1 </dev/null 9>&- &
mkfifo /tmp/told
"""

WRITE = TAKE_TURN + """
new={word}; old=$(cat ~/word 2>/dev/null || echo 0)
if [ "${{new%%-*}}" -gt "${{old%%-*}}" ]; then
  echo $new > ~/word; echo set $new > /tmp/ask; cat /tmp/told
fi"""
READ = TAKE_TURN + "cat ~/word; echo get > /tmp/ask; cat /tmp/told"


class Unknown(Exception):
    """The connection broke: the request was done, or it was not."""


class Lost(AssertionError):
    """Something acknowledged is not there, or not what it was."""


def ask(method: str, path: str, body=None):
    """A request that is repeated while the host says that it will be possible soon."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            status, answer = api(method, path, body)
        except (OSError, ValueError) as error:
            raise Unknown(f"{method} {path}: {error}") from error
        busy = status == 503 or (status == 409 and "busy" in answer["message"])
        if not busy:
            return status, answer
        time.sleep(0.1)
    raise Lost(f"{method} {path} is refused for ever: {status} {answer}")


class Box:
    """A sandbox of a client's, and the word that is in its file and in its process's memory."""

    def __init__(self, sandbox: Sandbox, word: str):
        self.sandbox, self.word, self.paused = sandbox, word, False
        self.history: list[str] = []

    @property
    def id(self) -> str:
        return self.sandbox.sandbox_id


class World:
    """What was acknowledged, to all clients."""

    def __init__(self, template: str):
        self.template = template
        self.lock = threading.Lock()
        self.snapshots: dict[str, str] = {}
        self.boxes: set[str] = set()
        self.forgotten: set[str] = set()
        self.counts: dict[str, int] = {}
        self.answers = 0
        self.vm_kills = 0
        self.over = threading.Event()
        self.failures: list[str] = []

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def answered(self) -> None:
        with self.lock:
            self.answers += 1

    def forget(self, what: str) -> None:
        """Before it is asked to go: from now on it may be there or not."""
        with self.lock:
            self.snapshots.pop(what, None)
            self.boxes.discard(what)
            self.forgotten.add(what)

    def acknowledged(self) -> tuple[set[str], set[str]]:
        with self.lock:
            return set(self.boxes), set(self.snapshots)

    def is_all_there(self) -> None:
        boxes, snapshots = self.acknowledged()
        listed = set(sandboxes())
        status, kept = api("GET", "/snapshots?limit=100")
        assert status == 200
        with self.lock:
            forgotten = set(self.forgotten)
        lost = boxes - listed - forgotten
        lost |= snapshots - {entry["snapshotID"] for entry in kept} - forgotten
        if lost:
            raise Lost(f"acknowledged, and not there after a kill: {lost}")


def read(sandbox: Sandbox) -> str:
    """The word, from the file and from memory."""
    disk, memory = run(sandbox, READ).split()
    if disk != memory:
        raise Lost(f"{sandbox.sandbox_id}: on disk {disk}, in memory {memory}")
    return disk


def write(sandbox: Sandbox, word: str) -> None:
    told = run(sandbox, WRITE.format(word=word)).strip()
    if told != word:
        raise Lost(f"{sandbox.sandbox_id} was told {word}, and says {told!r}")


class Client(threading.Thread):
    """Works on sandboxes of its own, one request at a time."""

    def __init__(self, world: World, seed: int):
        super().__init__(daemon=True)
        self.world, self.random = world, random.Random(seed)
        self.boxes: list[Box] = []
        self.written = 0
        # By id: whose they are, and their word.
        self.snapshots: dict[str, tuple[str, str]] = {}

    def run(self) -> None:
        try:
            while not self.world.over.is_set():
                self.step()
        except Exception:  # what a thread ends with is the test's to tell
            self.world.failures.append(traceback.format_exc())
            self.world.over.set()

    def step(self) -> None:
        if len(self.boxes) < BOXES_PER_CLIENT:
            return self.create()
        box = self.random.choice(self.boxes)
        if box.paused:
            what = self.random.choices(["resume", "kill", "kill_vm"], [8, 1, 1])[0]
        else:
            names = ["write", "snapshot", "rollback", "pause", "kill", "kill_vm", "check"]
            what = self.random.choices(names, [4, 5, 4, 3, 1, 1, 2])[0]
        box.history.append(f"{time.monotonic():.2f} {what} at {box.word}")
        try:
            getattr(self, what)(box)
        except Lost as error:
            raise Lost(f"{error}\n" + "\n".join(box.history[-20:])) from error
        box.history.append(f"{time.monotonic():.2f}   then {box.word}, paused {box.paused}")
        self.world.count(what)
        self.world.answered()

    # Requests. Each ends with the client knowing what is true, however it went.

    def word(self) -> str:
        self.written += 1
        return f"{self.written}-{self.random.getrandbits(48):012x}"

    def again(self, doing):
        """Repeats what may be repeated until a daemon lives long enough."""
        while True:
            try:
                done = doing()
                self.world.answered()
                return done
            except Lost:
                raise
            except Exception as error:  # the SDK has many names for a connection that broke
                self.world.count(f"again after {type(error).__name__}")
                wait_until("a daemon answers", answers)

    def create(self) -> None:
        """From the template, or from a snapshot of this client's, whose word it must have."""
        kept = [(kept, word) for kept, (_, word) in self.snapshots.items()]
        template, word = self.random.choice([*kept, (self.world.template, "")])
        mark = uuid.uuid4().hex
        body = {"templateID": template, "timeout": 3600, "metadata": {"mark": mark}}
        try:
            status, made = ask("POST", "/v2/sandboxes", body)
        except Unknown:
            # Its id was never told. If it is there, it is of no use to anybody.
            self.world.count("create unknown")
            self.again(lambda: self.remove_marked(mark))
            return
        assert status == 201, (status, made)
        with self.world.lock:
            self.world.boxes.add(made["sandboxID"])
        box = Box(self.again(lambda: connect(made["sandboxID"])), word)
        if word:
            self.check(box)
            self.world.count("create from a snapshot")
        else:
            self.again(lambda: run(box.sandbox, KEEPER))
            self.write(box)
            self.world.count("create")
        self.boxes.append(box)

    def remove_marked(self, mark: str) -> None:
        status, listed = api("GET", f"/v2/sandboxes?state=running,paused&metadata=mark%3D{mark}")
        assert status == 200, listed
        for entry in listed:
            assert entry["metadata"]["mark"] == mark
            assert api("DELETE", f"/sandboxes/{entry['sandboxID']}")[0] in (204, 404)

    def write(self, box: Box) -> None:
        def new_word() -> str:
            word = self.word()
            box.history.append(f"{time.monotonic():.2f}   write {word}")
            write(box.sandbox, word)
            return word

        box.word = self.again(new_word)

    def check(self, box: Box) -> None:
        word = self.again(lambda: read(box.sandbox))
        if word != box.word:
            raise Lost(f"{box.id} says {word}, it was told {box.word}")

    def is_running(self, box: Box) -> None:
        """A paused word may be an operation of the last daemon's that is still being put right."""
        wait_until(f"{box.id} runs", lambda: self.again(lambda: self.state(box)) == "running")

    def state(self, box: Box) -> str:
        state = state_of(box.id)
        if state is None:
            raise Lost(f"{box.id} is gone")
        return state

    def snapshot(self, box: Box) -> None:
        if len(self.snapshots) >= SNAPSHOTS_PER_CLIENT:
            self.delete(self.random.choice(list(self.snapshots)))
        mark = uuid.uuid4().hex
        try:
            status, made = ask("POST", f"/sandboxes/{box.id}/snapshots", {"name": mark})
            assert status == 201, (status, made)
            kept = made["snapshotID"]
        except Unknown:
            self.world.count("snapshot unknown")
            status, listed = self.again(lambda: api("GET", f"/snapshots?name={mark}"))
            assert status == 200 and len(listed) <= 1, listed
            self.is_running(box)
            if not listed:
                return
            # It was committed, and only the answer was lost: then it is as good as any.
            self.world.count("snapshot committed, answer lost")
            kept = listed[0]["snapshotID"]
        self.snapshots[kept] = (box.id, box.word)
        with self.world.lock:
            self.world.snapshots[kept] = box.word

    def delete(self, kept: str) -> None:
        self.world.forget(kept)
        del self.snapshots[kept]
        status, body = self.again(lambda: ask("DELETE", f"/templates/{kept}"))
        assert status in (204, 404), (status, body)

    def rollback(self, box: Box) -> None:
        own = [(kept, word) for kept, (owner, word) in self.snapshots.items() if owner == box.id]
        if not own:
            return
        kept, word = self.random.choice(own)
        try:
            status, body = ask("POST", f"/sandboxes/{box.id}/rollback", {"snapshotID": kept})
            assert status == 200, (status, body)
            box.word = word
            self.check(box)
        except Unknown:
            self.world.count("rollback unknown")
            self.is_running(box)
            now = self.again(lambda: read(box.sandbox))
            if now not in (word, box.word):
                raise Lost(f"{box.id} says {now}, it was to go from {box.word} to {word}") from None
            box.word = now

    def pause(self, box: Box) -> None:
        try:
            status, body = ask("POST", f"/sandboxes/{box.id}/pause", {})
            assert status == 204, (status, body)
            if self.again(lambda: self.state(box)) != "paused":
                raise Lost(f"{box.id} was paused, and runs")
            box.paused = True
        except Unknown:
            self.world.count("pause unknown")
            box.paused = self.again(lambda: self.state(box)) == "paused"

    def resume(self, box: Box) -> None:
        if self.again(lambda: self.state(box)) != "paused":
            raise Lost(f"{box.id} was paused, and runs")
        try:
            status, body = ask("POST", f"/sandboxes/{box.id}/resume", {"timeout": 3600})
            assert status == 201, (status, body)
            box.paused = False
            self.check(box)
        except Unknown:
            self.world.count("resume unknown")
            box.paused = self.again(lambda: self.state(box)) == "paused"

    def kill(self, box: Box) -> None:
        self.world.forget(box.id)
        status, body = self.again(lambda: ask("DELETE", f"/sandboxes/{box.id}"))
        assert status in (204, 404), (status, body)
        self.boxes.remove(box)

    def kill_vm(self, box: Box) -> None:
        """SIGKILL of its VM process. It takes a running sandbox with it, and not a paused one."""
        with self.world.lock:
            if self.world.vm_kills >= VM_KILLS:
                return
            self.world.vm_kills += 1
        if not box.paused:
            self.world.forget(box.id)
        group = group_of(box.id)
        if group:
            lab(f"echo 1 > {group}/cgroup.kill || test ! -e {group}")
        if not box.paused:
            gone = lambda: self.again(lambda: state_of(box.id)) is None  # noqa: E731
            wait_until(f"{box.id} went with its process", gone)
            self.boxes.remove(box)



def killer(world: World, seed: int) -> None:
    """Kills the daemon again and again; the lab's supervisor starts the next. All acknowledged must be
    there each time that one answers."""
    draw = random.Random(seed)
    for number in range(KILLS):
        enough, end = world.answers + draw.randint(*ANSWERS), time.monotonic() + LIFE_MAX_S
        while world.answers < enough and time.monotonic() < end and not world.over.wait(0.01):
            pass
        if world.over.wait(draw.uniform(*LONGER_S)):
            return
        lab("kill -9 $(pgrep -of '[m]ica serve')")
        world.count("kill of the daemon")
        # Some die while they take over.
        if draw.random() < AT_ONCE:
            world.count("of them before it answered")
            continue
        wait_until(f"a daemon answers after kill {number}", answers)
        end = time.monotonic() + 60
        while True:
            try:
                world.is_all_there()
                break
            except OSError:
                # The daemon was not killed by anybody here: then it died by itself.
                if time.monotonic() > end:
                    raise


def restores(kept: str, word: str) -> None:
    copy = make(kept)
    try:
        if (now := read(copy)) != word:
            raise Lost(f"snapshot {kept} says {now}, it was {word}")
    finally:
        assert copy.kill(**SLOW) is True


def test_a_hundred_kills(tiny):
    seed = int(os.environ.get("MICA_E2E_SEED", random.SystemRandom().getrandbits(32)))
    print(f"seed {seed}: {KILLS} kills")
    # A daemon holds shells for the templates that there were when it started, and for those that it made
    # something of since: the one before may know some that are gone.
    lab("kill -9 $(pgrep -of '[m]ica serve')")
    wait_until("a daemon answers", answers)
    assert make(tiny).kill(**SLOW) is True
    before = at_rest()
    templates = set(lab(f"ls {STORE}/snapshots").split())
    world = World(tiny)
    clients = [Client(world, seed + number) for number in range(1, CLIENTS + 1)]
    begun = time.monotonic()
    for client in clients:
        client.start()
    try:
        killer(world, seed)
    finally:
        world.over.set()
        for client in clients:
            client.join(timeout=PATIENCE_S)
    print(f"{time.monotonic() - begun:.0f} s; {dict(sorted(world.counts.items()))}")
    for failure in world.failures:
        print(failure)
    assert not world.failures, f"{len(world.failures)} clients saw what must not be"
    assert not any(client.is_alive() for client in clients)
    assert world.counts["kill of the daemon"] == KILLS

    boxes = {box.id: box for client in clients for box in client.boxes}
    assert sandboxes() == {i: "paused" if box.paused else "running" for i, box in boxes.items()}
    # Snapshots that clients know, those that paused sandboxes wait in, and no others.
    on_disk = set(lab(f"ls {STORE}/snapshots").split()) - templates
    waiting = on_disk - set(world.snapshots)
    assert set(world.snapshots) <= on_disk
    assert len(waiting) == sum(box.paused for box in boxes.values()), waiting
    for box in boxes.values():
        if box.paused:
            box.sandbox.connect(timeout=3600, **SLOW)
        if (now := read(box.sandbox)) != box.word:
            raise Lost(f"{box.id} says {now}, it was told {box.word}")
        assert box.sandbox.kill(**SLOW) is True
    for kept, word in world.snapshots.items():
        restores(kept, word)
        assert Sandbox.delete_snapshot(kept, **SLOW) is True
    settled(before)
