"""JUnit XML: the counts, the kinds of outcome, and text that XML cannot hold."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from orepa_compiler.cli.run.steps import ExportStep
from orepa_compiler.cli.shown.junit import Case, junit_xml, write_junit
from orepa_compiler.cli.shown.summary import cases
from orepa_compiler.errors import ExportError

CASES = [
    Case("right", "pass", seconds=0.25),
    Case("wrong", "failure", 'error <5> & "more"', "a table\nof numbers"),
    Case("broken", "error", "no such file"),
    Case("later", "skipped", "no GPU"),
]


def test_every_case_is_there_with_its_outcome() -> None:
    (suite,) = ElementTree.fromstring(junit_xml("orepa-verify", CASES))
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped", "time")}
    assert list(counts.values()) == ["4", "1", "1", "1", "0.250"]
    found = [[case.get("name"), *[child.tag for child in case]] for case in suite]
    assert found == [["right"], ["wrong", "failure"], ["broken", "error"], ["later", "skipped"]]
    failure = suite[1][0]
    assert failure.get("message") == 'error <5> & "more"'
    assert failure.text == "a table\nof numbers"


def test_control_characters_do_not_break_the_file(tmp_path: Path) -> None:
    write_junit(tmp_path / "r.xml", "s", [Case("a\x1b[31m", "failure", "\x00", "▀ \ud800")])
    (suite,) = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert suite[0].get("name") == "a?[31m"
    assert suite[0][0].text == "▀ ?"


def test_what_is_due_and_was_not_run_is_an_error_and_never_a_pass() -> None:
    steps = [
        ExportStep("check onnx", "not run", cause=ExportError("no onnxruntime")),
        ExportStep("check engine", "not run", note="no GPU", is_required=False),
        ExportStep("write onnx", "failed", cause=ExportError("bn1: not collapsed")),
        ExportStep("load", "done"),
    ]
    assert [(case.outcome, case.message) for case in cases(steps)] == [
        ("error", "no onnxruntime"),
        ("skipped", "no GPU"),
        ("error", "bn1: not collapsed"),
        ("pass", ""),
    ]
