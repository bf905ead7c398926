"""What the panels draw, number by number: the colour of a shard, the charts over time, the tile of memory, and what
was done of late. Of a host that is not there, whose numbers each test sets; only the last one asks a daemon.
"""

import json
import re
import time

import pytest
from big import BigHost

GIB = 2**30


@pytest.fixture
def small(tab, open_host):
    """The page of a host with two nodes and four shards, and its numbers, which are the test's to change."""
    host = BigHost(4, shards=4)
    one = tab(reduced_motion="reduce")
    one.page.route("**/ui/state?*", lambda route: route.fulfill(json=host.state(1000, None)[0]))
    one.page.route("**/metrics", lambda route: route.fulfill(body=host.metrics))
    yield one.page, host, lambda: one.open(open_host)
    assert json.dumps(one.errors) == "[]"


def look_again(page):
    """Until a state that was asked for from now on is drawn: the next but one is asked for after the next is."""
    for _ in range(2):
        with page.expect_response("**/ui/state?*"):
            pass


def test_a_shard_has_the_colour_and_the_bar_of_its_load(small):
    page, host, opened = small
    loads = [0.0, 1.0, 0.6, 1.0]
    for shard, load in zip(host.host["shards"], loads):
        shard["busy_fraction"] = load
    opened()
    page.wait_for_selector("[data-shard='3']")
    colour = "node => getComputedStyle(node).backgroundColor"
    share = """bar => bar.firstElementChild.getBoundingClientRect().width / bar.getBoundingClientRect().width"""
    cells = [page.locator(f"[data-shard='{shard}']") for shard in range(4)]
    cool, hot, half, other = [cell.evaluate(colour) for cell in cells]
    assert len({cool, half, hot}) == 3 and hot == other, (cool, half, hot, other)
    bars = [cell.locator(".bar").evaluate(share) for cell in cells]
    assert bars == pytest.approx(loads, abs=0.02)


def test_memory_is_a_tile_and_two_lines(small):
    page, host, opened = small
    for node, free in zip(host.host["nodes"], (100, 156)):
        node.update(memory_bytes=512 * GIB, free_bytes=free * GIB)
    for number, sandbox in enumerate(host.sandboxes):
        sandbox["memory_bytes"] = (number + 1) * GIB
    opened()
    tile = page.locator("[data-tile=memory]")
    tile.wait_for()
    assert tile.locator(".value").text_content() == "768 GiB"
    assert tile.locator(".muted").text_content() == "of 1.00 TiB; sandboxes 10.0 GiB"
    chart = page.locator("#memory-chart svg")
    assert chart.get_attribute("aria-label") == "Memory: host 768 GiB, sandboxes 10.0 GiB"
    host.host["nodes"][0]["free_bytes"] -= 64 * GIB
    look_again(page)
    assert chart.get_attribute("aria-label").startswith("Memory: host 832 GiB")
    (line,) = chart.locator(".line.series-0").all()
    heights = [float(y) for y in re.findall(r",([\d.]+)", line.get_attribute("d"))]
    # Down the page is less: the line rises, by the 64 GiB of a scale that ends at 1 TiB.
    zero, top = [float(mark.get_attribute("y1")) for mark in (chart.locator(".grid").first, chart.locator(".grid").last)]
    assert (heights[0] - heights[-1]) / (zero - top) == pytest.approx(64 / 1024, abs=0.002), heights
    assert (zero - heights[-1]) / (zero - top) == pytest.approx(832 / 1024, abs=0.002), heights


def test_the_rate_is_what_was_made_between_two_looks(small):
    page, host, opened = small
    times = []

    def one_more(route):
        times.append(time.monotonic())
        host.host["shards"][0]["ops"]["create"]["count"] += 50
        host.host["shards"][3]["ops"]["restore"]["count"] += 50
        route.fulfill(json=host.state(1000, None)[0])

    page.route("**/ui/state?*", one_more)
    opened()
    page.wait_for_selector("[data-shard='3']")
    look_again(page)
    value = page.locator("[data-tile=rate] .value").text_content()
    chart = page.locator("#rate-chart svg")
    assert chart.get_attribute("aria-label") == f"Creates per second: creates and restores {value}"
    rests = [after - before for before, after in zip(times, times[1:])]
    assert 100 / max(rests) / 2 < float(value) < 100 / min(rests) * 2, (value, rests)
    assert chart.locator(".line.series-0").get_attribute("d").count("L") >= 1


def test_what_was_done_of_late_is_counted_from_when_the_page_was_opened(tab, host):
    for _ in range(2):
        host.create()
    one = tab()
    page = one.open(host, host.key)
    done = page.locator("[data-operation=create] td").first
    page.wait_for_selector("[data-operation=create]")
    before = int(done.text_content().replace(",", ""))
    page.click("#since-recent")
    assert page.locator("#since-recent").get_attribute("aria-pressed") == "true"
    host.create()
    page.wait_for_selector("[data-operation=create] td >> nth=0 >> text=/^1$/")
    page.click("#since-start")
    assert done.text_content() == f"{before + 1:,}" and before >= 2
    host.kill_all()
    assert one.errors == []
