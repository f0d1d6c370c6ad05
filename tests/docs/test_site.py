"""The site's own script: a field above each long table that keeps the rows with all the words."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "site" / "tables.js"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

ROWS = "".join(f"<tr><td>net{i}</td><td>{'pass' if i % 3 else 'fail'}</td></tr>" for i in range(30))
PAGE = f"""<!doctype html><body>
<table id="long"><thead><tr><th>model</th><th>verdict</th></tr></thead><tbody>{ROWS}</tbody></table>
<table id="short"><tbody><tr><td>one</td></tr></tbody></table>
<script>{{script}}</script>
<script>const field = document.querySelector("input"); field.value = "FAIL net1";
field.dispatchEvent(new Event("input"));
document.title = document.querySelectorAll("input").length + " field, "
  + [...document.querySelectorAll("#long tbody tr")].filter((row) => !row.hidden)
    .map((row) => row.cells[0].textContent).join(" ");</script>"""


def test_the_site_has_the_script_and_the_style() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    assert "extra_javascript: [site/tables.js]" in site
    assert ".table-filter" in (ROOT / "docs" / "site" / "wide.css").read_text()
    assert 'className = "table-filter"' in SCRIPT.read_text()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_long_table_is_filtered_and_a_short_one_left(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGE.replace("{script}", SCRIPT.read_text()))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [str(BROWSER), *flags, profile, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    (title,) = re.findall("<title>(.*)</title>", done.stdout)
    assert title == "1 field, net12 net15 net18"
    assert "3 of 30 rows" in done.stdout
