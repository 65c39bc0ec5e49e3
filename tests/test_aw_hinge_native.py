"""The compiled half of the adaptive-weighted hinge: dtypes, memory layouts, calls made, machine code."""

import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar import native, reference_aw_hinge
from fastcifar.nn import AdaptiveWeightedHinge
from fastcifar.ops import aw_hinge as compiled

SOURCES = pathlib.Path(__file__).resolve().parent.parent / "kernels" / "native"
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(native.module() is None, reason=str(native.why_not()))
OPTIONS = {"alpha1": 0.5, "alpha2": 0.75, "delta": 0.05, "epsilon": 0.05, "normalized": True}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def deep_network(layers, width=9):
    torch.manual_seed(0)
    hidden = [module for _ in range(layers - 1) for module in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 1))


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_terms_equal_autograd(dtype, scaled):
    real, fake = draw(11, dtype=dtype) * 2, draw(6, 1, dtype=dtype, seed=1) * 2
    real[3], fake[2] = 1.0, -1.0
    scaling = {"scale": 0.5, "device_scale": torch.tensor(64.0)} if scaled else {}
    exact = [t.double().requires_grad_() for t in (real, fake)]
    losses = F.relu(1 - exact[0]).mean(), F.relu(1 + exact[1]).mean()
    gradients = torch.autograd.grad(sum(losses) * (32.0 if scaled else 1.0), exact)
    scores = [t.sigmoid().mean() for t in exact]
    expected = torch.stack([*losses, *scores]).detach()
    for run in (compiled, reference_aw_hinge):
        terms, d_real, d_fake = run.hinge_terms(real, fake, **scaling)
        torch.testing.assert_close(terms, expected, rtol=1e-14, atol=0)
        for found, gradient, logits in ((d_real, gradients[0], real), (d_fake, gradients[1], fake)):
            assert found.dtype == dtype and found.shape == logits.shape
            torch.testing.assert_close(found, gradient.to(dtype), rtol=0, atol=0)


def test_terms_of_strided_logits():
    logits = draw(6, 2)
    terms, d_real, _ = compiled.hinge_terms(logits[:, 0], logits[:, 1])
    expected = reference_aw_hinge.hinge_terms(logits[:, 0].clone(), logits[:, 1].clone())
    torch.testing.assert_close(terms, expected[0], rtol=1e-14, atol=0)
    assert torch.equal(d_real, expected[1])


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: torch.cat([t, t], dim=3)[..., : t.shape[3]],
    "expanded": lambda t: t[:, :, :1, :1].expand_as(t),
}


@pytest.mark.parametrize("fake_layout", LAYOUTS)
@pytest.mark.parametrize("real_layout", LAYOUTS)
def test_gradients_of_any_layout(real_layout, fake_layout):
    terms = torch.tensor([1.0, 1.0, 0.4, 0.4], dtype=torch.float64)
    real = [LAYOUTS[real_layout](draw(3, 4, 5, 7)), None]
    fake = [LAYOUTS[fake_layout](draw(3, 4, 5, 7, seed=1)), LAYOUTS[fake_layout](draw(2, 3, 4, 5))]
    expected, _ = reference_aw_hinge.gradient_weights(terms, real, fake, **OPTIONS)
    weights, finite = compiled.gradient_weights(terms, real, fake, **OPTIONS)
    assert finite.item()
    torch.testing.assert_close(weights, expected, rtol=1e-13, atol=1e-16)
    for target_layout in list(LAYOUTS)[:4]:
        outs = [[LAYOUTS[target_layout](torch.ones_like(f).contiguous()) for f in fake] for _ in range(2)]
        for run, targets in zip((compiled, reference_aw_hinge), outs, strict=True):
            run.combine_(targets, real, fake, weights, accumulate=[True, False])
        for found, exact in zip(*outs, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1, 15, 4095, 4096, 4097, 20_001])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sizes_around_a_chunk(dtype, size):
    terms = torch.tensor([1.0, 1.0, 0.8, 0.4], dtype=torch.float64)
    real, fake = draw(size, dtype=dtype), draw(size, dtype=dtype, seed=1)
    expected, _ = reference_aw_hinge.gradient_weights(terms, [real], [fake], **OPTIONS)
    weights, _ = compiled.gradient_weights(terms, [real], [fake], **OPTIONS)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-15)
    found, exact = torch.empty_like(real), torch.empty_like(real)
    compiled.combine_([found], [real], [fake], weights, accumulate=[False])
    reference_aw_hinge.combine_([exact], [real], [fake], weights, accumulate=[False])
    # One rounding of the sum to dtype, and one of float64's in either product.
    terms_size = (weights[0] * real.double()).abs() + (weights[1] * fake.double()).abs()
    budget = exact.double().abs() * torch.finfo(dtype).eps + terms_size * torch.finfo(torch.float64).eps
    assert ((found.double() - exact.double()).abs() <= budget).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_numbers_are_read_and_rounded_as_torch_does(dtype):
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = torch.cat([every[every.isfinite()], torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)])
    found = torch.empty_like(every)
    compiled.combine_([found], [every], [None], weights, accumulate=[False])
    # Zero times the missing gradient leaves every value as it was, -0 apart.
    torch.testing.assert_close(found, every, rtol=0, atol=0, equal_nan=True)

    middles = every.float()[:-3]
    wide = torch.cat([middles * (1 + 2.0**-9), middles * (1 - 2.0**-12), middles * 1.00390625, draw(5000) * 1e-6])
    rounded = torch.empty_like(wide, dtype=dtype)
    compiled.combine_([rounded], [wide], [None], weights, accumulate=[False])
    torch.testing.assert_close(rounded, wide.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_parameters_of_several_dtypes(impl):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5).bfloat16(), nn.Linear(5, 5), nn.Linear(5, 1).double()]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]

    def network(x):
        for layer in layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return x

    hinge = AdaptiveWeightedHinge(parameters, impl=impl)
    found = hinge.backward(network(draw(5, 4)), network(draw(3, 4, seed=1)))
    real = torch.autograd.grad(F.relu(1 - network(draw(5, 4))).mean(), parameters)
    fake = torch.autograd.grad(F.relu(1 + network(draw(3, 4, seed=1))).mean(), parameters)
    squares = [sum(g.double().square().sum() for g in side) + 1e-4 for side in (real, fake)]
    np.testing.assert_allclose([found.norm_real**2, found.norm_fake**2], squares, rtol=1e-13)
    for parameter, r, f in zip(parameters, real, fake, strict=True):
        exact = found.weight_real * r.double() + found.weight_fake * f.double()
        assert parameter.grad.dtype == parameter.dtype
        torch.testing.assert_close(parameter.grad, exact.to(parameter.dtype), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_channels_last_discriminator(impl):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 1))
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network.to(memory_format=memory_format).zero_grad()
        real, fake = (draw(4, 3, 6, 6, seed=s).to(memory_format=memory_format) for s in (1, 2))
        result = AdaptiveWeightedHinge(network.parameters(), impl=impl).backward(network(real), network(fake))
        found.append(([p.grad.clone() for p in network.parameters()], [value.item() for value in result]))
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bits_do_not_depend_on_threads_or_runs(threads):
    terms = torch.tensor([1.0, 1.0, 0.4, 0.4], dtype=torch.float64)
    sizes = (100_003, 7, 60_000)
    real, fake = ([draw(size, seed=seed + size) for size in sizes] for seed in (0, 1))
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        weights, _ = compiled.gradient_weights(terms, real, fake, **OPTIONS)
        targets = [torch.empty_like(r) for r in real]
        compiled.combine_(targets, real, fake, weights, accumulate=[False] * 3)
        results.append((weights, *targets))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layers", [1, 7, 40])
def test_calls_do_not_grow_with_layers(layers, monkeypatch):
    calls = []

    class Counted:
        aw_hinge_chunk = native.module().aw_hinge_chunk

        def __getattr__(self, name):
            return lambda *arguments: calls.append(name) or getattr(module, name)(*arguments)

    module = native.module()
    monkeypatch.setattr(native, "module", Counted)
    network = deep_network(layers)
    AdaptiveWeightedHinge(network.parameters(), impl="native").backward(network(draw(5, 9)), network(draw(4, 9)))
    assert calls == ["aw_hinge_terms", "aw_hinge_weights", "aw_hinge_combine"]
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_kernels_launched_for_forty_layers():
    # On a GPU the second call is two launches, and a launch takes a table of this many parameters.
    table = int(re.search(r"kTableSize = (\d+)", (SOURCES / "aw_hinge.cu").read_text())[1])
    launches = 1 + -(-80 // table) + 1 + -(-80 // table)
    assert (SOURCES / "aw_hinge.cu").read_text().count("<<<") == 4
    assert launches <= 4


def test_refuses_lists_that_do_not_fit():
    module = native.module()
    with pytest.raises(ValueError, match="differ in length"):
        module.aw_hinge_combine([0], [0], [0], [1, 2], [0], [0], [False], 0, -1, 0, 1)
    with pytest.raises(ValueError, match="scalar code 9"):
        module.aw_hinge_terms(0, 0, 0, 0, 1, 1, 9, 0, 0, 1.0, 0, -1, 0)
    with pytest.raises(ValueError, match="workspace is too small"):
        module.aw_hinge_weights(
            [0], [0], [5000], [0], 0, 0, 1.0, 0.5, 0.75, 0.05, 0.05, True, 0, 3, 0, 0, -1, 0, 1
        )  # fmt: skip
    with pytest.raises(ValueError, match="dtype of its target"):
        module.aw_hinge_combine([0], [0], [0], [1], [1], [2], [False], 0, -1, 0, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_calls_without_a_gpu_raise():
    assert native.cuda_obstacle()
    with pytest.raises(RuntimeError, match="aw_hinge: "):
        native.module().aw_hinge_terms(0, 0, 0, 0, 1, 1, 0, 0, 0, 1.0, 0, 0, 0)


@pytest.fixture(scope="module")
def compiler_report(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc to compile the CUDA code, and there is none on PATH")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None or (int(release[1]), int(release[2])) < (12, 8):
        pytest.skip("needs a working nvcc, 12.8 or later, for sm_100")
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90, 100)]
    out = tmp_path_factory.mktemp("cuda") / "aw_hinge.o"
    command = [nvcc, "-std=c++17", "-O3", "-DFASTCIFAR_CUDA=1", *targets, "-Xptxas", "-v", "-c"]
    done = subprocess.run([*command, str(SOURCES / "aw_hinge.cu"), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("architecture", [80, 90, 100], ids="sm_{}".format)
def test_machine_code_spills_nothing(compiler_report, architecture):
    pattern = (
        rf"Compiling entry function '(\S+)' for 'sm_{architecture}'\n.*\n\s+(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    kernels = re.findall(pattern, compiler_report)
    for kernel in ("hinge_terms", "gradient_products", "decide", "combine"):
        assert any(kernel in name for name, *_ in kernels), kernel
    for name, stack, stores, loads, registers in kernels:
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), name
        # 64 leave room for four blocks of 256 threads on a multiprocessor.
        assert int(registers) <= 64, f"{name}: {registers} registers"


@pytest.mark.gpu
def test_gpu_equals_reference_and_is_captured_in_a_graph():
    if native.cuda_obstacle():
        pytest.skip(native.cuda_obstacle())
    network = deep_network(40).cuda()
    images = [draw(n, 9, seed=n).cuda() for n in (5, 4)]
    results = []
    for impl in ("native", "reference"):
        network.zero_grad()
        found = AdaptiveWeightedHinge(network.parameters(), impl=impl).backward(*map(network, images))
        results.append((torch.stack([v.double() for v in found]), [p.grad.clone() for p in network.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-7)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    hinge = AdaptiveWeightedHinge(network.parameters(), impl="native")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            network.zero_grad()
            hinge.backward(*map(network, images))
    torch.cuda.current_stream().wait_stream(stream)
    network.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = hinge.backward(*map(network, images))
    graph.replay()
    torch.testing.assert_close(torch.stack([v.double() for v in found]), results[0][0], rtol=1e-5, atol=1e-7)
