"""Vision first: the tower learns where the objects are from labels that only the simulator has.

Invariant: the labels are in the loss only; what is kept is the tower, whose tokens carry what it learnt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from sim.training.frame_data import FrameData
from sim.training.settings import VisionTraining
from sim.training.trainer import Order
from sim.training.vision_weights import load_tower
from steer_runtime.errors import SteerError
from steer_runtime.policies.objects.config import HeatmapConfig
from steer_runtime.policies.objects.heatmap import HeatmapTower, Seen, bearing

_BATCH = 64
_PLACE_BETA, _POSITION_BETA, _TURN_BETA = 0.02, 0.1, 0.3
"""Where the smooth L1 loss turns from square to linear: 2 % of the image, 1 cm, 0.15 rad of a double angle."""


class VisionSubject:
    """A tower, frames to learn from and frames to score it on.

    loss = heat * CE(heatmap) + place * L1(place) + position * L1(position / 0.1 m) + turn * L1(bearing) + presence * BCE,
    over the objects that are in the scene and in the picture; the wrist's terms likewise without position.
    """

    def __init__(self, settings: VisionTraining, data: FrameData, held_out: Mapping[str, FrameData]) -> None:
        self._settings, self._data, self._held_out = settings, data, dict(held_out)
        size = settings.tower.image_size
        if data.agentview.shape[-1] != size:
            raise SteerError(
                "mixed_sizes",
                f"the frames have {data.agentview.shape[-1]} pixels and the tower {size}: make them equal",
            )
        torch.manual_seed(settings.seed)
        heat = HeatmapConfig(classes=data.classes, **settings.tower.model_dump(exclude={"image_size"}))
        self._heat = heat
        self.module: nn.Module = HeatmapTower(heat, size)
        for eye in (self.tower.front, self.tower.wrist):
            nn.init.normal_(eye.position_embedding, std=0.02)
        self._start = ""
        if settings.start is not None:
            began = load_tower(settings.start)
            if (began.heat, began.image_size) != (heat, size):
                raise SteerError(
                    "other_checkpoint",
                    f"{settings.start} is a tower of another shape or other classes: start without it",
                )
            self.module.load_state_dict(began.tower.state_dict())
            self._start = began.digest
        else:
            means = torch.nanmean(data.positions, 0)
            with torch.no_grad():
                self.tower.position_mean.copy_(means)
        self._order = Order(len(data), settings.batch, settings.seed)

    @property
    def tower(self) -> HeatmapTower:
        assert isinstance(self.module, HeatmapTower)
        return self.module

    @property
    def heat(self) -> HeatmapConfig:
        """What the tower was built from."""
        return self._heat

    def fingerprint(self) -> Mapping[str, str]:
        return {"frames_sha256": hashlib.sha256(self._data.digest.encode()).hexdigest(), "start_sha256": self._start}

    def rate(self, name: str) -> float:
        return 1.0

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        indices = self._order.indices(step)
        seen = self.tower.see(network_input(self._disturbed(self._data.pixels(indices))))
        parts = self._parts(seen, self._data, indices)
        total = torch.stack(list(parts.values())).sum()
        return total, {name: float(part.detach()) for name, part in parts.items()}

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """For each held-out set: error of the position in the table plane and in space (cm), of the place (pixels)."""
        self.module.eval()
        scores: dict[str, float] = {}
        for name, data in self._held_out.items():
            for key, value in localisation(self.tower, data).items():
                scores[f"{name}/{key}"] = value
        return scores

    def _disturbed(self, pixels: Tensor) -> Tensor:
        """Brightness a camera, tint a channel and grain a pixel, all normal; nothing that moves the picture."""
        s, n = self._settings, len(pixels)
        gain = 1 + s.brightness * torch.randn(n, 2, 1, 1).repeat_interleave(3, 1)
        tint = s.tint * torch.randn(n, 6, 1, 1)
        grain = s.grain * torch.randn_like(pixels)
        return (pixels * gain + tint + grain).clamp(0, 255)

    def _parts(self, seen: Seen, data: FrameData, indices: Tensor) -> dict[str, Tensor]:
        s = self._settings
        places, wrist = data.places[indices], data.wrist_places[indices]
        positions = data.positions[indices]
        there = ~positions[..., 0].isnan()
        visible, close = ~places[..., 0].isnan(), ~wrist[..., 0].isnan()
        aimed = (seen.position - positions) / 0.1
        turned = seen.turn - bearing(data.turns[indices])
        wrist_turned = seen.wrist_turn - bearing(data.turns[indices] - data.hand_turn[indices, None])
        return {
            "heat": s.heat * _cross_entropy(seen.heatmap, places, visible),
            "place": s.place * _distance(seen.place - places, visible, _PLACE_BETA),
            "position": s.position * _distance(aimed, visible, _POSITION_BETA),
            "turn": s.turn * _distance(turned, visible, _TURN_BETA),
            "present": s.presence * functional.binary_cross_entropy_with_logits(seen.present, there.float()),
            "wrist_heat": s.heat * _cross_entropy(seen.wrist_heatmap, wrist, close),
            "wrist_place": s.place * _distance(seen.wrist_place - wrist, close, _PLACE_BETA),
            "wrist_turn": s.turn * _distance(wrist_turned, close, _TURN_BETA),
            "wrist_present": s.presence
            * functional.binary_cross_entropy_with_logits(seen.wrist_present, close.float()),
        }


@torch.no_grad()
def localisation(tower: HeatmapTower, data: FrameData) -> dict[str, float]:
    """Scores over all objects in the picture: xy_median_cm, xy_mean_cm, xyz_median_cm, under_3_cm (share),
    place_median_px, wrist_place_median_px, present_accuracy, wrist_present_accuracy, turn_error and wrist_turn_error (mean
    distance of the double angle's cosine and sine; 1 when nothing is known)."""
    plane, space, pixels, wrist_pixels, present, wrist_present, turn, wrist_turn = ([] for _ in range(8))
    size = data.agentview.shape[-1]
    for indices in torch.arange(len(data)).split(_BATCH):
        seen = tower.see(network_input(data.pixels(indices)))
        visible, close = ~data.places[indices, :, 0].isnan(), ~data.wrist_places[indices, :, 0].isnan()
        error = 100 * (seen.position - data.positions[indices])[visible]
        plane.append(error[:, :2].norm(dim=-1))
        space.append(error.norm(dim=-1))
        pixels.append(size * (seen.place - data.places[indices])[visible].norm(dim=-1))
        wrist_pixels.append(size * (seen.wrist_place - data.wrist_places[indices])[close].norm(dim=-1))
        turns = data.turns[indices]
        turn.append((seen.turn - bearing(turns))[visible][:, :2].norm(dim=-1))
        relative = bearing(turns - data.hand_turn[indices, None])
        wrist_turn.append((seen.wrist_turn - relative)[close][:, :2].norm(dim=-1))
        present.append(((seen.present > 0) == ~data.positions[indices, :, 0].isnan()).float().flatten())
        wrist_present.append(((seen.wrist_present > 0) == close).float().flatten())
    joined = torch.cat(plane)
    return {
        "xy_median_cm": float(joined.median()),
        "xy_mean_cm": float(joined.mean()),
        "xyz_median_cm": float(torch.cat(space).median()),
        "under_3_cm": float((joined < 3).float().mean()),
        "place_median_px": float(torch.cat(pixels).median()),
        "wrist_place_median_px": float(torch.cat(wrist_pixels).median()),
        "present_accuracy": float(torch.cat(present).mean()),
        "wrist_present_accuracy": float(torch.cat(wrist_present).mean()),
        "turn_error": float(torch.cat(turn).mean()),
        "wrist_turn_error": float(torch.cat(wrist_turn).mean()),
    }


def network_input(pixels: Tensor) -> Tensor:
    """[-1, 1] of [0, 255], as `camera_values` does for the policy."""
    return pixels / 127.5 - 1.0


def split(data: FrameData, share: float, seed: int) -> tuple[FrameData, FrameData]:
    """(to learn from, held out), by frame."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    cut = max(1, int(len(data) * share))
    return _subset(data, order[cut:].sort().values), _subset(data, order[:cut].sort().values)


def _subset(data: FrameData, indices: Tensor) -> FrameData:
    return replace(
        data,
        agentview=data.agentview[indices],
        wrist=data.wrist[indices],
        positions=data.positions[indices],
        places=data.places[indices],
        wrist_places=data.wrist_places[indices],
        turns=data.turns[indices],
        hand_turn=data.hand_turn[indices],
    )


def _cross_entropy(logits: Tensor, places: Tensor, mask: Tensor) -> Tensor:
    """Mean of -log softmax(logits [B, C, n]) at the cell that holds the place [B, C, 2], over the mask [B, C]."""
    side = round(logits.shape[-1] ** 0.5)
    cell = (places.nan_to_num() * side).long().clamp(0, side - 1)
    target = cell[..., 1] * side + cell[..., 0]
    if not bool(mask.any()):
        return logits.sum() * 0.0
    return functional.cross_entropy(logits[mask], target[mask])


def _distance(difference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Smooth L1 of the difference [B, C, k], mean over the mask [B, C]."""
    if not bool(mask.any()):
        return difference.nan_to_num().sum() * 0.0
    chosen = difference[mask]
    return functional.smooth_l1_loss(chosen, torch.zeros_like(chosen), beta=beta)
