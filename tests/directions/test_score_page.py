"""The page shows the document's numbers, sorts and opens by click, and asks the network for nothing."""

from __future__ import annotations

import builtins
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import browser
import fabricate
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from steer_runtime.cli.directions import app
from steer_runtime.directions import score_page
from steer_runtime.directions.direction import Axis, Direction, Neurons
from steer_runtime.directions.store import DirectionStore
from steer_runtime.directions.token_basis import TokenBasis
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment, save_moments
from steer_runtime.policies import load_policy
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its configuration, two moments, and a store of three directions and an axis."""
    folder = tmp_path_factory.mktemp("score")
    fabricate.save_tiny(folder / "checkpoint")
    (folder / "tiny.yaml").write_text("kind: openvla\nname: tiny\ncheckpoint: checkpoint\nsuite: libero_object\n")
    policy = load_policy(str(folder / "tiny.yaml"))
    moments = [
        Moment(fabricate.make_observation(policy, seed=i, size=64), -1.0, "carry", episode=f"e{i}") for i in (0, 1)
    ]
    save_moments(folder / "moments.safetensors", moments, {})
    store = DirectionStore(folder / "store")
    sizes: dict[str, Any] = {"tower": "lm", "model_hash": policy.model_hash, "layers": 3, "d_model": 32, "d_ff": 64}
    vector = np.random.default_rng(1).standard_normal(32).astype(np.float32) * 9
    for name, sign in (("fast", 1.0), ("slow", -1.0)):
        facts = {"finder": "word", "words": [HOSTILE]}
        store.save(Direction(name=name, op="add", dense={3: np.float32(sign) * vector}, provenance=facts, **sizes))
    written = Neurons(np.array([2, 1, 2], np.int32), np.array([7, 5, 9], np.int32), np.array([1, 9, -4], np.float32))
    store.save(Direction(name="up", neurons=written, provenance={"finder": "token"}, **sizes))
    store.save_axis(Axis("speed", "slow", "fast"))
    return folder


def score(folder: Path, out: Path, *given: str, names: tuple[str, ...] = ("--all",)) -> Result:
    common = ["--policy", str(folder / "tiny.yaml"), "--store", str(folder / "store"), "--out", str(out)]
    options = ["--moments", str(folder / "moments.safetensors"), "--strengths", "0.5,1", "--random", "2"]
    return CliRunner().invoke(app, ["score", *names, *options, *common, *given])


@pytest.fixture(scope="module")
def scored(folder: Path) -> Path:
    out = folder / "out"
    result = score(folder, out)
    assert result.exit_code == 0, result.output
    return out


def test_the_verb_writes_table_document_and_page(folder: Path, scored: Path) -> None:
    again = score(folder, scored)  # everything is measured already
    assert "(0 to measure)" in again.output
    assert re.search(r"fast +speed up +word", again.output)
    assert "random controls" in again.output
    assert "says nothing of a trained one" in again.output
    document = json.loads((scored / "score.json").read_text())
    assert document["schema"] == "steer-score/1"
    assert set(document["readings"]) == {"executed", "expected"}
    assert (document["random"], document["strengths"], document["moments"]["used"]) == (2, [0.5, 1.0], 2)
    ids = {card["id"].split("@")[0] for card in document["directions"].values()}
    assert ids == {"fast", "slow", "up"}
    effects = document["readings"]["executed"]["scores"][0]["points"][0]["effects"]
    assert {"speed", "dx", "dy", "dz", "rotation", "gripper", "entropy"} <= set(effects)
    assert len(effects["speed"]["controls"]) == 2


def test_an_axis_is_scored_by_both_its_ends(folder: Path, tmp_path: Path) -> None:
    result = score(folder, tmp_path / "out", "--no-page", names=("speed",))
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out" / "score.html").exists()
    scores = json.loads((tmp_path / "out" / "score.json").read_text())["readings"]["executed"]["scores"]
    assert sorted(s["claim"]["sign"] for s in scores) == [-1.0, 1.0]
    assert {s["claim"]["source"] for s in scores} == {"end of axis speed"}


@pytest.mark.parametrize(
    ("names", "given", "sentence"),
    [
        ((), (), "expected either names of directions and axes, or --all"),
        (("fast", "--all"), (), "expected either names"),
        (("fats",), (), "'fats' is not in"),
        (("fast",), ("--strengths", "0.5,2"), "expected numbers in 0 to 1"),
        (("fast",), ("--strengths", "half"), "are no numbers"),
        (("fast",), ("--moments", "nowhere.safetensors"), "there is no file of moments nowhere.safetensors"),
        (("fast",), ("--moments-used", "3"), "3 moments were asked for: expected 1 to 2"),
        (("fast",), ("--on", "sped"), "observable 'sped' is not known"),
        (("fast",), ("--on", "careful"), "none of the 2 moments tells 'near_speed'"),
        (("fast",), ("--reading", "said"), "expected executed or expected"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    folder: Path, tmp_path: Path, names: tuple[str, ...], given: tuple[str, ...], sentence: str
) -> None:
    result = score(folder, tmp_path, "--random", "0", *given, names=names)
    assert isinstance(result.exception, SteerError)
    assert sentence in str(result.exception)


def test_what_a_direction_writes_is_told_in_words_largest_write_first(tiny_policy: OpenVLAPolicy) -> None:
    basis, tower = TokenBasis.of(tiny_policy), tiny_policy.towers["lm"]
    sizes: dict[str, Any] = {"name": "d", "tower": "lm", "model_hash": "a" * 64, "layers": 3, "d_model": 32, "d_ff": 64}
    written = Neurons(np.array([2, 1], np.int32), np.array([7, 5], np.int32), np.array([0.5, -9], np.float32))
    told = score_page.contents(Direction(neurons=written, **sizes), tower, basis)
    assert [(n["layer"], n["neuron"], n["flat"], n["alpha"]) for n in told["neurons"]] == [
        (1, 5, 69, -9),
        (2, 7, 135, 0.5),
    ]
    column = tower.down_projs[1].weight[:, 5].float()  # type: ignore[attr-defined]
    assert told["neurons"][0]["write"] == pytest.approx(9 * float(column.norm()), rel=1e-4)
    order = (basis.unembedding.float() @ column).argsort(descending=True).tolist()
    assert told["neurons"][0]["tokens"] == [basis.text(t) for t in order[:10]]
    assert told["neurons"][0]["low_tokens"] == [basis.text(t) for t in order[:-11:-1]]
    vector = basis.unembedding[20].float().numpy() * 50
    dense = score_page.contents(Direction(op="add", dense={0: vector, 2: -vector}, **sizes), tower, basis)
    assert basis.text(20) in dense["sites"][0]["tokens"]
    assert dense["sites"][0]["tokens"] == dense["sites"][1]["low_tokens"]


def test_the_page_holds_the_document_and_no_text_breaks_out_of_it(scored: Path) -> None:
    html = (scored / "score.html").read_text()
    document = json.loads((scored / "score.json").read_text())
    (inside,) = re.findall(r'<script type="application/json" id="document">(.*?)</script>', html, re.DOTALL)
    assert json.loads(inside) == document
    assert HOSTILE in json.dumps(document["directions"])
    assert HOSTILE not in html
    assert "default-src 'none'" in html
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", html.replace(inside, "").split("<body>")[1])


def test_without_plotly_the_page_is_refused_in_a_sentence(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("plotly"):
            raise ModuleNotFoundError("no", name="plotly")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SteerError, match="the page needs plotly: install it with"):
        score_page.render(json.loads((scored / "score.json").read_text()), tmp_path / "page.html")


@pytest.mark.heavy
def test_a_person_can_sort_click_and_switch_and_nothing_is_fetched(scored: Path, tmp_path: Path) -> None:
    document = json.loads((scored / "score.json").read_text())
    by_hash = {h: card["id"] for h, card in document["directions"].items()}
    column = "[...document.querySelectorAll('#directions tbody tr')].map(r => r.dataset.key)"
    with browser.page(tmp_path / "profile") as page:
        page.open(scored / "score.html")
        assert page.run("document.querySelectorAll('#plots .js-plotly-plot').length") >= 8
        assert page.run(column) == [s["hash"] for s in document["readings"]["executed"]["scores"]]  # best ratio first

        header = "[...document.querySelectorAll('#directions th button')].find(b => b.textContent === {!r})"
        page.run(header.format("direction") + ".click()")
        assert page.run(column) == sorted(by_hash, key=lambda h: by_hash[h])
        page.run(header.format("direction") + ".click()")
        assert page.run(column) == sorted(by_hash, key=lambda h: by_hash[h], reverse=True)
        page.run(header.format("dose") + ".click()")
        doses = {s["hash"]: s["points"][s["best"]]["dose"] for s in document["readings"]["executed"]["scores"]}
        assert page.run(column) == sorted(doses, key=lambda h: -doses[h])
        assert page.run("document.querySelector('#directions th[aria-sort=descending]').textContent") == "dose"

        (up,) = [h for h, i in by_hash.items() if i.startswith("up@")]
        page.run(f"document.querySelector('tr[data-key=\"{up}\"]').click()")
        assert page.run("document.getElementById('picked').textContent").startswith(by_hash[up])
        shown = page.run("[...document.querySelectorAll('#neurons tbody tr')].map(r => r.cells[0].textContent)")
        assert shown == [f"{n['layer']}:{n['neuron']}" for n in document["directions"][up]["writes"]["neurons"]]
        tokens = page.run("[...document.querySelectorAll('#neurons tbody tr')][0].cells[3].textContent")
        assert document["directions"][up]["writes"]["neurons"][0]["tokens"][1].strip() in tokens
        plotted = page.run("[...document.querySelector('.plot[data-observable=dz]').data[3].y]")
        (mine,) = [s for s in document["readings"]["executed"]["scores"] if s["hash"] == up]
        assert plotted == pytest.approx([0.0, *(p["effects"]["dz"]["value"] for p in mine["points"])])

        (fast,) = [h for h, i in by_hash.items() if i.startswith("fast@")]
        page.run(f"document.querySelector('tr[data-key=\"{fast}\"]').click()")
        assert page.run("[...document.querySelector('.plot[data-observable=speed]').data[3].x]") == [
            -1,
            -0.5,
            0,
            0.5,
            1,
        ]
        page.run("document.querySelector('[data-reading=expected]').click()")
        speeds = page.run("[...document.querySelector('.plot[data-observable=speed]').data[3].y]")
        (expected,) = [s for s in document["readings"]["expected"]["scores"] if s["hash"] == fast]
        assert speeds[3:] == pytest.approx([p["effects"]["speed"]["value"] for p in expected["points"]])

        page.run("document.querySelector('#finders tbody tr').click()")
        assert 0 < page.run("document.querySelectorAll('#directions tbody tr').length") < 3
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.errors == []
        assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:", "about:"))] == []


def test_help_has_examples_and_loads_no_policy() -> None:
    script = (
        "import sys\nfrom steer_runtime.cli.directions import app\ntry: app(['score', '--help'])\n"
        "except SystemExit: pass\nassert not {'torch', 'plotly', 'jinja2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Examples" in done.stdout
