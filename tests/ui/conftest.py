"""A browser, a daemon with the stand-in VM, and pages that note whatever goes wrong in them.

Used by the tests beside this file; tools/test-ui runs them. Refuses a page that wrote an error nobody asked for.
"""

import json
import os
import pathlib
import subprocess
import sys
import urllib.request

import pytest
from playwright.sync_api import sync_playwright

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/clients"))
import standin  # noqa: E402

PROGRAMS = pathlib.Path(os.environ["MICA_BIN_DIR"]).resolve()
SHOTS = ROOT / "target/ui-screenshots"
# What it would do by itself, and what a container has no room for, is off.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]
PATIENCE_MS = 30_000
# Violations of the page's policy become errors that are noted.
TELL = "document.addEventListener('securitypolicyviolation', (e) => console.error('policy: ' + e.violatedDirective + ' ' + e.blockedURI))"


class Host:
    """A daemon, and the API as its operator or as another tenant."""

    def __init__(self, daemon):
        self.url, self.key, self.directory = daemon.url, daemon.api_key, daemon.directory

    def ask(self, method, path, body=None, key=None):
        request = urllib.request.Request(f"{self.url}/{path}", method=method)
        request.add_header("X-API-Key", key or self.key)
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps(body).encode()
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
        return json.loads(text) if text[:1] in ("{", "[") else text

    def create(self, key=None, **wishes):
        body = {"templateID": "base", "timeout": 600} | wishes
        return self.ask("POST", "v2/sandboxes", body, key)["sandboxID"]

    def states(self, key=None):
        listed = self.ask("GET", "v2/sandboxes?state=running,paused", key=key)
        return {one["sandboxID"]: one["state"] for one in listed}

    def kill_all(self):
        for sandbox in self.states():
            self.ask("DELETE", f"sandboxes/{sandbox}")

    def make_key(self, tenant):
        words = [PROGRAMS / "mica", "key", "create", "--tenant", tenant, "--key-db", self.directory / "keys.json"]
        return subprocess.check_output(list(map(str, words)), text=True).strip()


@pytest.fixture(scope="session")
def host():
    with standin.Daemon(PROGRAMS) as daemon:
        yield Host(daemon)


@pytest.fixture(scope="session")
def open_host():
    with standin.Daemon(PROGRAMS, keyless=True) as daemon:
        yield Host(daemon)


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


class Tab:
    """A page of its own, in a browser that knows nothing yet, and the errors that it wrote."""

    def __init__(self, browser, **options):
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.context.add_init_script(TELL)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.errors = []
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.on("pageerror", lambda error: self.errors.append(f"thrown: {error}"))

    def open(self, host, key=None):
        """The dashboard, with a key entered if one is given."""
        self.page.goto(f"{host.url}/ui/")
        if key is not None:
            self.page.fill("#key", key)
            self.page.keyboard.press("Enter")
            self.page.wait_for_selector(".live[data-is=on]")
        return self.page

    def shoot(self, name, whole=True):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=whole)


@pytest.fixture
def tab(browser):
    tabs = []

    def make(**options):
        tabs.append(Tab(browser, **options))
        return tabs[-1]

    yield make
    for one in tabs:
        one.context.close()
