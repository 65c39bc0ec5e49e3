"""The resident loader once more, slowly: one image at a time, with Python integers and NumPy."""

import math

import numpy


def philox_words(position, step, purpose, seed):
    mask = 2**32 - 1
    counter = [position, step & mask, step >> 32 & mask, purpose]
    key = [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second & mask,
            first >> 32 ^ counter[3] ^ key[1],
            first & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return tuple(counter)


def order(count, seed, epoch):
    return numpy.random.Generator(numpy.random.Philox(key=[seed, epoch])).permutation(count)


def flip_halves(count, seed):
    generator = numpy.random.Generator(numpy.random.Philox(key=[seed, 1 << 40]))
    return generator.integers(0, 2, count, dtype=numpy.int64)


def index_and_epoch(count, seed, step, batch_size, position):
    epoch, place = divmod(step * batch_size + position, count)
    return int(order(count, seed, epoch)[place]), epoch


def cropped(image, dy, dx, pad, mode):
    widths = ((pad, pad), (pad, pad), (0, 0))
    padded = numpy.pad(image, widths, mode="reflect" if mode == "reflect" else "constant") if pad else image
    return padded[dy : dy + image.shape[0], dx : dx + image.shape[1]]


def colour_jittered(image, strength, words):
    """torchvision's brightness, contrast and saturation on float64 [H, W, 3] in [0, 1]."""
    factor = [1 + strength * (2 * (word + 0.5) / 2**32 - 1) for word in words[:3]]
    grey = numpy.array([0.2989, 0.587, 0.114])
    image = numpy.clip(image * factor[0], 0, 1)
    image = numpy.clip((image @ grey).mean() * (1 - factor[1]) + image * factor[1], 0, 1)
    return numpy.clip((image @ grey)[..., None] * (1 - factor[2]) + image * factor[2], 0, 1)


def box(words, height, width, box_height, box_width):
    top = (words[0] * height >> 32) - box_height // 2
    left = (words[1] * width >> 32) - box_width // 2
    rows, columns = slice(max(top, 0), max(top + box_height, 0)), slice(max(left, 0), max(left + box_width, 0))
    mask = numpy.zeros((height, width), bool)
    mask[rows, columns] = True
    return mask


def sample(images, seed, step, batch_size, position, options, mean, std):
    """One normalised float64 image [H, W, 3] and its index."""
    count, height, width, _ = images.shape
    index, epoch = index_and_epoch(count, seed, step, batch_size, position)
    words = philox_words(position, step, 0, seed)
    span = 2 * options.crop_pad + 1
    image = cropped(images[index], words[0] * span >> 32, words[1] * span >> 32, options.crop_pad, options.crop_mode)
    mirrored = options.hflip == "random" and words[2] >= 2**31
    if options.hflip == "alternating":
        mirrored = (flip_halves(count, seed)[index] + epoch) % 2 == 1
    image = (image[:, ::-1] if mirrored else image) / 255
    if options.color_jitter:
        image = colour_jittered(image, options.color_jitter, philox_words(position, step, 1, seed))
    image = (image - numpy.array(mean)) / numpy.array(std)
    if options.cutout:
        words = philox_words(position, step, 2, seed)
        image[box(words, height, width, options.cutout, options.cutout)] = 0
    return image, index


def partner(position, seed, step, batch_size):
    word = philox_words(0, step, 3, seed)[0]
    return (position + 1 + (word * (batch_size - 1) >> 32)) % batch_size


def cutmixed(image, other, position, seed, step, share):
    height, width, _ = image.shape
    side = math.sqrt(share)
    words = philox_words(position, step, 4, seed)[2:]
    mask = box(words, height, width, int(side * height), int(side * width))
    return numpy.where(mask[..., None], other, image), mask.mean()
