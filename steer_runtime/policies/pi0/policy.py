"""Pi0 as a Policy: an observation in, a chunk of actions out, token roles announced before every forward.

Invariant: without a listener and with one, the numbers are the same; the policy knows nothing of steering. The noise is
drawn from (seed, episode, inference) alone, so an episode can be repeated, steered and not, from the same noise.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from steer_runtime.errors import SteerError
from steer_runtime.policies.objects.image import camera_values
from steer_runtime.policies.objects.proprioception import OPEN, state_vector
from steer_runtime.policies.objects.tokens import NAMED_OBJECTS, named
from steer_runtime.policies.pi0.checkpoint import load_checkpoint
from steer_runtime.policies.pi0.config import ObjectSight
from steer_runtime.policies.pi0.denoise import EXPERT, PREFIX, Denoised, denoise
from steer_runtime.policies.pi0.image import camera_images, ragged, require_cameras
from steer_runtime.policies.pi0.network import Inputs, Pi0Network
from steer_runtime.policies.pi0.prompt import batch, text_ids
from steer_runtime.policies.pi0.statistics import DELTA_DIMS, Pi0Statistics, add_state, read_statistics
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

GRIPPER = 6
"""Row of an action that is the gripper's, above zero to close."""
WHY_DEAD = "only keys and values leave the prefix, and those of its last layer come before that layer's FFN"


class Pi0Policy:
    """A loaded Pi0 with the statistics of one data set. One instance serves one inference thread.

    cameras: names of the observation's images, in the order of training; those an embodiment lacks are left out, which
    is what masking them does. delta: the data set was trained with openpi's extra delta transform (`add_state`).
    euler_steps, action_steps: None for the checkpoint's. seed: of the noise. `model`: the network. `report`: what the
    load left aside. `timings`: seconds of each stage of the last inference.
    """

    def __init__(
        self,
        model: Pi0Network,
        tokenizer: PreTrainedTokenizerFast,
        statistics: Pi0Statistics,
        *,
        name: str | None = None,
        cameras: Sequence[str] = ("agentview", "wrist"),
        delta: bool = False,
        euler_steps: int | None = None,
        action_steps: int | None = None,
        seed: int = 0,
        action_space: ActionSpace = LIBERO_ACTION_SPACE,
        report: LoadReport | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        config = model.config
        self.model = model
        self.tokenizer = tokenizer
        self.statistics = statistics
        self.report = report
        self.config = config
        self.name = name or config.name
        self.trained = config.trained
        self.cameras = tuple(cameras)
        self.delta = delta
        self.seed = self._loaded_seed = seed
        self.action_space = action_space
        self.euler_steps = config.euler_steps if euler_steps is None else euler_steps
        self.action_steps = action_steps or config.action_steps or config.chunk
        self.timings: Mapping[str, float] = {}
        self._clock = clock
        self._check()
        prefix, expert = config.prefix, config.expert
        self.towers: Mapping[str, Tower] = {
            PREFIX: Tower(
                name=PREFIX,
                down_projs=tuple(layer.mlp.down_proj for layer in model.language_model.layers),  # type: ignore[union-attr]
                residual_sites=(model.prefix_entry, *model.language_model.layers),  # type: ignore[misc]
                d_model=prefix.d_model,
                d_ff=prefix.d_ff,
                max_tokens=config.prefix_tokens,
                firings_per_inference=1,
                last_steerable=prefix.layers - 2,
                why_dead=WHY_DEAD,
                roles=frozenset({"image", "text", *(("state",) if config.objects is not None else ())}),  # type: ignore[arg-type]
            ),
            EXPERT: Tower(
                name=EXPERT,
                down_projs=tuple(layer.mlp.down_proj for layer in model.expert.layers),  # type: ignore[union-attr]
                residual_sites=(model.expert_entry, *model.expert.layers),  # type: ignore[misc]
                d_model=expert.d_model,
                d_ff=expert.d_ff,
                max_tokens=config.expert_tokens,
                firings_per_inference=self.euler_steps,
                roles=frozenset({"state", "action"}),
                basis="actions",
                denoises=True,
            ),
        }
        self._listener: TokenRoles | None = None
        self._cancelled = threading.Event()
        self._episode = self._inference = 0
        self._gripper = OPEN
        self._counted = ("", 0)  # an instruction and how many known objects it names

    def _check(self) -> None:
        problems = []
        if not 1 <= len(self.cameras) <= self.config.max_cameras or len(set(self.cameras)) != len(self.cameras):
            problems.append(
                f"cameras are {list(self.cameras)}: expected 1 to {self.config.max_cameras} different names"
            )
        if not 1 <= self.euler_steps <= 1000:
            problems.append(f"euler_steps is {self.euler_steps}: expected 1 to 1000")
        if not 1 <= self.action_steps <= self.config.chunk:
            problems.append(f"action_steps is {self.action_steps}: expected 1 to the chunk's {self.config.chunk}")
        dims = self.action_space.dims
        if not dims <= min(self.config.action_dim, len(self.statistics.action)):
            problems.append(
                f"the action space has {dims} dimensions, the model {self.config.action_dim} and "
                f"{self.statistics.source} {len(self.statistics.action)}"
            )
        if self.delta and len(self.statistics.state) < DELTA_DIMS:
            problems.append(f"delta needs a state of {DELTA_DIMS} numbers and there are {len(self.statistics.state)}")
        if self.config.objects is not None and len(self.cameras) != 2:
            problems.append(f"cameras are {list(self.cameras)}: a policy that sees objects needs both of its two")
        if problems:
            raise SteerError("bad_policy", "the policy does not fit together: " + "; ".join(problems))

    @classmethod
    def from_checkpoint(
        cls,
        directory: Path,
        *,
        statistics: Path | None = None,
        tokenizer: Path | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        name: str | None = None,
        cameras: Sequence[str] = ("agentview", "wrist"),
        delta: bool = False,
        euler_steps: int | None = None,
        action_steps: int | None = None,
        seed: int = 0,
    ) -> Pi0Policy:
        """Load a checkpoint directory. statistics, tokenizer: a file and a folder, where the checkpoint has none itself.

        Raises SteerError as `load_checkpoint`, no_statistics, no_tokenizer, bad_policy.
        """
        network, report = load_checkpoint(directory, dtype=dtype, device=device)
        return cls(
            network,
            load_tokenizer(tokenizer or directory),
            read_statistics(directory, statistics),
            name=name,
            cameras=cameras,
            delta=delta,
            euler_steps=euler_steps,
            action_steps=action_steps,
            seed=seed,
            report=report,
        )

    def __repr__(self) -> str:
        label = "trained" if self.trained else "untrained policy"
        prefix, expert = self.config.prefix, self.config.expert
        return (
            f"Pi0Policy({self.name!r}, {label}, {prefix.layers} layers of {prefix.d_model} with {prefix.d_ff} neurons, "
            f"expert of {expert.d_model} with {expert.d_ff}, chunks of {self.config.chunk} in {self.euler_steps} steps, "
            f"statistics {self.statistics.source!r})"
        )

    @property
    def unembedding(self) -> Tensor:
        """Token basis of tower "prefix", [vocab, d_model]."""
        return self.model.unembedding

    @property
    def options(self) -> Mapping[str, Any]:
        """What decides its actions besides weights and statistics, as it is set now; JSON-able.

        seed: the one that it was loaded with, whatever episodes were begun since.
        """
        return {
            "cameras": list(self.cameras),
            "delta": self.delta,
            "euler_steps": self.euler_steps,
            "action_steps": self.action_steps,
            "seed": self._loaded_seed,
            "rate_hz": self.action_space.rate_hz,
            "dtype": str(self.unembedding.dtype).removeprefix("torch."),
        }

    @property
    def final_norm(self) -> Tensor:
        """What the norm before the unembedding multiplies with, [d_model]; Gemma stores it minus one."""
        stored: Tensor = self.model.language_model.norm.weight  # type: ignore[union-attr, assignment]
        return stored.float() + 1.0

    @property
    def action_basis(self) -> Tensor:
        """Action basis of tower "expert", [action_dim, d_model]: `action_out_proj`, one row a dimension of an action."""
        return self.model.pi0.action_out_proj.weight

    def action_token_values(self) -> dict[int, float]:
        """No token of the vocabulary is an action here."""
        return {}

    @cached_property
    def model_hash(self) -> str:
        """sha256 hex of the prefix's down_projs, the token basis, and the expert's down_projs.

        The action basis is left out: published files hold it in another precision than the rest.
        """
        prefix, expert = (
            {f"{name}.{i}.down_proj": module.weight for i, module in enumerate(self.towers[name].down_projs)}  # type: ignore[attr-defined]
            for name in (PREFIX, EXPERT)
        )
        return hash_matrices({**prefix, f"{PREFIX}.unembedding": self.unembedding, **expert})

    def announce_roles_to(self, listener: TokenRoles | None) -> None:
        """Set (or clear) who is told the token roles before each forward of either tower."""
        self._listener = listener

    def reset(self, seed: int | None = None) -> None:
        """Begin an episode: its noise differs from the last one's, or is that of `seed` where one is given."""
        if seed is not None:
            self.seed, self._episode = seed, 0
        else:
            self._episode += 1
        self._inference = 0
        self._gripper = OPEN

    def told_gripper(self, command: float) -> None:
        """Somebody else commanded the gripper (above zero: close), so that is now the last command.

        Only a policy that sees objects feels it; published ones read the fingers alone.
        """
        self._gripper = 1.0 if command > 0 else OPEN

    def memory(self) -> Memory:
        """The last gripper command, and what the next noise is drawn from (types.Remembering)."""
        return {"gripper": self._gripper, "seed": self.seed, "episode": self._episode, "inference": self._inference}

    def remember(self, memory: Memory) -> None:
        """Go back to a memory. Raises SteerError('other_memory')."""
        require_memory(self.name, memory, ("gripper", "seed", "episode", "inference"))
        self._gripper = float(memory["gripper"])
        self.seed, self._episode, self._inference = (int(memory[name]) for name in ("seed", "episode", "inference"))

    def cancel(self) -> None:
        """Stop a running inference before its next denoising step; any thread. It raises SteerError('cancelled')."""
        self._cancelled.set()

    def infer(self, observation: Observation, noise: Tensor | None = None) -> ActionChunk:
        """Actions float32 [action_steps, dims] in the policy's action space; noise float32 [chunk, action_dim] or drawn.

        notes: seconds_<stage> of preprocess, vision, prefix, denoise; with objects unknown_object, 1 where the instruction
        names fewer than two of those it knows.
        Raises SteerError: missing_camera, bad_image, bad_instruction, bad_state, bad_noise, not_finite, cancelled.
        """
        denoised = self._denoise(observation, self.noise(self._inference) if noise is None else noise)
        normalised = denoised.actions[0].cpu().numpy().astype(np.float64)
        if not np.isfinite(normalised).all():
            raise SteerError(
                "not_finite",
                f"{self.name} computed actions that are not finite: they are refused; lower or clear the steering",
            )
        actions = self.statistics.unnormalise(normalised[:, : self.action_space.dims])
        if self.delta:
            actions = add_state(actions, observation.state)
        self._inference += 1
        notes = {f"seconds_{stage}": seconds for stage, seconds in self.timings.items()}
        kept = actions[: self.action_steps].astype(np.float32)
        if self.config.objects is not None:
            notes["unknown_object"] = float(self._objects_named(observation.instruction) < NAMED_OBJECTS)
            self.told_gripper(float(kept[-1, GRIPPER]))
        return ActionChunk(actions=kept, space=self.action_space, notes=notes)

    def logits(self, observation: Observation) -> Tensor:
        """float32 [chunk, action_dim]: normalised actions from the episode's first noise.

        A flow policy has no logits; these are the numbers that stand in their place where policies are compared.
        """
        return self._denoise(observation, self.noise(0)).actions[0]

    def noise(self, inference: int) -> Tensor:
        """float32 [chunk, action_dim] of one inference of the running episode, the same on every device."""
        words = np.random.SeedSequence([self.seed, self._episode, inference]).generate_state(2)
        generator = torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))
        return torch.randn(self.config.chunk, self.config.action_dim, generator=generator)

    def inputs(self, observations: Sequence[Observation], cameras: Sequence[Sequence[str]] | None = None) -> Inputs:
        """Network inputs of observations, one a row; cameras: of each, where they differ (default: the policy's).

        Raises SteerError: missing_camera, bad_image, bad_instruction, bad_state.
        """
        texts = [text_ids(self.tokenizer, self.config, o.instruction) for o in observations]
        device = self.unembedding.device
        if self.config.objects is not None:
            return Inputs(*(part.to(device) for part in self._object_inputs(self.config.objects, observations, texts)))
        assert self.config.vision is not None
        chosen = [self.cameras] * len(observations) if cameras is None else cameras
        size = self.config.vision.image
        samples = [camera_images(o.images, names, size) for o, names in zip(observations, chosen, strict=True)]
        ids, mask = batch(self.config, texts, [len(names) for names in chosen])
        pixels, present = ragged(samples)
        state = torch.stack([self._state(o.state) for o in observations])
        return Inputs(*(part.to(device) for part in (ids, mask, pixels, present, state)))

    def _object_inputs(
        self, sight: ObjectSight, observations: Sequence[Observation], texts: Sequence[Sequence[int]]
    ) -> tuple[Tensor, ...]:
        """The fields of Inputs, in order, of a policy that sees objects: its two cameras are always both there."""
        ids, mask = batch(self.config, texts, [len(self.cameras)] * len(observations))
        front, wrist = self.cameras
        pixels = []
        for observation in observations:
            require_cameras(observation.images, self.cameras)
            pictures = (observation.images[front], observation.images[wrist])
            pixels.append(camera_values(*pictures, sight.image, cameras=(front, wrist))[0].unflatten(0, (2, 3)))
        felt = np.stack([state_vector(o.state, self._gripper) for o in observations])
        state = torch.stack([self._state(row) for row in felt])
        present = torch.ones(len(observations), 2, dtype=torch.bool)
        return ids, mask, torch.stack(pixels), present, state, torch.from_numpy(felt)

    def _objects_named(self, instruction: str) -> int:
        assert self.config.objects is not None
        if instruction != self._counted[0]:
            found = named([text_ids(self.tokenizer, self.config, instruction)], self.config.objects.names)
            self._counted = (instruction, int(found.any(dim=1).sum()))
        return self._counted[1]

    def _state(self, state: np.ndarray) -> Tensor:
        """float32 [state_dim], normalised and padded with zeros."""
        normalised = self.statistics.normalise_state(state)
        if len(normalised) > self.config.state_dim or (self.delta and len(normalised) < DELTA_DIMS):
            least = DELTA_DIMS if self.delta else 1
            raise SteerError(
                "bad_state", f"the state has {len(normalised)} numbers: expected {least} to {self.config.state_dim}"
            )
        whole = torch.zeros(self.config.state_dim)
        whole[: len(normalised)] = torch.from_numpy(normalised).float()
        return whole

    @torch.inference_mode()
    def _denoise(self, observation: Observation, noise: Tensor) -> Denoised:
        return self.decode(observation, noise)

    def decode(self, observation: Observation, noise: Tensor | None = None) -> Denoised:
        """The inference behind `infer`, differentiable through all denoising steps by whatever a hook puts into it.

        noise float32 [chunk, action_dim], or that of the episode's next inference, which is not used up. Raises as `infer`.
        """
        noise = self.noise(self._inference) if noise is None else noise
        self._cancelled.clear()
        started = self._clock()
        inputs = self.inputs([observation])
        prepared = self._clock()
        denoised = denoise(
            self.model,
            inputs,
            noise[None].to(self.unembedding.device),
            steps=self.euler_steps,
            announce=self._announce if self._listener is not None else None,
            cancelled=self._cancelled.is_set,
            clock=self._clock,
        )
        self.timings = {"preprocess": prepared - started, **denoised.seconds}
        return denoised

    def _announce(self, tower: str, roles: list[Role]) -> None:
        if self._listener is not None:
            self._listener.set_roles(tower, roles)
