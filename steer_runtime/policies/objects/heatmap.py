"""A vision tower small enough to train on a CPU: two cameras in, where each object class is out.

Invariant: an object's place is read off a heatmap by soft-argmax (Levine et al. 2016, arXiv 1504.00702, section 4), so
the same weights that a privileged label trains in the picture place the object in metres.
Direct regression of positions needs several times the data. No buffers: all that is stored is a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from steer_runtime.policies.objects.config import HeatmapConfig

STRIDE = 4
"""Pixels of a camera's image to one cell of its heatmap."""
PARTS = (2, 3, 1, 2, 1, 4, 4)
"""Place, position, present, wrist place, wrist present, turn, wrist turn: how the numbers of an object class split (see
`geometry`)."""
GEOMETRY = sum(PARTS)
"""Numbers an object class."""
_GROUPS = 8
_FEATURE = 64


@dataclass(frozen=True)
class Seen:
    """What the tower sees. C object classes; places are fractions of the image, column and row from the top left.

    heatmap, wrist_heatmap [B, C, cells]: logits over a square grid of cells, row by row. place, wrist_place [B, C, 2].
    position [B, C, 3]: in the world, m. present, wrist_present [B, C]: logits that it is in the scene, in the picture.
    turn, wrist_turn [B, C, 4]: `bearing` of how it is turned in the world, and against the hand; smaller when unsure.
    """

    heatmap: Tensor
    place: Tensor
    position: Tensor
    present: Tensor
    wrist_heatmap: Tensor
    wrist_place: Tensor
    wrist_present: Tensor
    turn: Tensor
    wrist_turn: Tensor

    def geometry(self) -> Tensor:
        """[B, C, GEOMETRY] of the function of this name."""
        there, close = self.present.sigmoid(), self.wrist_present.sigmoid()
        return geometry(self.place, self.position, there, self.wrist_place, close, self.turn, self.wrist_turn)


def geometry(
    place: Tensor,
    position: Tensor,
    present: Tensor,
    wrist_place: Tensor,
    wrist_present: Tensor,
    turn: Tensor,
    wrist_turn: Tensor,
) -> Tensor:
    """[..., GEOMETRY] of places [..., 2], position [..., 3] (m), presences [...] from 0 to 1 and bearings [..., 4].

    A place, position or bearing counts as far as the object is there: without it, it is the middle of the picture, the
    origin, nothing.
    """
    there, close = present[..., None], wrist_present[..., None]
    first = 0.5 + there * (place - 0.5), there * position, there
    return torch.cat((*first, 0.5 + close * (wrist_place - 0.5), close, there * turn, close * wrist_turn), -1)


def bearing(angle: Tensor) -> Tensor:
    """[..., 4] of angles [...] (rad): cos 2a, sin 2a, cos 4a, sin 4a.

    A box looks the same after half a turn, one with a square base after a quarter, and so may the hand take them.
    """
    return torch.stack(((2 * angle).cos(), (2 * angle).sin(), (4 * angle).cos(), (4 * angle).sin()), -1)


class HeatmapTower(nn.Module):
    """Pixels [B, 6, S, S] in [-1, 1], the first camera's channels and then the wrist's, to `Seen`."""

    def __init__(self, heat: HeatmapConfig, image_size: int) -> None:
        super().__init__()
        classes = len(heat.classes)
        self.front = _Eye(heat, image_size)
        self.wrist = _Eye(heat, image_size)
        self.name = nn.Parameter(torch.randn(classes, _FEATURE) * 0.1)
        self.locate = _mlp(2 * (2 + _FEATURE) + _FEATURE, 4)
        self.glance = _mlp(2 + 2 * _FEATURE, 1)
        self.turn = _mlp(2 * _FEATURE, 4)
        self.wrist_turn = _mlp(2 * _FEATURE, 4)
        # Set from the training data, not trained: where the objects of a class are on average, and how far they spread.
        self.position_mean = nn.Parameter(torch.zeros(classes, 3), requires_grad=False)
        self.position_scale = nn.Parameter(torch.full((1,), 0.1), requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Geometry [B, C, GEOMETRY]."""
        return self.see(pixels).geometry()

    def see(self, pixels: Tensor) -> Seen:
        """Everything the tower knows of pixels [B, 6, S, S]."""
        heatmap, place, feature = self.front(pixels[:, :3])
        wrist_heatmap, wrist_place, wrist_feature = self.wrist(pixels[:, 3:])
        name = self.name.expand(len(pixels), -1, -1)
        # What the wrist sees tells whether an object is in the hand, so how high it is.
        located = self.locate(torch.cat((2 * place - 1, feature, 2 * wrist_place - 1, wrist_feature, name), -1))
        glanced = self.glance(torch.cat((2 * wrist_place - 1, wrist_feature, name), -1))
        return Seen(
            heatmap=heatmap,
            place=place,
            position=self.position_mean + located[..., :3] * self.position_scale,
            present=located[..., 3],
            wrist_heatmap=wrist_heatmap,
            wrist_place=wrist_place,
            wrist_present=glanced[..., 0],
            turn=self.turn(torch.cat((feature, name), -1)),
            wrist_turn=self.wrist_turn(torch.cat((wrist_feature, name), -1)),
        )


class _Eye(nn.Module):
    """One camera [B, 3, S, S]: heatmaps [B, C, cells], places [B, C, 2], features [B, C, _FEATURE] at the places."""

    def __init__(self, heat: HeatmapConfig, image_size: int) -> None:
        super().__init__()
        d, classes = heat.hidden, len(heat.classes)
        thin, low, mid = d // 8, d // 4, d // 2
        self.stem = nn.Sequential(_Down(3, thin, kernel=5), _Down(thin, low), _Residual(low))
        self.middle = nn.Sequential(_Down(low, mid), _Residual(mid))
        self.bottom = _Down(mid, d)
        cells = (image_size // (4 * STRIDE)) ** 2
        self.position_embedding = nn.Parameter(torch.zeros(1, cells, d))
        block = nn.TransformerEncoderLayer(
            d, heat.heads, 3 * d, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.mixer = nn.TransformerEncoder(block, heat.blocks, enable_nested_tensor=False)
        self.top_down = nn.Conv2d(d, mid, 1)
        self.middle_lateral = nn.Conv2d(mid, mid, 1)
        self.middle_down = nn.Conv2d(mid, _FEATURE, 1)
        self.stem_lateral = nn.Conv2d(low, _FEATURE, 1)
        self.heat = nn.Conv2d(_FEATURE, classes, 1)
        self.offset = nn.Conv2d(_FEATURE, 2 * classes, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.stem(pixels)
        middle = self.middle(fine)
        coarse = self.bottom(middle)
        mixed = self.mixer(coarse.flatten(2).transpose(1, 2) + self.position_embedding)
        coarse = mixed.transpose(1, 2).reshape(coarse.shape)
        joined = functional.gelu(self.middle_lateral(middle) + _twice(self.top_down(coarse)))
        joined = functional.gelu(self.stem_lateral(fine) + _twice(self.middle_down(joined)))
        heatmap = self.heat(joined).flatten(2)
        offset = 0.1 * torch.tanh(self.offset(joined)).unflatten(1, (-1, 2)).flatten(3)
        place, feature = _read(heatmap, joined, offset)
        return heatmap, place, feature


class _Down(nn.Sequential):
    """Convolution of stride 2, group norm, GELU: [B, in, H, W] -> [B, out, H / 2, W / 2]."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, 2, kernel // 2, bias=False), nn.GroupNorm(_GROUPS, outputs), nn.GELU()
        )


class _Residual(nn.Module):
    """gelu(x + f(x)), f two 3 x 3 convolutions with group norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.GroupNorm(_GROUPS, width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.GroupNorm(_GROUPS, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x + self.body(x))


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, outputs))


def _twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def _read(heatmap: Tensor, features: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Soft-argmax: place [B, C, 2] = sum_n p_n (cell_n + offset_n), feature [B, C, F] = sum_n p_n features_n.

    p = softmax(heatmap [B, C, n]); cell centres are fractions of the image; offset [B, C, 2, n] refines them.
    """
    weight = heatmap.softmax(-1)
    side = features.shape[-1]
    line = (torch.arange(side, device=features.device, dtype=features.dtype) + 0.5) / side
    cells = torch.stack((line.repeat(side), line.repeat_interleave(side)))
    place = (weight[:, :, None] * (cells + offset)).sum(-1)
    return place, torch.einsum("bcn,bfn->bcf", weight, features.flatten(2))
