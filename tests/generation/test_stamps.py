"""Stamps: a change of a tensor is seen, and no tensor is held so that torch could not swap it."""

import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.generation.stamps import Stamp


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_stamp_fits_the_tensors_that_it_was_made_of():
    tensor = nn.Parameter(torch.ones(3))
    stamp = Stamp([tensor])
    assert stamp.fits([tensor])
    assert not stamp.fits([])
    assert not stamp.fits([nn.Parameter(torch.ones(3))])


def test_an_edit_in_place_is_seen():
    tensor = torch.ones(3)
    stamp = Stamp([tensor])
    tensor.add_(1)
    assert not stamp.fits([tensor])


def test_other_memory_under_the_same_tensor_is_seen():
    tensor = nn.Parameter(torch.ones(3))
    stamp = Stamp([tensor])
    tensor.data = torch.zeros(3)
    assert not stamp.fits([tensor])


def test_a_tensor_that_was_swapped_is_seen():
    tensor, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    stamp = Stamp([tensor])
    torch.utils.swap_tensors(tensor, other)
    assert not stamp.fits([tensor])


def test_a_block_that_ran_without_gradients_can_be_converted_by_swapping(swapping):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    big, x = orepa.expand(net, block=orepa.OREPA).eval(), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        before = big(x)
        big.double()
        after = big(x.double())
        big.load_state_dict({name: 2 * value for name, value in big.state_dict().items()})
        assert not torch.allclose(big(x.double()), after)
    assert torch.allclose(before.double(), after, rtol=1e-4, atol=1e-5)
