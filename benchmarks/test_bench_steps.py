"""Whole training steps beside the same networks in plain PyTorch; the loader alone; from start to first step."""

import copy
import statistics

import pytest
import torch

from benchmarks import timing, training_step
from benchmarks.timing import DEVICE
from fastcifar import models
from fastcifar.fuse import fuse

ON_GPU = DEVICE.type == "cuda"
# On a CPU compiling one network takes longer than measuring all.
COMPILED = {"torch.compile": {"dynamic": False}}
COMPILED_GPU = COMPILED | {"torch.compile, CUDA graph": {"dynamic": False, "mode": "reduce-overhead"}}
FUSED = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0", "resnet18")
marker = pytest.mark.benchmark(group="training step, bfloat16", timer=timing.replayed)


@marker
@pytest.mark.parametrize(
    ("name", "width", "batch"), [("ds_resnet", 1, 512), ("ds_resnet_x2", 2, 512 if ON_GPU else 128)]
)
def test_step_of_a_classifier(keep, smoke, effort, name, width, batch):
    drawn = training_step.loader(4 if smoke else batch, torch.bfloat16).batch(0)
    compiled = {} if smoke else COMPILED_GPU if ON_GPU else COMPILED if name == "ds_resnet" else {}
    torch.manual_seed(0)
    networks = training_step.plain_ds_resnet(width), models.create_model(name)
    images, labels = drawn.images.float(), drawn.labels
    effort |= {"checked": len(labels), "others": {"ours, with loader": training_step.engine_step(name, len(labels))}}
    rows, rounds = training_step.compare(*networks, images, labels, compiled=compiled, **effort)
    keep("steps", [{"model": name, "batch": len(labels), **row} for row in rows], rounds)
    torch.compiler.reset()


@marker
@pytest.mark.parametrize("name", FUSED)
def test_step_of_a_fused_network(keep, smoke, effort, name):
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs a torchvision that fits this torch: {error}")
    torch.manual_seed(0)
    batch, size = (2, 64) if smoke else (256 if ON_GPU else 16, 224)
    original = getattr(torchvision.models, name)(num_classes=1000)
    # Random drops would differ between the networks.
    for module in original.modules():
        if isinstance(module, (torch.nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    fused = copy.deepcopy(original)
    report = fuse(fused)
    images, labels = torch.randn(batch, 3, size, size, device=DEVICE), torch.randint(0, 1000, (batch,), device=DEVICE)
    compiled = COMPILED if ON_GPU and name == "mobilenet_v2" and not smoke else {}
    # float64 is slow on a CPU.
    effort["checked"] = batch if ON_GPU else 2
    rows, rounds = training_step.compare(original, fused, images, labels, compiled=compiled, **effort)
    kinds = [entry.operator for entry in report.fused]
    about = {"model": name, "input": f"{batch}×3×{size}²", "depthwise groups": kinds.count("depthwise_conv_bn_act")}
    about["batch-norm groups"] = kinds.count("batch_norm_act")
    keep("fused", [{**about, **row} for row in rows], rounds)
    torch.compiler.reset()


@marker
def test_parts_of_a_step(keep, smoke):
    drawn = training_step.loader(4 if smoke else 512, torch.bfloat16).batch(0)
    step = training_step.Step(models.create_model("ds_resnet"), drawn.images.float(), drawn.labels)
    found = training_step.parts(step, rounds=1 if smoke else 5)
    rows = [{"model": "ds_resnet", "batch": len(drawn.labels), "part": p, "ms": 1e3 * s} for p, s in found.items()]
    keep("step-parts", rows, [sum(found.values())])


@pytest.mark.benchmark(group="loader", timer=timing.replayed)
def test_loader_alone(keep, smoke, effort):
    batch = 4 if smoke else 512
    loader, exact = (training_step.loader(batch, dtype) for dtype in (torch.bfloat16, torch.float64))
    torch.testing.assert_close(loader.batch(1).images.double(), exact.batch(1).images, rtol=2**-8, atol=2**-8)
    source = loader.batch(0).images
    target = torch.empty_like(source)
    calls = {"loader": lambda: loader.batch(1), "copy of a batch": lambda: target.copy_(source)}
    found = timing.in_turns(calls, **effort)
    seconds = timing.medians(found)
    rows = [{"what": name, "batch": batch, "ms": 1e3 * s, "images/s": batch / s} for name, s in seconds.items()]
    keep("loader", rows, timing.whole(found["loader"]))


@pytest.mark.benchmark(group="start to first step", timer=timing.replayed)
def test_start_to_first_step(keep, smoke):
    seconds = [training_step.start_up_seconds() for _ in range(1 if smoke else 2)]
    keep("start", [{"start to first step, s": statistics.median(seconds)}], seconds)
