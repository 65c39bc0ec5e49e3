"""The Triton batch norm on a GPU: numbers, determinism, CUDA graphs."""

import functools

import oracle
import pytest
import torch
from batch_norm_case import inputs_of, reference_impl, stored_gradient_floors

from fastcifar import functional

pytestmark = pytest.mark.gpu
triton_impl = functools.partial(functional.batch_norm_act, impl="triton")


def on_gpu(shape, **options):
    inputs = inputs_of(shape, **options)
    return {name: None if tensor is None else oracle.restride(tensor.cuda(), tensor) for name, tensor in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("shape", [(3, 37, 5, 7), (64, 96, 33, 31), (7, 130), (4, 20, 11), (256, 64, 32, 32)], ids=str)
def test_numbers(shape, residual, dtype):
    inputs = on_gpu(shape, residual=residual, layout="contiguous")
    dz = oracle.gradient_like(shape).cuda()
    floors = stored_gradient_floors(inputs, dz, dtype, "silu") if residual else None
    oracle.check(triton_impl, reference_impl, inputs, dtype, dz, floors, activation="silu", training=True, momentum=0.3)


@pytest.mark.parametrize(
    ("shape", "residual", "dtype"),
    [((3, 37, 5, 7), True, torch.bfloat16), ((7, 130), False, torch.float32)],
    ids=["residual", "alone"],
)
def test_memcheck(shape, residual, dtype):
    inputs = {n: None if t is None else t.cuda() for n, t in inputs_of(shape, residual=residual).items()}
    inputs |= {n: inputs[n].to(dtype).requires_grad_() for n in ("x", "residual") if inputs[n] is not None}
    z = triton_impl(**inputs, training=True)
    z.backward(torch.ones_like(z))
    assert z.cpu().isfinite().all() and inputs["x"].grad.cpu().isfinite().all()


def step(inputs):
    leaves = {n: t.detach().clone().requires_grad_(not n.startswith("running")) for n, t in inputs.items()}
    z = triton_impl(**leaves, training=True)
    z.square().mean().backward()
    return [z.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def test_runs_are_equal_to_the_bit():
    inputs = on_gpu((32, 64, 32, 32))
    first = step(inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, step(inputs), strict=True))


def test_a_step_can_be_captured():
    inputs = on_gpu((8, 32, 16, 16))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs)
    inputs["x"].normal_()
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(inputs), strict=True))
