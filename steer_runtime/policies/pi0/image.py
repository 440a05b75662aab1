"""The image path of Pi0: any camera's picture to the square that SigLIP was trained on, and cameras to one tensor.

Invariant: the aspect is kept; what the picture does not fill is 0 before scaling to [-1, 1], so black (openpi
`resize_with_pad`, LeRobot `resize_with_pad_torch`). Sampling is bilinear without antialiasing, as LeRobot's and openpi's
torch code; transformers' own processor is bicubic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from steer_runtime.errors import SteerError, nearest
from steer_runtime.policies.camera import require_image


def padded(image: np.ndarray, size: int) -> Tensor:
    """float32 [3, size, size] in [-1, 1] of uint8 [H, W, 3]: resized to fit, centred, black around it."""
    height, width = image.shape[:2]
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    ratio = max(height / size, width / size)
    inner = (max(1, int(height / ratio)), max(1, int(width / ratio)))
    if inner != (height, width):
        pixels = torch.nn.functional.interpolate(pixels, inner, mode="bilinear", align_corners=False)
        # The published code resizes 8-bit pictures to 8-bit pictures.
        pixels = pixels.round().clamp(0, 255)
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    whole = torch.zeros(1, 3, size, size)
    whole[..., top : top + inner[0], left : left + inner[1]] = pixels
    return whole[0] / 127.5 - 1.0


def camera_images(images: Mapping[str, np.ndarray], cameras: Sequence[str], size: int) -> Tensor:
    """float32 [len(cameras), 3, size, size] in the order of the names; other cameras are not looked at.

    Raises SteerError: 'missing_camera', 'bad_image'.
    """
    require_cameras(images, cameras)
    for camera in cameras:
        require_image(images[camera], camera)
    return torch.stack([padded(images[camera], size) for camera in cameras])


def require_cameras(images: Mapping[str, np.ndarray], cameras: Sequence[str]) -> None:
    """Raises SteerError('missing_camera') when an image is not there."""
    missing = [camera for camera in cameras if camera not in images]
    if missing:
        raise SteerError(
            "missing_camera",
            f"the observation has {len(images)} images and none of camera {missing[0]!r}: expected {len(cameras)} cameras, "
            f"{', '.join(cameras)}; {nearest(missing[0], images)}",
        )


def ragged(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """pixels [B, C, 3, S, S] and which are cameras, bool [B, C], of samples with their own number of cameras each.

    Missing ones are 0 (grey) and masked: nothing attends to them, for they have no tokens.
    """
    most = max(len(sample) for sample in samples)
    mask = torch.tensor([[i < len(sample) for i in range(most)] for sample in samples])
    pixels = samples[0].new_zeros(len(samples), most, *samples[0].shape[1:])
    for row, sample in enumerate(samples):
        pixels[row, : len(sample)] = sample
    return pixels, mask
