"""Preparing the same input with Hugging Face's datasets: one run, as a script of its own in its own environment.

    python peer_prepare.py INPUT TOKENIZER OUTPUT WORKERS MAX_TOKENS

As its documentation advises: JSON by its own reader, `map` in batches with several processes, no attention masks, the
result by `save_to_disk`. Exact duplicates are found as unisono finds them: by text, without the space around it, of
records that have a text and a label; of a text with two labels all records go. datasets has no operation for that, so
hashes are made by `map` in parallel and compared in this process. Prints seconds and records kept as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes use the cores

BEGAN = time.perf_counter()

import numpy as np  # noqa: E402
from datasets import load_dataset  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402


def main() -> None:
    source, tokenizer_file, output, workers, most = sys.argv[1:]
    count = int(workers)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.no_padding()
    tokenizer.enable_truncation(int(most))

    def hash_texts(batch: dict) -> dict:
        contents = [text.strip() for text in batch["text"]]
        hashes = [
            hashlib.blake2b(content.encode(), digest_size=16).digest() if content else b"" for content in contents
        ]
        return {"hash": hashes}

    def encode(batch: dict) -> dict:
        return {"input_ids": [encoding.ids for encoding in tokenizer.encode_batch_fast(batch["text"])]}

    rows = load_dataset("json", data_files=source, split="train", cache_dir=f"{output}/cache")
    total = len(rows)
    rows = rows.map(hash_texts, batched=True, num_proc=count)
    labels: dict[bytes, object] = {}
    first = np.zeros(total, bool)
    of: list[bytes] = []
    torn: set[bytes] = set()
    for number, (digest, label) in enumerate(zip(rows["hash"], rows["label"], strict=True)):
        of.append(digest)
        if not digest or label is None:
            continue
        if digest not in labels:
            labels[digest] = label
            first[number] = True
        elif labels[digest] != label:
            torn.add(digest)
    kept = [number for number in np.flatnonzero(first).tolist() if of[number] not in torn]
    rows = rows.select(kept)
    rows = rows.map(encode, batched=True, num_proc=count, remove_columns=["text", "hash"])
    rows.save_to_disk(f"{output}/dataset", num_proc=count)
    print(json.dumps({"seconds": time.perf_counter() - BEGAN, "records": total, "kept": len(rows)}))


if __name__ == "__main__":
    main()
