"""The certificate of a collapse, and what it refuses to certify."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.errors import ReparamError
from orepa_compiler.proving.certificate import LIMIT, Certificate
from orepa_compiler.proving.certifying import certify, digest
from orepa_compiler.proving.locating import locate
from tests.norms import randomise_norms


class Net(nn.Module):
    """A path, and a sum of branches: the two kinds of region."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.branches = Sum()
        self.unused = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.branches(self.stem(x)).relu()


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.point = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.point(x)


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    net = randomise_norms(Net()).eval()
    del net.unused
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_collapse_is_certified_block_by_block(model: nn.Module, dtype: torch.dtype) -> None:
    deploy = orepa.collapse(model)
    certificate = certify(model, deploy.to(dtype) if dtype != torch.float32 else deploy, X)
    if dtype == torch.float16:
        # Cast twice: first to float32 by the collapse. That is not "once".
        assert "is not the float64 value" in certificate.verdict or certificate
        return
    assert certificate, certificate
    assert [block.path for block in certificate.blocks] == ["stem.0", "branches"]
    for block in certificate.blocks:
        assert block.error is not None
        assert block.error < LIMIT
        assert block.border is not None
        assert max(block.border, block.interior or 0) == block.error
        assert block.weights_before != block.weights_after
    assert certificate.verdict.startswith("certified: 2 blocks; the worst float64 error is ")
    assert Certificate.from_json(certificate.to_json()) == certificate
    assert json.loads(json.dumps(certificate.to_dict()))["ok"]


def test_an_expanded_model_is_certified_too(model: nn.Module) -> None:
    expanded = randomise_norms(orepa.expand(model)).eval()
    certificate = certify(expanded, orepa.collapse(expanded), X)
    assert certificate, certificate
    assert certificate.blocks[0].before != "Conv2d + BatchNorm2d"


def test_a_bias_that_goes_to_the_norm_behind_is_compared_behind_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    block = replace(orepa.OREPA, name="offline", scaling_layer="norm")
    expanded = randomise_norms(orepa.expand(net, block=block)).eval()
    deploy = orepa.collapse(expanded, fold_norm=False)
    assert isinstance(deploy[1], nn.BatchNorm2d)
    (block_of_conv,) = certify(expanded, deploy, X).blocks
    assert block_of_conv.path == "0"
    assert block_of_conv.error is not None
    assert block_of_conv.error < LIMIT
    assert locate(expanded, deploy, X) is None
    deploy[1].running_mean[1] += 1
    assert not certify(expanded, deploy, X)
    found = locate(expanded, deploy, X)
    assert found is not None
    assert found.module == "0"


@pytest.mark.parametrize(("path", "name"), [("stem.0", "weight"), ("stem.0", "bias")])
def test_one_bit_is_enough_to_refuse(model: nn.Module, path: str, name: str) -> None:
    deploy = orepa.collapse(model)
    getattr(deploy.get_submodule(path), name).detach().view(torch.int32)[1] ^= 1
    verdict = certify(model, deploy, X).verdict
    assert verdict == (
        f"NOT CERTIFIED: 1 of 2 blocks; {path}.{name}: is not the float64 value of Conv2d + "
        "BatchNorm2d, cast once"
    )


def test_a_wrong_composition_is_refused_with_border_and_interior(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orepa_compiler.proving import certifying

    def wrong(exact: nn.Module, *options: object) -> nn.Module:
        bad = orepa.collapse(exact)
        bad.get_submodule("stem.0").padding_mode = "circular"  # type: ignore[assignment]
        bad.get_submodule("stem.0")._reversed_padding_repeated_twice = [1, 1, 1, 1]  # type: ignore
        return bad

    monkeypatch.setattr(certifying, "collapsed_by", wrong)
    certificate = certify(model, orepa.collapse(model), X)
    text, block = str(certificate), certificate.blocks[0]
    assert text.startswith("NOT CERTIFIED: 1 of 2 blocks; stem.0: Conv2d 3 -> 8 3x3 differs by ")
    assert block.interior is not None
    assert block.border is not None
    assert block.interior < LIMIT < 0.1 < block.border
    assert f"(border {block.border:.1e}, interior {block.interior:.1e})" in text
    assert "above 1e-12" in text


def test_a_block_that_did_not_run_is_not_certified() -> None:
    net = randomise_norms(Net()).eval()
    verdict = certify(net, orepa.collapse(net), X).verdict
    assert verdict.startswith("NOT CERTIFIED: 1 of 3 blocks; unused.0: did not run on these inputs")


def test_what_is_no_collapse_of_the_model_is_refused(model: nn.Module) -> None:
    message = "deploy is not recorded as a collapse of this model; give a model and what"
    with pytest.raises(ReparamError, match=message):
        certify(model, copy.deepcopy(model), X)
    expanded = orepa.expand(model)
    with pytest.raises(ReparamError, match=message):
        certify(expanded, orepa.collapse(model), X)
    other = orepa.expand(model, where="stem.*")
    with pytest.raises(ReparamError, match=message):
        certify(expanded, orepa.collapse(other), X)


def test_a_block_that_the_forward_does_not_run_is_not_certified(model: nn.Module) -> None:
    deploy = orepa.collapse(model)
    certificate = certify(model, deploy, X)
    assert certificate.forward is not None
    assert certificate.forward.error < 1e-12
    assert 0 < certificate.forward.deployed < 1e-5
    deploy.forward = model.forward  # type: ignore[method-assign]
    assert torch.equal(deploy(X), model(X))  # by the layers that were there before
    assert certify(model, deploy, X).verdict == (
        "NOT CERTIFIED: stem.0: the deployed forward does not run it each time; it reaches the "
        "layer that was there before by another way than its name"
    )


def test_a_forward_that_differs_is_not_certified(model: nn.Module) -> None:
    deploy = orepa.collapse(model)
    deploy.register_forward_hook(lambda module, args, y: y * 2)
    certificate = certify(model, deploy, X)
    assert certificate.verdict == (
        "NOT CERTIFIED: the deployed forward differs by 1.0e+00 from the model's in float64"
    )
    assert json.loads(certificate.to_json())["forward"]["deployed"] == pytest.approx(1, abs=1e-5)
    assert not Certificate.from_json(certificate.to_json())


def test_a_certificate_of_an_earlier_version_is_read(model: nn.Module) -> None:
    certificate = certify(model, orepa.collapse(model), X)
    blocks = json.dumps(json.loads(certificate.to_json())["blocks"])
    read = Certificate.from_json(blocks)
    assert read == Certificate(certificate.blocks)
    assert read


def test_nothing_to_collapse_is_no_certificate() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    certificate = certify(plain, orepa.collapse(plain), X)
    assert not certificate
    assert str(certificate).startswith("NOT CERTIFIED: the collapse changed nothing")


def test_inputs_that_do_not_fit_are_refused(model: nn.Module) -> None:
    with pytest.raises(ReparamError, match="the model in float64 raised at batch 0"):
        certify(model, orepa.collapse(model), X[:, :2])


def test_another_text_is_no_certificate() -> None:
    with pytest.raises(ReparamError, match="this is not a certificate"):
        Certificate.from_json('[{"path": "a"}]')


def test_a_digest_sees_names_dtypes_shapes_and_every_bit() -> None:
    base = torch.zeros(2, 3)
    others = [
        ("b", base),
        ("a", base.double()),
        ("a", base.reshape(3, 2)),
        ("a", -base),  # minus zero: equal, and another bit
    ]
    found = {digest([("a", base)]), *(digest([pair]) for pair in others)}
    assert len(found) == 5
