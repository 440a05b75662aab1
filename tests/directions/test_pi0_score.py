"""Catalog, score and choice on a Pi0: both towers side by side, from the same noise, against controls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fabricate_pi0
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from steer_runtime.cli.directions import app
from steer_runtime.directions.building import read_catalog
from steer_runtime.directions.choosing import choose, read_score
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.score import OFF, measure, measurements, plan
from steer_runtime.directions.score_summary import summarise
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment, load_moments, save_moments
from steer_runtime.policies import load_policy
from steer_runtime.policies.pi0.policy import Pi0Policy

WORDINGS = {"positive": ["{}, fast"], "negative": ["{}, slow"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its configuration, four moments of two episodes and a catalog that sweeps."""
    folder = tmp_path_factory.mktemp("pi0")
    fabricate_pi0.save_tiny(folder / "checkpoint")
    told = {"kind": "pi0", "name": "tiny", "checkpoint": "checkpoint", "action_steps": 3}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(told))
    moments = [
        Moment(fabricate_pi0.make_observation(seed=i, frame_id=i), -1.0, "carry", {"speed": 0.1 * i}, f"e{i // 2}")
        for i in range(4)
    ]
    save_moments(folder / "m.safetensors", moments, {})
    file = {"moments": str(folder / "m.safetensors")}
    entries: list[dict[str, Any]] = [
        {"name": "speed-contrast", "finder": "contrast", "tower": "expert", "axis": True, "options": {**file, **WORDINGS, "norm": 4.0},
         "sweep": {"site": [1, 3]}},
        {"name": "height-attribution", "finder": "attribution", "tower": "expert", "axis": True,
         "options": {**file, "observable": "dz", "form": "dense", "norm": 1.0}, "sweep": {"site": [2, 3]}},
        {"name": "height-word", "finder": "word", "tower": "prefix", "axis": True, "options": {"words": ["up"], "against": ["low"]}},
    ]  # fmt: skip
    body = {"format": "steer-catalog/1", "policy": str(folder / "tiny.yaml"), "entries": entries}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(body))
    return folder


def run(folder: Path, *given: object) -> Result:
    result = CliRunner().invoke(app, [str(part) for part in given])
    assert result.exit_code == 0, result.output
    return result


def score(folder: Path, store: str, out: str, *given: object) -> Result:
    where = ["--policy", folder / "tiny.yaml", "--store", folder / store, "--moments", folder / "m.safetensors"]
    return run(folder, "score", "--all", "--strengths", "0.5,1", *where, "--out", folder / out, *given)


@pytest.fixture(scope="module")
def built(folder: Path) -> DirectionStore:
    run(folder, "build", folder / "sweep.yaml", "--store", folder / "store", "--cache", folder / "labels")
    return DirectionStore(folder / "store")


@pytest.fixture(scope="module")
def scored(folder: Path, built: DirectionStore) -> Result:
    return score(folder, "store", "scored", "--random", "3")


def test_a_swept_entry_is_built_once_for_each_value_in_its_own_tower(built: DirectionStore) -> None:
    assert sorted(axis.name for axis in built.load_axes()) == [
        "height-attribution.site2",
        "height-attribution.site3",
        "height-word",
        "speed-contrast.site1",
        "speed-contrast.site3",
    ]
    assert list(built.load("speed-contrast.site1-positive").dense or {}) == [1]
    towers = {d.name.split(".")[0].split("-negative")[0].split("-positive")[0]: d.tower for d in built.load_all()}
    assert towers == {"height-attribution": "expert", "height-word": "prefix", "speed-contrast": "expert"}


def test_the_score_sets_towers_side_by_side(folder: Path, scored: Result) -> None:
    assert re.search(r"height\W+expert\W+attribution", scored.output)
    assert re.search(r"height\W+prefix\W+word", scored.output)
    assert re.search(r"height\W+prefix\W+random controls", scored.output)
    document = json.loads((folder / "scored" / "score.json").read_text())
    assert set(document["readings"]) == {"executed"}  # nothing is chosen from bins here
    still = document["readings"]["executed"]["unsteered"]
    assert {"speed", "dz", "sideways", "gripper"} <= set(still)
    assert "entropy" not in still
    contents = {card["name"]: card["writes"] for card in document["directions"].values()}
    assert contents["height-attribution.site3-positive"]["basis"] == "actions"
    assert re.fullmatch(r"d[xyz] \+0\.\d\d", contents["height-attribution.site3-positive"]["sites"][0]["tokens"][0])
    assert "up" in contents["height-word-positive"]["sites"][0]["tokens"][0]
    page = (folder / "scored" / "score.html").read_text()
    assert 'id="tower"' in page
    refused = CliRunner().invoke(app, ["score", "--all", "--reading", "expected", "--policy", str(folder / "tiny.yaml"),
        "--store", str(folder / "store"), "--moments", str(folder / "m.safetensors"), "--strengths", "0.5,1", "--random", "3",
        "--out", str(folder / "scored")])  # fmt: skip
    assert isinstance(refused.exception, SteerError)
    assert "no expected action" in str(refused.exception)


def test_the_attributed_direction_has_the_claimed_effect(folder: Path, scored: Result) -> None:
    document = read_score(folder / "scored" / "score.json")
    names = {h: card["name"] for h, card in document["directions"].items()}
    on = {names[s["hash"]]: s["points"][0]["on"] for s in document["readings"]["executed"]["scores"]}
    for end in ("negative", "positive"):
        assert on[f"height-attribution.site3-{end}"] > 0


def test_controls_may_be_what_the_policy_itself_holds(folder: Path, scored: Result) -> None:
    result = score(folder, "store", "pairs", "--random", "2", "--controls", "pairs", "--no-page")
    # The moments share one instruction, so its words enter alike.
    assert "controls are Gaussian: height-word-negative, height-word-positive" in result.output
    documents = [json.loads((folder / out / "score.json").read_text()) for out in ("scored", "pairs")]
    assert [d["controls"] for d in documents] == ["gaussian", "pairs"]
    mine, theirs = (
        {s["hash"]: s["points"][1]["effects"]["speed"] for s in d["readings"]["executed"]["scores"]} for d in documents
    )
    assert {h: e["value"] for h, e in mine.items()} == {h: e["value"] for h, e in theirs.items()}
    names = {h: card["name"] for h, card in documents[0]["directions"].items()}
    same = {names[h] for h in mine if mine[h]["controls"][:2] == theirs[h]["controls"]}
    assert same == {"height-word-negative", "height-word-positive"}
    bad = CliRunner().invoke(
        app, ["score", "--all", "--controls", "twins", "--moments", str(folder / "m.safetensors"), "--out", str(folder)]
    )
    assert isinstance(bad.exception, SteerError)
    assert "expected gaussian or pairs" in str(bad.exception)


def test_what_is_chosen_reaches_the_aim_with_the_least_damage_or_comes_nearest(folder: Path, scored: Result) -> None:
    catalog, document = read_catalog(folder / "sweep.yaml"), read_score(folder / "scored" / "score.json")
    names = {h: card["name"] for h, card in document["directions"].items()}
    points = {names[s["hash"]]: s["points"] for s in document["readings"]["executed"]["scores"]}

    every, nets = {}, {}
    for variant in (1, 3):
        for i, strength in enumerate((0.5, 1.0)):
            ends = [points[f"speed-contrast.site{variant}-{end}"][i] for end in ("negative", "positive")]
            nets[(variant, strength)] = np.mean([p["on"] - p["damage"] for p in ends])
            every[(variant, strength)] = (min(p["on"] for p in ends), max(p["damage"] for p in ends))
    # Out of reach: the largest effect less damage, mean over the ends.
    site, strength = max(nets, key=nets.__getitem__)
    speed = choose(catalog, document, aim=99.0)[0]
    assert (speed.variant.options["site"], speed.strength, speed.reaches) == (site, strength, False)
    assert (speed.on, speed.damage) == every[(site, strength)]
    # Within reach of all: the least damage.
    gentle = choose(catalog, document, aim=min(on for on, _ in every.values()))[0]
    assert gentle.reaches
    assert gentle.damage == min(damage for _, damage in every.values())

    scores = folder / "scored" / "score.json"
    run(folder, "choose", folder / "sweep.yaml", "--scored", scores, "--aim", 99, "--out", folder / "kept.yaml")
    run(folder, "build", folder / "kept.yaml", "--store", folder / "kept", "--cache", folder / "labels")
    kept, swept = DirectionStore(folder / "kept"), DirectionStore(folder / "store")
    assert sorted(a.name for a in kept.load_axes()) == ["height-attribution", "height-word", "speed-contrast"]
    mine, whole = kept.load("speed-contrast-positive"), swept.load(f"speed-contrast.site{site}-positive")
    # Strength 1 of what is kept is the strength that was chosen.
    np.testing.assert_allclose((mine.dense or {})[site], speed.strength * (whole.dense or {})[site], rtol=1e-5)


def test_what_was_not_scored_cannot_be_chosen(folder: Path, scored: Result, tmp_path: Path) -> None:
    document = read_score(folder / "scored" / "score.json")
    body = yaml.safe_load((folder / "sweep.yaml").read_text())
    body["entries"][0]["sweep"] = {"site": [1, 2]}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(body))
    speed, *_ = choose(read_catalog(tmp_path / "other.yaml"), document)
    assert (speed.variant.name, speed.missing) == ("speed-contrast.site1", ("speed-contrast.site2",))
    scores = str(folder / "scored" / "score.json")
    told = run(folder, "choose", tmp_path / "other.yaml", "--scored", scores, "--out", tmp_path / "kept.yaml")
    assert "never scored: speed-contrast.site2" in told.output
    body["entries"] = body["entries"][:1]
    body["entries"][0]["name"] = "slow-unheard"
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(body))
    with pytest.raises(SteerError, match="none of the catalog's entries") as caught:
        choose(read_catalog(tmp_path / "none.yaml"), document)
    assert caught.value.code == "not_scored"
    for text in ("{", "[]", '{"schema": "steer-score/0"}'):
        (tmp_path / "score.json").write_text(text)
        with pytest.raises(SteerError, match="score"):
            read_score(tmp_path / "score.json")


@pytest.mark.parametrize("sweep", [{"site": [1, -4]}, {"sites": [1]}])
def test_a_swept_value_that_makes_no_sense_is_refused_by_entry(folder: Path, tmp_path: Path, sweep: Any) -> None:
    body = yaml.safe_load((folder / "sweep.yaml").read_text())
    body["entries"][0]["sweep"] = sweep
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(body))
    with pytest.raises(SteerError, match=r"entry 'speed-contrast\.site") as caught:
        read_catalog(tmp_path / "bad.yaml")
    assert caught.value.code == "bad_catalog"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (("labels", "--tower", "expert"), "no_token_basis"),
        (("search", "up", "--tower", "expert"), "no_token_basis"),
        (("make", "neurons", "up", "--neurons", "0:1"), "which_tower"),
        (("make", "neurons", "up", "--neurons", "2:1", "--tower", "prefix"), "dead_layer"),
        (("make", "neurons", "up", "--neurons", "0:1", "--tower", "expert", "--span", "text"), "bad_span"),
        (("make", "word", "up", "--words", "up", "--against", "low", "--tower", "expert"), "no_token_basis"),
    ],
)
def test_the_command_line_refuses_the_wrong_tower_in_a_sentence(
    folder: Path, tmp_path: Path, given: tuple[str, ...], code: str
) -> None:
    where = ["--policy", str(folder / "tiny.yaml"), "--cache", str(tmp_path)]
    where += ["--store", str(tmp_path / "store")] if given[0] == "make" else []
    result = CliRunner().invoke(app, [*given, *where])
    assert isinstance(result.exception, SteerError), result.output
    assert result.exception.code == code


def test_labels_and_searches_read_the_tower_that_has_words(folder: Path, tmp_path: Path) -> None:
    where = ("--policy", folder / "tiny.yaml", "--cache", tmp_path)
    assert "Labels of tiny" in run(folder, "labels", "--layers", "0", "--neurons", "0-1", *where).output


# by hand


@pytest.fixture(scope="module")
def policy(folder: Path) -> Pi0Policy:
    return load_policy(str(folder / "tiny.yaml"))  # type: ignore[return-value]


def dense(policy: Pi0Policy, tower: str, site: int, scale: float, name: str = "fast") -> Direction:
    of = policy.towers[tower]
    vector = np.random.default_rng(3).standard_normal(of.d_model).astype(np.float32) * np.float32(scale)
    return Direction(
        name, tower, policy.model_hash, of.layers, of.d_model, of.d_ff, op="add", dense={site: vector},
        provenance={"finder": "planted"},
    )  # fmt: skip


def measured(
    policy: Pi0Policy, folder: Path, directions: Sequence[Direction], out: Path, strengths: Sequence[float]
) -> tuple[Any, Any]:
    moments = load_moments(folder / "m.safetensors")[0]
    wanted = plan(policy, directions, strengths, 2, 0)
    with measurements(out, policy, folder / "m.safetensors", range(4)) as done:
        measure(policy, moments, wanted, done)
        rows = dict(done.rows)
    return rows, summarise(rows, wanted, moments, "executed")


@pytest.mark.parametrize(("tower", "site"), [("prefix", 1), ("expert", 2)])
def test_without_strength_there_is_exactly_no_effect_and_with_it_there_is(
    tower: str, site: int, policy: Pi0Policy, folder: Path, tmp_path: Path
) -> None:
    rows, summary = measured(policy, folder, [dense(policy, tower, site, 2.0)], tmp_path / "m.jsonl", [0.0, 1.0])
    nothing, something = summary.scores[0].points
    assert {e.value for e in nothing.effects.values()} == {0.0}
    assert something.effects["speed"].value != 0
    assert something.effects["speed"].moved == 2  # a flow policy moves under whatever is written
    assert something.dose > 0
    # Steering is the only difference: the unsteered row is what the policy does from each moment's own noise.
    moments = load_moments(folder / "m.safetensors")[0]
    for i, moment in enumerate(moments):
        policy.reset(moment.observation.frame_id)
        mean = np.clip(policy.infer(moment.observation).actions.astype(np.float64), -1, 1).mean(0)
        assert rows[OFF]["executed"]["dz"][i] == pytest.approx(5.0 * mean[2], abs=1e-9)
        assert rows[OFF]["executed"]["speed"][i] == pytest.approx(float(np.linalg.norm(mean[:3])), abs=1e-9)


def test_controls_of_the_two_towers_are_pooled_apart(policy: Pi0Policy, folder: Path, tmp_path: Path) -> None:
    both = [dense(policy, "prefix", 1, 2.0), dense(policy, "expert", 2, 2.0, "quick")]
    _, summary = measured(policy, folder, both, tmp_path / "m.jsonl", [1.0])
    rows = {(r.tower, r.finder): r for r in summary.finders}
    assert set(rows) == {(t, f) for t in ("prefix", "expert") for f in ("planted", "random controls")}
    assert rows[("prefix", "random controls")].directions == 2
    assert rows[("prefix", "random controls")].on != rows[("expert", "random controls")].on
