"""Quantization-aware training by torch.export: what it is given is the stock net's own program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from tests.norms import randomise_norms


def vgg() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width_in, width in ((3, 4), (4, 6)):
        conv = nn.Conv2d(width_in, width, 3, 2, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    return randomise_norms(net.double())  # type: ignore[return-value]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64)


def exported(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    shapes = ({0: torch.export.Dim.AUTO},)
    return torch.export.export(model.train(), (x,), dynamic_shapes=shapes).module()  # type: ignore[return-value]


def operators(module: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("block", [orepa.OREPA, orepa.REPVGG], ids=lambda block: block.name)
def test_what_is_exported_for_training_is_what_the_stock_net_gives(
    block: orepa.Block, x: Tensor
) -> None:
    big = orepa.expand(vgg(), block=block)
    big(x).square().mean().backward()
    with torch.no_grad():
        for parameter in big.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    expected = big.eval()(x)
    program = exported(orepa.collapse(big, fold_norm=False), x)
    assert operators(program) == operators(exported(vgg(), x))
    assert any("batch_norm" in name for name in operators(program))
    kept = orepa.collapse(big, fold_norm=False)
    torch.testing.assert_close(kept(x), expected)


@pytest.mark.filterwarnings("ignore")  # torchao calls what torch deprecates
def test_the_recipe_prepares_trains_and_converts(x: Tensor) -> None:
    reason = "needs torchao, which is none of our dependencies; docs/training.md has its numbers"
    flow = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason=reason)
    import torchao.quantization.pt2e as pt2e
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    big, x = orepa.expand(vgg()).float(), x.float()
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    quantizer = xnnpack.XNNPACKQuantizer().set_global(config)
    program = exported(orepa.collapse(big, fold_norm=False), x)
    prepared = flow.prepare_qat_pt2e(program, quantizer)
    pt2e.move_exported_model_to_train(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    pt2e.move_exported_model_to_eval(prepared)
    quantized = flow.convert_pt2e(prepared)
    assert any("dequantize" in name for name in operators(quantized))
    assert quantized(x).isfinite().all()
