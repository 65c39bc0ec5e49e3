"""Fuse a torchvision model in place, check that it computes the same, and time a training step before and after.

python examples/fuse_torchvision.py --model mobilenet_v2 --batch 16 --size 224
"""

import argparse
import copy
import statistics
import time

import torch
import torchvision

import fastcifar


def step(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    started = time.perf_counter()
    model(images).square().mean().backward()
    return time.perf_counter() - started


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    original = torchvision.models.get_model(options.model, weights=None, num_classes=100)
    fused = copy.deepcopy(original)

    # The one line. Parameters, state-dict keys and optimisers made before stay valid.
    print(fastcifar.fuse(fused))

    images = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)
    for model in (original, fused):
        model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        difference = (original.eval()(images) - fused.eval()(images)).abs().max().item()
    print(f"largest difference of the outputs in evaluation: {difference:.2g}")

    times = {"original": [], "fused": []}
    for _ in range(options.rounds + 1):
        times["original"].append(step(original.train(), images))
        times["fused"].append(step(fused.train(), images))
    for name, values in times.items():
        print(f"{name}: {1000 * statistics.median(values[1:]):.1f} ms a training step")

    # And back: the exact original classes again.
    print(f"{fastcifar.unfuse(fused)} modules changed back")


if __name__ == "__main__":
    main()
