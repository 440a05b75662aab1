"""Control vectors in GGUF, as repeng and llama.cpp exchange them.

`general.architecture` is "controlvector"; tensor `direction.N`, float32 [d_model], is added to the output of layer N
counted from 0 (repeng `extract.py`: layer N is `hidden_states[N + 1]`; llama.cpp `llama-adapter.cpp` adds tensor `il`
after layer `il`), our residual site N + 1, at every token. `controlvector.layer_count` counts the tensors, and
`controlvector.model_hint` names an architecture. llama.cpp refuses a file with `direction.0`.

Invariant: what is written adds the same numbers at the same places, or what differs is a loss that is told.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path

from steer_runtime.directions.direction import Direction
from steer_runtime.directions.files import read_file
from steer_runtime.directions.finders.recipe import Recipe, written
from steer_runtime.directions.formats.carried import CARD_KEY, card_text, dense_form, source_facts, with_card
from steer_runtime.directions.formats.exported import Exported
from steer_runtime.directions.formats.gguf_file import read_gguf
from steer_runtime.directions.token_basis import TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.types import ALL_ROLES

ARCHITECTURE = "controlvector"
MAX_GGUF_BYTES = 64 << 20
"""A control vector of 80 layers of 8,192 is 2.6 MB."""
LOSS_KEY = "steer.loss"
_NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,3})")


def from_control_vector(path: Path | str, identity: TowerIdentity, recipe: Recipe) -> Direction:
    """The direction of a GGUF control vector: dense, added at every token unless the recipe names a span.

    recipe.alpha: factor of the vectors. A file of ours comes back as the direction it was.
    Raises SteerError: 'bad_file', 'bad_gguf', 'other_model', 'bad_operation', as `with_card`, and what Direction refuses.
    """
    path = Path(path)
    content = read_file(path, MAX_GGUF_BYTES, follow=True)
    parsed = read_gguf(content, path.name)
    found = parsed.fields.get("general.architecture")
    if found != ARCHITECTURE:
        raise SteerError(
            "bad_gguf",
            f"{path.name!r} has the architecture {str(found)[:40]!r}: expected {ARCHITECTURE!r}; it is no control vector",
        )
    vectors = {}
    for name, vector in parsed.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise SteerError("bad_gguf", f"{path.name!r} holds the tensor {name[:80]!r}: expected direction.N only")
        vectors[int(match[1]) + 1] = vector
    card = parsed.fields.get(CARD_KEY)
    if card is not None:
        arrays = {f"site.{site}": vector for site, vector in vectors.items()}
        return with_card(str(card), arrays, identity, recipe, path.name)
    facts = source_facts(path, content, "gguf control vector") | {
        "model_hint": str(parsed.fields.get(f"{ARCHITECTURE}.model_hint", ""))[:200],
        "alpha": 1.0 if recipe.alpha is None else recipe.alpha,
    }
    dense = dense_form(vectors, identity, recipe, path.name)
    return written(identity, recipe, facts, op=recipe.op or "add", span=recipe.span or ALL_ROLES, dense=dense)


def to_control_vector(direction: Direction) -> Exported:
    """A dense direction as a GGUF control vector that repeng and llama.cpp load; our card goes along in its metadata.

    Raises SteerError: 'not_exportable' for neurons, and for sites 0 and 1 (no reader adds to the embeddings, and llama.cpp
    refuses a file with `direction.0`), 'missing_package'.
    """
    if direction.dense is None:
        raise SteerError(
            "not_exportable",
            f"direction {direction.id!r} writes neurons: a control vector adds to the residual stream; export it as "
            "safetensors or YAML",
        )
    early = sorted(site for site in direction.dense if site < 2)
    if early:
        raise SteerError(
            "not_exportable",
            f"direction {direction.id!r} adds at residual site {early[0]}: a control vector begins at the output of layer "
            "1 (site 2), and llama.cpp refuses a file with an earlier one; export it as safetensors",
        )
    if importlib.util.find_spec("gguf") is None:
        raise SteerError("missing_package", "writing GGUF needs the package gguf: run `pip install gguf`")
    import gguf

    losses = []
    if direction.span != ALL_ROLES:
        losses.append(
            f"{direction.id}: added on {', '.join(sorted(direction.span))} tokens only, where a control vector is added to "
            "every token"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", str(direction.provenance.get("policy", direction.tower)))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(direction.dense))
        writer.add_string("general.license", direction.licence)
        writer.add_string(CARD_KEY, card_text(direction))
        if losses:
            writer.add_string(LOSS_KEY, "; ".join(losses))
        for site, vector in sorted(direction.dense.items()):
            writer.add_tensor(f"direction.{site - 1}", vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Exported(path.read_bytes(), tuple(losses))
