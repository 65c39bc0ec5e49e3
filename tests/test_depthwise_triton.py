"""The Triton kernels of depthwise convolution + batch norm + activation, in the interpreter or on a GPU."""

import functools

import numpy
import oracle
import pytest
import torch
import torch.nn.functional as F
from distributed_case import run_ranks
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastcifar import dispatch, functional, models, reference
from fastcifar.nn import DepthwiseConvBNAct
from fastcifar.validation import ACTIVATIONS, output_size

pytest.importorskip("triton")
triton_impl = functools.partial(functional.depthwise_conv_bn_act, impl="triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernels are tested on it, see test_depthwise_gpu.py"
)


def hold(shape, kernel_size=3, stride=1, padding=1, dilation=1, dtype=torch.float32, activation="relu", **options):
    training = options.pop("training", True)
    inputs = oracle.depthwise_inputs(*shape, kernel_size, **options)
    sizes = (stride,) * 2, (padding,) * 2, (dilation,) * 2
    height, width = output_size(shape[2:], (kernel_size, kernel_size), *sizes)
    dz = oracle.gradient_like((shape[0], shape[1], height, width))
    floors = {}
    if options.get("mean"):
        settings = {"stride": stride, "padding": padding, "activation": activation}
        floors["weight"] = oracle.weight_gradient_floor(inputs, dz, **settings)
    if stride > 1 and training:  # y is stored in the dtype of x
        settings = {"stride": stride, "padding": padding, "dilation": dilation, "activation": activation}
        floors["bn_weight"] = oracle.stored_output_floor(inputs, dz, dtype, **settings)
    expected = functools.partial(functional.depthwise_conv_bn_act, impl="reference")
    oracle.check(
        triton_impl, expected, inputs, dtype, dz, floors, stride=stride, padding=padding, dilation=dilation,
        activation=activation, negative_slope=0.1, training=training, momentum=0.3,
    )  # fmt: skip


GRID = [
    # batch, channels, height, width, kernel, stride, padding, dilation
    ((2, 5, 7, 6), 3, 1, 1, 1),
    ((1, 3, 6, 7), 3, 2, 1, 1),
    ((2, 8, 9, 8), 5, 1, 2, 1),
    ((1, 16, 9, 9), 7, 2, 3, 1),
    ((2, 4, 8, 9), 3, 1, 0, 1),
    ((2, 4, 8, 5), 3, 1, 3, 1),
    ((1, 4, 8, 9), 3, 1, 2, 2),
    ((1, 4, 9, 9), 3, 1, 1, 3),
    ((1, 4, 9, 9), 3, 2, 2, 2),
    ((1, 4, 11, 9), 5, 3, 2, 2),
    ((9, 4, 1, 1), 3, 1, 1, 1),
    ((1, 20, 40, 3), 3, 1, 1, 1),
    ((1, 2, 7, 7), 7, 1, 3, 1),
    ((2, 1, 5, 5), 3, 1, 1, 1),
    ((1, 70, 4, 4), 3, 1, 1, 1),
    ((5, 3, 9, 8), 5, 1, 2, 1),  # dw in two chunks, the second from the middle of a row
]


# The dtype changes loads and stores, not the walk: every other shape shows them.
CASES = [(torch.float32, *case) for case in GRID] + [(torch.float16, *case) for case in GRID[::2]]


@pytest.mark.parametrize(("dtype", "shape", "kernel_size", "stride", "padding", "dilation"), CASES, ids=str)
def test_shapes(dtype, shape, kernel_size, stride, padding, dilation):
    hold(shape, kernel_size, stride, padding, dilation, dtype)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(2, 3), channels=st.integers(1, 40), size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel_size=st.sampled_from([3, 3, 5, 7]), stride=st.integers(1, 3), dilation=st.integers(1, 3),
    padding=st.integers(0, 4), dtype=st.sampled_from([torch.float32, torch.float16]),
    activation=st.sampled_from(["none", "silu"]), training=st.booleans(),
)  # fmt: skip
def test_any_shape(batch, channels, size, kernel_size, stride, dilation, padding, dtype, activation, training):
    """Smooth activations only: beside a kink a rounding decides between two right derivatives."""
    assume(min(output_size(size, (kernel_size,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2)) > 0)
    hold(
        (batch, channels, *size), kernel_size, stride, padding, dilation, dtype, activation=activation,
        training=training,
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, training):
    hold((2, 6, 5, 4), activation=activation, training=training)


@pytest.mark.parametrize("layout", ["channels-last", "contiguous", "sliced"])
@pytest.mark.parametrize("stride", [1, 2])
def test_layouts(layout, stride):
    hold((2, 8, 6, 5), stride=stride, layout=layout, dtype=torch.float16)


@pytest.mark.parametrize("mean", [100.0, 1000.0])
def test_large_means(mean):
    hold((2, 4, 9, 8), padding=0, mean=mean, activation="none")


def test_statistics_of_a_large_mean_keep_their_digits():
    from fastcifar.ops import depthwise  # noqa: F401  (registers the operators)

    x = 1000 + torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.zeros(3, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    mean, variance = torch.ops.fastcifar.depthwise_statistics(x, weight, [1, 1], [1, 1], [1, 1])
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("running", [True, False], ids=["tracked", "untracked"])
def test_absent_parameters(affine, running):
    hold((2, 4, 5, 5), affine=affine, running=running)


@pytest.mark.parametrize("needed", [("x",), ("weight",), ("bn_weight",), ("bn_bias",), ("x", "bn_bias")], ids="+".join)
@pytest.mark.parametrize("stride", [1, 2])
def test_only_needed_gradients(needed, stride):
    inputs = oracle.depthwise_inputs(2, 4, 5, 5, 3)
    got, expected = {}, {}
    for implementation, grads in (("triton", got), ("reference", expected)):
        leaves = {name: tensor.clone().requires_grad_(name in needed) for name, tensor in inputs.items()}
        z = functional.depthwise_conv_bn_act(**leaves, stride=stride, padding=1, training=True, impl=implementation)
        z.backward(oracle.gradient_like(z.shape))
        grads.update({name: leaf.grad for name, leaf in leaves.items()})
    for name in got:
        assert (got[name] is None) == (name not in needed)
        if name in needed:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


def test_empty_batch_is_an_empty_result():
    inputs = oracle.depthwise_inputs(0, 4, 5, 5, 3)
    for training in (True, False):
        z = triton_impl(**inputs, padding=1, training=training)
        assert z.shape == (0, 4, 5, 5)


def test_a_single_value_is_torchs_error():
    inputs = oracle.depthwise_inputs(1, 4, 1, 1, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        triton_impl(**inputs, padding=1, training=True)


def test_every_element_is_written_and_runs_are_equal():
    """torch.empty holds NaN here: what a kernel leaves out would show."""
    inputs = oracle.depthwise_inputs(2, 6, 7, 6, 3)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            for stride in (1, 2):
                leaves = {n: t.clone().requires_grad_(not n.startswith("running")) for n, t in inputs.items()}
                z = triton_impl(**leaves, stride=stride, padding=1, training=True)
                z.backward(oracle.gradient_like(z.shape))
                results.append([z, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)])
    finally:
        torch.use_deterministic_algorithms(False)
    for tensors in results:
        assert all(torch.isfinite(tensor).all() for tensor in tensors)
    for first, second in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_x_and_statistics_are_kept():
    inputs = oracle.depthwise_inputs(2, 8, 16, 16, 3)
    leaves = {name: t.clone().requires_grad_(not name.startswith("running")) for name, t in inputs.items()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        triton_impl(**leaves, padding=1, training=True)
    assert sum(kept.values()) <= 1.05 * leaves["x"].numel() * 4


def test_double_backward_is_a_clear_error():
    inputs = oracle.depthwise_inputs(2, 4, 5, 5, 3)
    x = inputs["x"].requires_grad_()
    z = triton_impl(**inputs, padding=1, training=True)
    (gradient,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocast_casts_the_convolution_only():
    module = DepthwiseConvBNAct(4, impl="triton")
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        z = module(x)
    assert z.dtype == torch.float16
    z.sum().backward()
    assert module.weight.grad.dtype == module.bn_weight.grad.dtype == x.grad.dtype == torch.float32


OPCHECK_LAYOUTS = ["channels-last", "contiguous", "sliced", "one channel"]


@pytest.mark.parametrize("layout", OPCHECK_LAYOUTS)
def test_opcheck(layout):
    from fastcifar.ops import depthwise  # noqa: F401  (registers the operators)

    channels = 1 if layout == "one channel" else 4
    inputs = oracle.depthwise_inputs(2, channels, 5, 4, 3, layout="contiguous" if channels == 1 else layout)
    x, weight, gamma, beta, *_ = inputs.values()
    sizes, act = ([1, 1], [1, 1], [1, 1]), (1e-5, "silu", 0.01)
    statistics = torch.ops.fastcifar.depthwise_statistics(x, weight, *sizes)
    norm = gamma, beta, statistics
    dz, terms = oracle.gradient_like(x.shape), torch.zeros(2, channels)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operators = torch.ops.fastcifar
    for operator, arguments in (
        (operators.depthwise_statistics, (x, weight, *sizes)),
        (operators.depthwise_apply, (x, weight, *norm, *sizes, *act)),
        (operators.depthwise_reduce, (dz, x, weight, *norm, *sizes, *act)),
        (operators.depthwise_gradients, (dz, x, weight, *norm, terms, *sizes, *act, True, True)),
        (operators.depthwise_convolve, (x, weight, *sizes)),
        (operators.depthwise_convolution_gradients, (dz, x, weight, *sizes, True, True)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=utilities)


def test_compiles_as_one_graph():
    torch.manual_seed(0)
    module = DepthwiseConvBNAct(4, stride=2, activation="hardswish", impl="triton")
    plain = DepthwiseConvBNAct(4, stride=2, activation="hardswish", impl="triton")
    plain.load_state_dict(module.state_dict())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 6, 5)
    results = []
    for function in (compiled, plain):
        leaf = x.clone().requires_grad_()
        z = function(leaf)
        z.sum().backward()
        results.append((z, leaf.grad))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    for one, two in zip(module.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_gradcheck_of_the_reference():
    inputs = oracle.depthwise_inputs(2, 3, 4, 4, 3)
    tensors = [inputs[name].double().requires_grad_() for name in ("x", "weight", "bn_weight", "bn_bias")]
    for activation in ("none", "silu"):
        options = {"stride": 2, "padding": 1, "activation": activation, "training": True}
        assert torch.autograd.gradcheck(
            lambda *leaves, options=options: functional.depthwise_conv_bn_act(*leaves, impl="reference", **options),
            tensors,
        )


def _on_ranks(rank, world_size, parts, implementation):
    torch.manual_seed(3)
    inputs = oracle.depthwise_inputs(sum(parts), 4, 5, 4, 3)
    begin = sum(parts[:rank])
    x = inputs["x"][begin : begin + parts[rank]].clone().requires_grad_()
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("weight", "bn_weight", "bn_bias")}
    running = {name: inputs[name].clone() for name in ("running_mean", "running_var")}
    z = functional.depthwise_conv_bn_act(
        x, **leaves, **running, stride=2, padding=1, training=True, momentum=0.3, impl=implementation,
        process_group=torch.distributed.group.WORLD if world_size > 1 else None,
    )  # fmt: skip
    dz = oracle.gradient_like((sum(parts), *z.shape[1:]))[begin : begin + parts[rank]]
    z.backward(dz)
    own = {"z": z.detach(), "x": x.grad}
    shared = {name: leaf.grad for name, leaf in leaves.items()}
    return tuple({name: t.numpy() for name, t in part.items()} for part in (own, shared, running))


@pytest.mark.parametrize("parts", [(2, 3), (4, 0)], ids=["different counts", "an empty rank"])
def test_synchronised_statistics_equal_one_process(parts):
    (own, shared, running) = _on_ranks(0, 1, [sum(parts)], "reference")
    ranks = run_ranks(_on_ranks, 2, list(parts), "triton")
    for name, value in own.items():
        numpy.testing.assert_allclose(numpy.concatenate([r[0][name] for r in ranks]), value, rtol=1e-4, atol=1e-5)
    for name, value in shared.items():
        numpy.testing.assert_allclose(sum(r[1][name] for r in ranks), value, rtol=1e-4, atol=1e-5, err_msg=name)
    for rank in ranks:
        for name, value in running.items():
            numpy.testing.assert_allclose(rank[2][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_network_trains_as_with_the_reference(monkeypatch):
    # One large program instead of many small ones: the interpreter pays by the operation.
    from fastcifar.kernels.triton import configs

    monkeypatch.setattr(configs, "tile", lambda *arguments: configs.Tile(1, 64, 32, 32, 4))

    def losses(implementation, dtype):
        torch.manual_seed(0)
        # No kink: two trajectories part for good where a rounding puts a value on the other side of ReLU's.
        options = {"width": 0.25, "strides": (1, 2, 1, 1), "activation": "silu", "impl": "reference"}
        model = models.create_model("ds_resnet", 4, **options).to(dtype)
        for module in model.modules():
            if isinstance(module, DepthwiseConvBNAct):
                module.impl = implementation
        optimiser = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            x, y = torch.randn(8, 3, 3, 3, generator=generator), torch.randint(0, 4, (8,), generator=generator)
            loss = F.cross_entropy(model(x.to(dtype)), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            yield loss.item()

    exact = torch.tensor(list(losses("reference", torch.float64)), dtype=torch.float64)
    low = torch.tensor(list(losses("reference", torch.float32)), dtype=torch.float64)
    oracle.within(torch.tensor(list(losses("triton", torch.float32)), dtype=torch.float64), exact, low, torch.float32)


def test_dispatch_says_what_is_missing(monkeypatch):
    call = dispatch.Call(device=torch.device("cpu"), dtype=torch.float64, kernel_size=(3, 3))
    with pytest.raises(RuntimeError, match="not float64"):
        dispatch.select("depthwise_conv_bn_act", "triton", call)
    with pytest.raises(RuntimeError, match="not 4×4"):
        dispatch.select("depthwise_conv_bn_act", "triton", dispatch.Call(call.device, torch.float32, (4, 4)))
    assert "triton     passed over by auto: Triton's interpreter is for tests" in dispatch.explain(
        "depthwise_conv_bn_act"
    )
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        dispatch.select("depthwise_conv_bn_act", "triton", dispatch.Call(call.device, torch.float32, (3, 3)))


def test_the_reference_is_what_auto_takes_in_the_interpreter():
    call = dispatch.Call(device=torch.device("cpu"), dtype=torch.float64, kernel_size=(3, 3))
    assert dispatch.select("depthwise_conv_bn_act", "auto", call) is reference.depthwise_conv_bn_act
