"""The compiled CPU core of depthwise convolution + batch norm + activation, with every instruction set it has."""

import contextlib
import functools
import os
import subprocess
import sys

import numpy
import oracle
import pytest
import torch
from distributed_case import run_ranks
from torch.autograd import forward_ad

from fastcifar import dispatch, functional, native
from fastcifar.nn import DepthwiseConvBNAct
from fastcifar.validation import ACTIVATIONS, output_size

pytestmark = pytest.mark.skipif(native.module() is None, reason=f"no compiled module: {native.why_not()}")

native_impl = functools.partial(functional.depthwise_conv_bn_act, impl="native")
reference_impl = functools.partial(functional.depthwise_conv_bn_act, impl="reference")
ISAS = native.module().isa_levels() if native.module() else ["none"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@contextlib.contextmanager
def instruction_set(name):
    before = native.module().isa()
    native.module().set_isa(name)
    try:
        yield
    finally:
        native.module().set_isa(before)


@pytest.fixture(params=ISAS)
def isa(request):
    with instruction_set(request.param):
        yield request.param


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def away_from_the_kink(gradient, inputs, dtype, **options):
    """The gradient, zero where ReLU's derivative hangs on the rounding of y."""
    exact = oracle.run(reference_impl, oracle.rounded(inputs, dtype), torch.float64, None, **options)
    return gradient * (exact["z"].abs() > 16 * torch.finfo(dtype).eps * exact["z"].abs().max())


def hold(shape, kernel_size=3, stride=1, padding=1, dilation=1, dtype=torch.float32, activation="relu", **options):
    training = options.pop("training", True)
    inputs = oracle.depthwise_inputs(*shape, kernel_size, **options)
    sizes = [pair if isinstance(pair, tuple) else (pair, pair) for pair in (stride, padding, dilation)]
    height, width = output_size(shape[2:], (kernel_size, kernel_size), *sizes)
    settings = {"stride": sizes[0], "padding": sizes[1], "dilation": sizes[2], "training": training, "momentum": 0.3}
    gradient = oracle.gradient_like((shape[0], shape[1], height, width))
    if activation == "relu":
        gradient = away_from_the_kink(gradient, inputs, dtype, activation="none", **settings)
    oracle.check(
        native_impl, reference_impl, inputs, dtype, gradient, activation=activation, negative_slope=0.1, **settings
    )


GRID = [
    # batch, channels, height, width, kernel, stride, padding, dilation
    ((2, 5, 7, 6), 3, 1, 1, 1),
    ((3, 3, 9, 7), 3, 2, 1, 1),
    ((2, 37, 33, 21), 3, 2, 1, 1),
    ((3, 21, 19, 10), 3, 1, 1, 1),
    ((2, 8, 9, 8), 5, 1, 2, 1),
    ((2, 18, 13, 12), 5, 2, 2, 1),
    ((2, 16, 9, 11), 7, 1, 3, 1),
    ((2, 16, 19, 17), 7, 2, 3, 1),
    ((2, 4, 8, 9), 3, 1, 0, 1),
    ((2, 4, 8, 5), 3, 1, 3, 1),
    ((1, 18, 20, 20), 7, 2, 9, 1),
    ((1, 4, 8, 9), 3, 1, 2, 2),
    ((2, 4, 13, 13), 3, 1, 1, 3),
    ((2, 4, 13, 11), 3, 2, 2, 2),
    ((4, 4, 23, 21), 5, 3, 2, 2),
    ((2, 4, 12, 11), 4, 1, 2, 1),
    ((2, 20, 13, 14), 2, 3, 0, 1),
    ((2, 4, 13, 11), 1, 1, 0, 1),
    ((2, 4, 13, 11), 3, (2, 1), (0, 2), (1, 2)),
    ((65, 20, 1, 1), 3, 1, 1, 1),
    ((1, 20, 40, 3), 3, 1, 1, 1),
    ((2, 2, 7, 7), 7, 1, 3, 1),
    ((2, 1, 5, 5), 3, 1, 1, 1),
    ((2, 70, 4, 4), 3, 1, 1, 1),
    ((70, 33, 5, 5), 3, 1, 1, 1),
    ((1, 6, 90, 9), 3, 2, 1, 1),
]


@DTYPES
@pytest.mark.parametrize(("shape", "kernel_size", "stride", "padding", "dilation"), GRID, ids=str)
def test_shapes(shape, kernel_size, stride, padding, dilation, dtype):
    hold(shape, kernel_size, stride, padding, dilation, dtype)


@DTYPES
@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 1, 1), (7, 2, 1), (3, 1, 2)], ids=str
)
def test_instruction_sets(isa, kernel_size, stride, dilation, dtype):
    hold((2, 21, 12, 13), kernel_size, stride, kernel_size // 2 * dilation, dilation, dtype, activation="silu")


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa, activation, training):
    hold((2, 19, 6, 5), activation=activation, training=training)


@DTYPES
@pytest.mark.parametrize("layout", ["channels-last", "contiguous", "sliced"])
@pytest.mark.parametrize("stride", [1, 2])
def test_layouts(layout, stride, dtype):
    hold((3, 8, 8, 7), stride=stride, layout=layout, dtype=dtype)


def test_results_are_channels_last():
    inputs = oracle.depthwise_inputs(2, 8, 6, 5, 3, layout="contiguous")
    inputs["x"].requires_grad_()
    z = native_impl(**inputs, padding=1, training=True)
    z.sum().backward()
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert inputs["x"].grad.shape == inputs["x"].shape


@pytest.mark.parametrize("mean", [100.0, 1000.0])
@pytest.mark.parametrize("padding", [0, 1])
def test_large_means(mean, padding):
    hold((3, 4, 9, 8), padding=padding, mean=mean, activation="none")


@pytest.mark.parametrize("padding", [0, 1])
def test_statistics_of_a_large_mean_keep_their_digits(isa, padding):
    from fastcifar.ops import depthwise_native  # noqa: F401  (registers the operators)

    x = 1000 + torch.randn(100, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(5, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    sizes = [1, 1], [padding, padding], [1, 1]
    y, statistics = torch.ops.fastcifar.native_depthwise_statistics(x, weight, *sizes)
    exact = y.double()
    torch.testing.assert_close(statistics[0], exact.mean((0, 2, 3)), rtol=1e-8, atol=0)
    torch.testing.assert_close(statistics[1], exact.var((0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_statistics_are_those_before_rounding():
    """In bfloat16 the values are multiples of 4 at 1000, but their mean and variance are not."""
    from fastcifar.ops import depthwise_native  # noqa: F401  (registers the operators)

    x = (1000 + 8 * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    weight = torch.full((3, 1, 3, 3), 1 / 8).bfloat16()
    y, statistics = torch.ops.fastcifar.native_depthwise_statistics(x, weight, [1, 1], [0, 0], [1, 1])
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), groups=3)
    torch.testing.assert_close(y, exact.bfloat16())
    torch.testing.assert_close(statistics[0], exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(statistics[1], exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_not_a_number_stays_one(isa):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = oracle.depthwise_inputs(2, 18, 5, 5, 3)
        x = inputs["x"].to(dtype)
        x[1, 17, 2, 2] = float("nan")
        arguments = {**inputs, "x": x, "weight": inputs["weight"].to(dtype)}
        for activation in ("relu", "relu6", "leaky_relu", "silu", "hardswish"):
            z = native_impl(**arguments, padding=1, training=False, activation=activation)
            assert z.isnan().nonzero().tolist() == [[1, 17, i, j] for i in (1, 2, 3) for j in (1, 2, 3)]


def test_sixteen_bit_values_round_as_torch_rounds(isa):
    """A 1×1 convolution stores the float32 value it computed: ties, subnormals, overflow."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite() & ((every == 0) | (every.abs() >= torch.finfo(torch.float32).tiny))]
        x = every[: every.numel() // 16 * 16].reshape(1, 16, -1, 1).contiguous(memory_format=torch.channels_last)
        for factor in (1.0, 1.0078125, 0.5, 3.0):
            weight = torch.full((16, 1, 1, 1), factor, dtype=dtype)
            exact = x.float() * weight.float().view(1, 16, 1, 1)
            y, _ = torch.ops.fastcifar.native_depthwise_statistics(x, weight, [1, 1], [0, 0], [1, 1])
            # AVX-512's own narrowing to bfloat16 takes subnormal float32 values for zero.
            normal = exact.abs() >= torch.finfo(torch.float32).tiny
            assert torch.equal(y[normal], exact.to(dtype)[normal])


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("running", [True, False], ids=["tracked", "untracked"])
def test_absent_parameters(affine, running):
    hold((2, 4, 5, 5), affine=affine, running=running)


@pytest.mark.parametrize("needed", [("x",), ("weight",), ("bn_weight",), ("bn_bias",), ("x", "bn_bias")], ids="+".join)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_only_needed_gradients(needed, stride, training):
    inputs = oracle.depthwise_inputs(2, 4, 5, 5, 3)
    got, expected = {}, {}
    for implementation, grads in (("native", got), ("reference", expected)):
        leaves = {name: tensor.clone().requires_grad_(name in needed) for name, tensor in inputs.items()}
        z = functional.depthwise_conv_bn_act(**leaves, stride=stride, padding=1, training=training, impl=implementation)
        z.backward(oracle.gradient_like(z.shape))
        grads.update({name: leaf.grad for name, leaf in leaves.items()})
    for name in got:
        assert (got[name] is None) == (name not in needed)
        if name in needed:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


def test_infinity_is_not_hidden(isa):
    inputs = oracle.depthwise_inputs(2, 18, 5, 5, 3)
    inputs["x"][1, 17, 2, 2] = float("inf")
    z = native_impl(**inputs, padding=1, training=True, activation="relu")
    assert z[:, 17].isnan().all() and z[:, :17].isfinite().all()
    assert inputs["running_var"].isnan().nonzero().tolist() == [[17]]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_forward_mode_is_refused(training):
    """Its tangent must not be dropped where nothing requires a gradient."""
    inputs = oracle.depthwise_inputs(2, 4, 5, 5, 3)
    x = inputs.pop("x")
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp|forward"), forward_ad.dual_level():
        native_impl(forward_ad.make_dual(x, torch.ones_like(x)), **inputs, padding=1, training=training)


def test_no_channels():
    empty = torch.zeros(2, 0, 5, 5), torch.zeros(0, 1, 3, 3)
    y, statistics = torch.ops.fastcifar.native_depthwise_statistics(*empty, [1, 1], [1, 1], [1, 1])
    assert y.shape == (2, 0, 5, 5) and statistics.shape == (2, 0)


def test_empty_batch_is_an_empty_result():
    inputs = oracle.depthwise_inputs(0, 4, 5, 5, 3)
    for training in (True, False):
        assert native_impl(**inputs, padding=1, training=training).shape == (0, 4, 5, 5)


def test_a_single_value_is_torchs_error():
    inputs = oracle.depthwise_inputs(1, 4, 1, 1, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        native_impl(**inputs, padding=1, training=True)


def step(inputs, **options):
    leaves = {name: t.clone().requires_grad_(not name.startswith("running")) for name, t in inputs.items()}
    z = native_impl(**leaves, training=True, **options)
    z.backward(oracle.gradient_like(z.shape).to(z.dtype))
    return [z.detach(), *(t.detach() if t.grad is None else t.grad for t in leaves.values())]


@pytest.mark.parametrize("shape", [(67, 5, 9, 8), (2, 40, 33, 30)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_same_bits_in_every_run_and_with_every_thread_count(shape, stride):
    """torch.empty holds NaN here: what a kernel leaves out would show."""
    inputs = oracle.depthwise_inputs(*shape, 3)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for number in (1, 2, 2, 3, 5):
            with threads(number):
                results.append(step(inputs, stride=stride, padding=1))
    finally:
        torch.use_deterministic_algorithms(False)
    for tensors in results:
        assert all(torch.isfinite(tensor).all() for tensor in tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, results[0], strict=True))


def test_full_size_batch():
    hold((64, 32, 32, 32), dtype=torch.bfloat16)
    hold((64, 32, 32, 32), stride=2)


def test_double_backward_is_a_clear_error():
    inputs = oracle.depthwise_inputs(2, 4, 5, 5, 3)
    x = inputs["x"].requires_grad_()
    z = native_impl(**inputs, padding=1, training=True)
    (gradient,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocast_casts_the_convolution_only():
    module = DepthwiseConvBNAct(4, impl="native")
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z = module(x)
    assert z.dtype == torch.bfloat16
    z.sum().backward()
    assert module.weight.grad.dtype == module.bn_weight.grad.dtype == x.grad.dtype == torch.float32
    assert module.running_mean.dtype == torch.float32


@pytest.mark.parametrize("layout", ["channels-last", "contiguous", "sliced", "one channel"])
def test_opcheck(layout):
    from fastcifar.ops import depthwise_native  # noqa: F401  (registers the operators)

    channels = 1 if layout == "one channel" else 4
    inputs = oracle.depthwise_inputs(2, channels, 5, 4, 3, layout="contiguous" if channels == 1 else layout)
    x, weight, gamma, beta, *_ = inputs.values()
    sizes, act = ([1, 1], [1, 1], [1, 1]), (1e-5, "silu", 0.01)
    operators = torch.ops.fastcifar
    y, statistics = operators.native_depthwise_statistics(x, weight, *sizes)
    norm = gamma, beta, statistics
    dz, terms = oracle.gradient_like(x.shape), torch.zeros(2, channels)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments in (
        (operators.native_depthwise_statistics, (x, weight, *sizes)),
        (operators.native_depthwise_inference, (x, weight, *norm, *sizes, *act)),
        (operators.native_depthwise_gradients, (dz, x, weight, y, *norm, terms, *sizes, *act, True, True)),
        (operators.native_depthwise_gradients, (dz, x, weight, y, *norm, None, *sizes, *act, True, False)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=utilities)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiles_without_graph_break(training):
    torch.manual_seed(0)
    module = DepthwiseConvBNAct(4, stride=2, impl="native").train(training)
    x = torch.randn(2, 4, 6, 5).contiguous(memory_format=torch.channels_last)
    results = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        module.running_mean.zero_()
        leaf = x.clone().requires_grad_()
        z = run(leaf)
        z.sum().backward()
        results.append([z, leaf.grad, module.weight.grad.clone(), module.running_mean.clone()])
    torch.testing.assert_close(results[0], results[1])


SPLIT = (0, 3, 3, 7)


def _rank(rank, world_size, part, others, gradient):
    torch.set_num_threads(1)
    names = ("x", "weight", "bn_weight", "bn_bias", "running_mean", "running_var")
    leaves = dict(zip(names, [torch.from_numpy(t) for t in (part[rank], *others)], strict=True))
    for name in names[:4]:
        leaves[name].requires_grad_()
    z = native_impl(**leaves, padding=1, activation="silu", training=True, process_group=torch.distributed.group.WORLD)
    z.backward(torch.from_numpy(gradient[rank]))
    return [z.detach().numpy(), *(leaves[n].grad.numpy() for n in names[:4]), *(leaves[n].numpy() for n in names[4:])]


def test_ranks_of_different_size_equal_one_process():
    inputs = oracle.depthwise_inputs(SPLIT[-1], 5, 6, 5, 3, mean=3.0)
    gradient = oracle.gradient_like(inputs["x"].shape)
    whole = oracle.run(reference_impl, inputs, torch.float64, gradient, padding=1, activation="silu", training=True)
    low = oracle.run(reference_impl, inputs, torch.float32, gradient, padding=1, activation="silu", training=True)
    parts = [inputs["x"][a:b].numpy() for a, b in zip(SPLIT, SPLIT[1:], strict=False)]
    gradients = [gradient[a:b].numpy() for a, b in zip(SPLIT, SPLIT[1:], strict=False)]
    others = [tensor.numpy() for name, tensor in inputs.items() if name != "x"]
    ranks = run_ranks(_rank, len(parts), parts, others, gradients)
    joined = [numpy.concatenate([rank[i] for rank in ranks]) for i in (0, 1)]
    summed = [sum(rank[i] for rank in ranks) for i in (2, 3, 4)]
    for name, value in zip(("z", "x", "weight", "bn_weight", "bn_bias"), joined + summed, strict=True):
        oracle.within(torch.from_numpy(value).double(), whole[name], low[name], torch.float32, name)
    for i, name in ((5, "running_mean"), (6, "running_var")):
        for rank in ranks:
            oracle.within(torch.from_numpy(rank[i]).double(), whole[name], low[name], torch.float32, name)


def test_dispatch_says_why_not():
    cpu = torch.device("cpu")
    call = functools.partial(dispatch.Call, device=cpu, dtype=torch.float32, kernel_size=(3, 3))
    text = dispatch.explain("depthwise_conv_bn_act", call())
    assert [line for line in text.splitlines() if line.endswith(" runs")][0].split()[0] == "native"
    with pytest.raises(RuntimeError, match="computes float32, float16 and bfloat16, not float64"):
        dispatch.select("depthwise_conv_bn_act", "native", call(dtype=torch.float64))
    with pytest.raises(RuntimeError, match="runs on CPU tensors, not on cuda"):
        dispatch.select("depthwise_conv_bn_act", "native", call(device=torch.device("cuda")))


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="instruction set 'avx1024' cannot run here"):
        native.module().set_isa("avx1024")
    script = "from fastcifar import native; print(native.module().isa())"
    environment = {**os.environ, "FASTCIFAR_ISA": "baseline"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "baseline"
