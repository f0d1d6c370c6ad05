"""Samples: taken once, made beside the user's inputs, kept in a file, and judged elsewhere."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler.errors import ReparamError
from orepa_compiler.verification import judge, take_samples, verify_callables
from orepa_compiler.verification.probes import LARGE, SMALL, made_batches
from orepa_compiler.verification.sample_file import load_samples, save_samples
from tests.verification_nets import Returning, X, changed, folded, net


def test_made_batches_are_what_they_are_called() -> None:
    x = 3 * X + 5
    made = made_batches((x, torch.arange(4)))
    assert list(made) == ["random", "constant", "large", "small"]
    assert all(torch.equal(batch[1], torch.arange(4)) for batch in made.values())
    for batch in made.values():
        assert (batch[0].shape, batch[0].dtype) == (x.shape, x.dtype)
    random, constant = made["random"][0], made["constant"][0]
    assert abs(float(random.mean() - x.mean())) < 0.5
    assert abs(float(random.std() / x.std()) - 1) < 0.1
    assert not torch.allclose(random, x)
    assert constant.unique().numel() == 1
    assert torch.equal(made["large"][0], x * LARGE)
    assert torch.equal(made["small"][0], x * SMALL)
    assert torch.equal(made_batches((x, torch.arange(4)))["random"][0], random)


def test_nothing_is_made_of_integers() -> None:
    assert made_batches((torch.arange(4),)) == {}


def test_stress_finds_what_normal_inputs_do_not_show() -> None:
    def saturates(y: Tensor) -> Tensor:
        return y.clamp(max=float(net()(X).max()))

    assert verify_callables(net(), changed(saturates), X)
    report = verify_callables(net(), changed(saturates), X, stress=True)
    assert not report
    assert report.verdict.startswith("FAIL: 1 of 5 rows; batch 3 (large), output: error ")


def test_made_inputs_that_the_reference_cannot_bear_are_noted_and_do_not_fail() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            nn.init.ones_(self.conv.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).exp().exp()

    model = Growing()
    report = verify_callables(model, deepcopy(model), X / (2 * X.abs().max()), stress=True)
    text = " ".join(report.notes)
    assert "output was not compared on large inputs: the reference itself is not finite" in text
    assert [row.made for row in report.rows if not row.ok] == []
    # The user's own inputs are not forgiven.
    assert not verify_callables(model, deepcopy(model), 10 * X)


def test_samples_in_a_file_give_the_same_verdict(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    samples = take_samples(net(), [X, X[:1]], stress=True)
    save_samples(samples, path)
    loaded = load_samples(path)
    right, again = judge(samples, folded(net())), judge(loaded, folded(net()))
    assert right.rows == again.rows
    assert bool(again)
    assert not judge(loaded, changed(lambda y: y * 1.001))


def test_half_precision_is_kept_in_the_file(tmp_path: Path) -> None:
    samples = take_samples(net(), X, precision=torch.bfloat16)
    save_samples(samples, tmp_path / "s.safetensors")
    loaded = load_samples(tmp_path / "s.safetensors")
    assert loaded.precision == torch.bfloat16
    assert (
        judge(loaded, folded(net()).bfloat16()).rows
        == judge(samples, folded(net()).bfloat16()).rows
    )


def test_of_several_noisy_outputs_the_worst_is_kept() -> None:
    samples = take_samples(net(outputs=1), X)
    assert len(samples.truth.noisy) > 1
    lean = samples.lean()
    assert len(lean.truth.noisy) == 1
    assert judge(lean, net(outputs=1)).rows == judge(samples, net(outputs=1)).rows


def test_nested_inputs_and_plain_values_are_kept(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, x: dict[str, Any], gain: float, more: tuple[Tensor, ...]) -> Tensor:
            return x["image"] * gain + more[0] * x["mask"][0]

    batch = ({"image": X, "mask": [X > 0, None]}, 2.0, (X,))
    samples = take_samples(Nested(), batch)
    save_samples(samples, tmp_path / "s.safetensors")
    loaded = load_samples(tmp_path / "s.safetensors")
    ((image, gain, more),) = loaded.batches
    assert torch.equal(image["image"], X)
    assert torch.equal(image["mask"][0], X > 0)
    assert (image["mask"][1], gain, type(more)) == (None, 2.0, tuple)
    assert judge(loaded, Nested()).rows == judge(samples, Nested()).rows


def test_what_masks_and_indices_were_decided_on_is_kept(tmp_path: Path) -> None:
    model = Returning(lambda f, s: {"mask": f > 0.5, "class": s.argmax(1), "any": (f > 0).any()})
    samples = take_samples(model, X, stress=True)
    save_samples(samples, tmp_path / "s.safetensors")
    loaded = load_samples(tmp_path / "s.safetensors")
    assert [d.keys() for d in loaded.truth.decisions] == [{"mask", "class"}] * 5
    assert [u.keys() for u in loaded.truth.unclear] == [{"any"}] * 5
    for candidate in (model, Returning(lambda f, s: {"mask": f > 0.6, "class": s.argmin(1)})):
        assert judge(loaded, candidate).rows == judge(samples, candidate).rows


def test_what_cannot_be_kept_or_read_is_refused(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"features": x, "kind": "map"}

    with pytest.raises(ReparamError, match="expected kind is a str: only tensors are kept as samp"):
        save_samples(take_samples(Named(), X), tmp_path / "s.safetensors")
    (tmp_path / "t.safetensors").write_bytes(b"no")
    with pytest.raises(ReparamError, match=r"t.safetensors: holds no samples of an export"):
        load_samples(tmp_path / "t.safetensors")
