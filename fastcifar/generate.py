"""`python -m fastcifar.generate`: images of a trained GAN: sheets, chosen classes, interpolations, sets for metrics."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy
import torch

from fastcifar import command_line, models, validation
from fastcifar.training import checkpoint, environment, recipe, sampling
from fastcifar.training.gan import load_gan


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m fastcifar.generate",
        description="Draws images with a trained GAN. The last line printed names what was written, one JSON object.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a checkpoint or a run folder")
    parser.add_argument("--classes", metavar="NAMES", help="names with commas between; default: ten across all")
    parser.add_argument("--seeds", default="0-7", metavar="NUMBERS", help="a column each, such as 0-7 or 3,14,15")
    parser.add_argument("--truncation", type=command_line.number, default=1.0, help="scale of the latents, 0 to 1")
    parser.add_argument("--interpolate", metavar="A:B", help="from one class to another, as a strip and a GIF")
    parser.add_argument("--frames", type=command_line.whole_number, default=16, help="of the interpolation")
    parser.add_argument("--path", default="spherical", help="of the latents between two seeds: spherical or linear")
    parser.add_argument("--count", type=command_line.whole_number, help="write so many images instead of a sheet")
    parser.add_argument("--format", default="npz", help="of --count: npz or png (a folder a class)")
    parser.add_argument("--no-average", action="store_true", help="the last weights instead of the averaged ones")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--output", metavar="DIR", help="default: generated/ in the run folder")
    return parser


def between(a: torch.Tensor, b: torch.Tensor, share: torch.Tensor, path: str) -> torch.Tensor:
    """Latents [F, Z] on the way from a [Z] to b [Z] at the shares [F]; "spherical" keeps their usual length.

    Source: White, Sampling generative networks, 2016.
    """
    share = share[:, None]
    if path == "linear":
        return torch.lerp(a, b, share)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    if angle < 1e-3:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def _latent(gan: models.GAN, seed: int) -> torch.Tensor:
    return torch.randn(gan.latent_dim, generator=torch.Generator().manual_seed(seed))


def _class_index(gan: models.GAN, name: str, names: tuple[str, ...]) -> int:
    if not gan.conditional:
        raise ValueError("this GAN was trained without classes; drop --classes and --interpolate")
    return names.index(validation.choose("class", name.strip(), names))


def _sheet(gan: models.GAN, names: tuple[str, ...], parsed, device: torch.device) -> numpy.ndarray:
    """Classes × seeds; without classes one row."""
    seeds = command_line.numbers("--seeds", parsed.seeds)
    latents = torch.stack([_latent(gan, seed) for seed in seeds]) * parsed.truncation
    labels = None
    if parsed.classes or gan.conditional:
        chosen = [_class_index(gan, name, names) for name in parsed.classes.split(",")] if parsed.classes else None
        if chosen is None:
            chosen = numpy.linspace(0, len(names) - 1, min(10, len(names))).round().astype(int).tolist()
        print("rows: " + ", ".join(names[index] for index in chosen))
        labels = torch.tensor(chosen).repeat_interleave(len(seeds)).to(device)
        latents = latents.repeat(len(chosen), 1)
    images = sampling.generate(gan.generator, latents.to(device), labels)
    return sampling.grid(sampling.to_uint8(images), len(seeds), scale=3)


@torch.no_grad()
def _interpolation(gan: models.GAN, names: tuple[str, ...], parsed, device: torch.device) -> numpy.ndarray:
    """uint8 [frames, 32, 32, 3] from the first seed and class to the second (or the same) seed and the other class."""
    first, colon, second = parsed.interpolate.partition(":")
    if not colon:
        raise ValueError(f"--interpolate must be two classes such as poppy:apple, got {parsed.interpolate!r}")
    labels = torch.tensor([_class_index(gan, name, names) for name in (first, second)])
    if parsed.frames < 2:
        raise ValueError(f"--frames must be ≥ 2, got {parsed.frames}")
    seeds = command_line.numbers("--seeds", parsed.seeds)
    share = torch.linspace(0, 1, parsed.frames)
    start, end = _latent(gan, seeds[0]), _latent(gan, seeds[min(1, len(seeds) - 1)])
    latents = between(start, end, share, parsed.path) * parsed.truncation
    # A class is a row of each embedding; between two classes lies a row that is mixed of theirs.
    rows = len(names)
    tables = [module for module in gan.generator.modules() if isinstance(module, torch.nn.Embedding)]
    for table in tables:
        one, other = table.weight[labels[0]], table.weight[labels[1]]
        mixed = torch.lerp(one, other, share[:, None].to(table.weight))
        table.weight = torch.nn.Parameter(torch.cat([table.weight, mixed]), requires_grad=False)
        table.num_embeddings = len(table.weight)
    chosen = torch.arange(rows, rows + parsed.frames).to(device)
    return sampling.to_uint8(sampling.generate(gan.generator, latents.to(device), chosen))


def _write_set(gan: models.GAN, names: tuple[str, ...], parsed, device: torch.device, folder: pathlib.Path) -> str:
    """`--count` images with random labels."""
    images, labels = [], []
    seed = command_line.numbers("--seeds", parsed.seeds)[0]
    for batch, classes in sampling.sample_batches(gan.generator, gan, parsed.count, device, seed):
        images.append(batch)
        labels.append(numpy.zeros(len(batch), numpy.int64) if classes is None else classes.cpu().numpy())
    everything, classes = numpy.concatenate(images), numpy.concatenate(labels)
    if parsed.format == "npz":
        place = folder / f"samples-{parsed.count}.npz"
        folder.mkdir(parents=True, exist_ok=True)
        numpy.savez_compressed(place, images=everything, labels=classes)
        return str(place)
    for index, (image, label) in enumerate(zip(everything, classes, strict=True)):
        kind = names[label].replace("/", "-") if gan.conditional else "all"
        sampling.save_png(folder / "samples" / kind / f"{index:06d}.png", image)
    return str(folder / "samples")


def main(arguments: Sequence[str]) -> int:
    """Draws as the arguments say; returns the exit status.

    Raises:
        ValueError, OSError: a mistake of the user; the message says what to do.
    """
    parsed = _parser().parse_args(arguments)
    validation.choose("--path", parsed.path, ("spherical", "linear"))
    validation.choose("--format", parsed.format, ("npz", "png"))
    if not 0.0 <= parsed.truncation <= 1.0:
        raise ValueError(f"--truncation must lie in [0, 1], got {parsed.truncation:g}")
    if parsed.count is not None and parsed.count < 1:
        raise ValueError(f"--count must be ≥ 1, got {parsed.count}")
    if parsed.count is not None and (parsed.classes or parsed.interpolate or parsed.truncation != 1.0):
        raise ValueError("--count draws of all classes, whole latents; drop --classes, --interpolate and --truncation")
    device = environment.choose_device(parsed.device)
    saved = checkpoint.find(parsed.checkpoint, notify=print)
    gan, names = load_gan(saved, recipe.of_checkpoint(saved, impl="auto"), average=not parsed.no_average)
    gan = gan.to(device)
    folder = pathlib.Path(parsed.output) if parsed.output else checkpoint.run_folder(saved.path) / "generated"
    written = []
    if parsed.count is not None:
        written.append(_write_set(gan, names, parsed, device, folder))
    elif parsed.interpolate:
        frames = _interpolation(gan, names, parsed, device)
        place = folder / f"{parsed.interpolate.replace(':', '-to-')}.png"
        sampling.save_png(place, sampling.grid(frames, len(frames), scale=3))
        sampling.save_gif(place.with_suffix(".gif"), frames)
        written += [str(place), str(place.with_suffix(".gif"))]
    else:
        place = folder / "sheet.png"
        sampling.save_png(place, _sheet(gan, names, parsed, device))
        written.append(str(place))
    print(json.dumps({"checkpoint": str(saved.path), "step": saved.step, "written": written}), flush=True)
    return 0


if __name__ == "__main__":
    command_line.run("python -m fastcifar.generate", main)
