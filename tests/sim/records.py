"""A small, complete episode record: real arrays and a trace shaped as the engine writes it."""

from __future__ import annotations

import numpy as np

from sim.episode import CommandOutcome, EpisodeFacts, EpisodeRecord, SteeredBy

FAST = "fast@0123456789ab"
T0 = 1_700_000_000_000_000_000


def command(label: str, step: int, **changes: object) -> CommandOutcome:
    """A command that was applied, unless `changes` say otherwise."""
    values: dict[str, object] = {
        "label": label, "op": "set", "target": "fast", "strength": 0.8, "ramp_s": None, "expected": "applied",
        "published_ns": T0, "accepted": True, "code": "accepted", "sentence": "'fast' goes to 0.8",
        "applied_strength": 0.8, "epoch": 1, "sequence": 1, "direction_id": FAST, "step": step,
        "verdict_ns": T0 + 2_000_000, "latched_ns": T0 + 40_000_000, "action_ns": T0 + 240_000_000,
        "executed_ns": T0 + 400_000_000, "inferences": 1, "first_inference": 3, "first_step": step + 1, "writes": 12,
    }  # fmt: skip
    return CommandOutcome(**{**values, **changes})  # type: ignore[arg-type]


def trace(inference: int, sequence: int, strength: float) -> dict[str, object]:
    """One line of the engine's trace."""
    site = {"tower": "lm", "kind": "neurons", "layer": 2, "neurons": [4, 9], "forwards": 7, "writes": 12, "dose": None}
    return {
        "inference_id": inference,
        "steering": {"epoch": 1, "sequence": sequence},
        "strengths": {FAST: strength} if strength else {},
        "sites": [site] if strength else [],
        "tokens": {"text": 12, "image": 64, "action": 6},
        "firings": 70,
        "expected_firings": 70,
        "interrupted": False,
    }


def small_record(inferences: int = 6, chunk: int = 1, size: int = 32, seed: int = 0) -> EpisodeRecord:
    """A command before the third inference and a refused one before the fifth; two conditions on three observations.

    The last chunk is cut short by one step where it is longer than one. The hand moves 1 cm a step, then 2 under steering;
    a policy of chunks says words.
    """
    rng = np.random.default_rng(seed)
    sequence = np.array([0, 0] + [1] * (inferences - 2), np.int64)
    steps = chunk * inferences - (chunk > 1)
    refusal = command(
        "warp 1", 4 * chunk, expected="refused", accepted=False, code="unknown_direction",
        sentence="no direction is called 'warp'", applied_strength=0.0,
        latched_ns=None, action_ns=None, executed_ns=None, inferences=None, first_inference=None,
        first_step=None, writes=0,
    )  # fmt: skip
    facts = EpisodeFacts(
        policy="pocket-untrained",
        trained=False,
        model_hash="ab" * 32,
        suite="libero_object",
        task_id=0,
        init_state_index=0,
        instruction="pick up the <alphabet> soup & place it in the basket",
        created="2025-01-01T00:00:00+00:00",
        success=False,
        hold_steps=0,
        missing_frames=0,
        versions={"mujoco": "3.17.0", "gl_backend": "osmesa"},
        directions=(SteeredBy("fast", FAST, "neurons", "override", ("text", "action"), 2, ("fast", "quick")),),
        commands=(command("fast 0.8", chunk, first_step=2 * chunk), refusal),
        trace=tuple(trace(i + 1, int(s), 0.8 * bool(s)) for i, s in enumerate(sequence)),
        conditions=("off", "fast +0.8"),
        said=tuple(("fast" if s else "calmly", "low") for s in sequence) if chunk > 1 else (),
        condition_said=((("calmly", "low"),) * 3, (("fast", "low"),) * 3) if chunk > 1 else (),
        timings={"episode": 12.5},
    )
    logits = rng.normal(size=(2, 3, 7, 256))
    bins = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return EpisodeRecord(
        facts=facts,
        agentview=rng.integers(0, 256, (inferences, size, size, 3), dtype=np.uint8),
        wrist=rng.integers(0, 256, (inferences, size, size, 3), dtype=np.uint8),
        state=np.outer(np.append(0.0, np.cumsum(0.01 * chunk * (1 + sequence[:-1]))), np.eye(8)[0]),
        step=chunk * np.arange(inferences, dtype=np.int64),
        inference=np.arange(1, inferences + 1, dtype=np.int64),
        sequence=sequence,
        age_s=rng.uniform(0.2, 0.3, inferences),
        action=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        replayed=np.arange(3, dtype=np.int64),
        actions=rng.uniform(-1, 1, (2, 3, 7)).astype(np.float32),
        tokens=rng.integers(0, 256, (2, 3, 7)).astype(np.int64),
        bins=bins.astype(np.float32),
        bin_values=np.linspace(-1, 1, 256, dtype=np.float32),
    )
