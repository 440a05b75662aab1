"""The image path of the small tower: two cameras' pictures to one input.

Invariant: pixels are averaged, not picked, so that what training rendered small and a camera's larger picture look alike.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steer_runtime.policies.camera import require_image


def camera_values(front: np.ndarray, wrist: np.ndarray, size: int, *, cameras: tuple[str, str]) -> Tensor:
    """Input float32 [1, 6, size, size] in [-1, 1] of the small tower, from two images as policies see them.

    Pixels are averaged down to `size` (Pillow's box filter); the channels are the front camera's, then the wrist's.
    cameras: their names, for the refusal. Raises SteerError('bad_image').
    """
    parts = []
    for image, camera in zip((front, wrist), cameras, strict=True):
        require_image(image, camera, square=True)
        if image.shape[0] != size:
            image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
        parts.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.cat(parts)[None].float() / 127.5 - 1.0
