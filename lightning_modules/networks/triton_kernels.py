"""Triton kernels of the StyleGAN operators: what runs on the card. `triton_operators` launches them.

Needs Triton, which CUDA builds of PyTorch bring along; no other compiler. One program makes one tile of the result.
Arithmetic is in float32, and positions are int32 inside an image, int64 beyond.
"""

# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def _leaky_relu(v: tl.tensor, slope: tl.tensor, limit: tl.tensor, CLAMPED: tl.constexpr) -> tl.tensor:
    """Leaky ReLU, limited to ±limit. NaN stays NaN, which `tl.clamp` would hide from the scaler of gradients."""
    v = tl.where(v > 0, v, slope * v)
    if CLAMPED:
        v = tl.where(v > limit, limit, v)
        v = tl.where(v < -limit, -limit, v)
    return v


@triton.jit(do_not_specialize=["rows", "channels"])
def bias_lrelu(
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    channels: tl.tensor,
    slope: tl.tensor,
    gain: tl.tensor,
    limit: tl.tensor,
    BIASED: tl.constexpr,
    CHANNEL_IS_COLUMN: tl.constexpr,
    CLAMPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Make y = clamp(gain · lrelu(x + bias)), of matrices.

    The channel of an element is its column, or its row modulo the number of channels.
    """
    tiles = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_inside = (row < rows) & (column < columns)
    i = row.to(tl.int64) * columns + column
    v = tl.load(x + i, mask=is_inside, other=0).to(tl.float32)
    if BIASED:
        if CHANNEL_IS_COLUMN:
            v += tl.load(bias + column, mask=column < columns, other=0).to(tl.float32)
        else:
            v += tl.load(bias + row % channels).to(tl.float32)
    tl.store(y + i, _leaky_relu(v * gain, slope, limit, CLAMPED), mask=is_inside)  # a positive gain commutes


@triton.jit
def lrelu_gradient(
    g: tl.tensor,
    y: tl.tensor,
    result: tl.tensor,
    size: tl.tensor,
    slope: tl.tensor,
    gain: tl.tensor,
    limit: tl.tensor,
    CLAMPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Multiply g by dy/dx of `bias_lrelu`, which its result y tells: a positive gain keeps the sign."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(y + i, mask=i < size, other=0).to(tl.float32)
    s = tl.where(v > 0, gain, gain * slope)
    if CLAMPED:
        s = tl.where(tl.abs(v) < limit, s, 0.0)
    tl.store(result + i, tl.load(g + i, mask=i < size, other=0).to(tl.float32) * s, mask=i < size)


# Sizes that are a part of the compiled kernel would cost a compilation each; whether a stride is 1 is worth knowing.
@triton.jit(
    do_not_specialize=[
        *("height", "width", "out_height", "out_width", "channels", "lead_y", "lead_x", "skip_y", "skip_x"),
        *("x_sample", "x_row", "y_sample", "y_row"),
    ],
    do_not_specialize_on_alignment=["x_channel", "x_column", "y_channel", "y_column"],
)
def upfirdn2d(
    x: tl.tensor,
    f: tl.tensor,
    y: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    channels: tl.tensor,
    x_sample: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    y_sample: tl.tensor,
    y_channel: tl.tensor,
    y_row: tl.tensor,
    y_column: tl.tensor,
    lead_y: tl.tensor,
    lead_x: tl.tensor,
    skip_y: tl.tensor,
    skip_x: tl.tensor,
    gain: tl.tensor,
    UP_Y: tl.constexpr,
    UP_X: tl.constexpr,
    DOWN_Y: tl.constexpr,
    DOWN_X: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    FLIP: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Upsample, filter and downsample; the inserted zeros are skipped.

    The first tap of output o lies at m = o · DOWN + lead of the grid with zeros, which begins `skip` samples before the
    image so that m > -UP. Of its taps, every UP-th meets a sample.
    """
    pixel_tiles = tl.cdiv(out_height * out_width, PIXELS)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    tile = tl.program_id(0)
    p = tile % pixel_tiles * PIXELS + tl.arange(0, PIXELS)
    c = tile // pixel_tiles % channel_tiles * CHANNELS + tl.arange(0, CHANNELS).to(tl.int64)
    sample = (tile // pixel_tiles // channel_tiles).to(tl.int64)
    is_pixel, is_channel = p < out_height * out_width, c < channels
    row, column = p // out_width, p % out_width

    my, mx = row * DOWN_Y + lead_y, column * DOWN_X + lead_x
    jy, jx = (my + UP_Y - 1) // UP_Y, (mx + UP_X - 1) // UP_X  # the first samples from there on; no negative dividends
    first_tap_y, first_tap_x = jy * UP_Y - my, jx * UP_X - mx
    x += sample * x_sample + c[None, :] * x_channel
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for i in range((KH + UP_Y - 1) // UP_Y):
        for k in tl.static_range((KW + UP_X - 1) // UP_X):
            sy, sx = jy - skip_y + i, jx - skip_x + k
            is_inside = is_pixel & (sy >= 0) & (sy < height) & (sx >= 0) & (sx < width)
            mask = is_inside[:, None] & is_channel[None, :]
            v = tl.load(x + (sy * x_row + sx * x_column)[:, None], mask=mask, other=0)
            if UP_Y == 1 and UP_X == 1:  # all pixels have the same taps
                t = i * KW + k
                w = tl.load(f + (KH * KW - 1 - t if FLIP else t))
                total += w * v.to(tl.float32)
            else:
                ty, tx = first_tap_y + i * UP_Y, first_tap_x + k * UP_X
                t = ty * KW + tx
                w = tl.load(f + (KH * KW - 1 - t if FLIP else t), mask=(ty < KH) & (tx < KW), other=0)
                total += w[:, None] * v.to(tl.float32)
    y += sample * y_sample + c[None, :] * y_channel + (row * y_row + column * y_column)[:, None]
    tl.store(y, total * gain, mask=is_pixel[:, None] & is_channel[None, :])


@triton.jit
def _upsampled(
    x: tl.tensor,
    matrices_y: tl.tensor,
    matrices_x: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    first_row: tl.tensor,
    first_column: tl.tensor,
    COARSE: tl.constexpr,
    FINE: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Make sum_r A_r X B_r^T for the tile X of an image; (FINE, FINE)."""
    coarse, fine = tl.arange(0, COARSE), tl.arange(0, FINE)
    rows, columns = first_row + coarse[:, None], first_column + coarse[None, :]
    is_inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    tile = tl.load(x + rows * width + columns, mask=is_inside, other=0)
    entries = fine[:, None] * COARSE + coarse[None, :]
    u = tl.zeros((FINE, FINE), tl.float32)
    for r in range(RANK):
        a = tl.load(matrices_y + r * FINE * COARSE + entries)
        b = tl.load(matrices_x + r * FINE * COARSE + entries)
        t = tl.dot(a, tile, input_precision=PRECISION).to(tile.dtype)  # (FINE, COARSE)
        u = tl.dot(t, tl.trans(b), u, input_precision=PRECISION)
    return u


@triton.jit(
    do_not_specialize=[
        *("height", "width", "gate_height", "gate_width", "out_height", "out_width", "out_step"),
        *("up_first_y", "up_first_x", "up_step", "gate_first_y", "gate_first_x", "gate_step"),
    ]
)
def filtered_lrelu(
    v: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    gate_height: tl.tensor,
    gate_width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    up_y: tl.tensor,
    up_x: tl.tensor,
    up_first_y: tl.tensor,
    up_first_x: tl.tensor,
    up_step: tl.tensor,
    gate_y: tl.tensor,
    gate_x: tl.tensor,
    gate_first_y: tl.tensor,
    gate_first_x: tl.tensor,
    gate_step: tl.tensor,
    down_y: tl.tensor,
    down_x: tl.tensor,
    out_step: tl.tensor,
    slope: tl.tensor,
    limit: tl.tensor,
    GATED: tl.constexpr,
    CLAMPED: tl.constexpr,
    COARSE: tl.constexpr,
    GATE: tl.constexpr,
    FINE: tl.constexpr,
    OUT: tl.constexpr,
    RANK: tl.constexpr,
    GATE_RANK: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Resample v to the fine grid, activate it there, resample back; images are (planes, H, W), contiguous.

    Gated, the fine signal is not activated but multiplied by the derivative of the activation at the upsampled x.
    The fine grid exists only in tiles of FINE × FINE. What a tile has beyond the edge of the grid meets zeros: nothing
    is resampled to there (adjoint), or only results that are not stored read it (signal, tangent).
    """
    tiles_x = tl.cdiv(out_width, out_step)
    tiles = tiles_x * tl.cdiv(out_height, out_step)
    ty, tx = tl.program_id(0) % tiles // tiles_x, tl.program_id(0) % tiles_x
    plane = (tl.program_id(0) // tiles).to(tl.int64)

    row, column = up_first_y + ty * up_step, up_first_x + tx * up_step
    v += plane * height * width
    u = _upsampled(v, up_y, up_x, height, width, row, column, COARSE, FINE, RANK, PRECISION)
    if GATED:
        row, column = gate_first_y + ty * gate_step, gate_first_x + tx * gate_step
        x += plane * gate_height * gate_width
        s = _upsampled(x, gate_y, gate_x, gate_height, gate_width, row, column, GATE, FINE, GATE_RANK, PRECISION)
        u = tl.where(s > 0, u, slope * u)
        if CLAMPED:
            s = tl.where(s > 0, s, -slope * s)
            u = tl.where(s < limit, u, 0.0)
    else:
        u = _leaky_relu(u, slope, limit, CLAMPED)
    fine, out = tl.arange(0, FINE), tl.arange(0, OUT)
    u = u.to(y.dtype.element_ty)

    entries = fine[:, None] * OUT + out[None, :]
    result = tl.zeros((OUT, OUT), tl.float32)
    for r in range(DOWN_RANK):
        a = tl.load(down_y + r * FINE * OUT + entries)
        b = tl.load(down_x + r * FINE * OUT + entries)
        t = tl.dot(tl.trans(a), u, input_precision=PRECISION).to(u.dtype)  # (OUT, FINE)
        result = tl.dot(t, b, result, input_precision=PRECISION)
    rows, columns = ty * out_step + out[:, None], tx * out_step + out[None, :]
    is_mine = (out[:, None] < out_step) & (out[None, :] < out_step) & (rows < out_height) & (columns < out_width)
    tl.store(y + plane * out_height * out_width + rows * out_width + columns, result, mask=is_mine)
