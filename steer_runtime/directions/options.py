"""What each finder is told: one model a finder, which the command line and catalog files share.

Invariant: options that exist are complete and consistent; an unknown one is refused by name. Nothing heavy is imported
here, so that `--help` can read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steer_runtime.errors import SteerError, nearest

Form = Literal["dense", "neurons"]
Pool = Literal["mean", "ends", "each"]
"""How the tokens of a span in one inference become rows: their mean, the mean of each forward's last one, or each alone."""


class FinderOptions(BaseModel):
    """Base of all; a subclass says what its opposite is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def opposite(self) -> FinderOptions:
        """Options of the other end of an axis. Raises SteerError('no_opposite')."""
        raise SteerError("no_opposite", "this finder has no opposite end: make both ends and join them with `axis`")


class Signed(FinderOptions):
    """Options of a finder whose direction has a sign of its own."""

    invert: bool = Field(False, description="Write the opposite of what is found.")

    def opposite(self) -> FinderOptions:
        return self.model_copy(update={"invert": not self.invert})


class Placed(Signed):
    """Where a direction of measured activations is taken and written."""

    form: Form = Field("dense", description="dense (a vector at a residual site) or neurons (inputs of down_proj).")
    site: int | None = Field(None, ge=0, description="Dense: residual site, 0 the embeddings; default the last.")
    layers: tuple[int, ...] = Field((), description="Neurons: layers, such as 3,26-29; default all.")
    count: int = Field(20, ge=1, description="Neurons: how many.")
    norm: float | None = Field(
        None,
        gt=0,
        description="Norm of what is written, in mean norms of a word embedding (an expert: of a row of the action basis); "
        "default: as it was found.",
    )


class OnMoments(Placed):
    """Options of a finder that watches the policy at recorded moments."""

    moments: Path = Field(description="Recorded moments, a file of `steer data moments`.")
    pool: Pool = Field("mean", description="Tokens of the span: mean, ends (the last of each forward) or each.")


class TokenOptions(FinderOptions):
    """Neurons whose labels carry words."""

    words: tuple[str, ...] = Field(min_length=1, description="Words to look for in the labels, one token each.")
    against: tuple[str, ...] = Field((), description="Words a label must not hold.")
    layers: tuple[int, ...] = Field((), description="Layers to search, such as 3,26-29; default all.")
    count: int = Field(20, ge=1, description="The most neurons to take.")

    def opposite(self) -> FinderOptions:
        if not self.against:
            raise SteerError("no_opposite", "words alone have no opposite end: give --against as well")
        return self.model_copy(update={"words": self.against, "against": self.words})


class NeuronsOptions(FinderOptions):
    """Neurons that you name."""

    neurons: tuple[tuple[int, int], ...] = Field(min_length=1, description="As layer:neuron,layer:neuron.")


class WordOptions(FinderOptions):
    """A dense vector: mean embedding of some words minus that of others."""

    words: tuple[str, ...] = Field(min_length=1, description="Words whose embeddings are added, one token each.")
    against: tuple[str, ...] = Field(min_length=1, description="Words whose embeddings are subtracted.")
    spaced: bool = Field(False, description="Only the tokens with a leading space, as inside a sentence.")
    site: int = Field(0, ge=0, description="Residual site: 0 the embeddings, i + 1 the output of layer i.")
    norm: float | None = Field(
        None, gt=0, description="Norm of the vector, in mean norms of a word embedding; default: the difference itself."
    )
    onto_layer: int | None = Field(
        None, ge=0, description="Write it with the value vectors of this layer instead, by the smallest activations."
    )
    count: int | None = Field(None, ge=1, description="With --onto-layer: only so many neurons; default all.")

    def opposite(self) -> FinderOptions:
        return self.model_copy(update={"words": self.against, "against": self.words})

    @model_validator(mode="after")
    def _one_place(self) -> WordOptions:
        if self.count is not None and self.onto_layer is None:
            raise ValueError("count goes with onto_layer")
        if self.onto_layer is not None and self.site not in (0, self.onto_layer + 1):
            raise ValueError(f"layer {self.onto_layer} writes at site {self.onto_layer + 1}: drop site")
        return self


class ActionOptions(Signed):
    """Value vectors that raise the actions' values, read through the action rows."""

    readout: Literal["value", "size"] = Field(
        "value",
        description="value: what raises the action (tokens: high minus low values; an expert: needs `dimension`); size: what "
        "makes moves large (tokens: large minus small ones; an expert: neurons that write into the translation, scaled).",
    )
    dimension: int | None = Field(
        None,
        ge=0,
        description="Action dimension (0 dx, 1 dy, 2 dz, ..., 6 gripper) of an expert; action tokens share rows.",
    )
    form: Form = Field("neurons", description="neurons (overridden, alpha 4) or dense (the readout itself).")
    site: int | None = Field(None, ge=0, description="Dense: residual site; default the last.")
    layers: tuple[int, ...] = Field((), description="Neurons: layers; default the later half.")
    count: int = Field(20, ge=1, description="Neurons: how many.")
    norm: float | None = Field(
        None,
        gt=0,
        description="Dense: norm in mean norms of a word embedding, or of a row of the action basis; default 1.",
    )

    @model_validator(mode="after")
    def _one_readout(self) -> ActionOptions:
        if self.readout == "size" and self.dimension is not None:
            raise ValueError("size is of the whole move: drop dimension")
        return self


class ContrastOptions(OnMoments):
    """Difference of mean activations, over pairs of prompts or over moments above and below the median."""

    positive: tuple[str, ...] = Field((), description="Wordings, {} standing for the instruction, with | between them.")
    negative: tuple[str, ...] = Field((), description="The opposite wordings, as many.")
    quantity: str = Field("", description="Instead of wordings: a measured quantity, or said_ and a slot.")
    by: Literal["moment", "episode"] = Field("moment", description="Quantity: median of moments or of episode means.")
    onto_layer: int | None = Field(
        None,
        ge=0,
        description="The difference behind this layer, written by `count` of the layer's value vectors instead.",
    )
    sites: tuple[int, ...] = Field((), description="Dense: several residual sites, each written its own difference.")

    @model_validator(mode="after")
    def _pairs_or_groups(self) -> ContrastOptions:
        if self.sites and (self.site is not None or self.onto_layer is not None or self.form != "dense"):
            raise ValueError("sites go with form dense and without site and onto_layer")
        if bool(self.quantity) == bool(self.positive or self.negative):
            raise ValueError("expected either positive and negative wordings or a quantity")
        if len(self.positive) != len(self.negative):
            raise ValueError("expected as many positive as negative wordings")
        bad = [wording for wording in (*self.positive, *self.negative) if wording.count("{}") != 1]
        if bad:
            raise ValueError(f"wording {bad[0][:40]!r} has no place for the instruction: expected one {{}}")
        if self.pool == "each":
            raise ValueError("a contrast compares one row a moment: expected pool mean or ends")
        if self.onto_layer is not None and (self.form != "dense" or self.site not in (None, self.onto_layer + 1)):
            raise ValueError("onto_layer says where and how it is written: drop form and site")
        return self


class AttributionOptions(Signed):
    """Neurons by gradient times activation of what the policy does, or the gradient itself at a residual site."""

    moments: Path = Field(description="Recorded moments, a file of `steer data moments`.")
    observable: str = Field(
        description="speed, dx, dy, dz, rotation, gripper; of action tokens entropy, or said_ and a slot (last word minus first)."
    )
    form: Form = Field(
        "neurons", description="neurons (inputs of down_proj) or dense (the gradient at a residual site)."
    )
    site: int | None = Field(None, ge=0, description="Dense: residual site, 0 the embeddings; default the last.")
    layers: tuple[int, ...] = Field((), description="Neurons: layers; default all.")
    count: int = Field(20, ge=1, description="Neurons: how many.")
    write: Literal["add", "scale"] = Field(
        "add",
        description="Neurons: add one range each, or scale: those that raise the observable by alpha (default 2), those that "
        "lower it by 2 - alpha.",
    )
    norm: float | None = Field(
        None,
        gt=0,
        description="Norm of what is written, in mean norms of a word embedding (an expert: of a row of the action basis); "
        "default: neurons one range each, dense 1.",
    )

    @model_validator(mode="after")
    def _scaled_neurons(self) -> AttributionOptions:
        if self.write == "scale" and (self.form != "neurons" or self.norm is not None):
            raise ValueError("write scale goes with form neurons and without norm")
        return self


class ProbeOptions(OnMoments):
    """Ridge regression of a measured quantity on activations."""

    quantity: str = Field(description="Measured quantity (speed, height, dz, ...), or said_ and a slot.")
    step: float = Field(1.0, gt=0, description="How far strength 1 raises the reading, in standard deviations.")
    pool: Literal["mean", "ends"] = Field("mean", description="Tokens of the span: mean or ends of each forward.")


class SnmfOptions(Signed):
    """One factor of a semi-nonnegative factorisation of one layer's activations."""

    moments: Path = Field(description="Recorded moments, a file of `steer data moments`.")
    layer: int = Field(ge=0, description="Layer whose activations are factorised.")
    factors: int = Field(30, ge=1, description="How many factors.")
    quantity: str = Field("", description="Take the factor that goes most with this quantity, ...")
    words: tuple[str, ...] = Field((), description="... or the one whose write says these words most ...")
    against: tuple[str, ...] = Field((), description="... and these least.")
    form: Form = Field("neurons", description="neurons (the factor's largest) or dense (its write into the residual).")
    count: int = Field(20, ge=1, description="Neurons: how many.")
    norm: float | None = Field(
        None, gt=0, description="Norm of what is written, in mean norms of a word embedding; default: as it occurs."
    )
    seed: int = Field(0, ge=0, description="Seed of the start.")
    iterations: int = Field(200, ge=1, description="Multiplicative updates.")

    @model_validator(mode="after")
    def _one_choice(self) -> SnmfOptions:
        if bool(self.quantity) == bool(self.words):
            raise ValueError("expected either a quantity or words to choose the factor by")
        if self.against and not self.words:
            raise ValueError("against goes with words")
        return self


class PcaOptions(OnMoments):
    """A principal direction of activations."""

    component: int | None = Field(None, ge=0, description="Which component, 0 the largest, ...")
    quantity: str = Field("", description="... or the one that goes most with this quantity.")
    components: int = Field(10, ge=1, description="Components to choose from by quantity.")

    @model_validator(mode="after")
    def _one_choice(self) -> PcaOptions:
        if (self.component is not None) == bool(self.quantity):
            raise ValueError("expected either a component or a quantity to choose it by")
        return self


class RandomOptions(FinderOptions):
    """A norm-matched random control of a direction in the store."""

    like: str = Field(description="Direction to match: a name, or a name and @ and digits of its hash.")
    seed: int = Field(0, ge=0, description="Seed.")
    draw: int = Field(0, ge=0, description="Which draw of that seed.")


OPTIONS: Mapping[str, type[FinderOptions]] = {
    "token": TokenOptions,
    "neurons": NeuronsOptions,
    "word": WordOptions,
    "action": ActionOptions,
    "contrast": ContrastOptions,
    "attribution": AttributionOptions,
    "probe": ProbeOptions,
    "snmf": SnmfOptions,
    "pca": PcaOptions,
    "random": RandomOptions,
}
"""Finder -> its options."""


def options_for(finder: str, given: Mapping[str, Any]) -> FinderOptions:
    """Options of a finder. Raises SteerError: 'unknown_finder', 'bad_option' naming the first bad one."""
    if finder not in OPTIONS:
        raise SteerError("unknown_finder", f"finder {finder[:40]!r} is not known: {nearest(finder, OPTIONS)}")
    try:
        return OPTIONS[finder].model_validate(dict(given))
    except ValidationError as error:
        raise SteerError("bad_option", f"finder {finder!r}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """The first problem of a refused model, in a phrase."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    given = "" if first["type"] == "missing" or not place else f" (given {str(first['input'])[:40]!r})"
    return f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}{given}"
