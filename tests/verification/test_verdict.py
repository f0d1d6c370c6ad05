"""The report: read, printed and stored, with what the comparison could not have seen."""

from __future__ import annotations

import json
from copy import deepcopy

import torch
from torch import Tensor

from orepa_compiler.verification import NOISE_FACTOR, verify_callables
from tests.verification_nets import Returning, X, changed, folded, net, poke


def test_the_report_can_be_read_printed_and_stored() -> None:
    report = verify_callables(net(), changed(poke(9.0)), [X, X[:2]])
    worst = report.worst
    assert worst is not None
    assert (
        f"{report!r}" == f"<Report FAIL: 2 of 2 rows; batch {worst.batch}, output: {worst.reason}>"
    )
    lines = str(report).splitlines()
    assert lines[0].startswith("FAIL: 2 of 2 rows; batch ")
    assert any(line.split()[:3] == ["batch", "output", "shape"] for line in lines)
    assert sum(line.endswith("FAIL") for line in lines) == 2
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["ok"] is False
    assert data["verdict"] == report.verdict
    assert data["max_error"] == report.max_error == worst.error
    assert data["rows"][0]["shape"] == [4, 5]
    assert data["rows"][0]["reason"] == report.rows[0].reason
    assert data["rows"][1]["ok"] is False
    assert data["factor"] == NOISE_FACTOR


def test_long_reports_print_what_fails_first_and_count_the_rest() -> None:
    batches = [X[:1]] * 49 + [X[1:2]]
    report = verify_callables(
        net(), lambda x: net()(x).detach() * (1 + torch.equal(x, X[1:2])), batches
    )
    lines = str(report).splitlines()
    assert lines[0].startswith("FAIL: 1 of 50 rows; batch 49, output: error ")
    assert "and 10 more rows" in lines
    batch_column = [line.split()[0] for line in lines if line.endswith((" ok", " FAIL"))]
    assert batch_column == ["49", *map(str, range(39))]


def test_blind_spots_are_noted() -> None:
    model = net()
    assert verify_callables(model, folded(model), X).notes == ()
    with torch.no_grad():
        model[5].weight.mul_(1e-9)
    text = " ".join(verify_callables(model, folded(model), [X[:1], X[1:2]]).notes)
    assert "a candidate that ignores its input would pass too" in text

    def boxes(features: Tensor, scores: Tensor) -> Tensor:
        return torch.cat([features[:, :1] * 1e9, features[:, 1:]], 1)

    mixed = Returning(boxes)
    text = " ".join(verify_callables(mixed, deepcopy(mixed), X).notes)
    assert "5 of 6 channels of output are smaller than what the tolerance lets pass" in text


def test_the_largest_error_is_infinite_where_one_row_was_not_compared() -> None:
    cut = {False: slice(None), True: slice(2)}
    report = verify_callables(net(), lambda x: net()(x).detach()[cut[torch.equal(x, -X)]], [X, -X])
    assert [row.ok for row in report.rows] == [True, False]
    assert report.max_error == float("inf")
    assert report.worst is report.rows[1]
    assert report.to_dict()["max_error"] is None
