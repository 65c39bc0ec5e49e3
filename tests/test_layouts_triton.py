"""How the tensors of Triton's operators may lie in memory: vectors with strides, copies, images far apart."""

import functools

import oracle
import pytest
import torch
from batch_norm_case import inputs_of

from fastcifar import functional

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts and compares in Triton's interpreter")
VECTORS = ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")


def depthwise(kernel_size, stride):
    options = {"stride": stride, "padding": kernel_size // 2}
    function = functools.partial(functional.depthwise_conv_bn_act, training=True, **options)
    return function, oracle.depthwise_inputs(2, 8, 12, 10, kernel_size)


def batch_norm(residual):
    return functools.partial(functional.batch_norm_act, training=True), inputs_of((4, 8, 12, 10), residual=residual)


CASES = {
    "3×3": functools.partial(depthwise, 3, 1),
    "5×5": functools.partial(depthwise, 5, 1),
    "strided": functools.partial(depthwise, 3, 2),
    "batch norm": functools.partial(batch_norm, False),
    "batch norm, residual": functools.partial(batch_norm, True),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", ["column", "expanded"])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_vectors_with_strides(make, kind, training):
    """γ, β and running statistics as columns of matrices; γ and β as one number for all channels."""
    function, inputs = make()
    inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    vectors = [name for name in inputs if name in VECTORS and inputs[name].dim() == 1]
    if kind == "expanded":
        vectors = [name for name in vectors if not name.startswith("running")]
    for name in vectors:
        value = inputs[name]
        inputs[name] = value[:1] if kind == "expanded" else torch.stack([value, torch.full_like(value, 9.0)], 1)
    results = []
    for impl in ("triton", "reference"):
        leaves = {n: t.clone().requires_grad_(not n.startswith("running")) for n, t in inputs.items()}
        views = {name: leaves[name].expand(8) if kind == "expanded" else leaves[name][:, 0] for name in vectors}
        z = function(**{**leaves, **views}, training=training, activation="silu", impl=impl)
        z.backward(oracle.gradient_like(z.shape))
        results.append([z, *(leaf.grad if leaf.requires_grad else leaf for leaf in leaves.values())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["3×3", "5×5", "strided", "batch norm", "batch norm, residual"])
def test_a_layout_is_converted_once(name):
    """x and the residual in forward, dz in backward; the results lie as they do for channels-last tensors."""
    from benchmarks.counting import count_traffic

    function, inputs = CASES[name]()
    names = [name for name in ("x", "residual") if inputs.get(name) is not None]
    strides = []
    for layout in (torch.channels_last, torch.contiguous_format):
        leaves = [inputs[name].contiguous(memory_format=layout).requires_grad_() for name in names]
        given = {name: 1 * leaf for name, leaf in zip(names, leaves, strict=True)}
        with count_traffic() as forward:
            z = function(**{**inputs, **given}, impl="triton")
        dz = oracle.gradient_like(z.shape).contiguous(memory_format=layout)
        with count_traffic() as backward:
            gradients = torch.autograd.grad(z, leaves, dz)
        copies = [[row.written for row in t.rows if row.name == "aten::clone"] for t in (forward, backward)]
        if layout == torch.channels_last:
            assert copies == [[], []]
        else:
            assert copies == [[4 * leaf.numel() for leaf in leaves], [4 * dz.numel()]]
        strides.append([tensor.stride() for tensor in (z, *gradients)])
    assert strides[0] == strides[1]


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (5, 1), (3, 2)], ids=["3×3", "5×5", "strided"])
def test_images_may_lie_far_apart(kernel_size, stride, tmp_path):
    """2³² elements from one image to the next, in a file that is all hole between them; in 32 bits that is none."""
    apart, path = (2**32, 1, 16, 4), tmp_path / "x"
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=2 * (apart[0] + 80))
    path.unlink()
    inputs = oracle.depthwise_inputs(2, 4, 5, 4, kernel_size)
    far = torch.empty(0, dtype=torch.float16).set_(storage, 0, (2, 4, 5, 4), apart).copy_(inputs["x"])
    results = []
    for x in (far, far.contiguous(memory_format=torch.channels_last)):
        x, weight = x.detach().requires_grad_(), inputs["weight"].half().requires_grad_()
        z = functional.depthwise_conv_bn_act(
            x, weight, None, None, stride=stride, padding=kernel_size // 2, training=True, impl="triton"
        )
        z.backward(oracle.gradient_like(z.shape).half())
        results.append((z, x.grad, weight.grad))
    assert far.stride() == apart and all(torch.equal(a, b) for a, b in zip(*results, strict=True))
