"""The image path of OpenVLA's LIBERO evaluation, from a camera image to network input.

Invariant: the steps and their order are the ones the policies were trained and published with (openvla
`experiments/robot/{libero/libero_utils,openvla_utils}.py` and its processor); leaving one out costs success. TensorFlow's
and Pillow's codecs and Lanczos kernels differ by about one grey level; the crop's sampling is TensorFlow's, exactly.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steer_runtime.policies.camera import require_image

DINO_MEAN = (0.484375, 0.455078125, 0.40625)
DINO_STD = (0.228515625, 0.2236328125, 0.224609375)
SIGLIP_MEAN = (0.5, 0.5, 0.5)
SIGLIP_STD = (0.5, 0.5, 0.5)
"""Channel statistics of the two towers (published `preprocessor_config.json`)."""
CROP_AREA = 0.9
"""Share of the area the centre crop keeps, matching the random crops of training (openvla_utils.py)."""
JPEG_QUALITY = 95
"""TensorFlow's `encode_jpeg` default, with 4:2:0 chroma."""


def libero_image(image: np.ndarray, size: int, *, camera: str = "agentview") -> np.ndarray:
    """uint8 [size, size, 3] that the network was trained to see, from uint8 [H, H, 3] already turned by 180 degrees.

    JPEG there and back, Lanczos to `size`, centre crop of area 0.9, bilinear back to `size`.
    """
    require_image(image, camera, square=True)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=2)
    decoded = Image.open(buffer, formats=("JPEG",)).convert("RGB")
    return centre_crop(np.asarray(decoded.resize((size, size), Image.Resampling.LANCZOS)), CROP_AREA)


def centre_crop(image: np.ndarray, area: float) -> np.ndarray:
    """uint8 [S, S, 3]: the centre of side sqrt(area), sampled bilinearly back to S (`tf.image.crop_and_resize`).

    Output pixel i samples row (S - 1) (1 - side) / 2 + i * side. Back to uint8 by truncating 255.5 x, as
    `tf.image.convert_image_dtype` does.
    """
    size = image.shape[0]
    side = float(np.sqrt(area))
    axis = torch.linspace(-side, side, size, dtype=torch.float32)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    pixels = torch.from_numpy(image.astype(np.float32) / 255.0).permute(2, 0, 1)[None]
    # In grid_sample's aligned coordinates -1 and 1 are the centres of the corner pixels, as in TensorFlow's boxes.
    sampled = torch.nn.functional.grid_sample(
        pixels, torch.stack((columns, rows), dim=-1)[None], mode="bilinear", align_corners=True
    )
    return (sampled[0].clamp(0, 1) * 255.5).clamp(max=255).to(torch.uint8).permute(1, 2, 0).numpy()


def pixel_values(image: np.ndarray) -> Tensor:
    """Network input float32 [1, 6, S, S] of uint8 [S, S, 3]: (x / 255 - mean) / std, DINO's channels then SigLIP's."""
    scaled = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255.0
    towers = [
        (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in ((DINO_MEAN, DINO_STD), (SIGLIP_MEAN, SIGLIP_STD))
    ]
    return torch.cat(towers)[None]
