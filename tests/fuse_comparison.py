"""What the tests of fuse() share: seeded models and inputs, and the comparison of a model with its fused copy."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastcifar import functional
from fastcifar.fuse import fuse


def record_operators(monkeypatch, name="depthwise_conv_bn_act"):
    """A list that gets the activation of each fused operator as it runs; for batch_norm_act, whether it adds, too."""
    calls = []
    operator = getattr(functional, name)

    def recorded(*args, **kwargs):
        adds = args[5] is not None if name == "batch_norm_act" else None
        calls.append(kwargs["activation"] if adds is None else (kwargs["activation"], adds))
        return operator(*args, **kwargs)

    monkeypatch.setattr(functional, name, recorded)
    return calls


def image(channels=4, size=9, dtype=torch.float64, seed=0):
    return torch.randn(3, channels, size, size + 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(build, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.to(dtype)


def optimiser(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9) if parameters else None


def observe(model, x, optimise=None, steps=2):
    """Everything that training steps and an evaluation show, by name; the model is trained, its modes are kept."""
    seen = {}
    modes = [(module, module.training) for module in model.modules()]
    for step in range(steps):
        torch.manual_seed(step)
        leaf = x.clone().requires_grad_()
        output = model(leaf)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        model.zero_grad()
        (output * weights).sum().backward()
        seen |= {f"output {step}": output, f"input gradient {step}": leaf.grad}
        seen |= {f"gradient {step} of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        if optimise is not None:
            optimise.step()
        seen |= {f"buffer {step} {name}": buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        seen["evaluation"] = model(x)
    for module, training in modes:
        module.training = training
    return {name: tensor.detach() for name, tensor in seen.items()}


def assert_alike(expected, got, tolerance=1e-12):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_fused_equals_original(model, x, tolerance=1e-12, steps=2, **options):
    """Trains the model and its fused copy side by side, each with an optimiser made before; returns the report."""
    twin = copy.deepcopy(model)
    optimisers = optimiser(model), optimiser(twin)
    parameters, keys = list(twin.parameters()), list(twin.state_dict())
    modes = [module.training for module in twin.modules()]
    report = fuse(twin, **options)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in parameters]
    assert list(twin.state_dict()) == keys
    assert [module.training for module in twin.modules()] == modes
    assert_alike(observe(model, x, optimisers[0], steps), observe(twin, x, optimisers[1], steps), tolerance)
    return report
