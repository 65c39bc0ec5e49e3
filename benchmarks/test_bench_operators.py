"""The fused operators, forward, backward and both, beside eager and compiled PyTorch and a copy of their input."""

import pytest
import torch

from benchmarks import operators, timing


@pytest.mark.benchmark(group="operators, bfloat16, forward + backward", timer=timing.replayed)
@pytest.mark.parametrize("make", operators.makers(torch.bfloat16), ids=lambda make: "-".join(map(str, make.args[0])))
def test_operator(keep, smoke, effort, request, make):
    subject = operators.tiny(make) if smoke else make()
    compiled = (request.config.getoption("--compile") or subject.shape in operators.COMPILED) and not smoke
    keep("operators", *operators.measure(subject, compiled=compiled, **effort))
    torch.compiler.reset()
