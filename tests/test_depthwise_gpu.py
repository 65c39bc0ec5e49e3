"""The Triton depthwise operator on a GPU: numbers, determinism, CUDA graphs, compiled code."""

import functools

import oracle
import pytest
import torch

from fastcifar import functional
from fastcifar.nn import DepthwiseConvBNAct

pytestmark = pytest.mark.gpu
triton_impl = functools.partial(functional.depthwise_conv_bn_act, impl="triton")
reference_impl = functools.partial(functional.depthwise_conv_bn_act, impl="reference")


def on_gpu(inputs):
    return {name: None if tensor is None else oracle.restride(tensor.cuda(), tensor) for name, tensor in inputs.items()}


GRID = [
    ((2, 5, 7, 6), 3, 1, 1, 1),
    ((4, 64, 33, 31), 3, 2, 1, 1),
    ((2, 40, 19, 18), 5, 1, 2, 1),
    ((3, 16, 23, 29), 7, 2, 3, 1),
    ((2, 24, 18, 19), 3, 1, 3, 1),
    ((2, 8, 18, 19), 3, 1, 2, 2),
    ((2, 8, 17, 19), 5, 3, 2, 2),
    ((64, 96, 32, 32), 3, 1, 1, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("shape", "kernel_size", "stride", "padding", "dilation"), GRID, ids=str)
def test_numbers(shape, kernel_size, stride, padding, dilation, dtype):
    inputs = on_gpu(oracle.depthwise_inputs(*shape, kernel_size))
    sizes, floors = {"stride": stride, "padding": padding, "dilation": dilation}, {}
    with torch.no_grad():
        dz = oracle.gradient_like(reference_impl(**inputs, **sizes).shape).cuda()
    if stride > 1:  # y is stored in the dtype of x
        floors["bn_weight"] = oracle.stored_output_floor(inputs, dz, dtype, **sizes, activation="silu")
    options = {**sizes, "activation": "silu", "training": True, "momentum": 0.3}
    oracle.check(triton_impl, reference_impl, inputs, dtype, dz, floors, **options)


@pytest.mark.parametrize(
    ("shape", "kernel_size", "stride", "dtype"),
    [
        ((2, 5, 7, 6), 3, 1, torch.float32),
        ((2, 8, 9, 7), 5, 1, torch.bfloat16),
        ((2, 12, 9, 8), 3, 2, torch.float16),
    ],
    ids=["3×3", "5×5", "strided"],
)
def test_memcheck(shape, kernel_size, stride, dtype):
    inputs = on_gpu(oracle.depthwise_inputs(*shape, kernel_size))
    x, weight = (inputs.pop(name).to(dtype).requires_grad_() for name in ("x", "weight"))
    z = triton_impl(x, weight, **inputs, stride=stride, padding=kernel_size // 2, training=True)
    z.backward(torch.ones_like(z))
    assert all(tensor.cpu().isfinite().all() for tensor in (z, x.grad, weight.grad))


def step(module, x):
    module.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()
    z = module(leaf)
    z.square().mean().backward()
    return [z.detach(), leaf.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("stride", [1, 2])
def test_runs_are_equal_to_the_bit(stride):
    module = DepthwiseConvBNAct(64, stride=stride, impl="triton").cuda()
    x = torch.randn(32, 64, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    first = step(module, x)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, step(module, x), strict=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_step_can_be_captured(stride):
    module = DepthwiseConvBNAct(32, stride=stride, impl="triton").cuda()
    x = torch.randn(8, 32, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(module, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, x)
    x.normal_()
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(module, x), strict=True))


def test_compiled_code_equals_eager_code():
    module = DepthwiseConvBNAct(32, stride=2, activation="hardswish", impl="triton").cuda()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(8, 32, 16, 16, device="cuda")
    for one, two in zip(step(compiled, x), step(module, x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_addresses_beyond_two_gigabytes():
    """More than 2³¹ elements: the last image must be as right as the first."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    size, layout = (17, 64, 1408, 1408), torch.channels_last
    x = torch.empty(size, device="cuda", dtype=torch.bfloat16, memory_format=layout).zero_()
    x[0].normal_()
    x[-1].copy_(x[0])
    weight = torch.randn(64, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        z = triton_impl(x, weight, None, None, padding=1, training=True)
    assert x.numel() > 2**31 and torch.equal(z[0], z[-1])
