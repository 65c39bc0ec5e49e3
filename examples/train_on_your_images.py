"""Train on your own folder of images, evaluate, and classify a picture.

    python examples/train_on_your_images.py FOLDER      # FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png

Without a FOLDER it draws one of three classes of shapes first.
"""

import argparse
import pathlib

import numpy
import torch
from PIL import Image, ImageDraw

from fastcifar import evaluate, train
from fastcifar.training import trained


def draw_folder(folder: pathlib.Path, each: int) -> None:
    """Discs, squares and crosses in random places and colours, `each` of a class for training, half for testing."""
    random = numpy.random.default_rng(0)
    for split, count in (("train", each), ("test", max(1, each // 2))):
        for name in ("cross", "disc", "square"):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image = Image.fromarray(random.integers(0, 120, (32, 32, 3), dtype=numpy.uint8))
                x, y = random.integers(4, 16, 2).tolist()
                colour, box = tuple(random.integers(130, 256, 3).tolist()), (x, y, x + 12, y + 12)
                pencil = ImageDraw.Draw(image)
                if name == "disc":
                    pencil.ellipse(box, fill=colour)
                elif name == "square":
                    pencil.rectangle(box, fill=colour)
                else:
                    pencil.line((x, y, x + 12, y + 12), fill=colour, width=3)
                    pencil.line((x, y + 12, x + 12, y), fill=colour, width=3)
                image.save(place / f"{number:04d}.png")


def classify(run: pathlib.Path, picture: pathlib.Path) -> dict[str, float]:
    """Probabilities of the classes of a picture, by name."""
    model, _, dataset, _ = trained.load_classifier(run)
    small = Image.open(picture).convert("RGB").resize((32, 32), Image.Resampling.BOX)  # as in training
    pixels = torch.from_numpy(numpy.asarray(small, numpy.float32) / 255)
    images = ((pixels - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)).permute(2, 0, 1)[None]
    with torch.no_grad():
        probabilities = model(images).softmax(1)[0].tolist()
    return dict(zip(dataset.class_names, probabilities, strict=True))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, help="default: shapes that are drawn")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/your-images"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=200, help="of each class that is drawn")
    options = parser.parse_args(arguments)

    folder = options.folder
    if folder is None:
        folder = options.output.with_name(f"{options.output.name}-images")
        draw_folder(folder, options.images)

    # The same as: python -m fastcifar.train --dataset folder:FOLDER --steps 200 -b 32 …
    status = train.main([
        "--dataset", f"folder:{folder}", "--steps", str(options.steps), "-b", "32", "--lr", "0.1", "--crop-pad", "2",
        "--output", str(options.output), "--resume", "auto",
    ])  # fmt: skip
    if status:
        raise SystemExit(status)
    evaluate.main(["--checkpoint", str(options.output)])
    picture = next(iter(sorted((folder / "test").rglob("*.png"))))
    found = classify(options.output, picture)
    print(f"{picture}: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in found.items()))
    return found


if __name__ == "__main__":
    main()
