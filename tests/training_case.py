"""A tiny data set and short command lines for the tests of training."""

import json

import numpy

from fastcifar import command_line, train

TINY = ["--model-option", "width=0.25", "-b", "16", "--amp-dtype", "fp32", "--device", "cpu"]


def write_tiny(path, classes=5, size=12):
    """An .npz of bright squares in places that tell the class, with noise."""
    generator = numpy.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 100), ("test", 40)):
        labels = numpy.arange(count) % classes
        images = generator.integers(0, 120, (count, size, size, 3))
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 3, 3:9] += 130
        arrays |= {f"{split}_images": images.astype(numpy.uint8), f"{split}_labels": labels}
    numpy.savez(path, **arrays)
    return f"npz:{path}"


def status_of(arguments, main=train.main, name="python -m fastcifar.train"):
    """The exit status of a command line run in this process."""
    try:
        command_line.run(name, main, [str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def result_of(capsys):
    """The JSON object in the last line of standard output."""
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])
