"""The batched spectral norm as a function: reference, kernels, launches, operators, bad input."""

import pytest
import torch
from oracle import within
from spectral_case import WEIGHTS, draw, operands, unit
from torch.nn.utils import parametrizations

from fastcifar import dispatch, reference_spectral
from fastcifar.functional import spectral_normalize

# For layers this small, several threads wait more for each other than they work.
pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("W/σ", "u", "v", "σ", "dW")


def interpreted():
    """Skips where Triton's kernels cannot run on CPU tensors."""
    call = dispatch.Call(device=torch.device("cpu"), dtype=torch.float32)
    obstacle = dispatch.implementations("spectral_normalize")[0].obstacle(call)
    if obstacle is not None:
        pytest.skip(obstacle)


def run(impl, dtype, iterations, kinds=WEIGHTS, eps=1e-12):
    """All results in float64, a list each of W/σ, u, v, σ and dW."""
    weights, us, vs, gradients = operands(dtype, kinds)
    normalised, new_us, new_vs, sigmas = spectral_normalize(
        weights, us, vs, n_power_iterations=iterations, eps=eps, impl=impl
    )
    torch.autograd.backward(normalised, gradients)
    for weight, value in zip(weights, normalised, strict=True):
        assert value.dtype == dtype and weight.grad.dtype == dtype
        assert value.stride() == weight.stride() or impl == "reference"
    found = [normalised, new_us, new_vs, sigmas, [weight.grad for weight in weights]]
    return [[value.detach().double() for value in values] for values in found]


def compare(impl, dtype, iterations, **options):
    exact = run("reference", torch.float64, iterations, **options)
    low = run("reference", dtype, iterations, **options)
    got = run(impl, dtype, iterations, **options)
    for name, values, exacts, lows in zip(NAMES, got, exact, low, strict=True):
        rounding = dtype if name in ("W/σ", "dW") else torch.promote_types(dtype, torch.float32)
        for kind, value, e, near in zip(options.get("kinds", WEIGHTS), values, exacts, lows, strict=True):
            within(value, e, near, rounding, f"{name} of {kind}")


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_native_keeps_the_budget(dtype, iterations):
    compare("native", dtype, iterations)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_triton_keeps_the_budget(iterations):
    interpreted()
    compare("triton", torch.float32, iterations)


def test_triton_keeps_the_budget_in_float16():
    interpreted()
    compare("triton", torch.float16, 1, kinds=("conv channels-last", "transposed", "tall"))


def test_low_precision_weights_keep_float32_vectors():
    weights, us, vs, _ = operands(torch.bfloat16, ("conv", "linear"))
    normalised, new_us, new_vs, sigmas = spectral_normalize(weights, us, vs, n_power_iterations=2)
    wide = spectral_normalize([w.float() for w in weights], us, vs, n_power_iterations=2)
    assert {t.dtype for t in (*new_us, *new_vs, *sigmas)} == {torch.float32}
    for values, expected in zip((new_us, new_vs, sigmas), wide[1:], strict=True):
        for value, other in zip(values, expected, strict=True):
            torch.testing.assert_close(value, other)
    torch.testing.assert_close(normalised[0], wide[0][0].bfloat16())


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_it_is_what_torch_computes(impl):
    weight = draw(6, 5, 3)
    torch.manual_seed(1)
    norm = parametrizations._SpectralNorm(weight, n_power_iterations=2)
    u, v = norm._u.clone(), norm._v.clone()
    leaves = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = norm(leaves[0])
    (value,), (new_u,), (new_v,), _ = spectral_normalize([leaves[1]], [u], [v], n_power_iterations=2, impl=impl)
    gradient = draw(6, 5, 3, seed=1)
    expected.backward(gradient)
    value.backward(gradient)
    for ours, other in ((value, expected), (new_u, norm._u), (new_v, norm._v), (leaves[1].grad, leaves[0].grad)):
        torch.testing.assert_close(ours, other, rtol=2e-6, atol=2e-7)


def test_norms_below_eps_divide_by_eps():
    weights, us, vs, _ = operands(torch.float32, ("linear",))
    small = [1e-4 * weights[0].detach()]
    expected = spectral_normalize(small, us, vs, eps=0.1, impl="reference")
    assert expected[1][0].norm() < 0.5
    for impl in ("native", "triton"):
        if impl == "triton":
            interpreted()
        for values, others in zip(spectral_normalize(small, us, vs, eps=0.1, impl=impl), expected, strict=True):
            torch.testing.assert_close(values, others, rtol=1e-5, atol=0)


def test_nan_reaches_every_result():
    weights, us, vs, _ = operands(torch.float32, ("linear",))
    bad = weights[0].detach().clone()
    bad[1, 2] = float("nan")
    for impl in ("reference", "native"):
        for values in spectral_normalize([bad], us, vs, impl=impl):
            assert values[0].isnan().all(), impl


def test_weights_with_gaps_and_vectors_with_strides():
    weight = draw(6, 8)[:, ::2].requires_grad_()
    u, v = unit(6, 1).float(), torch.stack([unit(4, 2).float()] * 2, 1)[:, 0]
    results = [spectral_normalize([weight], [u], [v], impl=impl) for impl in ("native", "reference")]
    gradients = [torch.autograd.grad(value.square().sum(), weight)[0] for (value,), *_ in results]
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_threads_do_not_change_a_bit():
    shapes = [(300, 900), (40, 30), (250, 1000), (16, 64)]
    weights = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    us = [unit(shape[0], i).float() for i, shape in enumerate(shapes)]
    vs = [unit(shape[1], 9 + i).float() for i, shape in enumerate(shapes)]
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            results.append(spectral_normalize(weights, us, vs, impl="native"))
        finally:
            torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("iterations", [0, 1])
def test_gradcheck(iterations, impl):
    weights, us, vs, _ = operands(torch.float64, ("linear", "transposed"))
    # Once u and v have converged, moving W does not move σ by way of them to first order.
    us, vs = spectral_normalize([weight.detach() for weight in weights], us, vs, n_power_iterations=60)[1:3]

    def function(*leaves):
        return tuple(spectral_normalize(leaves, us, vs, n_power_iterations=iterations, impl=impl)[0])

    assert torch.autograd.gradcheck(function, weights, atol=1e-6)
    if impl == "reference" and iterations == 0:
        assert torch.autograd.gradgradcheck(function, weights, atol=1e-5)


def test_double_backward_through_kernels_is_refused():
    weights, us, vs, _ = operands(torch.float32, ("linear",))
    (value,), *_ = spectral_normalize(weights, us, vs, impl="native")
    (gradient,) = torch.autograd.grad(value.square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_weights_that_nobody_needs_get_no_gradient():
    weights, us, vs, _ = operands(torch.float32, ("linear", "conv", "wide"))
    normalised, *_ = spectral_normalize(weights, us, vs, impl="native")
    normalised[1].sum().backward()
    assert [weight.grad is None for weight in weights] == [True, False, True]


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.kernel.__name__)
        return self.kernel[grid]


@pytest.mark.parametrize("layers", [1, 7, 40])
@pytest.mark.parametrize("iterations", [1, 2])
def test_launches(layers, iterations, monkeypatch):
    interpreted()
    from fastcifar.kernels.triton import spectral_launch

    launches = []
    for name in ("rows", "columns", "apply", "gradient"):
        kernel = getattr(spectral_launch, f"spectral_{name}_kernel")
        monkeypatch.setattr(spectral_launch, f"spectral_{name}_kernel", Counted(kernel, launches))
    weights = [draw(2 + i % 3, 3 + i % 4, seed=i).requires_grad_() for i in range(layers)]
    us, vs = [unit(len(w), 1).float() for w in weights], [unit(w.shape[1], 2).float() for w in weights]
    normalised, *_ = spectral_normalize(weights, us, vs, n_power_iterations=iterations, impl="triton")
    assert len(launches) == 1 + 2 * iterations
    torch.autograd.backward(normalised, [torch.ones_like(w) for w in weights])
    assert len(launches) == 1 + 2 * iterations + 1
    if iterations == 1:
        assert len(launches) <= 3 + 1


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_opcheck(impl):
    if impl == "triton":
        interpreted()
    weights, us, vs, gradients = operands(torch.float32, ("linear", "conv channels-last"))
    weights = [weight.detach() for weight in weights]
    operators = torch.ops.fastcifar
    torch.library.opcheck(operators.spectral_normalize.default, (weights, us, vs, 1, 1e-12, impl))
    normalised, vectors, _, sigmas = operators.spectral_normalize(weights, us, vs, 0, 1e-12, impl)
    from fastcifar.ops.spectral_layout import arrange

    table = list(arrange(weights, [0, 0])[1].table)
    torch.library.opcheck(operators.spectral_gradient.default, (gradients, normalised, vectors, sigmas, table, impl))


@pytest.mark.parametrize("impl", ["native", "reference", "auto"])
def test_compiles_as_one_graph(impl):
    weights, us, vs, gradients = operands(torch.float32, ("linear", "conv", "transposed channels-last"))

    def function(weights, us, vs):
        normalised, new_us, new_vs, sigmas = spectral_normalize(weights, us, vs, impl=impl)
        return [2 * value for value in normalised], new_us, new_vs, sigmas

    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        for weight in weights:
            weight.grad = None
        found = call(weights, us, vs)
        torch.autograd.backward(found[0], gradients)
        results.append([*(v.detach() for values in found for v in values), *(weight.grad for weight in weights)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_autocast_leaves_it_alone():
    weights, us, vs, _ = operands(torch.float32, ("linear", "conv"))
    for impl in ("reference", "native"):
        expected = spectral_normalize(weights, us, vs, impl=impl)
        with torch.autocast("cpu", torch.bfloat16):
            got = spectral_normalize(weights, us, vs, impl=impl)
        for values, others in zip(got, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(values, others, strict=True))


def test_equal_shapes_are_stacked(monkeypatch):
    products = []
    monkeypatch.setattr(torch, "bmm", lambda a, b: products.append(a.shape) or torch.matmul(a, b))
    weights = [draw(4, 6, seed=i) for i in range(5)]
    us, vs = [unit(4, i).float() for i in range(5)], [unit(6, i).float() for i in range(5)]
    got = reference_spectral.spectral_normalize(weights, us, vs)
    assert products == [(5, 4, 6), (5, 6, 4)]
    for i in range(5):
        alone = reference_spectral.spectral_normalize(weights[i : i + 1], us[i : i + 1], vs[i : i + 1])
        for values, others in zip(got, alone, strict=True):
            torch.testing.assert_close(values[i], others[0])


def test_static_cases_name_every_argument():
    pytest.importorskip("triton")
    from fastcifar.kernels.triton import KERNEL_MODULES, spectral_launch

    assert "spectral_launch" in KERNEL_MODULES
    cases = list(spectral_launch.static_cases())
    assert {case.kernel.__name__.split("_")[1] for case in cases} == {"rows", "columns", "apply", "gradient"}
    for case in cases:
        assert {*case.types, *case.constants} == {*case.kernel.arg_names}, case.label


W, U, V = (5, 3), (5,), (3,)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(us=[]), ValueError, "one tensor each a layer, got 1, 0 and 1"),
        (dict(weights=[], us=[], vs=[]), ValueError, "got 0, 0 and 0"),
        (dict(us=[torch.ones(4)]), ValueError, r"us\[0\] must have shape \(5,\) for a weight of \(5, 3\), got \(4,\)"),
        (dict(vs=[torch.ones(1, 3)]), ValueError, r"vs\[0\] must have shape \(3,\)"),
        (dict(weights=[torch.ones(5)]), ValueError, "at least two dimensions"),
        (dict(weights=[torch.ones(5, 0)], vs=[torch.ones(0)]), ValueError, "one element"),
        (dict(weights=[torch.ones(5, 3).int()]), TypeError, "floating point, got torch.int32"),
        (dict(weights=["w"]), TypeError, r"weights\[0\] must be a tensor, got str"),
        (dict(us=[torch.ones(5).half()]), TypeError, r"us\[0\] must be torch.float32 for a weight of torch.float32"),
        (dict(us=[torch.ones(5, device="meta")]), ValueError, "is on meta but"),
        (dict(n_power_iterations=-1), ValueError, "int ≥ 0, got -1"),
        (dict(n_power_iterations=1.0), ValueError, "int ≥ 0, got 1.0"),
        (dict(eps=0.0), ValueError, "eps must be > 0, got 0.0"),
        (dict(impl="cuda"), ValueError, "unknown impl 'cuda'"),
        (dict(weights=[torch.ones(W).double()], us=[torch.ones(U).double()], vs=[torch.ones(V).double()],
              impl="triton"), RuntimeError, "not float64"),
        (dict(weights=[torch.ones(W).half()], impl="native"), RuntimeError, "not float16"),
    ],
    ids=["no u", "empty", "u size", "v shape", "vector", "no elements", "integers", "text", "u dtype", "device",
         "negative", "fraction", "eps", "impl", "triton float64", "native float16"],
)  # fmt: skip
def test_bad_input(change, error, words):
    if change.get("impl") == "triton":
        interpreted()
    arguments = {"weights": [torch.ones(W)], "us": [torch.ones(U)], "vs": [torch.ones(V)], **change}
    with pytest.raises(error, match=words):
        spectral_normalize(arguments.pop("weights"), arguments.pop("us"), arguments.pop("vs"), **arguments)


def test_it_says_why_another_implementation_runs():
    text = dispatch.explain("spectral_normalize", dispatch.Call(torch.device("cpu"), torch.bfloat16))
    assert "float32 and float64 weights, not bfloat16" in text
