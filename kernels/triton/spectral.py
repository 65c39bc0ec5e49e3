"""Spectral normalisation of all weights of a model: three launches, whatever their number and shapes, one for dW.

A weight is a matrix that lies in memory as [outer, rows, inner]; column m in memory order is a·inner + b. Each power
iteration is a launch for t = W v and one for s = Wᵀ u; the last launch divides by σ = uᵀW v = |s|²/max(|s|, eps), which
needs no third product. Partial sums go to a workspace and are added in a fixed order by whoever reads them.
"""

import triton
import triton.language as tl

# Numbers of a matrix in the table: the first six as the caller gives them.
FIELDS = tl.constexpr(12)
_ROWS, _OUTER, _INNER, _SWAP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_WEIGHT_OFFSET, _VECTOR_OFFSET = tl.constexpr(4), tl.constexpr(5)
_T_OFFSET, _T_PARTS, _T_SPAN = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
_S_OFFSET, _S_PARTS, _S_SPAN = tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)


@triton.jit
def _pick(addresses, index):
    chosen = addresses[0]
    for i in tl.static_range(1, len(addresses)):
        chosen = tl.where(index == i, addresses[i], chosen)
    return chosen


@triton.jit
def _offset(table_ptr, layer, field):
    return tl.load(table_ptr + layer * FIELDS + field)


@triton.jit
def _size(table_ptr, layer, field):
    return tl.load(table_ptr + layer * FIELDS + field).to(tl.int32)


@triton.jit
def _sum_parts(partial_ptr, index, ok, length, parts):
    """Σ over the parts of partial [parts, length] at `index`."""
    total = tl.load(partial_ptr + index, mask=ok, other=0.0)
    for part in range(1, parts):
        total += tl.load(partial_ptr + part * length + index, mask=ok, other=0.0)
    return total


@triton.jit
def _squares(partial_ptr, length, parts, BLOCK: tl.constexpr):
    """|x|² of the vector whose partial sums are given."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        value = _sum_parts(partial_ptr, index, index < length, length, parts)
        total += value * value
    return tl.sum(total, 0)


@triton.jit
def _divisor(squares, eps):
    """max(|x|, eps); NaN stays NaN."""
    norm = tl.sqrt_rn(squares)
    return tl.where(norm < eps, eps, norm)


@triton.jit
def _padded(length):
    """Up to where results are stored: a multiple of 16, so that nothing between them is left undefined."""
    return (length + 15) // 16 * 16


@triton.jit
def _logical(column, columns, swap):
    """The matrix's column at a place in memory order."""
    turns = columns // swap
    return (column % turns) * swap + column // turns


@triton.jit
def _load_matrix(weight_ptr, row, column, rows, columns, inner):
    """W [ROWS, COLUMNS] in fp32."""
    place = (column // inner * rows * inner + column % inner)[None, :] + row[:, None] * inner
    ok = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(weight_ptr + place, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def spectral_rows_kernel(
    weights, vs, table_ptr, items_ptr, workspace_ptr, eps,
    DTYPE: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial t = W v over a span of columns; v as given (FIRST), or s/max(|s|, eps) of the iteration before."""
    item = tl.program_id(0) * 3
    layer, first_row, part = tl.load(items_ptr + item), tl.load(items_ptr + item + 1), tl.load(items_ptr + item + 2)
    rows = _size(table_ptr, layer, _ROWS)
    inner = _size(table_ptr, layer, _INNER)
    columns = _size(table_ptr, layer, _OUTER) * inner
    span = _size(table_ptr, layer, _T_SPAN)
    weight_ptr = tl.multiple_of(_pick(weights, layer).to(tl.pointer_type(DTYPE)), 16)
    v_ptr = _pick(vs, layer).to(tl.pointer_type(tl.float32))
    s_ptr = workspace_ptr + _offset(table_ptr, layer, _S_OFFSET)
    s_parts = _size(table_ptr, layer, _S_PARTS)
    swap = _size(table_ptr, layer, _SWAP)
    divisor = 1.0
    if not FIRST:
        divisor = _divisor(_squares(s_ptr, columns, s_parts, BLOCK), eps)
    row = first_row + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        if FIRST:
            v = tl.load(v_ptr + _logical(column, columns, swap), mask=column < columns, other=0.0)
        else:
            v = _sum_parts(s_ptr, column, column < columns, columns, s_parts) / divisor
        total += _load_matrix(weight_ptr, row, column, rows, columns, inner) * v[None, :]
    t_ptr = workspace_ptr + _offset(table_ptr, layer, _T_OFFSET) + part * rows
    tl.store(t_ptr + row, tl.sum(total, 1), mask=row < rows)


@triton.jit
def spectral_columns_kernel(
    weights, new_us, table_ptr, items_ptr, workspace_ptr, vectors_ptr, eps,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial s = Wᵀ u over a span of rows, u = t/max(|t|, eps); the programs of the first columns store u."""
    item = tl.program_id(0) * 3
    layer, first, part = tl.load(items_ptr + item), tl.load(items_ptr + item + 1), tl.load(items_ptr + item + 2)
    rows = _size(table_ptr, layer, _ROWS)
    inner = _size(table_ptr, layer, _INNER)
    columns = _size(table_ptr, layer, _OUTER) * inner
    span = _size(table_ptr, layer, _S_SPAN)
    weight_ptr = tl.multiple_of(_pick(weights, layer).to(tl.pointer_type(DTYPE)), 16)
    u_ptr = _pick(new_us, layer).to(tl.pointer_type(tl.float32))
    t_ptr = workspace_ptr + _offset(table_ptr, layer, _T_OFFSET)
    t_parts = _size(table_ptr, layer, _T_PARTS)
    vectors_ptr += _offset(table_ptr, layer, _VECTOR_OFFSET)
    divisor = _divisor(_squares(t_ptr, rows, t_parts, BLOCK), eps)
    column = first + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        u = _sum_parts(t_ptr, row, row < rows, rows, t_parts) / divisor
        total += _load_matrix(weight_ptr, row, column, rows, columns, inner) * u[:, None]
        if first == 0:
            tl.store(u_ptr + row, u, mask=row < rows)
            tl.store(vectors_ptr + row, u, mask=row < rows)
    s_ptr = workspace_ptr + _offset(table_ptr, layer, _S_OFFSET) + part * columns
    tl.store(s_ptr + column, tl.sum(total, 0), mask=column < columns)


@triton.jit
def spectral_apply_kernel(
    weights, us, vs, new_vs, table_ptr, items_ptr, workspace_ptr, normalised_ptr, vectors_ptr, sigmas_ptr, eps,
    DTYPE: tl.constexpr, ITERATED: tl.constexpr, NORM_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W/σ of a slice in memory order. The first slice stores σ and v; without ITERATED it copies u and v."""
    item = tl.program_id(0) * 3
    layer, first, size = tl.load(items_ptr + item), tl.load(items_ptr + item + 1), tl.load(items_ptr + item + 2)
    rows = _size(table_ptr, layer, _ROWS)
    columns = _size(table_ptr, layer, _OUTER) * _size(table_ptr, layer, _INNER)
    swap = _size(table_ptr, layer, _SWAP)
    weight_ptr = tl.multiple_of(_pick(weights, layer).to(tl.pointer_type(DTYPE)), 16)
    u_ptr = _pick(us, layer).to(tl.pointer_type(tl.float32))
    v_ptr = _pick(vs, layer).to(tl.pointer_type(tl.float32))
    new_v_ptr = _pick(new_vs, layer).to(tl.pointer_type(tl.float32))
    t_ptr = workspace_ptr + _offset(table_ptr, layer, _T_OFFSET)
    t_parts = _size(table_ptr, layer, _T_PARTS)
    s_ptr = workspace_ptr + _offset(table_ptr, layer, _S_OFFSET)
    s_parts = _size(table_ptr, layer, _S_PARTS)
    vectors_ptr += _offset(table_ptr, layer, _VECTOR_OFFSET)
    divisor = 1.0
    if ITERATED:
        squares = _squares(s_ptr, columns, s_parts, NORM_BLOCK)
        divisor = _divisor(squares, eps)
        sigma = tl.div_rn(squares, divisor)
    else:
        total = tl.zeros([NORM_BLOCK], tl.float32)
        for start in range(0, rows, NORM_BLOCK):
            row = start + tl.arange(0, NORM_BLOCK)
            u = tl.load(u_ptr + row, mask=row < rows, other=0.0)
            total += u * _sum_parts(t_ptr, row, row < rows, rows, t_parts)
            if first == 0:
                tl.store(vectors_ptr + row, u, mask=row < rows)
        sigma = tl.sum(total, 0)
    if first == 0:
        tl.store(sigmas_ptr + layer, sigma)
        padded = _padded(rows + columns) - rows
        for start in range(0, padded, NORM_BLOCK):
            column = start + tl.arange(0, NORM_BLOCK)
            ok = column < columns
            logical = _logical(column, columns, swap)
            if ITERATED:
                v = _sum_parts(s_ptr, column, ok, columns, s_parts) / divisor
                tl.store(new_v_ptr + logical, v, mask=ok)
            else:
                v = tl.load(v_ptr + logical, mask=ok, other=0.0)
            tl.store(vectors_ptr + rows + column, v, mask=column < padded)
    normalised_ptr += tl.multiple_of(_offset(table_ptr, layer, _WEIGHT_OFFSET), 16)
    inverse = tl.div_rn(1.0, sigma)
    first = tl.multiple_of(first, 16)
    end = tl.minimum(first + size, rows * columns)
    full = first + (end - first) // BLOCK * BLOCK
    # Whole blocks without a mask: only those have vector loads.
    for start in range(first, full, BLOCK):
        place = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + place).to(tl.float32)
        tl.store(normalised_ptr + place, (weight * inverse).to(DTYPE))
    place = full + tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + place, mask=place < end, other=0.0).to(tl.float32)
    tl.store(normalised_ptr + place, (weight * inverse).to(DTYPE), mask=place < _padded(end))


@triton.jit
def _rank_one(vectors_ptr, place, ok, rows, inner):
    """u·v of the elements at these places in memory order."""
    line = place // inner
    outer = line // rows
    u = tl.load(vectors_ptr + (line - outer * rows), mask=ok, other=0.0)
    return u * tl.load(vectors_ptr + rows + (place - (line - outer) * inner), mask=ok, other=0.0)


@triton.jit
def spectral_gradient_kernel(
    gradients, table_ptr, items_ptr, normalised_ptr, vectors_ptr, sigmas_ptr, result_ptr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A slice of dW = (dW̄ − ⟨dW̄, W̄⟩·u vᵀ)/σ. Every slice sums the inner product itself, in the same order."""
    item = tl.program_id(0) * 4
    layer, number = tl.load(items_ptr + item), tl.load(items_ptr + item + 1)
    first, size = tl.load(items_ptr + item + 2), tl.load(items_ptr + item + 3)
    rows = _size(table_ptr, layer, _ROWS)
    inner = _size(table_ptr, layer, _INNER)
    elements = rows * inner * _size(table_ptr, layer, _OUTER)
    offset = tl.multiple_of(_offset(table_ptr, layer, _WEIGHT_OFFSET), 16)
    gradient_ptr = tl.multiple_of(_pick(gradients, number).to(tl.pointer_type(DTYPE)), 16)
    normalised_ptr += offset
    result_ptr += offset
    whole = elements // BLOCK * BLOCK
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, whole, BLOCK):
        place = start + tl.arange(0, BLOCK)
        gradient = tl.load(gradient_ptr + place).to(tl.float32)
        total += gradient * tl.load(normalised_ptr + place).to(tl.float32)
    place = whole + tl.arange(0, BLOCK)
    gradient = tl.load(gradient_ptr + place, mask=place < elements, other=0.0).to(tl.float32)
    total += gradient * tl.load(normalised_ptr + place, mask=place < elements, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.load(sigmas_ptr + layer))
    scale = tl.sum(total, 0) * inverse
    vectors_ptr += _offset(table_ptr, layer, _VECTOR_OFFSET)
    first = tl.multiple_of(first, 16)
    end = tl.minimum(first + size, elements)
    full = first + (end - first) // BLOCK * BLOCK
    for start in range(first, full, BLOCK):
        place = start + tl.arange(0, BLOCK)
        product = _rank_one(vectors_ptr, place, place < end, rows, inner)
        gradient = tl.load(gradient_ptr + place).to(tl.float32)
        tl.store(result_ptr + place, (gradient * inverse - scale * product).to(DTYPE))
    place = full + tl.arange(0, BLOCK)
    product = _rank_one(vectors_ptr, place, place < end, rows, inner)
    gradient = tl.load(gradient_ptr + place, mask=place < end, other=0.0).to(tl.float32)
    tl.store(result_ptr + place, (gradient * inverse - scale * product).to(DTYPE), mask=place < _padded(end))
