"""The AdaIN decoder's fast forms beside what they stand for."""

import pytest
import torch
from siv_plugins import adain
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


def plain_doubling(convolution, x):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), convolution.weight, convolution.bias, padding=1)


def plain_adain(x, parameters, one_plus):
    """Of Huang & Belongie: a sample and channel at a time."""
    out = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            offset, scale = parameters[n, 2 * c], parameters[n, 2 * c + 1]
            variance = x[n, c].var(unbiased=False)
            out[n, c] = (scale + 1 if one_plus else scale) * (x[n, c] - x[n, c].mean()) / (variance + 1e-5).sqrt() + offset
    return out


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (4, 4), (5, 2)])
def test_a_doubling_convolution_is_the_convolution_of_the_doubled_map(height, width):
    torch.manual_seed(0)
    layer = adain.DoublingConvolution(3, 4).double()
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    mine, theirs = layer(x), plain_doubling(layer, x)
    assert mine.shape == (2, 4, 2 * height, 2 * width)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)
    weight = torch.randn_like(mine)
    of = (x, layer.weight, layer.bias)
    for a, b in zip(torch.autograd.grad(mine, of, weight), torch.autograd.grad(theirs, of, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_its_weights_are_those_of_a_convolution():
    assert {name: value.shape for name, value in adain.DoublingConvolution(3, 4).state_dict().items()} == {
        name: value.shape for name, value in nn.Conv2d(3, 4, 3).state_dict().items()
    }


def test_it_takes_four_products_where_the_doubled_map_takes_nine():
    layer, x = adain.DoublingConvolution(8, 8), torch.randn(2, 8, 16, 16)
    counts = []
    for form in (layer, lambda x: plain_doubling(layer, x)):
        with FlopCounterMode(display=False) as counted:
            form(x)
        counts.append(counted.get_flop_counts()["Global"])
    convolutions = [sum(n for op, n in count.items() if "convolution" in str(op)) for count in counts]
    assert convolutions[0] * 9 == convolutions[1] * 4


@pytest.mark.parametrize("one_plus", [False, True])
def test_adain_is_a_normalisation_of_each_sample_and_channel(one_plus):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    parameters = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    decoder = adain.AdaINDecoder({"class": 2, "content": 2}, (4,), (4, 4), ((4, 3), (1, 3)), 0.2, one_plus, False, None)
    mine, theirs = decoder.adain(x, parameters), plain_adain(x, parameters, one_plus)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)
    weight = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad(y, (x, parameters), weight) for y in (mine, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_map_of_one_pixel_normalises_to_nothing():
    x, scale, offset = torch.randn(2, 3, 1, 1), torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(adain.normalised(x), torch.zeros_like(x))
    torch.testing.assert_close(adain.normalised(x, scale, offset), offset[..., None, None])


def test_channels_last_maps_are_normalised_alike():
    x, scale, offset = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3), torch.randn(2, 3)
    last = adain.normalised(x.to(memory_format=torch.channels_last), scale.double(), offset.double())
    assert torch.equal(last, adain.normalised(x, scale.double(), offset.double()))
