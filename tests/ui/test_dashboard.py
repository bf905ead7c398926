"""The dashboard in a browser, against a daemon with the stand-in VM: what it shows is what the API says, and its
buttons do what they say.
"""

import json
import re
import time
import urllib.error
import urllib.request
from collections import defaultdict

import pytest

HOSTILE = "<img src=x onerror=\"document.title='taken'\">"


def table_states(page):
    rows = page.locator("[data-sandbox]")
    return {row.get_attribute("data-sandbox"): row.locator(".badge").text_content() for row in rows.all()}


def eventually(what, holds, patience_s=30):
    end = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < end, f"not yet after {patience_s} s: {what}"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def nothing_is_left(host):
    yield
    host.kill_all()


def test_files_need_no_key_and_carry_the_policy(host):
    def get(path, **headers):
        try:
            return urllib.request.urlopen(urllib.request.Request(f"{host.url}{path}", headers=headers), timeout=30)
        except urllib.error.HTTPError as error:
            return error

    page = get("/ui")
    assert page.url == f"{host.url}/ui/" and page.status == 200, "the slash is added"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cache-control"] == "no-cache"
    assert get("/ui/", **{"If-None-Match": page.headers["etag"]}).status == 304
    assert get("/ui/app.js").headers["content-type"].startswith("text/javascript")
    assert get("/ui/state").status == 401 and get("/ui/nothing.js").status == 404


def test_the_page_loads_with_what_the_host_has(tab, host):
    made = {host.create() for _ in range(2)}
    one = tab()
    page = one.open(host, host.key)
    eventually("the table has them", lambda: set(table_states(page)) == made)
    state = host.ask("GET", "ui/state")
    assert page.locator("[data-node]").count() == len(state["host"]["nodes"])
    assert page.locator("[data-shard]").count() == len(state["host"]["shards"]) == 2
    assert page.locator("[data-tile=sandboxes] .value").text_content() == "2"
    assert state["host"]["kernel"] in page.locator("#host").text_content()
    for shard in state["host"]["shards"]:
        cell = page.locator(f"[data-shard='{shard['shard']}']")
        cell.focus()
        assert f"Shard {shard['shard']}" in page.locator("#shard-detail h3").text_content()
        assert f"core {shard['core']}" in page.locator("#shard-detail").text_content()
    # A reload keeps the key: it is asked for once in a tab.
    page.reload()
    page.wait_for_selector(".live[data-is=on]")
    assert page.locator("dialog").count() == 0
    assert one.errors == []


def test_a_wrong_key_is_told_and_kept_nowhere(tab, host):
    one = tab()
    page = one.open(host)
    page.fill("#key", "e2b_0000000000000000000000000000000000000000")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog .error:has-text('not valid here')")
    assert page.evaluate("Object.keys(sessionStorage).length + Object.keys(localStorage).length") == 0
    assert page.locator("[data-shard]").count() == 0 and page.locator("[data-sandbox]").count() == 0
    page.fill("#key", host.key)
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-shard]")
    page.click("#sign-out")
    page.wait_for_selector("#key")
    assert page.evaluate("sessionStorage.length") == 0
    assert page.locator("[data-shard]").count() == 0, "nothing of the host is left"
    # One that is kept and no longer valid is asked for anew.
    page.evaluate("sessionStorage.setItem('mica-key', 'e2b_00')")
    page.reload()
    page.wait_for_selector("dialog .error:has-text('not valid here')")
    assert page.evaluate("sessionStorage.length") == 0
    assert all("401" in error for error in one.errors), one.errors


def test_buttons_create_pause_resume_snapshot_and_kill(tab, host):
    one = tab()
    page = one.open(host, host.key)
    page.wait_for_selector(".empty:has-text('No sandboxes yet')")
    page.click("#create")
    page.fill("#template", "base")
    page.fill("#metadata", "owner=somebody")
    page.click("dialog button[type=submit]")
    page.wait_for_selector("[data-sandbox]")
    (sandbox,) = host.states()
    assert host.ask("GET", f"sandboxes/{sandbox}")["metadata"] == {"owner": "somebody"}
    row = f"[data-sandbox='{sandbox}']"

    def press(action, state):
        page.click(f"{row} [data-action={action}]")
        page.click("dialog button[type=submit]")
        page.wait_for_selector(f"{row} .badge[data-is={state}]")

    press("pause", "paused")
    assert host.states() == {sandbox: "paused"}
    assert page.locator(f"{row} [data-action=snapshot]").is_hidden()
    press("resume", "running")
    assert host.states() == {sandbox: "running"}
    page.click(f"{row} [data-action=snapshot]")
    page.fill("dialog #name", "from-the-page")
    page.click("dialog button[type=submit]")
    page.wait_for_selector(".toast:has-text('Snapshot')")
    (snapshot,) = host.ask("GET", f"snapshots?sandboxID={sandbox}")
    assert snapshot["snapshotID"] in page.locator(".toast:has-text('Snapshot')").text_content()
    assert "from-the-page" in json.dumps(snapshot["names"])
    # What is not confirmed is not done.
    page.click(f"{row} [data-action=kill]")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    assert host.states() == {sandbox: "running"}
    page.click(f"{row} [data-action=kill]")
    page.click("dialog button[type=submit]")
    page.wait_for_selector(row, state="detached")
    assert host.states() == {}
    assert one.errors == []


def test_what_the_host_refuses_is_told_in_the_dialog(tab, host):
    one = tab()
    page = one.open(host, host.key)
    page.click("#create")
    page.fill("#template", "no-such-template")
    page.click("dialog button[type=submit]")
    page.wait_for_selector("dialog .error:has-text('no-such-template')")
    page.fill("#metadata", "no equals sign")
    page.click("dialog button[type=submit]")
    page.wait_for_selector("dialog .error:has-text('name=value')")
    sandbox = host.create()
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    page.click(f"[data-sandbox='{sandbox}'] [data-action=kill]")
    host.ask("DELETE", f"sandboxes/{sandbox}")
    page.click("dialog button[type=submit]")
    page.wait_for_selector(f"dialog .error:has-text('{sandbox}')")
    assert all("404" in error for error in one.errors), one.errors


def test_text_of_a_sandbox_stays_text(tab, host):
    sandbox = host.create(metadata={HOSTILE: HOSTILE})
    one = tab()
    page = one.open(host, host.key)
    page.fill("#filter", HOSTILE)
    page.wait_for_selector(".empty:has-text('No sandbox is like that')")
    page.fill("#filter", sandbox)
    page.click(f"[data-sandbox='{sandbox}'] .id")
    page.wait_for_selector(".metadata dd")
    assert page.locator(".metadata dd").text_content() == HOSTILE
    assert page.locator(".metadata dt").text_content() == HOSTILE
    assert page.locator("img").count() == 0 and page.title() == "Mica"
    assert one.errors == []


def test_the_log_of_a_sandbox_is_the_apis(tab, host):
    sandbox = host.create()
    host.ask("POST", f"sandboxes/{sandbox}/pause")
    one = tab()
    page = one.open(host, host.key)
    page.click(f"[data-sandbox='{sandbox}'] .id")
    page.wait_for_selector(".log .line")
    said = [line["message"] for line in host.ask("GET", f"v2/sandboxes/{sandbox}/logs")["logs"]]
    shown = [line.text_content() for line in page.locator(".log .line > span:last-child").all()]
    assert shown == said and said
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    assert one.errors == []


def expected(text):
    """Of `GET /metrics`, over all shards: counts by operation and result, and mean times of phases."""
    counts, sums = defaultdict(int), defaultdict(lambda: [0.0, 0])
    for line in text.splitlines():
        if not line.startswith("mica_operation"):
            continue
        name, labels, value = re.match(r"(\w+)\{(.*)\} (.*)", line).groups()
        labels = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if name == "mica_operations_total":
            counts[labels["operation"], labels["result"]] += int(value)
        elif name == "mica_operation_phase_seconds_sum":
            sums[labels["operation"], labels["phase"]][0] += float(value)
        elif name == "mica_operation_phase_seconds_count":
            sums[labels["operation"], labels["phase"]][1] += int(value)
    return counts, {key: total / count * 1e6 for key, (total, count) in sums.items() if count}


def test_counts_and_phases_are_those_of_the_metrics(tab, host):
    first, second = host.create(), host.create()
    host.ask("POST", f"sandboxes/{first}/pause")
    host.ask("POST", f"sandboxes/{first}/resume", {"timeout": 300})
    snapshot = host.ask("POST", f"sandboxes/{second}/snapshots")["snapshotID"]
    host.create(templateID=snapshot)
    with pytest.raises(urllib.error.HTTPError):
        host.ask("POST", f"sandboxes/{first}/resume")
    one = tab()
    page = one.open(host, host.key)
    page.wait_for_selector("[data-operation=create]")
    counts, phases = expected(host.ask("GET", "metrics"))
    assert counts["restore", "ok"] >= 1 and counts["resume", "refused"] >= 1 and len(phases) > 20
    for operation in {name for name, _ in counts}:
        cells = page.locator(f"[data-operation={operation}] td").all_text_contents()
        assert cells[0] == f"{counts[operation, 'ok']:,}", (operation, cells)
        refused = counts[operation, "refused"]
        failed = f"{counts[operation, 'error']:,}" + (f" + {refused:,} refused" if refused else "")
        assert cells[1] == failed, (operation, cells)
    for (operation, phase), mean_us in phases.items():
        shown = page.locator(f"[data-operation={operation}] [data-phase={phase}]")
        assert float(shown.get_attribute("data-mean-us")) == pytest.approx(mean_us, abs=0.01), (operation, phase)
        assert shown.get_attribute("title").startswith(phase)
    for operation in ("snapshot", "resume"):
        page.click(f"[data-operation={operation}] .link")
        page.wait_for_selector(f".operation-detail h3:has-text('{operation}')")
        named = [row.get_attribute("data-phase-row") for row in page.locator("[data-phase-row]").all()]
        assert [name for name in named if name != "other"] == [p for o, p in phases if o == operation]
        assert page.locator(".columns .column").count() > 0
    assert one.errors == []


def phase_counts(text, operation):
    """Of `GET /metrics`, over all shards: how often each phase of an operation was timed."""
    counts = defaultdict(int)
    for line in text.splitlines():
        name, _, rest = line.partition("{")
        labels = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        if name == "mica_operation_phase_seconds_count" and labels["operation"] == operation:
            counts[labels["phase"]] += int(rest.rsplit(" ", 1)[1])
    return dict(counts)


def test_a_phase_that_is_chosen_is_drawn(tab, host):
    for _ in range(3):
        host.create()
    one = tab()
    page = one.open(host, host.key)
    page.click("[data-operation=create] .link")
    page.wait_for_selector("[data-phase-row=run]")
    title = page.locator(".operation-detail h3").first

    def drawn():
        return sum(int(text.split(" of ")[0]) for text in page.locator(".columns .column title").all_text_contents())

    def pressed():
        rows = page.locator("[data-phase-row]:has([aria-pressed=true])")
        return [row.get_attribute("data-phase-row") for row in rows.all()]

    assert title.text_content() == "How long create took" and pressed() == []
    counts = phase_counts(host.ask("GET", "metrics"), "create")
    whole = page.locator(".columns").get_attribute("aria-label")
    # Anywhere on the row.
    page.click("[data-phase-row=run] td >> nth=2")
    assert title.text_content() == "How long run took of create" and pressed() == ["run"]
    assert drawn() == counts["run"] >= 3
    label = page.locator(".columns").get_attribute("aria-label")
    p50 = page.locator("[data-phase-row=run] td").first.text_content()
    assert label.startswith(f"How long run took of create: p50 {p50}") and label != whole
    # With the keyboard, and what is reached stays reached when new numbers come.
    page.focus("[data-phase-row=ready] .link")
    page.keyboard.press("Enter")
    assert title.text_content() == "How long ready took of create" and pressed() == ["ready"]
    host.create()
    eventually("the new one is drawn", lambda: drawn() == counts["ready"] + 1)
    reached = "document.activeElement.closest('[data-phase-row]')?.dataset.phaseRow"
    assert page.evaluate(reached) == "ready" and pressed() == ["ready"]
    page.keyboard.press("Space")
    assert title.text_content() == "How long create took" and pressed() == []
    # Another operation begins with all of it.
    page.click("[data-phase-row=pool] .link")
    page.click("[data-operation=kill] .link")
    page.wait_for_selector("[data-operation=kill].chosen")
    page.click("[data-operation=create] .link")
    assert title.text_content() == "How long create took" and pressed() == []
    assert one.errors == []


def test_another_tenant_sees_its_own_and_nothing_of_the_host(tab, host):
    foreign = host.create()
    key = host.make_key("acme")
    eventually("the key works", lambda: works(host, key))
    own = host.create(key=key)
    one = tab()
    page = one.open(host, key)
    eventually("its own is shown", lambda: set(table_states(page)) == {own})
    assert page.locator("[data-shard]").count() == 0 and page.locator("[data-operation]").count() == 0
    assert page.locator("#map-panel").is_hidden() and page.locator("#tenant-note").is_visible()
    text = page.locator("body").inner_text()
    assert foreign not in text and "Linux" not in text
    page.click(f"[data-sandbox='{own}'] [data-action=kill]")
    page.click("dialog button[type=submit]")
    eventually("it is gone", lambda: host.states(key) == {})
    assert all("404" in error for error in one.errors), one.errors
    # The operator sees whose a sandbox is, and cannot touch another tenant's.
    theirs = host.create(key=key)
    page = tab().open(host, host.key)
    row = page.locator(f"[data-sandbox='{theirs}']")
    row.wait_for()
    assert row.locator("td").nth(8).text_content() == "acme"
    assert row.locator("[data-action=kill]").is_disabled()
    host.ask("DELETE", f"sandboxes/{theirs}", key=key)


def works(host, key):
    try:
        return host.states(key) == {}
    except urllib.error.HTTPError:
        return False


def test_an_open_host_asks_for_no_key(tab, open_host):
    one = tab()
    page = one.open(open_host)
    page.wait_for_selector("[data-shard]")
    assert page.locator("dialog").count() == 0 and page.locator("#sign-out").is_hidden()
    page.click("#create")
    page.fill("#template", "base")
    page.click("dialog button[type=submit]")
    page.wait_for_selector("[data-sandbox]")
    open_host.kill_all()
    assert one.errors == []


def test_a_lost_connection_is_told_and_found_again(tab, host):
    sandbox = host.create()
    one = tab()
    page = one.open(host, host.key)
    page.wait_for_selector("[data-sandbox]")
    one.context.set_offline(True)
    page.wait_for_selector("#banner:has-text('Not connected')")
    assert page.locator(".live").get_attribute("data-is") == "off"
    # What was seen last stays, and is marked.
    assert set(table_states(page)) == {sandbox} and "stale" in page.locator("body").get_attribute("class")
    one.context.set_offline(False)
    page.wait_for_selector(".live[data-is=on]")
    assert page.locator("#banner").is_hidden()
    assert all("ERR_INTERNET_DISCONNECTED" in error for error in one.errors), one.errors


def test_it_can_be_used_with_the_keyboard_alone(tab, host):
    sandbox = host.create()
    one = tab()
    page = one.open(host, host.key)
    page.wait_for_selector("[data-sandbox]")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "filter"
    page.keyboard.type(sandbox[:8])
    names = []
    for _ in range(16):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"))
        if names[-1] == f"Pause {sandbox}":
            break
    assert sandbox in names and names[-1] == f"Pause {sandbox}", names
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog")
    page.keyboard.press("Enter")
    page.wait_for_selector(".badge[data-is=paused]")
    assert host.states() == {sandbox: "paused"}
    assert one.errors == []


LOOKS = [
    ("light", {}),
    ("dark", {"color_scheme": "dark"}),
    ("narrow", {"viewport": {"width": 390, "height": 844}}),
]


@pytest.mark.parametrize(("name", "options"), LOOKS, ids=[name for name, _ in LOOKS])
def test_it_fits_and_is_kept_as_a_picture(tab, host, name, options):
    made = [host.create() for _ in range(3)]
    host.ask("POST", f"sandboxes/{made[0]}/pause")
    one = tab(**options)
    page = one.open(host, host.key)
    page.wait_for_selector(".badge[data-is=paused]")
    page.wait_for_selector(".operation-detail .columns")
    one.shoot(name)
    page.click(f"[data-sandbox='{made[0]}'] .id")
    page.wait_for_selector(".log .line")
    one.shoot(f"{name}-sandbox", whole=False)
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) <= 0, "the page scrolls to the side"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 150) == (name == "dark"), dark
    assert one.errors == []
