"""`python -m benchmarks.fuse`: a training step of torchvision's models, original and after `fastcifar.fuse`.

Channels-last, autocast to bfloat16, SGD; interleaved medians. On a GPU also the original under torch.compile. Writes
results/fuse-DEVICE.json.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import reporting
from fastcifar import native
from fastcifar.fuse import fuse

MODELS = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0", "resnet18")


def step_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A function that trains the model on one batch."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()

    return step


def measure(name: str, batch: int, size: int, device: torch.device, rounds: int) -> dict[str, object]:
    """The row of one model."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=1000).to(device, memory_format=torch.channels_last)
    fused = copy.deepcopy(model)
    report = fuse(fused)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)
    calls = {"original": step_of(model, images, labels), "fused": step_of(fused, images, labels)}
    if device.type == "cuda":
        calls["torch.compile"] = step_of(torch.compile(copy.deepcopy(model)), images, labels)
    seconds = reporting.interleaved(calls, rounds=rounds)
    kinds = [entry.operator for entry in report.fused]
    row: dict[str, object] = {"model": name, "input": f"{batch}×3×{size}²"}
    row |= {
        "depthwise groups": kinds.count("depthwise_conv_bn_act"),
        "batch-norm groups": kinds.count("batch_norm_act"),
    }
    row |= {f"{label}, ms": 1000 * value for label, value in seconds.items()}
    row["original / fused"] = seconds["original"] / seconds["fused"]
    return row


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuse", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="images (default 16 on a CPU, 256 on a GPU)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=MODELS)
    options = parser.parse_args()
    device = torch.device(options.device)
    native.tune_allocator()
    batch = options.batch_size or (256 if device.type == "cuda" else 16)
    rows = [measure(name, batch, options.size, device, options.rounds) for name in options.models]
    print(reporting.table(rows))
    print(reporting.save(f"fuse-{device.type}", {"rows": rows}))


if __name__ == "__main__":
    main()
