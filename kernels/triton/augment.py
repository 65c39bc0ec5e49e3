"""Augmented, normalised images: one launch from the set of bytes to the batch, every draw made inside.

A program owns an image, or a part of one, and works on tiles of whole values [ROWS, COLUMNS], red, green, blue, red, …,
as they lie in memory, so that stores are wide. Colours are computed in units of a byte: the same as in [0, 1], with
fewer roundings. Generator: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

import triton
import triton.language as tl

BETA_POINTS = tl.constexpr(4097)
# The purposes that a position's words serve, one block of four words each.
_GEOMETRY, _COLOUR, _CUTOUT, _MIX, _BOX = (tl.constexpr(purpose) for purpose in range(5))


@triton.jit
def draw(seed, position, step, PURPOSE: tl.constexpr):
    """Four random words of Philox4x32-10, uint32."""
    return tl.philox(seed, position, step.to(tl.int32), (step >> 32).to(tl.int32), PURPOSE)


@triton.jit
def below(word, bound):
    """A word as an integer in [0, bound)."""
    return tl.umulhi(word, tl.full([], bound, tl.uint32)).to(tl.int32)


@triton.jit
def uniform(word):
    """A word as float64 in (0, 1)."""
    return (word.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)


@triton.jit
def jitter_factor(word, STRENGTH: tl.constexpr):
    """1 + strength·(2·uniform − 1), drawn in float64."""
    return (1.0 + tl.full([], STRENGTH, tl.float64) * (2.0 * uniform(word) - 1.0)).to(tl.float32)


@triton.jit
def beta(beta_ptr, word, side):
    """Beta(α, α), float64: the quantile on the lower half, and which half."""
    place = uniform(word) * (BETA_POINTS - 1)
    index = place.to(tl.int32)
    low = tl.load(beta_ptr + index)
    value = low + (place - index.to(tl.float64)) * (tl.load(beta_ptr + index + 1) - low)
    return tl.where((side >> 31) == 1, 1.0 - value, value)


@triton.jit
def source(axis, shift, PAD: tl.constexpr, SIZE: tl.constexpr, REFLECT: tl.constexpr):
    """The row or column of the image that each one of the output shows, and whether there is one."""
    at = axis + shift - PAD
    if REFLECT:
        at = tl.abs(at)
        at = tl.where(at >= SIZE, 2 * (SIZE - 1) - at, at)
    return at, (axis < SIZE) & (at >= 0) & (at < SIZE)


@triton.jit
def values_of(tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows [ROWS], pixels and channels of the columns [COLUMNS], and places [ROWS, COLUMNS] of a tile's values."""
    tiles = tl.cdiv(3 * WIDTH, COLUMNS)
    row = tile // tiles * ROWS + tl.arange(0, ROWS)
    column = tile % tiles * COLUMNS + tl.arange(0, COLUMNS)
    ok = (row < HEIGHT)[:, None] & (column < 3 * WIDTH)[None, :]
    return row, column // 3, column % 3, row[:, None] * (3 * WIDTH) + column[None, :], ok


@triton.jit
def sources(crop, row, x, PAD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, REFLECT: tl.constexpr):
    """The red byte of every value's pixel in the image [ROWS, COLUMNS], and whether there is one."""
    down, right, mirrored = crop
    source_row, row_ok = source(row, down, PAD, HEIGHT, REFLECT)
    source_x, x_ok = source(tl.where(mirrored, WIDTH - 1 - x, x), right, PAD, WIDTH, REFLECT)
    place = source_row[:, None] * (3 * WIDTH) + (3 * source_x)[None, :]
    return place, row_ok[:, None] & (x_ok & (x < WIDTH))[None, :]


@triton.jit
def load_bytes(pointer, ok):
    """As fp32; black where there is none."""
    return tl.load(pointer, mask=ok, other=0).to(tl.float32)


@triton.jit
def clamp(value):
    """In [0, 255]."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0)


@triton.jit
def by_channel(channel, red, green, blue):
    """The one of three that belongs to each value's channel."""
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit
def mean_grey(
    image_ptr, crop, brightness, PAD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, REFLECT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of the cropped and brightened image."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.cdiv(HEIGHT, ROWS) * tl.cdiv(3 * WIDTH, COLUMNS)):
        row, x, channel, _, _ = values_of(tile, HEIGHT, WIDTH, ROWS, COLUMNS)
        place, ok = sources(crop, row, x, PAD, HEIGHT, WIDTH, REFLECT)
        bright = tl.minimum(load_bytes(image_ptr + place + channel[None, :], ok) * brightness, 255.0)
        total = tl.fma(bright, by_channel(channel, 0.2989, 0.587, 0.114)[None, :], total)
    return tl.sum(tl.sum(total, 1), 0) / (HEIGHT * WIDTH)


@triton.jit
def find_picture(
    images_ptr, indices_ptr, flips_ptr, seed, position, step, images,
    STRENGTH: tl.constexpr, CUTOUT: tl.constexpr, PAD: tl.constexpr, RANDOM_FLIP: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, REFLECT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What a position's image is: its address, its index and whether that exists; crop; colours; box cut out."""
    index = tl.load(indices_ptr + position)
    exists = (index >= 0) & (index < images)
    image_ptr = images_ptr + tl.where(exists, index, 0) * (HEIGHT * WIDTH * 3)
    down, right, side, _ = draw(seed, position, step, _GEOMETRY)
    mirrored = RANDOM_FLIP & ((side >> 31) == 1)
    if flips_ptr is not None:
        mirrored = tl.load(flips_ptr + position) != 0
    crop = (below(down, 2 * PAD + 1), below(right, 2 * PAD + 1), mirrored)
    brightness, contrast, level, saturation = 1.0, 1.0, 0.0, 1.0
    if STRENGTH > 0:
        bright, sharp, full, _ = draw(seed, position, step, _COLOUR)
        brightness = jitter_factor(bright, STRENGTH)
        contrast = jitter_factor(sharp, STRENGTH)
        saturation = jitter_factor(full, STRENGTH)
        mean = mean_grey(image_ptr, crop, brightness, PAD, HEIGHT, WIDTH, REFLECT, ROWS, COLUMNS)
        level = mean * (1.0 - contrast)
    top, left = 0, 0
    if CUTOUT > 0:
        centre_y, centre_x, _, _ = draw(seed, position, step, _CUTOUT)
        top, left = below(centre_y, HEIGHT) - CUTOUT // 2, below(centre_x, WIDTH) - CUTOUT // 2
    return image_ptr, index, exists, crop, (brightness, contrast, level, saturation), (top, left, CUTOUT, CUTOUT)


@triton.jit
def inside(box, row, x):
    """Which values [ROWS, COLUMNS] lie in a box."""
    top, left, height, width = box
    return ((row >= top) & (row < top + height))[:, None] & ((x >= left) & (x < left + width))[None, :]


@triton.jit
def render(
    picture, row, x, channel, wanted, scale, shift,
    STRENGTH: tl.constexpr, CUTOUT: tl.constexpr, PAD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    REFLECT: tl.constexpr,
):  # fmt: skip
    """A tile of the image, normalised; its `wanted` values only. NaN where there is no image."""
    image_ptr, _, exists, crop, tone, hole = picture
    place, ok = sources(crop, row, x, PAD, HEIGHT, WIDTH, REFLECT)
    ok &= wanted
    if STRENGTH > 0:
        brightness, contrast, level, saturation = tone
        red = tl.minimum(load_bytes(image_ptr + place, ok) * brightness, 255.0)
        green = tl.minimum(load_bytes(image_ptr + place + 1, ok) * brightness, 255.0)
        blue = tl.minimum(load_bytes(image_ptr + place + 2, ok) * brightness, 255.0)
        red = clamp(tl.fma(red, contrast, level))
        green = clamp(tl.fma(green, contrast, level))
        blue = clamp(tl.fma(blue, contrast, level))
        grey = tl.fma(red, 0.2989, tl.fma(green, 0.587, blue * 0.114))
        own = by_channel(channel[None, :], red, green, blue)
        value = clamp(tl.fma(own, saturation, grey * (1.0 - saturation)))
    else:
        value = load_bytes(image_ptr + place + channel[None, :], ok)
    value = tl.fma(value, by_channel(channel, *scale)[None, :], by_channel(channel, *shift)[None, :])
    if CUTOUT > 0:
        value = tl.where(inside(hole, row, x), 0.0, value)
    return tl.where(exists, value, float("nan"))


@triton.jit
def find_partner(
    beta_ptr, seed, position, step, batch, MIXING: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """The position of an image's partner, its share, and the box that cutmix pastes."""
    word, _, _, _ = draw(seed, position * 0, step, _MIX)
    ahead = tl.where(batch > 1, 1 + below(word, batch - 1), 0)
    quantile, side, centre_y, centre_x = draw(seed, position, step, _BOX)
    share = beta(beta_ptr, quantile, side)
    weight = share.to(tl.float32)
    box = (0, 0, 0, 0)
    if MIXING == "cutmix":
        side = tl.sqrt(share)
        height, width = (side * HEIGHT).to(tl.int32), (side * WIDTH).to(tl.int32)
        top, left = below(centre_y, HEIGHT) - height // 2, below(centre_x, WIDTH) - width // 2
        box = (top, left, height, width)
        rows = tl.maximum(tl.minimum(top + height, HEIGHT) - tl.maximum(top, 0), 0)
        columns = tl.maximum(tl.minimum(left + width, WIDTH) - tl.maximum(left, 0), 0)
        weight = tl.div_rn((rows * columns).to(tl.float32), tl.full([], HEIGHT * WIDTH, tl.float32))
    return (position + ahead) % batch, weight, box


@triton.jit(do_not_specialize=("step", "seed", "images", "batch", "first", "parts"))
def augment_kernel(
    images_ptr, indices_ptr, flips_ptr, step_ptr, beta_ptr, out_ptr, partners_ptr, weights_ptr,
    step, seed, images, batch, first, parts,
    red_scale, green_scale, blue_scale, red_shift, green_shift, blue_shift,
    STRENGTH: tl.constexpr, CUTOUT: tl.constexpr, MIXING: tl.constexpr, PAD: tl.constexpr, REFLECT: tl.constexpr,
    RANDOM_FLIP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Every `parts`-th tile of the image at position `first` + program // parts."""
    number, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    position = first + number
    if step_ptr is not None:
        step = tl.load(step_ptr)
    step = tl.cast(step, tl.int64)
    scale, shift = (red_scale, green_scale, blue_scale), (red_shift, green_shift, blue_shift)
    own = find_picture(
        images_ptr, indices_ptr, flips_ptr, seed, position, step, images,
        STRENGTH, CUTOUT, PAD, RANDOM_FLIP, HEIGHT, WIDTH, REFLECT, ROWS, COLUMNS,
    )  # fmt: skip
    if MIXING != "none":
        other, weight, box = find_partner(beta_ptr, seed, position, step, batch, MIXING, HEIGHT, WIDTH)
        partner = find_picture(
            images_ptr, indices_ptr, flips_ptr, seed, other, step, images,
            STRENGTH, CUTOUT, PAD, RANDOM_FLIP, HEIGHT, WIDTH, REFLECT, ROWS, COLUMNS,
        )  # fmt: skip
        tl.store(partners_ptr + number, partner[1], mask=part == 0)
        tl.store(weights_ptr + number, weight, mask=part == 0)
    out_ptr += number.to(tl.int64) * (HEIGHT * WIDTH * 3)
    for tile in range(part, tl.cdiv(HEIGHT, ROWS) * tl.cdiv(3 * WIDTH, COLUMNS), parts):
        row, x, channel, place, ok = values_of(tile, HEIGHT, WIDTH, ROWS, COLUMNS)
        if MIXING == "cutmix":
            pasted = inside(box, row, x)
            wanted = pasted == 0
        else:
            wanted = ok
        value = render(own, row, x, channel, wanted, scale, shift, STRENGTH, CUTOUT, PAD, HEIGHT, WIDTH, REFLECT)
        if MIXING != "none":
            if MIXING == "cutmix":
                wanted = pasted
            others = render(
                partner, row, x, channel, wanted, scale, shift, STRENGTH, CUTOUT, PAD, HEIGHT, WIDTH, REFLECT
            )
            if MIXING == "cutmix":
                value = tl.where(pasted, others, value)
            else:
                # From the nearer of the two, as torch.lerp does.
                nearer = weight < 0.5
                base = tl.where(nearer, value, others)
                value = tl.fma(others - value, tl.where(nearer, weight, weight - 1.0), base)
        tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=ok)
