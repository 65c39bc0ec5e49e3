"""Batch norm + residual + activation on the compiled CPU core."""

import functools

import numpy
import oracle
import pytest
import torch
from batch_norm_case import hold as hold_any
from batch_norm_case import hold_corners, hold_infinity, inputs_of, reference_impl
from distributed_case import run_ranks

from fastcifar import functional, native
from fastcifar.nn import BatchNormAct
from fastcifar.validation import ACTIVATIONS

pytestmark = pytest.mark.skipif(native.module() is None, reason=f"no compiled module: {native.why_not()}")
native_impl = functools.partial(functional.batch_norm_act, impl="native")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


hold = functools.partial(hold_any, "native")
SHAPES = [(3, 37, 5, 7), (9, 16, 1, 1), (64, 8, 9, 9), (5, 1, 4, 4), (7, 130), (4, 20, 11), (2, 6, 3, 4, 5)]


@DTYPES
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, residual, dtype):
    hold(shape, dtype, residual=residual, layout="contiguous")


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, training, residual):
    hold((4, 19, 6, 5), activation=activation, training=training, residual=residual)


@pytest.mark.parametrize("layout", ["channels-last", "contiguous", "sliced"])
def test_layouts(layout):
    hold((3, 24, 6, 5), torch.bfloat16, layout=layout)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_absent_parameters(affine):
    hold((3, 9, 4, 4), affine=affine)


def test_variance_of_a_large_mean_keeps_its_digits():
    from fastcifar.ops import batch_norm_native  # noqa: F401  (registers the operators)

    x = 1000 + torch.randn(8, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, variance = torch.ops.fastcifar.native_batch_norm_statistics(x)
    torch.testing.assert_close(variance, x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-8, atol=0)


@pytest.mark.parametrize("level", native.module().isa_levels() if native.module() else [])
def test_each_instruction_set(level):
    before = native.module().isa()
    native.module().set_isa(level)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            hold((3, 37, 5, 7), dtype)
    finally:
        native.module().set_isa(before)


def results(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaves = {
            n: t.clone().requires_grad_(not n.startswith("running")) for n, t in inputs_of((64, 40, 9, 9)).items()
        }
        z = native_impl(**leaves, training=True)
        z.backward(oracle.gradient_like(z.shape))
        return [z.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]
    finally:
        torch.set_num_threads(before)


def test_the_same_for_any_number_of_threads():
    one = results(1)
    for threads in (1, 2, 4):
        assert all(torch.equal(a, b) for a, b in zip(one, results(threads), strict=True))


def test_empty_batch_and_single_value():
    inputs = inputs_of((0, 4, 3, 3))
    assert native_impl(**inputs, training=True).shape == (0, 4, 3, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        native_impl(**inputs_of((1, 4, 1, 1)), training=True)


def test_no_channels():
    z = native_impl(**{**inputs_of((2, 0, 3, 3)), "x": torch.zeros(2, 0, 3, 3, requires_grad=True)}, training=True)
    z.sum().backward()
    assert z.shape == (2, 0, 3, 3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_corners_and_extremes(activation):
    hold_corners("native", activation)


def test_infinity_is_not_hidden():
    hold_infinity("native")


@pytest.mark.parametrize("needed", [("x",), ("residual",), ("weight",), ("bias",), ("x", "residual")], ids="+".join)
def test_only_needed_gradients(needed):
    inputs, found = inputs_of((4, 6, 5, 5)), []
    for function in (native_impl, reference_impl):
        leaves = {name: tensor.clone().requires_grad_(name in needed) for name, tensor in inputs.items()}
        z = function(**leaves, training=True, activation="silu")
        z.backward(oracle.gradient_like(z.shape))
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, gradient in found[0].items():
        assert (gradient is None) == (name not in needed)
        if name in needed:
            torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5)


def test_opcheck():
    from fastcifar.ops import batch_norm_native  # noqa: F401  (registers the operators)

    inputs = inputs_of((3, 6, 5, 4))
    x, weight, bias, residual = (inputs[name] for name in ("x", "weight", "bias", "residual"))
    operators, dz, terms = torch.ops.fastcifar, oracle.gradient_like(x.shape), torch.zeros(2, 6)
    norm = weight, bias, operators.native_batch_norm_statistics(x), 1e-5, "silu", 0.01
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments in (
        (operators.native_batch_norm_statistics, (x,)),
        (operators.native_batch_norm_normalise, (x, residual, *norm)),
        (operators.native_batch_norm_reduce, (dz, x, residual, *norm)),
        (operators.native_batch_norm_gradient, (dz, x, terms, *norm)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=utilities)


def test_compiles_as_one_graph():
    module = BatchNormAct(6, activation="hardswish", impl="native")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, residual = torch.randn(3, 6, 4, 4), torch.randn(3, 6, 4, 4)
    plain = BatchNormAct(6, activation="hardswish", impl="native")
    outcomes = []
    for function in (compiled, plain):
        leaf = x.clone().requires_grad_()
        z = function(leaf, residual)
        z.sum().backward()
        outcomes.append((z, leaf.grad))
    assert all(torch.equal(one, two) for one, two in zip(*outcomes, strict=True))
    assert torch.equal(module.running_var, plain.running_var)


def test_double_backward_is_a_clear_error():
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    z = native_impl(x, None, None, training=True, activation="silu")
    (gradient,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def _on_ranks(rank, world_size, parts, implementation):
    inputs = inputs_of((sum(parts), 4, 5, 4))
    begin = sum(parts[:rank])
    part = slice(begin, begin + parts[rank])
    x, residual = (inputs[name][part].clone().requires_grad_() for name in ("x", "residual"))
    weight, bias = (inputs[name].clone().requires_grad_() for name in ("weight", "bias"))
    running = inputs["running_mean"].clone(), inputs["running_var"].clone()
    z = functional.batch_norm_act(
        x, weight, bias, *running, residual, training=True, impl=implementation, activation="silu",
        process_group=torch.distributed.group.WORLD if world_size > 1 else None,
    )  # fmt: skip
    z.backward(oracle.gradient_like((sum(parts), *z.shape[1:]))[part])
    own = [t.detach().numpy() for t in (z, x.grad, residual.grad)]
    return own, [weight.grad.numpy(), bias.grad.numpy()], [t.numpy() for t in running]


@pytest.mark.parametrize("parts", [(2, 3), (4, 0)], ids=["different counts", "an empty rank"])
def test_synchronised_statistics_equal_one_process(parts):
    own, shared, running = _on_ranks(0, 1, [sum(parts)], "reference")
    ranks = run_ranks(_on_ranks, 2, list(parts), "native")
    for index, value in enumerate(own):
        numpy.testing.assert_allclose(numpy.concatenate([r[0][index] for r in ranks]), value, rtol=1e-4, atol=1e-5)
    for index, value in enumerate(shared):
        numpy.testing.assert_allclose(sum(r[1][index] for r in ranks), value, rtol=1e-4, atol=1e-5)
    for rank in ranks:
        for index, value in enumerate(running):
            numpy.testing.assert_allclose(rank[2][index], value, rtol=1e-5, atol=1e-6)
