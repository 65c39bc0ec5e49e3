"""The launcher of the augmentations, and what to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton

from .augment import augment_kernel
from .cases import TYPES, Case

# Values of a tile; with jitter each takes three loads and more registers.
TILE, JITTER_TILE, MOST_COLUMNS, WARPS = 2048, 1024, 256, 4
# About so many programs, where the images are few and large.
PROGRAMS = 512


def _tile(width: int, color_jitter: float) -> dict[str, int]:
    columns = min(MOST_COLUMNS, triton.next_power_of_2(3 * width))
    return {"ROWS": (JITTER_TILE if color_jitter else TILE) // columns, "COLUMNS": columns}


def augment(
    images: torch.Tensor,
    indices: torch.Tensor,
    flips: torch.Tensor | None,
    step: int | torch.Tensor,
    results: Sequence[torch.Tensor],
    *,
    seed: int,
    first: int,
    scale: Sequence[float],
    shift: Sequence[float],
    random_flip: bool,
    crop_pad: int,
    reflect: bool,
    color_jitter: float,
    cutout: int,
    mixing: str,
    beta_table: torch.Tensor | None,
) -> None:
    """Fills `results`: images [n, 3, H, W], channels-last, and with mixing ("mixup" or "cutmix") partners and weights.

    One launch. The step may be on the device, so that a captured graph can advance it.
    """
    made, partners, weights = results
    count, _, height, width = made.shape
    if made.numel() == 0:
        return
    tile = _tile(width, color_jitter)
    tiles = triton.cdiv(height, tile["ROWS"]) * triton.cdiv(3 * width, tile["COLUMNS"])
    parts = min(tiles, triton.cdiv(PROGRAMS, count))
    on_device = isinstance(step, torch.Tensor)
    augment_kernel[(count * parts,)](
        images, indices, None if flips is None else flips.view(torch.uint8), step if on_device else None, beta_table,
        made, partners if mixing != "none" else None, weights if mixing != "none" else None,
        0 if on_device else step, seed, len(images), len(indices), first, parts, *scale, *shift,
        STRENGTH=color_jitter, CUTOUT=cutout, MIXING=mixing, PAD=crop_pad, REFLECT=reflect, RANDOM_FLIP=random_flip,
        HEIGHT=height, WIDTH=width, **tile, num_warps=WARPS,
    )  # fmt: skip


# Names and options of the presets, and of every augmentation at once.
_RECIPES = {
    "plain": {},
    "crop, flip": {"PAD": 4, "flips_ptr": "*u8"},
    "zero crop, random flip, jitter": {"PAD": 4, "REFLECT": False, "RANDOM_FLIP": True, "STRENGTH": 0.1},
    "cutout": {"PAD": 4, "flips_ptr": "*u8", "CUTOUT": 8},
    "mixup": {"PAD": 4, "flips_ptr": "*u8", "MIXING": "mixup"},
    "cutmix": {"PAD": 4, "flips_ptr": "*u8", "MIXING": "cutmix"},
    "mixup, jitter, cutout": {"PAD": 4, "RANDOM_FLIP": True, "MIXING": "mixup", "STRENGTH": 0.1, "CUTOUT": 8},
    "cutmix, jitter, cutout": {"PAD": 4, "RANDOM_FLIP": True, "MIXING": "cutmix", "STRENGTH": 0.1, "CUTOUT": 8},
}


def static_cases() -> Iterator[Case]:
    """The recipes of 32×32 images in bfloat16; the heaviest also in float32 and of 224×224."""
    defaults = {"STRENGTH": 0.0, "CUTOUT": 0, "MIXING": "none", "PAD": 0, "REFLECT": True, "RANDOM_FLIP": False}
    for name, options in _RECIPES.items():
        for dtype, size in ((d, s) for d in TYPES for s in (32, 224)):
            if (dtype, size) != ("bf16", 32) and (name != "mixup, jitter, cutout" or dtype == "fp16"):
                continue
            constants = {**defaults, **options, "HEIGHT": size, "WIDTH": size}
            constants |= _tile(size, constants["STRENGTH"])
            types = {"images_ptr": "*u8", "indices_ptr": "*i64", "out_ptr": f"*{dtype}", "step_ptr": "*i64"}
            types["flips_ptr"] = constants.pop("flips_ptr", None)
            mixes = constants["MIXING"] != "none"
            types |= {"beta_ptr": "*fp64", "partners_ptr": "*i64", "weights_ptr": "*fp32"} if mixes else {}
            absent = [n for n in augment_kernel.arg_names if n.endswith("_ptr") and types.get(n) is None]
            constants |= dict.fromkeys(absent)
            kinds = {n: "fp32" if n.endswith(("scale", "shift")) else "i32" for n in augment_kernel.arg_names}
            found = {n: types.get(n, kind) for n, kind in kinds.items() if n not in constants}
            aligned = tuple(n for n in found if n.endswith("_ptr"))
            yield Case(
                f"augment {name} {size}² {dtype}", augment_kernel, found, constants, aligned, WARPS, ("out_ptr",)
            )
