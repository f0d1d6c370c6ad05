"""The page in a browser: it stands alone, in the light, in the dark, on paper and on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from orepa_compiler.report import write_page
from tests.report.pages import full_page

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--disable-background-networking"),
    *("--allow-file-access-from-files", "--virtual-time-budget=2000"),
)

# Loads the page at a phone's width (a window is not made so narrow) and tells its width.
FRAME = """<!doctype html><body><iframe id="f" width="390" height="800" src="page.html"></iframe>
<script>f.onload = () => { const root = f.contentDocument.documentElement;
document.title = "width " + root.scrollWidth; }</script>"""

# What is seen of a page that is not whole by itself.
ASKING = '<!doctype html><body><img src="http://127.0.0.1:9/picture.png">'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_page(full_page(), folder / "page.html")
    (folder / "asking.html").write_text(ASKING)
    (folder / "phone.html").write_text(FRAME)
    return folder


def browse(folder: Path, name: str, *flags: str) -> tuple[str, str]:
    """What the browser prints, and what it complains of on its console."""
    profile = f"--user-data-dir={folder / 'profile'}"
    address = (folder / name).as_uri()
    command = [str(BROWSER), *FLAGS, profile, *flags, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


def test_it_opens_without_an_error_and_all_charts_are_there(folder: Path) -> None:
    text, console = browse(folder, "page.html", "--dump-dom")
    assert console == ""
    assert len(re.findall(r"<svg[ >]", text)) == 4
    assert text.count("<path") > 50
    assert "<script" not in text


def requests_of(folder: Path, name: str) -> set[str]:
    """The addresses that a page asks for; the browser's own requests have no origin."""
    log = folder / f"{name}.log"
    browse(folder, name, "--dump-dom", f"--log-net-log={log}")
    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    return {p["url"] for p in asked if p["initiator"] != "not an origin" and "url" in p}


def test_no_request_leaves_the_page(folder: Path) -> None:
    assert requests_of(folder, "asking.html") == {"http://127.0.0.1:9/picture.png"}
    assert requests_of(folder, "page.html") == set()


def test_it_is_no_wider_than_a_phone(folder: Path) -> None:
    text, _ = browse(folder, "phone.html", "--dump-dom")
    found = re.search(r"<title>width (\d+)</title>", text)
    assert found, "the page did not load in the frame"
    assert int(found[1]) <= 390


@pytest.mark.parametrize("flags", [("--force-dark-mode",), ()])
def test_it_is_drawn_and_printed(folder: Path, flags: tuple[str, ...]) -> None:
    picture, paper = folder / "page.png", folder / "page.pdf"
    browse(folder, "page.html", *flags, f"--screenshot={picture}", "--window-size=1280,2000")
    browse(folder, "page.html", *flags, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    assert picture.stat().st_size > 20_000
    assert paper.read_bytes().startswith(b"%PDF")
