"""YAML as plain data in which a key stands once.

Invariant: a `UniqueKeys` loader builds plain data only, and refuses a key that is given twice in one mapping: PyYAML would
keep the last one without a word.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class UniqueKeys(yaml.SafeLoader):
    """For `yaml.load(text, UniqueKeys)`. A key that a merge (`<<`) brings may be given again, which is what merges are for."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = []
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            told = self.construct_object(key, deep=True)
            if told in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {told!r} is given twice", key.start_mark)
            seen.append(told)
        return super().construct_mapping(node, deep)
