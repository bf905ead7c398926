"""A thousand sandboxes on 24 shards: answers of a host that is not there, on the page that a daemon serves."""

import json
import urllib.parse

import pytest
from big import BigHost

SANDBOXES = 1000
ROWS_MAX = 100
# A task that holds the page up longer than this is one that people notice. Far above what it takes on a quiet
# machine, for tests run on busy ones.
TASK_MS_MAX = 1500
WATCH = "new PerformanceObserver((l) => l.getEntries().forEach((e) => (window.tasks ??= []).push(e.duration))).observe({ type: 'longtask', buffered: true })"


@pytest.fixture
def big(tab, open_host):
    host = BigHost(SANDBOXES)

    def state(route):
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlparse(route.request.url).query))
        page, following = host.state(int(query["limit"]), query.get("nextToken"))
        headers = {} if following is None else {"x-next-token": str(following)}
        route.fulfill(json=page, headers=headers)

    one = tab()
    one.page.route("**/ui/state?*", state)
    one.page.route("**/metrics", lambda route: route.fulfill(body=host.metrics))
    one.page.add_init_script(WATCH)
    one.open(open_host)
    one.page.wait_for_selector(".live[data-is=on]")
    one.page.wait_for_selector("[data-operation=create]")
    return one, host


def test_a_thousand_sandboxes_are_borne_found_and_sorted(big):
    one, host = big
    page = one.page
    rows = page.locator("[data-sandbox]")
    assert rows.count() == ROWS_MAX
    assert page.locator("#sandboxes-count").text_content() == "1,000, the first 100 shown"
    last = host.sandboxes[-1]["id"]
    page.fill("#filter", last)
    assert [row.get_attribute("data-sandbox") for row in rows.all()] == [last]
    page.fill("#filter", "node:1 state:paused")
    wanted = [one for one in host.sandboxes if one["node"] == 1 and one["state"] == "paused"]
    assert page.locator("#sandboxes-count").text_content().startswith(f"{len(wanted)} of 1,000")
    page.fill("#filter", "")
    page.click("th .link:has-text('Memory')")
    most = max(host.sandboxes, key=lambda one: one["memory_bytes"] or 0)
    assert rows.first.get_attribute("data-sandbox") == most["id"]
    page.click(".more button")
    assert rows.count() == 2 * ROWS_MAX
    with page.expect_response("**/ui/state?*"):
        pass
    tasks = page.evaluate("window.tasks ?? []")
    assert max(tasks, default=0) < TASK_MS_MAX, tasks
    assert one.errors == []


def test_both_nodes_and_every_shard_are_on_the_map(big):
    one, host = big
    page = one.page
    assert page.locator("[data-node]").count() == 2 and page.locator("[data-shard]").count() == 24
    busiest = max(host.host["shards"], key=lambda shard: shard["busy_fraction"])
    cell = page.locator(f"[data-node='{busiest['node']}'] [data-shard='{busiest['shard']}']")
    assert f"{busiest['busy_fraction'] * 100:.0f} % busy" in cell.get_attribute("aria-label")
    cell.click()
    page.mouse.move(1, 1)
    assert page.locator("#shard-detail h3").text_content().startswith(f"Shard {busiest['shard']}")
    wrong = sum(one["wrong_node_pages"] or 0 for one in host.sandboxes)
    assert page.locator("[data-tile=wrong] .value").text_content() == f"{wrong:,}"
    one.shoot("big", whole=False)
    assert json.dumps(one.errors) == "[]"
