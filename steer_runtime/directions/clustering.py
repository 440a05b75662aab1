"""Value vectors that say the same, put together and named.

Invariant: the same labels and seed give the same clusters, names and order; only semantic labels are clustered, since
the others would gather by accident.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import AgglomerativeClustering, MiniBatchKMeans
from sklearn.feature_extraction.text import TfidfVectorizer

from steer_runtime.directions.shares import is_semantic
from steer_runtime.directions.similarity import Told, WordSpace
from steer_runtime.directions.token_basis import Labels
from steer_runtime.errors import SteerError

ALIKE = 0.5
"""Mean cosine between two clusters that still are joined."""
_AT_ONCE = 8192  # labels compared all with all: their distances take 0.5 GB
_NAME_WORDS = 3


@dataclass(frozen=True)
class Cluster:
    """Value vectors with like labels. name: its most characteristic words; members: (layer, neuron), nearest to the
    centre first; alike: mean cosine of its pairs of labels, in [-1, 1]."""

    name: str
    members: tuple[tuple[int, int], ...]
    alike: float


def clusters(
    labels: Labels,
    space: WordSpace,
    threshold: float,
    *,
    alike: float = ALIKE,
    smallest: int = 2,
    words: Sequence[str] = (),
    seed: int = 0,
    progress: Told | None = None,
) -> list[Cluster]:
    """Clusters of the semantic value vectors, largest first; with `words`, those with a member whose label holds one.

    Average-linkage agglomeration on the labels' directions in `space`: two clusters are joined while the mean cosine of
    their pairs is at least `alike`, so that the number of clusters need not be known. More than 8,192 labels are first
    parted by k-means, and a cluster never spans parts. Name: the words with the largest tf-idf, a cluster being the
    document and the tokens of its labels (case and space dropped) the words; only words that half of its labels hold or
    more are taken, where there are some.
    threshold: `WordSpace.coherence_by_chance`. Raises SteerError: 'unknown_word', 'no_match', 'bad_option'.
    """
    if not 0 < alike < 1 or smallest < 1:
        raise SteerError(
            "bad_option", f"alike {alike} and smallest {smallest}: expected a cosine in (0, 1) and 1 member or more"
        )
    wanted = np.array([token for word in words for token in labels.basis.tokens_of(word)], np.int32)
    rows, neurons = np.nonzero(is_semantic(labels, space, threshold))
    if not len(rows):
        raise SteerError(
            "no_match",
            f"no label of the {len(labels.layers)} searched layers is more coherent than chance: try more layers",
        )
    tokens = labels.tokens[rows, neurons]
    features = space.labels(tokens).numpy()
    groups = _groups(features, alike, seed, progress)
    names = _names([[[_word(labels, t) for t in label] for label in tokens[group]] for group in groups])
    found = []
    for group, name in zip(groups, names, strict=True):
        if len(group) < smallest or (len(wanted) and not np.isin(tokens[group], wanted).any()):
            continue
        centre = features[group].sum(axis=0)
        order = np.argsort(-(features[group] @ centre), kind="stable")
        members = tuple((labels.layers[rows[i]], int(neurons[i])) for i in group[order])
        count = len(group)
        mean = float((centre @ centre - count) / (count * (count - 1))) if count > 1 else 1.0
        found.append(Cluster(name, members, mean))
    return sorted(found, key=lambda cluster: (-len(cluster.members), -cluster.alike, cluster.members))


def _groups(features: np.ndarray, alike: float, seed: int, progress: Told | None) -> list[np.ndarray]:
    """Row numbers of each cluster, in the order of their first rows."""
    count = len(features)
    part = np.zeros(count, np.int64)
    if count > _AT_ONCE:
        parts = math.ceil(2 * count / _AT_ONCE)
        part = MiniBatchKMeans(parts, random_state=seed, n_init=3, batch_size=4096).fit_predict(features)
    groups: list[np.ndarray] = []
    done = 0
    for number in np.unique(part):
        chosen = np.flatnonzero(part == number)
        # K-means parts are uneven: what is still too large is cut, which costs joins and never memory.
        for piece in np.array_split(chosen, math.ceil(len(chosen) / _AT_ONCE)):
            label = np.zeros(len(piece), np.int64)
            if len(piece) > 1:
                model = AgglomerativeClustering(
                    n_clusters=None, metric="cosine", linkage="average", distance_threshold=1 - alike
                )
                label = model.fit_predict(features[piece])
            groups.extend(piece[label == value] for value in np.unique(label))
            done += len(piece)
            if progress is not None:
                progress(done, count)
    return sorted(groups, key=lambda group: int(group[0]))


def _names(documents: list[list[list[str]]]) -> list[str]:
    """documents: of each cluster the words of each of its labels."""
    joined = [[word for label in labels for word in label] for labels in documents]
    vectorizer = TfidfVectorizer(analyzer=_as_given)
    weights = vectorizer.fit_transform(joined)
    column = vectorizer.vocabulary_
    names = []
    for i, labels in enumerate(documents):
        row = weights[[i]].toarray()[0]  # dense for one cluster at a time
        held = Counter(word for label in labels for word in set(label))
        common = [word for word in dict.fromkeys(joined[i]) if 2 * held[word] >= len(labels)] or joined[i]
        best = sorted(common, key=lambda word: -row[column[word]])  # stable: the earlier in a label, the better
        # A word that people read makes a better name than punctuation, where there is one.
        readable = [word for word in best if len(word) > 1 and word.isalnum() and not word.isdigit()]
        names.append(", ".join(dict.fromkeys((readable or best)[:_NAME_WORDS])))
    return names


def _as_given(document: list[str]) -> list[str]:
    return document


def _word(labels: Labels, token: int) -> str:
    return labels.basis.text(int(token)).strip().casefold() or repr(labels.basis.text(int(token)))
