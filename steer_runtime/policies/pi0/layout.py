"""Names of the published Pi0 tensors, and where each goes in our module.

Invariant: one translation serves loading and saving, so they cannot disagree; whether a key has LeRobot's leading
`model.`, whether SigLIP's keys have the `vision_model.` of older exports and the prefix's the second `model.` that
transformers 5 saves, makes no difference.
"""

from __future__ import annotations

import re

EMBEDDING = "pi0.model.vlm.language_model.embed_tokens.weight"
OWN_ROWS = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.own_rows"
"""Rows of the embedding that a base file does not have."""
BASE_PREFIX = "language_model.model."
"""What `policies.base` puts before the names of a Llama."""
_LANGUAGE = "pi0.model.vlm.language_model."

_ROOT = r"(?:model\.)?"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(f"^{_ROOT}{published}"), ours)
    for published, ours in (
        (r"paligemma_with_expert\.paligemma\.model\.vision_tower\.vision_model\.", "pi0.model.vlm.vision_tower."),
        (r"paligemma_with_expert\.paligemma\.model\.language_model\.model\.", "pi0.model.vlm.language_model."),
        (r"paligemma_with_expert\.paligemma\.model\.", "pi0.model.vlm."),
        (r"paligemma_with_expert\.paligemma\.lm_head\.weight$", EMBEDDING),
        (r"paligemma_with_expert\.gemma_expert\.model\.", "pi0.model.dit."),
        (r"(state_proj|action_in_proj|action_time_mlp_in|action_time_mlp_out)\.", r"pi0.embed_action_time.\1."),
        (r"action_out_proj\.", "pi0.action_out_proj."),
        (r"objects\.", "objects."),
    )
)
NEVER_READ = re.compile(
    r"^(?:model\.)?paligemma_with_expert\.gemma_expert\.(?:lm_head\.weight|model\.embed_tokens\.weight)$"
)
"""The expert's vocabulary, which no forward uses."""
NOT_PERSISTENT = re.compile(r"(^|\.)(rotary_emb\.(original_)?inv_freq|position_ids|embed_scale|sinusoid_freq)$")
"""Derived entries that some exports carry; they are reported and not read."""

_PI05 = re.compile(r"(^|\.)time_mlp_(in|out)\.|\.(input|post_attention)_layernorm\.dense\.")
_EXPERT = re.compile(r"gemma_expert\.|(^|\.)action_out_proj\.")
_PALIGEMMA = re.compile(r"paligemma")


def ours_of(published: str) -> str | None:
    """Parameter of ours that a published tensor fills, None for a key of another layout."""
    for pattern, ours in _RULES:
        if pattern.match(published):
            return pattern.sub(ours, published, count=1)
    return None


def published_of(parameter: str) -> str:
    """LeRobot's key of a parameter of ours: with the leading `model.`, the embedding under the tied head's name."""
    if parameter == EMBEDDING:
        return "model.paligemma_with_expert.paligemma.lm_head.weight"
    for ours, published in (
        ("pi0.model.vlm.vision_tower.", "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model."),
        ("pi0.model.vlm.", "model.paligemma_with_expert.paligemma.model."),
        ("pi0.model.dit.", "model.paligemma_with_expert.gemma_expert.model."),
        ("pi0.embed_action_time.", "model."),
        ("objects.", "model.objects."),
        ("pi0.", "model."),
    ):
        if parameter.startswith(ours):
            return published + parameter.removeprefix(ours)
    raise AssertionError(parameter)


def of_base(name: str) -> str:
    """Parameter of ours for a name that `policies.base.read_base` gives."""
    return _LANGUAGE + name.removeprefix(BASE_PREFIX)


def sister_of(keys: list[str]) -> str | None:
    """Name of the sister model that has such tensors, None for pi0's own.

    pi0.5 conditions its norms on time (`time_mlp_*`, `*_layernorm.dense`); pi0-FAST is PaliGemma alone, with no expert.
    """
    if any(_PI05.search(key) and "action_time_mlp" not in key for key in keys):
        return "pi0.5"
    if any(_PALIGEMMA.search(key) for key in keys) and not any(_EXPERT.search(key) for key in keys):
        return "pi0-FAST"
    return None
