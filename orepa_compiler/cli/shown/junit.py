"""Writes what a command found as JUnit XML, which continuous integration shows test by test."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from orepa_compiler.files.atomic import staged

# What XML 1.0 cannot hold, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# failure: something differs. error: a step broke, or a check that is due was not made.
Outcome = Literal["pass", "failure", "error", "skipped"]


@dataclass(frozen=True)
class Case:
    """One check. message: one line, why it is no pass; text: all that is known."""

    name: str
    outcome: Outcome
    message: str = ""
    text: str = ""
    seconds: float = 0.0


def junit_xml(suite: str, cases: Sequence[Case]) -> str:
    """The cases of one suite as the text of a JUnit file."""
    counts = {kind: sum(case.outcome == kind for case in cases) for kind in _KINDS}
    root = ElementTree.Element("testsuites")
    attributes = {"name": suite, "tests": str(len(cases)), "time": _time(cases)}
    attributes |= {name: str(counts[kind]) for kind, name in _KINDS.items()}
    element = ElementTree.SubElement(root, "testsuite", attributes)
    for case in cases:
        given = {"classname": suite, "name": _clean(case.name), "time": f"{case.seconds:.3f}"}
        node = ElementTree.SubElement(element, "testcase", given)
        if case.outcome != "pass":
            detail = ElementTree.SubElement(node, case.outcome, {"message": _clean(case.message)})
            detail.text = _clean(case.text) or None
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def write_junit(path: Path, suite: str, cases: Sequence[Case]) -> None:
    """The cases as a JUnit file, whole or not at all."""
    with staged(path) as draft:
        draft.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{junit_xml(suite, cases)}')


_KINDS = {"failure": "failures", "error": "errors", "skipped": "skipped"}


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", text)


def _time(cases: Sequence[Case]) -> str:
    return f"{sum(case.seconds for case in cases):.3f}"
