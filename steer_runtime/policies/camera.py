"""What every policy asks of a camera's picture before it looks at it."""

from __future__ import annotations

import numpy as np

from steer_runtime.errors import SteerError


def require_image(image: object, camera: str, *, square: bool = False) -> None:
    """Refuse what is not a uint8 RGB image of 16 to 4096 px a side, or not square. Raises SteerError('bad_image')."""
    if isinstance(image, np.ndarray):
        rgb = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        if (
            rgb
            and all(16 <= side <= 4096 for side in image.shape[:2])
            and (not square or len(set(image.shape[:2])) == 1)
        ):
            return
        given = f"{image.dtype} {list(image.shape)}"
    else:
        given = type(image).__name__
    wanted = "a square uint8 RGB image [H, H, 3]" if square else "a uint8 RGB image [H, W, 3]"
    raise SteerError(
        "bad_image",
        f"camera {camera!r} gave {given}: expected {wanted} of 16 to 4096 px a side; convert the camera's encoding or size",
    )
