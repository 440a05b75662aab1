"""The LIBERO evaluation image path, against independent computations of each step."""

from __future__ import annotations

import numpy as np
import pytest

from steer_runtime.errors import SteerError
from steer_runtime.policies.camera import require_image
from steer_runtime.policies.openvla.image import centre_crop, libero_image, pixel_values

RNG = np.random.default_rng(0)


def _scene(size: int = 256) -> np.ndarray:
    """Smooth colours, as a camera gives: noise would only test the JPEG codec."""
    y, x = np.mgrid[0:size, 0:size] / size
    return np.stack([255 * x, 255 * y, 127 * (1 + np.sin(6 * x))], axis=-1).astype(np.uint8)


def _published_crop(image: np.ndarray, area: float) -> np.ndarray:
    """TensorFlow's crop_and_resize with boxes in normalised coordinates, pixel by pixel."""
    size = image.shape[0]
    side = np.sqrt(area)
    low = (1 - side) / 2
    out = np.zeros(image.shape)
    for i in range(size):
        for j in range(size):
            y = low * (size - 1) + i * side * (size - 1) / (size - 1)
            x = low * (size - 1) + j * side * (size - 1) / (size - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, size - 1), min(x0 + 1, size - 1)
            top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


def test_crop_samples_where_the_published_crop_does() -> None:
    image = RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    expected = np.floor(_published_crop(image.astype(float), 0.9) / 255 * 255.5)
    assert np.max(np.abs(centre_crop(image, 0.9).astype(float) - expected)) <= 1


def test_crop_keeps_ninety_percent_of_the_area() -> None:
    image = np.zeros((200, 200, 3), dtype=np.uint8)
    image[:, :, 0] = np.arange(200)[None]
    shown = centre_crop(image, 0.9)[100, :, 0].astype(float)
    assert (shown[-1] - shown[0]) / 199 == pytest.approx(np.sqrt(0.9), abs=0.01)


def test_the_path_keeps_orientation_and_colour() -> None:
    image = libero_image(_scene(), 224)
    assert (image.shape, image.dtype) == ((224, 224, 3), np.dtype(np.uint8))
    assert image[100, 200, 0] > image[100, 20, 0] + 100  # red grows to the right
    assert image[200, 100, 1] > image[20, 100, 1] + 100  # green grows downwards


def test_extremes_stay_extreme() -> None:
    for value in (0, 255):
        assert np.all(libero_image(np.full((256, 256, 3), value, dtype=np.uint8), 224) == value)


def test_the_input_image_is_not_written_to() -> None:
    image = _scene()
    image.setflags(write=False)
    before = image.copy()
    pixel_values(libero_image(image, 224))
    assert np.array_equal(image, before)


def test_six_channels_have_the_published_normalisation() -> None:
    values = pixel_values(np.full((28, 28, 3), 255, dtype=np.uint8))
    expected = [(1 - 0.484375) / 0.228515625, (1 - 0.455078125) / 0.2236328125, (1 - 0.40625) / 0.224609375, 1, 1, 1]
    assert values.shape == (1, 6, 28, 28)
    assert values[0, :, 3, 5].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3), dtype=np.float32),
        np.zeros((64, 64), dtype=np.uint8),
        np.zeros((64, 64, 4), dtype=np.uint8),
        np.zeros((3, 64, 64), dtype=np.uint8),
        np.zeros((64, 48, 3), dtype=np.uint8),
        np.zeros((8, 8, 3), dtype=np.uint8),
        [[0]],
    ],
)
def test_images_of_another_kind_are_refused(image: np.ndarray) -> None:
    with pytest.raises(SteerError, match=r"'wrist'.*uint8 RGB") as refused:
        require_image(image, "wrist", square=True)
    assert refused.value.code == "bad_image"
