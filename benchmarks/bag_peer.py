"""A peer of `bag.py`, from raw text to test accuracy, in a process and an environment of its own.

    python bag_peer.py scikit-learn|scikit-learn-pairs|fasttext TRAIN.tab TEST.tab

Prints one JSON object: seconds to read and featurise, seconds to train, test accuracy. The settings are the best that
were found on this split; `bag.py` says how.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

CORES = 2


def read(path: str) -> tuple[list[str], list[str]]:
    """Return labels and texts; three lines of header, then label, tab, text."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[3:]
    labels, texts = zip(*(line.split("\t", 1) for line in lines if line), strict=True)
    return list(labels), list(texts)


def scikit_learn(train: str, test: str, features: dict[str, Any], classifier: dict[str, Any]) -> tuple[float, ...]:
    """TF-IDF and stochastic gradient descent, one classifier against the rest per class, on all cores."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier

    began = time.perf_counter()
    (labels, texts), (test_labels, test_texts) = read(train), read(test)
    vectorizer = TfidfVectorizer(sublinear_tf=True, **features)
    matrix, test_matrix = vectorizer.fit_transform(texts), vectorizer.transform(test_texts)
    ready = time.perf_counter()
    fitted = SGDClassifier(random_state=0, n_jobs=CORES, **classifier).fit(matrix, labels)
    done = time.perf_counter()
    return ready - began, done - ready, fitted.score(test_matrix, test_labels)


def fasttext(train: str, test: str) -> tuple[float, ...]:
    """Supervised fastText with pairs of words; its own counting of words is part of the training call."""
    import fasttext as library

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for name, path in (("train", train), ("test", test)):
            files.append(Path(scratch) / name)
            lines = [f"__label__{label} {text}\n" for label, text in zip(*read(path), strict=True)]
            Random(0).shuffle(lines)  # the files are sorted by class, and fastText takes them as they come
            files[-1].write_text("".join(lines), encoding="utf-8")
        ready = time.perf_counter()
        model = library.train_supervised(str(files[0]), wordNgrams=2, epoch=10, lr=1.0, dim=16, thread=CORES, verbose=0)
        done = time.perf_counter()
        # `predict` fails with NumPy 2; `test` gives the precision of the first label, which is the accuracy
        return ready - began, done - ready, model.test(str(files[1]))[1]


def main(peer: str, train: str, test: str) -> None:
    """Run one peer, and print what came out."""
    if peer == "fasttext":
        found = fasttext(train, test)
    elif peer == "scikit-learn":
        found = scikit_learn(train, test, {"stop_words": "english"}, {"loss": "modified_huber", "alpha": 3e-4})
    else:
        found = scikit_learn(train, test, {"ngram_range": (1, 2)}, {"loss": "hinge", "alpha": 3e-5})
    print(json.dumps(dict(zip(("featurise", "train", "accuracy"), found, strict=True))))


if __name__ == "__main__":
    main(*sys.argv[1:])
