"""Tells what a layer is: a conv, a norm that can be folded, an activation, an idle one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from orepa_compiler.algebra.maps import Axes, Maps, second
from orepa_compiler.algebra.overriding import has_torch_forward, overriding_reason

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Layers of libraries that are never imported here, known by where their class is defined.
FROZEN_NORMS = {"torchvision.ops.misc.FrozenBatchNorm2d"}
NORMS_WITH_ACTIVATION = {
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
}
_DROPOUTS = {"timm.layers.drop.DropPath", "torchvision.ops.stochastic_depth.StochasticDepth"}
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "timm.layers.activations")


# How many axes may stand behind the channels of what a norm takes; none given: any number.
_RANKS: dict[type | None, tuple[int, ...]] = {
    nn.BatchNorm1d: (0, 1),
    nn.BatchNorm2d: (2,),
    nn.BatchNorm3d: (3,),
    nn.SyncBatchNorm: (),
    nn.InstanceNorm1d: (1,),
    nn.InstanceNorm2d: (2,),
    nn.InstanceNorm3d: (3,),
}


def own_forward_reason(layer: nn.Module) -> str | None:
    """Why this conv cannot be read as a plain one, or None where it is plain."""
    if isinstance(layer, _ConvTransposeNd):
        return f"{type(layer).__name__} is a transposed conv"
    if not isinstance(layer, CONVS):
        return f"{type(layer).__name__} is not a conv"
    return overriding_reason(layer)


def is_plain_conv(layer: nn.Module) -> bool:
    return own_forward_reason(layer) is None


def is_conv_like(layer: nn.Module) -> bool:
    """Whether the plan must say something about this layer: any torch conv, transposed too.

    The conv inside a block, which holds no kernel of its own, is none.
    """
    return isinstance(layer, _ConvNd) and hasattr(layer, "weight")


def computes_kernel(layer: nn.Module) -> bool:
    """Whether a layer is a conv by its name and weight, and none of torch (CondConv2d).

    Its forward makes, or applies, the kernel in a way of its own.
    """
    named = "Conv" in type(layer).__name__ and not isinstance(layer, _ConvNd)
    return named and "weight" in dict(layer._parameters) and hasattr(layer, "kernel_size")


def is_norm(layer: nn.Module) -> bool:
    """Whether the layer normalizes: torch norms and layers named for it, not blocks of layers."""
    if isinstance(layer, (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)):
        return True
    if "Norm" not in type(layer).__name__ or any(isinstance(m, _ConvNd) for m in layer.modules()):
        return False
    has_tensors = any(True for _ in (*layer.parameters(False), *layer.buffers(False)))
    return has_tensors or not layer._modules


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether the layer is a norm that is affine in eval mode, so that a conv can absorb it."""
    name = qualified_name(layer)
    is_known = name in FROZEN_NORMS | NORMS_WITH_ACTIVATION or isinstance(layer, _BatchNorm)
    return is_known or is_tracked_instance_norm(layer)


def is_tracked_instance_norm(layer: nn.Module) -> bool:
    """Whether the layer normalizes each image in train mode, and by running statistics in eval."""
    return isinstance(layer, _InstanceNorm) and isinstance(layer.running_mean, Tensor)


def norm_maps(layer: nn.Module) -> Maps | None:
    """The maps that such a norm reads, and gives; None where it is not affine."""
    mean = layer.running_mean
    if not isinstance(mean, Tensor) or not isinstance(layer.running_var, Tensor):
        return None
    return Maps(mean.shape[0], norm_axes(layer))


def norm_axes(layer: nn.Module) -> Axes:
    if qualified_name(layer) in NORMS_WITH_ACTIVATION and isinstance(layer, _BatchNorm):
        return second()  # which asks for no number of axes
    bases = (base for base in _RANKS if base and isinstance(layer, base))
    return second(*_RANKS.get(next(bases, None), (2,)))  # the frozen ones are for images


def has_activation(layer: nn.Module) -> bool:
    """Whether the layer is a norm with an activation inside, or with a place for one."""
    return qualified_name(layer) in NORMS_WITH_ACTIVATION


def holds_kernel(layer: nn.Module) -> bool:
    """Whether the layer's parameters are more than a norm's: a conv, a block, a layer like them."""
    return not is_norm(layer) and any(True for _ in layer.parameters())


def is_activation(layer: nn.Module) -> bool:
    module = type(layer).__module__
    return module.startswith(_ACTIVATION_MODULES) and not isinstance(layer, nn.MultiheadAttention)


def is_dropout(layer: nn.Module) -> bool:
    """Whether the layer drops values in train mode and gives its input back in eval mode."""
    if isinstance(layer, _DropoutNd):
        return has_torch_forward(layer)
    return qualified_name(layer) in _DROPOUTS and "forward" not in vars(layer)


def is_idle(layer: nn.Module) -> bool:
    """Whether the layer, in the mode it is in, gives its input back."""
    if isinstance(layer, nn.Identity):
        return has_torch_forward(layer)
    return is_dropout(layer) and not layer.training


def qualified_name(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def is_channels_last(kernel: Tensor) -> bool:
    """Whether a 2-d kernel lies in memory with its channels last."""
    if kernel.dim() != 4 or kernel.is_contiguous():
        return False
    return kernel.is_contiguous(memory_format=torch.channels_last)
