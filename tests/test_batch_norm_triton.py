"""The Triton kernels of batch norm + residual + activation, in the interpreter."""

import functools

import oracle
import pytest
import torch
from batch_norm_case import hold as hold_any
from batch_norm_case import hold_corners, hold_infinity, inputs_of, reference_impl
from distributed_case import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcifar import functional
from fastcifar.nn import BatchNormAct
from fastcifar.validation import ACTIVATIONS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernels are tested on it, see test_batch_norm_gpu.py"
)
triton_impl = functools.partial(functional.batch_norm_act, impl="triton")
hold = functools.partial(hold_any, "triton")
SHAPES = [(3, 37, 5, 7), (9, 16, 1, 1), (16, 8, 9, 9), (5, 1, 4, 4), (7, 130), (4, 20, 11), (2, 6, 3, 4, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
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
    hold((3, 24, 6, 5), torch.float16, layout=layout)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(2, 6), channels=st.integers(1, 70), size=st.integers(1, 9), residual=st.booleans(),
    affine=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_any_shape(batch, channels, size, residual, affine, dtype):
    hold((batch, channels, size), dtype, residual=residual, affine=affine, layout="contiguous")


def test_variance_of_a_large_mean_keeps_its_digits():
    from fastcifar.ops import batch_norm  # noqa: F401  (registers the operators)

    x = 1000 + torch.randn(8, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, variance = torch.ops.fastcifar.batch_norm_statistics(x).double()
    torch.testing.assert_close(variance, x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)


def test_every_element_is_written_and_runs_are_equal():
    """torch.empty holds NaN here: what a kernel leaves out would show."""
    inputs, results = inputs_of((8, 20, 13, 11)), []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            leaves = {n: t.clone().requires_grad_(not n.startswith("running")) for n, t in inputs.items()}
            z = triton_impl(**leaves, training=True)
            z.backward(oracle.gradient_like(z.shape))
            results.append([z.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(tensor).all() for tensor in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty_batch_and_single_value():
    assert triton_impl(**inputs_of((0, 4, 3, 3)), training=True).shape == (0, 4, 3, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        triton_impl(**inputs_of((1, 4, 1, 1)), training=True)


def test_no_channels():
    z = triton_impl(**{**inputs_of((2, 0, 3, 3)), "x": torch.zeros(2, 0, 3, 3, requires_grad=True)}, training=True)
    z.sum().backward()
    assert z.shape == (2, 0, 3, 3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_corners_and_extremes(activation):
    hold_corners("triton", activation)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinity_is_not_hidden():
    hold_infinity("triton")


@pytest.mark.parametrize("layout", ["channels-last", "contiguous", "sliced"])
def test_opcheck(layout):
    from fastcifar.ops import batch_norm  # noqa: F401  (registers the operators)

    inputs = inputs_of((3, 6, 5, 4), layout=layout)
    x, weight, bias, residual = (inputs[name] for name in ("x", "weight", "bias", "residual"))
    operators, dz, terms = torch.ops.fastcifar, oracle.gradient_like(x.shape), torch.zeros(2, 6)
    norm = weight, bias, operators.batch_norm_statistics(x), 1e-5, "silu", 0.01
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments in (
        (operators.batch_norm_statistics, (x,)),
        (operators.batch_norm_normalise, (x, residual, *norm)),
        (operators.batch_norm_reduce, (dz, x, residual, *norm)),
        (operators.batch_norm_reduce, (dz, x, None, *norm)),
        (operators.batch_norm_gradient, (dz, x, terms, *norm)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=utilities)


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    module, plain = (BatchNormAct(6, activation="hardswish", impl="triton") for _ in range(2))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, residual = torch.randn(3, 6, 4, 4), torch.randn(3, 6, 4, 4)
    outcomes = []
    for function in (compiled, plain):
        leaf = x.clone().requires_grad_()
        z = function(leaf, residual)
        z.sum().backward()
        outcomes.append((z, leaf.grad))
    assert all(torch.equal(one, two) for one, two in zip(*outcomes, strict=True))
    assert torch.equal(module.running_var, plain.running_var)


def _on_ranks(rank, world_size, parts, impl):
    inputs = inputs_of((sum(parts), 4, 5, 4))
    part = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    x, residual = (inputs[name][part].clone().requires_grad_() for name in ("x", "residual"))
    weight, bias = (inputs[name].clone().requires_grad_() for name in ("weight", "bias"))
    z = functional.batch_norm_act(
        x, weight, bias, None, None, residual, training=True, impl=impl, activation="silu",
        process_group=torch.distributed.group.WORLD if world_size > 1 else None,
    )  # fmt: skip
    z.backward(oracle.gradient_like((sum(parts), *z.shape[1:]))[part])
    return [t.detach().numpy() for t in (z, x.grad, residual.grad)], [t.grad.numpy() for t in (weight, bias)]


def test_synchronised_statistics_equal_one_process():
    own, shared = _on_ranks(0, 1, [5], "reference")
    ranks = run_ranks(_on_ranks, 2, [2, 3], "triton")
    for i, value in enumerate(own):
        joined = torch.cat([torch.from_numpy(rank[0][i]) for rank in ranks])
        torch.testing.assert_close(joined, torch.from_numpy(value), rtol=1e-4, atol=1e-5)
    for i, value in enumerate(shared):
        summed = sum(torch.from_numpy(rank[1][i]) for rank in ranks)
        torch.testing.assert_close(summed, torch.from_numpy(value), rtol=1e-4, atol=1e-5)


def test_the_comparison_can_fail():
    def wrong(*arguments, **options):
        return 1.001 * reference_impl(*arguments, **options)

    with pytest.raises(AssertionError, match="exceeds the budget"):
        oracle.check(
            wrong, reference_impl, inputs_of((4, 3, 5, 5)), torch.float32, oracle.gradient_like((4, 3, 5, 5)),
            training=True,
        )  # fmt: skip
