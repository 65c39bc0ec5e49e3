"""Small models for the tests of fuse(): each holds depthwise convolutions in one of the places where they occur."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CHANNELS = 4


def depthwise(**options):
    settings = {"kernel_size": 3, "padding": 1, "groups": CHANNELS, "bias": False, **options}
    return nn.Conv2d(CHANNELS, settings.pop("out_channels", CHANNELS), **settings)


def sequence(*following, **options):
    return nn.Sequential(depthwise(**options), *(following or (nn.BatchNorm2d(CHANNELS), nn.ReLU())))


class Forward(nn.Module):
    """conv, bn and relu, called by the function that it is given."""

    def __init__(self, function, *, conv=None, norm=None, **children):
        super().__init__()
        self.conv = depthwise() if conv is None else conv
        self.bn = nn.BatchNorm2d(CHANNELS) if norm is None else norm
        self.relu = nn.ReLU(inplace=True)
        for name, child in children.items():
            setattr(self, name, child)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Optional(Forward):
    def forward(self, x, residual=None, *, state=object()):  # noqa: B008
        y = self.relu(self.bn(self.conv(x)))
        return y if residual is None else y + residual


class BasicBlock(nn.Module):
    """The residual block of ResNet-18, as torchvision writes it."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class TwoSharingAnActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = depthwise(stride=2), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = depthwise(), nn.BatchNorm2d(CHANNELS)
        self.convs = nn.ModuleList([depthwise(kernel_size=5, padding=2)])
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(CHANNELS)})
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        z = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.norms["a"](self.convs[0](z)) + y)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class ConvNormAct(nn.Sequential):
    def __init__(self, channels):
        super().__init__(depthwise(), nn.BatchNorm2d(channels), nn.SiLU(inplace=True))


class Block(nn.Module):
    """An inverted residual: pointwise, depthwise by function, pointwise."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU6())
        self.conv1, self.bn1 = depthwise(), nn.BatchNorm2d(CHANNELS)
        self.inner = ConvNormAct(CHANNELS)
        self.project = nn.Conv2d(CHANNELS, 2, 1)

    def forward(self, x):
        y = F.hardswish(self.bn1(self.conv1(self.expand(x))))
        return self.project(self.inner(y))


def several():
    """Five groups: two in a Block, three in the other."""
    return nn.Sequential(Block(), nn.Conv2d(2, CHANNELS, 1), TwoSharingAnActivation())


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's class of this name does, and found as that is found."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))

    forward.__module__ = "timm.layers.norm_act"


class BatchNormWithForward(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


class ConvWithForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


SEQUENCES = {
    "no activation": (lambda: sequence(nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, 2, 1)), "none"),
    "relu6": (lambda: sequence(nn.BatchNorm2d(CHANNELS), nn.ReLU6(inplace=True)), "relu6"),
    "leaky_relu": (lambda: sequence(nn.BatchNorm2d(CHANNELS), nn.LeakyReLU(0.3)), "leaky_relu"),
    "silu": (lambda: sequence(nn.BatchNorm2d(CHANNELS), nn.SiLU()), "silu"),
    "hardswish": (lambda: sequence(nn.BatchNorm2d(CHANNELS), nn.Hardswish(inplace=True)), "hardswish"),
    "unknown activation": (lambda: sequence(nn.BatchNorm2d(CHANNELS), nn.GELU()), "none"),
    "stride and dilation": (lambda: sequence(kernel_size=5, stride=(2, 1), padding=(4, 0), dilation=2), "relu"),
    "padding same": (lambda: sequence(padding="same", kernel_size=(3, 5)), "relu"),
    "padding valid": (lambda: sequence(padding="valid"), "relu"),
    "cumulative average": (lambda: sequence(nn.BatchNorm2d(CHANNELS, momentum=None), nn.ReLU()), "relu"),
    "no running statistics": (lambda: sequence(nn.BatchNorm2d(CHANNELS, track_running_stats=False)), "none"),
    "no affine": (lambda: sequence(nn.BatchNorm2d(CHANNELS, eps=0.1, momentum=0.5, affine=False), nn.ReLU()), "relu"),
    "SyncBatchNorm without ranks": (lambda: sequence(nn.SyncBatchNorm(CHANNELS), nn.ReLU()), "relu"),
    "Sequential subclass": (lambda: ConvNormAct(CHANNELS), "silu"),
    "activation within": (lambda: sequence(BatchNormAct2d(CHANNELS, nn.SiLU())), "silu"),
    "no activation within": (lambda: sequence(BatchNormAct2d(CHANNELS, nn.Identity())), "none"),
}

# the activation, and the last member of the group
FORWARDS = {
    "modules": (lambda m, x: m.relu(m.bn(m.conv(x))), "relu", "relu"),
    "F.relu": (lambda m, x: F.relu(m.bn(m.conv(x))), "relu", "relu()"),
    "F.relu inplace": (lambda m, x: F.relu(m.bn(m.conv(x)), inplace=True), "relu", "relu()"),
    "torch.relu": (lambda m, x: torch.relu(m.bn(m.conv(x))), "relu", "relu()"),
    "method relu": (lambda m, x: m.bn(m.conv(x)).relu_(), "relu", "relu_()"),
    "F.relu6": (lambda m, x: F.relu6(m.bn(m.conv(x))), "relu6", "relu6()"),
    "F.silu": (lambda m, x: F.silu(m.bn(m.conv(x))), "silu", "silu()"),
    "F.hardswish": (lambda m, x: F.hardswish(m.bn(m.conv(x))), "hardswish", "hardswish()"),
    "F.leaky_relu": (lambda m, x: F.leaky_relu(m.bn(m.conv(x)), 0.3), "leaky_relu", "leaky_relu()"),
    "F.relu by keyword": (lambda m, x: F.relu(input=m.bn(m.conv(x))), "relu", "relu()"),
    "torch.relu by keyword": (lambda m, x: torch.relu(input=m.bn(m.conv(x))), "none", "bn"),
    "activated elsewhere": (lambda m, x: torch.sigmoid(m.bn(m.conv(x))), "none", "bn"),
    "norm output used twice": (lambda m, x: (lambda y: F.relu(y) + y)(m.bn(m.conv(x))), "none", "bn"),
    "relu before and after": (lambda m, x: m.relu(m.relu(m.bn(m.conv(m.relu(x + 1)))) - 1), "relu", "relu"),
}


def _add_in_place(m, x):
    y = m.bn(m.conv(x))
    y += x
    return m.relu(y)


def _add_into_the_other(m, x):
    y = x * 2
    y += m.bn(m.conv(x))
    return F.relu(y) + y


def _add_what_comes_later(m, x):
    y = m.bn(m.conv(x))
    return F.silu(y + m.relu(m.conv2(x)))


def _without_gradient(m, x):
    with torch.no_grad():
        y = m.bn(m.conv(x))
    return F.relu(y + x)


def _input_used_later(m, x):
    y = m.conv(x)
    z = m.bn(y)
    return z + x + y


# what follows a pointwise convolution: members of the group, activation, and whether the operator gets a residual
RESIDUALS = {
    "activation": (lambda m, x: m.relu(m.bn(m.conv(x))), ("bn", "relu"), "relu", False),
    "function": (lambda m, x: F.hardswish(m.bn(m.conv(x))), ("bn", "hardswish()"), "hardswish", False),
    "norm alone": (lambda m, x: m.bn(m.conv(x)), ("bn",), "none", False),
    "addition": (lambda m, x: m.bn(m.conv(x)) + x, ("bn", "add()"), "none", True),
    "addition from the right": (lambda m, x: x + m.bn(m.conv(x)), ("bn", "add()"), "none", True),
    "addition in place": (_add_in_place, ("bn", "add()", "relu"), "relu", True),
    "addition into the other": (_add_into_the_other, ("bn", "add()"), "none", False),
    "addition of what comes later": (_add_what_comes_later, ("bn", "add()", "silu()"), "silu", True),
    "torch.add": (lambda m, x: m.relu(torch.add(m.bn(m.conv(x)), x)), ("bn", "add()", "relu"), "relu", True),
    "method add_": (lambda m, x: m.bn(m.conv(x)).add_(x).relu(), ("bn", "add_()", "relu()"), "relu", True),
    "scaled addition": (lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2), ("bn",), "none", False),
    "addition of a number": (lambda m, x: m.bn(m.conv(x)) + 1, ("bn",), "none", False),
    "addition to itself": (lambda m, x: (lambda y: y + y)(m.bn(m.conv(x))), ("bn",), "none", False),
    "broadcast addition": (lambda m, x: m.relu(m.bn(m.conv(x)) + x[:1]), ("bn", "add()", "relu"), "none", False),
    "promoted addition": (lambda m, x: m.relu(m.bn(m.conv(x)) + x.float()), ("bn", "add()", "relu"), "none", False),
    "another gradient mode": (_without_gradient, ("bn",), "none", False),
    "input used later": (_input_used_later, ("bn",), "none", False),
}


def _used_twice(m, x):
    y = m.conv(x)
    return m.relu(m.bn(y)) + y


def only_positive(m, x):
    return m.inner(x) if x.abs().sum() > 0 else x


def _data_dependent(m, x):
    return m.relu(m.bn(m.conv(x))) if x.sum() > 0 else x


def _by_mode(m, x):
    y = m.conv(x)
    return m.relu(m.bn(y)) if m.training else y


SKIPPED = {
    "bias": (lambda: sequence(bias=True), "the convolution has a bias"),
    "grouped": (lambda: sequence(groups=2), "not depthwise: 2 groups of 2 channels"),
    "multiplier": (lambda: sequence(nn.BatchNorm2d(8), out_channels=8), "channel multiplier 2"),
    "padding mode": (lambda: sequence(padding_mode="reflect"), "padding_mode is 'reflect'"),
    "uneven same": (lambda: sequence(padding="same", kernel_size=4), "one pixel wider on one side"),
    "one-dimensional": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=4)), "Conv1d has a forward other than"),
    "convolution subclass": (
        lambda: nn.Sequential(ConvWithForward(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4)),
        "ConvWithForward has a forward other than",
    ),
    "no norm": (lambda: sequence(nn.ReLU()), "followed by ReLU, not by BatchNorm2d"),
    "other norm": (lambda: sequence(nn.GroupNorm(2, CHANNELS)), "followed by GroupNorm, not by"),
    "norm subclass": (lambda: sequence(BatchNormWithForward(CHANNELS)), "BatchNormWithForward has its own forward"),
    "odd momentum": (
        lambda: sequence(nn.BatchNorm2d(CHANNELS, momentum=1.5)),
        r"momentum 1.5, which is not in \[0, 1\]",
    ),
    "activation within unknown": (lambda: sequence(BatchNormAct2d(CHANNELS, nn.GELU())), "applies GELU"),
    "lazy": (
        lambda: nn.Sequential(depthwise(), nn.LazyBatchNorm2d()),
        "LazyBatchNorm2d has no shape yet; run the model once",
    ),
    "last": (lambda: nn.Sequential(depthwise()), "Sequential.forward returns its output"),
    "scripted": (lambda: nn.Sequential(torch.jit.script(sequence()), nn.ReLU()), "inside a torch.jit.ScriptModule"),
    "traced": (lambda: nn.Sequential(torch.fx.symbolic_trace(sequence())), "inside a torch.fx.GraphModule"),
    "used twice": (lambda: Forward(_used_twice), "Forward.forward uses its output 2 times"),
    "data dependent": (lambda: Forward(_data_dependent), "Forward.forward cannot be traced: symbolically traced"),
    "differs by mode": (lambda: Forward(_by_mode), "differently in training and in evaluation"),
    "called twice": (lambda: Forward(lambda m, x: m.bn(m.conv(m.conv(x)))), "calls 'conv' 2 times"),
    "norm called twice": (lambda: Forward(lambda m, x: m.bn(m.bn(m.conv(x)))), "calls 'bn' 2 times"),
    "not called": (lambda: Forward(lambda m, x: m.bn(x)), "Forward.forward does not call it"),
    "called by keyword": (lambda: Forward(lambda m, x: m.bn(m.conv(input=x))), "with one positional tensor"),
    "output not used": (lambda: Forward(lambda m, x: (m.conv(x), m.bn(x))[1]), "does not use its output"),
    "function between": (lambda: Forward(lambda m, x: m.bn(F.relu(m.conv(x)))), "followed by relu, not by BatchNorm2d"),
    "checkpoint": (
        lambda: Forward(lambda m, x: checkpoint(lambda y: m.bn(m.conv(y)), x, use_reentrant=False)),
        "calls 'conv' under activation checkpointing",
    ),
}
