"""OpenVLA as a Policy: an observation in, LIBERO actions out, token roles announced before every forward.

Invariant: without a listener and with one, the numbers are the same; the policy knows nothing of steering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from steer_runtime.errors import SteerError, nearest
from steer_runtime.policies.objects.image import camera_values
from steer_runtime.policies.objects.proprioception import OPEN, state_vector
from steer_runtime.policies.objects.tokens import NAMED_OBJECTS, named
from steer_runtime.policies.openvla.actions import ActionTokenizer, Statistics, libero_gripper, read_statistics
from steer_runtime.policies.openvla.checkpoint import load_checkpoint
from steer_runtime.policies.openvla.config import OpenVLAConfig
from steer_runtime.policies.openvla.image import libero_image, pixel_values
from steer_runtime.policies.openvla.model import Decoded, OpenVLAModel
from steer_runtime.policies.shards import LoadReport
from steer_runtime.policies.tokenizer import load_tokenizer
from steer_runtime.policies.weight_hash import hash_matrices
from steer_runtime.types import (
    LIBERO_ACTION_SPACE,
    ActionChunk,
    ActionSpace,
    Memory,
    Observation,
    Role,
    TokenRoles,
    Tower,
    require_memory,
)

TOWER = "lm"


@dataclass(frozen=True)
class Considered:
    """One inference and how it was weighed. mean: float64 [chunk, 7], expected action over the bins in the units of
    `chunk.space`, its gripper not yet a choice (-1 open to +1 close); entropy: float64 [chunk, 7], nats over the bins of
    each action token; words: slot name -> expected index of its word."""

    chunk: ActionChunk
    mean: np.ndarray
    entropy: np.ndarray
    words: Mapping[str, float]


def prompt_text(config: OpenVLAConfig, instruction: str) -> str:
    """The instruction in lower case inside the configuration's prompt (published: openvla `get_vla_action`)."""
    return config.prompt.replace("{instruction}", instruction.lower())


class OpenVLAPolicy:
    """A loaded OpenVLA with the statistics of one suite. One instance serves one inference thread.

    `tokenizer`: fast tokenizer of the checkpoint. `model`: the network. `report`: what the load left aside. `said`: words
    of the last inference, one a slot.
    """

    def __init__(
        self,
        model: OpenVLAModel,
        tokenizer: PreTrainedTokenizerFast,
        statistics: Statistics,
        *,
        name: str | None = None,
        camera: str = "agentview",
        wrist_camera: str = "wrist",
        report: LoadReport | None = None,
    ) -> None:
        if len(tokenizer) > model.config.lm.vocab_rows:
            raise SteerError(
                "no_tokenizer",
                f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.lm.vocab_rows} rows: expected the "
                "tokenizer.json of this checkpoint",
            )
        self.model = model
        self.tokenizer = tokenizer
        self.statistics = statistics
        self.report = report
        self.config = model.config
        self.name = name or model.config.name
        self.trained = model.config.trained
        self.camera = camera
        self.wrist_camera = wrist_camera
        self._gripper = OPEN
        self._counted = ("", 0)  # an instruction and how many known objects it names
        self.said: tuple[str, ...] = ()
        self.action_space: ActionSpace = LIBERO_ACTION_SPACE
        self.actions = ActionTokenizer(self.config.usable_vocab, self.config.n_bins)
        decoder = model.language_model.model
        lm = self.config.lm
        self.towers: Mapping[str, Tower] = {
            TOWER: Tower(
                name=TOWER,
                down_projs=tuple(layer.mlp.down_proj for layer in decoder.layers),
                residual_sites=(model.embedding_entry, *decoder.layers),
                d_model=lm.d_model,
                d_ff=lm.d_ff,
                max_tokens=self.config.max_tokens,
                firings_per_inference=self.config.forwards,
            )
        }
        self._listener: TokenRoles | None = None

    @classmethod
    def from_checkpoint(
        cls,
        directory: Path,
        suite: str,
        *,
        name: str | None = None,
        camera: str = "agentview",
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> OpenVLAPolicy:
        """Load a checkpoint directory (published layout). Raises SteerError as `load_checkpoint`, no_statistics, no_tokenizer."""
        model, report = load_checkpoint(directory, dtype=dtype, device=device)
        statistics = read_statistics(directory, model.config, suite)
        return cls(model, load_tokenizer(directory), statistics, name=name, camera=camera, report=report)

    def __repr__(self) -> str:
        label = "trained" if self.trained else "untrained policy"
        lm = self.config.lm
        return (
            f"OpenVLAPolicy({self.name!r}, {label}, {lm.layers} layers of {lm.d_model} with {lm.d_ff} neurons, "
            f"{self.config.patches} patches, statistics {self.statistics.key!r})"
        )

    @property
    def unembedding(self) -> Tensor:
        """Token basis of tower "lm", [vocab_rows, d_model]."""
        return self.model.unembedding

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the images that an observation must have."""
        return (self.camera,) if self.config.heatmap is None else (self.camera, self.wrist_camera)

    @property
    def options(self) -> Mapping[str, Any]:
        """What decides its actions besides weights and statistics, as it is set now; JSON-able."""
        return {
            "cameras": list(self.cameras),
            "rate_hz": self.action_space.rate_hz,
            "dtype": str(self.unembedding.dtype).removeprefix("torch."),
        }

    @property
    def final_norm(self) -> Tensor:
        """Weight of the norm before the unembedding, [d_model]."""
        return self.model.language_model.model.norm.weight

    def action_token_values(self) -> dict[int, float]:
        """Bin centre in [-1, 1] of each action token id."""
        return self.actions.values()

    @cached_property
    def model_hash(self) -> str:
        """sha256 hex of every down_proj and the unembedding: names, shapes, values as little-endian float32.

        A bf16 model and its exact float32 copy hash alike.
        """
        layers = self.towers[TOWER].down_projs
        named = {f"{TOWER}.{i}.down_proj": module.weight for i, module in enumerate(layers)}  # type: ignore[attr-defined]
        return hash_matrices({**named, f"{TOWER}.unembedding": self.unembedding})

    def announce_roles_to(self, listener: TokenRoles | None) -> None:
        """Set (or clear) who is told the token roles before each forward of tower "lm"."""
        self._listener = listener

    def reset(self, seed: int | None = None) -> None:
        """Forget the last gripper command, all that is remembered, and only where proprioception is a token.

        Nothing is drawn, so a seed makes no difference.
        """
        self._gripper = OPEN

    def told_gripper(self, command: float) -> None:
        """Somebody else commanded the gripper (above zero: close), so that is now the last command."""
        self._gripper = 1.0 if command > 0 else OPEN

    def memory(self) -> Memory:
        """The last gripper command and the words said last (types.Remembering)."""
        return {"gripper": self._gripper, "said": list(self.said)}

    def remember(self, memory: Memory) -> None:
        """Go back to a memory. Raises SteerError('other_memory')."""
        require_memory(self.name, memory, ("gripper", "said"))
        self._gripper, self.said = float(memory["gripper"]), tuple(memory["said"])

    @torch.inference_mode()
    def infer(self, observation: Observation) -> ActionChunk:
        """Actions float32 [chunk, 7] in LIBERO's action space, by one vision pass and `config.forwards` of the language model.

        notes: out_of_range_tokens, how many of the tokens were no action tokens (clipped as published); said_<slot>,
        which of the slot's words was said, counted from 0; unknown_object, 1 where a policy that knows objects by name was
        given an instruction that names fewer than two of them (what, and where to): it acts on words it never learnt.
        Raises SteerError: missing_camera, bad_image, bad_instruction, not_finite.
        """
        return self._chunk(observation, self._decode(observation, all_logits=False))

    @torch.inference_mode()
    def consider(self, observation: Observation) -> Considered:
        """`infer`, with how the action tokens and words were weighed. Raises as `infer`."""
        decoded = self._decode(observation, all_logits=False)
        chunk = self._chunk(observation, decoded)
        first, usable = self.config.usable_vocab - self.config.n_bins, self.config.usable_vocab
        bins = decoded.logits if self.config.restrict_to_action_tokens else decoded.logits[:, first:usable]
        weights = bins.double().softmax(-1)
        mean = (weights.cpu().numpy() @ self.actions.decode(np.arange(first, usable))).reshape(self.config.chunk, -1)
        mean = self.statistics.unnormalise(mean)
        mean[:, 6] = 1.0 - 2.0 * mean[:, 6]  # opening 1 .. 0 to LIBERO's -1 open .. +1 close
        entropy = torch.special.entr(weights).sum(-1).reshape(self.config.chunk, -1).cpu().numpy()
        words = {
            slot.name: float(scores.double().softmax(-1).cpu() @ torch.arange(len(scores), dtype=torch.float64))
            for slot, scores in zip(self.config.slots, decoded.told, strict=True)
        }
        return Considered(chunk, mean, entropy, words)

    def _chunk(self, observation: Observation, decoded: Decoded) -> ActionChunk:
        if not all(bool(torch.isfinite(part).all()) for part in (decoded.logits, *decoded.told)):
            raise SteerError(
                "not_finite",
                f"{self.name} computed logits that are not finite: the action is refused; lower or clear the steering",
            )
        ids = decoded.tokens.cpu().numpy()
        actions = self.statistics.unnormalise(self.actions.decode(ids).reshape(self.config.chunk, -1))
        actions[:, 6] = [libero_gripper(float(opening)) for opening in actions[:, 6]]
        self._gripper = float(actions[-1, 6])
        notes = {"out_of_range_tokens": float(self.actions.out_of_range(ids))}
        places = [slot.ids.index(word) for slot, word in zip(self.config.slots, decoded.said, strict=True)]
        self.said = tuple(slot.words[at] for slot, at in zip(self.config.slots, places, strict=True))
        if self.config.names:
            notes["unknown_object"] = float(self._objects_named(observation.instruction) < NAMED_OBJECTS)
        notes |= {f"said_{slot.name}": float(at) for slot, at in zip(self.config.slots, places, strict=True)}
        return ActionChunk(
            actions=actions.astype(np.float32),
            space=self.action_space,
            notes=notes,
        )

    def decode(self, observation: Observation) -> Decoded:
        """The inference behind `infer`, differentiable by whatever a hook puts into it; greedy choices are constants.

        Raises SteerError: missing_camera, bad_image, bad_instruction.
        """
        return self._decode(observation, all_logits=False)

    @torch.inference_mode()
    def logits(self, observation: Observation) -> Tensor:
        """float32 [7 * chunk, vocab_rows]: logits of the action tokens, after the policy's own greedy words and tokens."""
        return self._decode(observation, all_logits=True).logits

    @torch.inference_mode()
    def word_logits(self, observation: Observation) -> dict[str, Tensor]:
        """Slot name -> float32 logits of its words, each after the policy's own greedy words before it."""
        told = self._decode(observation, all_logits=False).told
        return {slot.name: scores for slot, scores in zip(self.config.slots, told, strict=True)}

    def prompt_ids(self, instruction: str) -> list[int]:
        """BOS, the prompt's tokens, and the appended token of the training format. Raises SteerError('bad_instruction')."""
        # Bound the tokenizer's work before it starts: an instruction may come from the network.
        limit = 32 * self.config.max_prompt_tokens
        if not instruction.strip() or len(instruction) > limit:
            raise SteerError(
                "bad_instruction",
                f"the instruction has {len(instruction)} characters: expected 1 to {limit}, not only spaces",
            )
        ids = [
            self.config.lm.bos_token_id,
            *self.tokenizer.encode(prompt_text(self.config, instruction), add_special_tokens=False),
        ]
        if self.config.append_token_id is not None and ids[-1] != self.config.append_token_id:
            ids.append(self.config.append_token_id)
        if len(ids) > self.config.max_prompt_tokens:
            raise SteerError(
                "bad_instruction",
                f"the instruction makes a prompt of {len(ids)} tokens: expected at most {self.config.max_prompt_tokens}; "
                "shorten it",
            )
        return ids

    def pixels(self, observation: Observation) -> Tensor:
        """Network input float32 [1, 6, S, S] of the observation's camera, or of both for the small tower.

        Raises SteerError: missing_camera, bad_image.
        """
        size = self.config.image_size
        if self.config.heatmap is not None:
            front, wrist = self._image(observation, self.camera), self._image(observation, self.wrist_camera)
            return camera_values(front, wrist, size, cameras=(self.camera, self.wrist_camera))
        return pixel_values(libero_image(self._image(observation, self.camera), size, camera=self.camera))

    def state(self, observation: Observation) -> Tensor | None:
        """Network input float32 [1, STATE_SIZE] of proprioception, None where the policy has none.

        Raises SteerError('bad_state').
        """
        if self.config.state_tokens == 0:
            return None
        return torch.from_numpy(state_vector(observation.state, self._gripper))[None]

    def _objects_named(self, instruction: str) -> int:
        if instruction != self._counted[0]:
            found = named([self.prompt_ids(instruction)], self.config.names)
            self._counted = (instruction, int(found.any(dim=1).sum()))
        return self._counted[1]

    def _image(self, observation: Observation, camera: str) -> np.ndarray:
        image = observation.images.get(camera)
        if image is None:
            raise SteerError(
                "missing_camera",
                f"the observation has no image of camera {camera!r}: {nearest(camera, observation.images)}",
            )
        return image

    def _decode(self, observation: Observation, *, all_logits: bool) -> Decoded:
        weight = self.unembedding
        pixels = self.pixels(observation).to(weight.device, weight.dtype)
        prompt = torch.tensor([self.prompt_ids(observation.instruction)], device=weight.device)
        state = self.state(observation)
        if state is not None:
            state = state.to(weight.device, weight.dtype)
        return self.model.decode(pixels, prompt, self._announce, state=state, all_logits=all_logits)

    def _announce(self, roles: list[Role]) -> None:
        if self._listener is not None:
            self._listener.set_roles(TOWER, roles)
