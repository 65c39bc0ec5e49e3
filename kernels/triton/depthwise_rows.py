"""How every depthwise kernel walks an image: strips of output columns, row after row, each input loaded once.

A lane of the pixel axis owns COLUMNS neighbouring output columns of one image and walks down the rows of a strip. An
input row is loaded once and added at once to every output row that it belongs to (`pending`), so the convolution keeps
no window of inputs. The channel axis is the contiguous one: loads and stores are vectors of channels.

A dilated convolution is, on each sublattice of the image, one without dilation: outputs `phase + phases·k` see inputs
`stride·phase − padding + dilation·(STEP·k + tap)` with `STEP = stride / gcd(stride, dilation)` and
`phases = dilation / gcd(stride, dilation)`. So the kernels know strides in lattice steps only, and a dilation is
nothing but another address step.
"""

import triton
import triton.language as tl


@triton.jit
def locate_program(channels, strips, BLOCK_C: tl.constexpr, REVERSED: tl.constexpr):
    """This program's (tile, strip, block of lanes, first channel); channels vary fastest, then strips, then lanes.

    REVERSED walks the tiles from the last to the first: the second pass over a tensor then begins with what the
    first pass left in the cache.
    """
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    tile = program // channel_blocks
    return tile, tile % strips, tile // strips, program % channel_blocks * BLOCK_C


@triton.jit
def locate_strip(strip, strips, rows, phases, size):
    """The strip's phase, its first lattice row and the number of its rows, at most `rows`; the first two 64-bit."""
    phase = (strip // strips).to(tl.int64)
    first = (strip % strips).to(tl.int64) * rows
    return phase, first, tl.maximum(tl.minimum(rows, tl.cdiv(size - phase, phases) - first), 0)


@triton.jit
def locate_lanes(block, groups, phases, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Image, phase and first lattice column of each lane: three [BLOCK_P, 1]."""
    lane = block * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    image = lane // (groups * phases)
    return image, lane // groups % phases, lane % groups * COLUMNS


@triton.jit
def columns_inside(first, step, size, lanes_ok, COUNT: tl.constexpr):
    """COUNT masks [BLOCK_P, BLOCK_C]: is column `first + step·i` inside the image?"""
    masks = ()
    for i in tl.static_range(COUNT):
        column = first + step * i
        masks = masks + ((column >= 0) & (column < size) & lanes_ok,)
    return masks


@triton.jit
def lane_pointers(pointer, image, column, channel, stride_n, stride_w):
    """Addresses [BLOCK_P, BLOCK_C] of row 0; 64-bit, as an offset may pass 2^31."""
    return pointer + (image.to(tl.int64) * stride_n + column.to(tl.int64) * stride_w) + channel[None, :]


@triton.jit
def load_weights(weight_ptr, channel, channel_ok, TAPS: tl.constexpr):
    """TAPS weights of each channel, fp32 [1, BLOCK_C]."""
    weights = ()
    for tap in tl.static_range(TAPS):
        weight = tl.load(weight_ptr + channel * TAPS + tap, mask=channel_ok, other=0.0)
        weights = weights + (weight.to(tl.float32)[None, :],)
    return weights


@triton.jit
def load_vector(pointer, channel, channel_ok, default):
    """A vector over the channels as fp32 [1, BLOCK_C]; `default` where there is none."""
    if pointer is None:
        vector = tl.zeros_like(channel).to(tl.float32) + default
    else:
        vector = tl.load(pointer + channel, mask=channel_ok, other=default).to(tl.float32)
    return vector[None, :]


@triton.jit
def load_row(pointers, column_step, row_ok, columns_ok, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Columns FIRST … FIRST + COUNT − 1 of one row, fp32 [BLOCK_P, BLOCK_C] each, zero outside the image."""
    row = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        value = tl.load(pointers + i * column_step, mask=columns_ok[i] & row_ok, other=0.0)
        row = row + (value.to(tl.float32),)
    return row


@triton.jit
def row_inside(row, size):
    """[1, 1]: is this row in [0, size)? A block, as the interpreter cannot broadcast the comparison of scalars."""
    row = tl.zeros([1, 1], tl.int64) + row
    return (row >= 0) & (row < size)


@triton.jit
def repeat(value, COUNT: tl.constexpr):
    """A tuple of COUNT times the same block."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (value,)
    return values


@triton.jit
def accumulate_row(
    pending, row, weights, OFFSET: tl.constexpr, COLUMNS: tl.constexpr, KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """Adds the input row OFFSET rows below the first pending output row to all pending rows that it belongs to."""
    result = ()
    for line in tl.static_range((KERNEL_H - 1) // STEP_H + 1):
        for column in tl.static_range(COLUMNS):
            value = pending[line * COLUMNS + column]
            if OFFSET - STEP_H * line >= 0 and OFFSET - STEP_H * line < KERNEL_H:
                for tap in tl.static_range(KERNEL_W):
                    weight = weights[(OFFSET - STEP_H * line) * KERNEL_W + tap]
                    value = tl.fma(weight, row[column * STEP_W + tap], value)
            result = result + (value,)
    return result


@triton.jit
def begin_rows(
    initial, pointers, row_stride, column_step, first_row, row_step, height, columns_ok, weights,
    COLUMNS: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """The pending output rows with all input rows added that the first of them shares with the row above it.

    `first_row` is the input row under the first tap of that output row, `initial` the value every row starts from.
    """
    pending = repeat(initial, ((KERNEL_H - 1) // STEP_H + 1) * COLUMNS)
    for offset in tl.static_range(KERNEL_H - STEP_H):
        input_row = first_row + row_step * offset
        row = load_row(
            pointers + input_row * row_stride, column_step, row_inside(input_row, height), columns_ok,
            0, STEP_W * (COLUMNS - 1) + KERNEL_W,
        )  # fmt: skip
        pending = accumulate_row(pending, row, weights, offset, COLUMNS, KERNEL_H, KERNEL_W, STEP_H, STEP_W)
    return pending[: (KERNEL_H - 1) // STEP_H * COLUMNS]


@triton.jit
def next_row(
    pending, initial, pointers, row_stride, column_step, first_row, row_step, height, columns_ok, weights,
    COLUMNS: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
):  # fmt: skip
    """Loads what completes the first pending output row; returns its COLUMNS values and the pending rows after it."""
    pending = pending + repeat(initial, COLUMNS)
    for offset in tl.static_range(KERNEL_H - STEP_H if KERNEL_H > STEP_H else 0, KERNEL_H):
        input_row = first_row + row_step * offset
        row = load_row(
            pointers + input_row * row_stride, column_step, row_inside(input_row, height), columns_ok,
            0, STEP_W * (COLUMNS - 1) + KERNEL_W,
        )  # fmt: skip
        pending = accumulate_row(pending, row, weights, offset, COLUMNS, KERNEL_H, KERNEL_W, STEP_H, STEP_W)
    return pending[:COLUMNS], pending[COLUMNS:]
