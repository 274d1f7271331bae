"""Random crops, flips, rotations and collages of a whole training batch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from untrojan.errors import UntrojanError


def augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    crop_padding: int = 0,
    flip: bool = False,
    rotation: float = 0.0,
) -> Tensor:
    """A batch as the training loop feeds it: uint8 (N, C, H, W) to float32 (N, C, H, W) in [0, 1].

    Each image is mirrored left to right with probability 1/2 (``flip``), then a window of the original
    size is cut at a uniformly drawn place from the image with ``crop_padding`` black pixels around it,
    then it is turned by an angle uniform in ±``rotation`` degrees. With everything off the result is
    ``to_float(images)``, bit for bit; what is on draws from ``generator`` (any device) and nothing else
    does. Crop and flip move bytes, so they leave pixel values exact; rotation interpolates in float32 and is
    never rounded back to 8 bits, which would cost a faint pattern its last place.

    Raises UntrojanError where the images are not uint8, the padding is negative or the angle lies outside
    0..180 degrees.
    """
    _check(images, crop_padding, rotation)
    count = len(images)
    device = generator.device
    if crop_padding or flip:
        shifts = torch.randint(0, 2 * crop_padding + 1, (count, 2), generator=generator, device=device)
        mirrored = torch.randint(0, 2, (count,), generator=generator, device=device) if flip else None
        images = crop(images, shifts, crop_padding, mirrored)
    pixels = images.float().div_(255)
    if rotation:
        turn = torch.rand(count, generator=generator, device=device)
        pixels = rotate(pixels, (2 * turn - 1) * rotation)
    return pixels


def crop(images: Tensor, shifts: Tensor, padding: int, mirrored: Tensor | None = None) -> Tensor:
    """Windows of the images' own size, cut from the zero-padded and, where wanted, mirrored images.

    ``images`` (N, C, H, W) of any type; ``shifts`` int64 (N, 2), row and column of each window's corner in
    the padded image, in 0..2 ``padding``; ``mirrored`` int64 (N,) of 0 and 1. Same shape and type out.
    """
    count, channels, height, width = images.shape
    tall, wide = height + 2 * padding, width + 2 * padding
    copies = 1 if mirrored is None else 2
    padded = images.new_zeros((copies, count, channels, tall, wide))
    padded[0, ..., padding : padding + height, padding : padding + width] = images
    shifts = shifts.to(images.device)
    sources = torch.arange(count, device=images.device)
    if mirrored is not None:
        padded[1] = padded[0].flip(-1)
        sources = sources + count * mirrored.to(images.device)

    # Every row of every window is one run of `width` values in the flat padded batch, so that an overlapping
    # view of all such runs turns the crop into a row gather, which copies memory rather than elements.
    flat = padded.view(-1)
    runs = flat.as_strided((max(flat.numel() - width + 1, 0), width), (1, 1))
    planes = sources[:, None] * channels + torch.arange(channels, device=images.device)
    rows = planes[:, :, None] * tall + torch.arange(height, device=images.device) + shifts[:, 0, None, None]
    starts = rows * wide + shifts[:, 1, None, None]
    return runs.index_select(0, starts.view(-1)).view(images.shape)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images turned counter-clockwise about their centre by ``degrees`` (N,).

    float (N, C, H, W), same shape out: bilinear between pixel centres, black from outside the image.
    """
    if not len(images):  # affine_grid refuses an empty batch
        return images.clone()
    height, width = images.shape[2:]
    angle = torch.deg2rad(degrees).to(images)
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # Grid coordinates run over -1..1 on both axes whatever their lengths: hence the aspect ratio.
    across = torch.stack([cosine, -sine * (height / width), zero], 1)
    down = torch.stack([sine * (width / height), cosine, zero], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def collage(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image with a rectangle of another of the batch in place of its own, and which other, int64 (N,).

    (N, C, H, W) of any type, same shape and type out. The rectangle is the same in all images; its area is
    drawn uniformly between none and all of the image's, and it has the image's proportions (Yun et al.,
    "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
    section 3.2). No image gets its own where there are two or more.
    """
    count, (height, width) = len(images), images.shape[-2:]
    if count < 2:
        return images.clone(), torch.arange(count, device=images.device)
    drawn = torch.rand(3, generator=generator).tolist()
    tall, wide = (int(drawn[0] ** 0.5 * side) for side in (height, width))
    top, left = int(drawn[1] * (height - tall + 1)), int(drawn[2] * (width - wide + 1))
    places = slice(top, top + tall), slice(left, left + wide)
    order = torch.randperm(count, generator=generator).to(images.device)
    out, others = images.clone(), torch.empty_like(order)
    # Whoever comes next in a random circle is somebody else.
    others[order] = order.roll(1)
    out[..., *places] = images[..., *places][others]
    return out, others


def _check(images: Tensor, crop_padding: int, rotation: float) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        found = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise UntrojanError(f"augment takes uint8 images (N, C, H, W), not {found}")
    if crop_padding < 0:
        raise UntrojanError(f"crop_padding must be 0 pixels or more, not {crop_padding}")
    if not 0 <= rotation <= 180:
        raise UntrojanError(f"rotation must lie in 0..180 degrees, not {rotation}")
