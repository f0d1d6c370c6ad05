"""The text of a page: what stands on it, what is said to be absent, and that nothing breaks out."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orepa_compiler.errors import MissingPackage
from orepa_compiler.proving.certificate import Certificate
from orepa_compiler.report import ModelSize, render_page, write_page
from orepa_compiler.report import rendering as drawing
from orepa_compiler.verification.divergence import Divergence
from tests.report.pages import HOSTILE, block, empty_page, full_page

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

VOID = {"meta", "link", "br", "hr", "img", "input"}
SECTIONS = ("chain", "layers", "sizes", "branches", "audit", "manifest")


class Balanced(HTMLParser):
    """Elements that close in order; texts and addresses by the way."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        names = ("src", "href", "xlink:href", "action", "srcset")
        self.addresses += [value or "" for name, value in attrs if name in names]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> without its start"
        assert self.stack.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def full() -> str:
    return render_page(full_page())


def section(text: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">(.*?)</section>', text, re.DOTALL)
    assert found, f"no section {name}"
    return found[1]


@pytest.mark.parametrize(
    ("verdict", "mark"), [("pass", "✓"), ("mismatch", "✗"), ("failed", "✗"), ("not run", "–")]
)
def test_the_verdict_stands_on_top_in_a_word_and_a_mark(verdict: Any, mark: str) -> None:
    text = render_page(empty_page(verdict=verdict, missing=("engine: no GPU",)))
    banner = text[text.index('<div class="banner') : text.index("<main>")]
    headline = "– pass in part" if verdict == "pass" else f"{mark} {verdict}"
    assert f"<strong>{headline}</strong>" in banner
    whole = render_page(empty_page(verdict=verdict))
    assert f"<strong>{mark} {verdict}</strong>" in whole
    kind = "pass-in-part" if verdict == "pass" else verdict.replace(" ", "-")
    assert f'class="banner {kind}"' in banner
    assert "not run: engine: no GPU" in banner


def test_an_empty_page_says_of_each_section_why_it_is_empty() -> None:
    text = render_page(empty_page(absent=(("sizes", "only files"),)))
    assert "Absent: only files" in section(text, "sizes")
    for name in SECTIONS[1:]:
        assert "Absent: " in section(text, name)
    assert "<svg" not in text
    Balanced(text)


@pytest.mark.parametrize(
    ("verdict", "said"), [("pass", "nothing differs"), ("mismatch", "no first")]
)
def test_no_difference_is_claimed_only_where_nothing_differs(verdict: Any, said: str) -> None:
    assert said in section(render_page(empty_page(verdict=verdict)), "layers")


def test_a_full_page_has_every_section(full: str) -> None:
    for name in SECTIONS:
        assert "Absent: " not in section(full, name)
    assert section(full, "layers").count("<svg") == 2
    assert section(full, "branches").count("<svg") == 2  # one block, two charts
    chain = section(full, "chain")
    assert chain.index("✓ pass") < chain.index("✗ mismatch") < chain.index("– not run")
    assert "device numerics: not run" in chain
    assert re.search(r"error \d\.\de-\d\d, tolerance \d\.\de-\d\d", chain)
    assert "NOT CERTIFIED: 3 of 9 blocks" in section(full, "layers")
    assert "12,345" in section(full, "sizes")
    assert "overflow" in section(full, "audit")
    assert "ab" * 32 in section(full, "manifest")


def test_what_comes_from_the_user_is_text_and_nothing_else(full: str) -> None:
    page = Balanced(full)
    assert "script" not in page.tags
    said = "".join(page.texts)
    assert said.count(HOSTILE) >= 15
    assert "onload" not in full


def test_the_page_takes_nothing_from_elsewhere(full: str) -> None:
    page = Balanced(full)
    assert "http://" not in full
    assert "https://" not in full
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not {"script", "iframe", "object", "embed", "base"} & {*page.tags}
    assert "@import" not in full
    assert "@font-face" not in full


def test_no_id_is_given_twice_and_every_reference_is_met(full: str) -> None:
    page = Balanced(full)
    assert len(page.ids) == len({*page.ids})
    used = re.findall(r"url\(#([^)]*)\)", full) + [a[1:] for a in page.addresses if a[0] == "#"]
    assert used
    assert {*used} <= {*page.ids}


def test_the_same_page_has_the_same_bytes() -> None:
    page = empty_page(certificate=Certificate((block("a", 1e-15),)))
    assert render_page(page) == render_page(page)


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "-"), (999_999, "999,999"), (11_684_712, "11.7 M"), (4_089_184_256, "4.1 G")],
)
def test_large_amounts_are_short(value: int | None, said: str) -> None:
    size = ModelSize("net", 1, 2, 3, value, None, 5)
    assert f'<td class="n">{said}</td>' in section(render_page(empty_page(sizes=(size,))), "sizes")


def test_a_column_of_reasons_stands_only_where_a_row_has_one(full: str) -> None:
    right, wrong = section(full, "chain").split("rows compared")[1:]
    assert "<th>why</th>" not in right
    assert wrong.count("<th>why</th>") == 1


def test_the_branches_of_a_heat_map_are_numbered(full: str) -> None:
    heat = re.search(r'aria-label="similarity.*?</svg>', full, re.DOTALL)
    assert heat
    said = re.findall(r"<text [^>]*>([^<]*)</text>", heat[0])
    assert {"origin 1", "depthwise_pointwise 6", "1", "6"} <= set(said)


def test_a_chart_shows_the_worst_blocks_and_says_how_many_there_are() -> None:
    most = drawing.MOST_BLOCKS
    blocks = [block(f"layer{i:03}", 1e-16 * (i + 1)) for i in range(most + 5)]
    text = section(render_page(empty_page(certificate=Certificate(tuple(blocks)))), "layers")
    assert f"The {most} with the largest errors of {most + 5}" in text
    assert "layer004" not in text
    assert "layer005" in text
    assert "✓ pass" in text


@pytest.mark.parametrize("error", [float("nan"), float("inf"), None, 0.0])
def test_an_error_that_no_log_axis_has_is_drawn(error: float | None) -> None:
    text = render_page(empty_page(certificate=Certificate((block("odd", error),))))
    assert ("NOT CERTIFIED" in text) == (error != 0.0)
    assert "NOT CERTIFIED" in text or "certified: 1 blocks" in text
    assert (">not run</text>" in text) == (error is None)
    Balanced(text)


def test_a_divergence_without_a_map_is_told_in_words() -> None:
    found = Divergence("head", "Linear", (2, 5), "error 1", 3)
    for divergence in (found, "no modules to look at"):
        page = section(render_page(empty_page(divergence=divergence)), "layers")
        assert str(divergence) in page
        assert "<svg" not in page


def test_a_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    assert write_page(empty_page(), path) == path
    before = path.read_text(encoding="utf-8")
    assert before.startswith("<!doctype html>")
    monkeypatch.setattr(Path, "write_text", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(empty_page(title="other"), path)
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_the_missing_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"package {package}; .*orepa-compiler\[report\]"):
        render_page(empty_page())


def test_options_that_were_not_given_are_left_out() -> None:
    options = {
        **{"onnx": "net.onnx", "engine": None, "keep_fp32": [], "batch": 0, "tf32": False},
        **{"shapes": ["3x8x8", "8"], "images": {"crop": None, "resize": 8}, "simplify": True},
    }
    page = full_page()
    assert page.manifest is not None
    page = replace(page, manifest=replace(page.manifest, options=options))
    text = " ".join(Balanced(section(render_page(page), "manifest")).texts)
    shown = " ".join(text.partition("Options that were given")[2].partition("Versions")[0].split())
    assert shown == "onnx net.onnx batch 0 shapes 3x8x8, 8 resize 8 simplify yes"
