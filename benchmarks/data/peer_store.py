"""Random microbatches by datasets or a DataLoader: one run, as a script of its own in its own environment.

python peer_store.py SIDE ARROW MICROBATCH SECONDS
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, load_from_disk
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader


def main() -> None:
    side, arrow, size, seconds = sys.argv[1:]
    microbatch = int(size)
    table = pa.ipc.open_file(pa.memory_map(arrow)).read_all()
    order = np.random.default_rng(0).permutation(table.num_rows)

    def collate(samples: list) -> dict:
        ids = [torch.as_tensor(sample["ids"]) for sample in samples]
        labels = torch.tensor([int(sample["label"]) for sample in samples])
        return {"ids": pad_sequence(ids, batch_first=True), "label": labels}

    with tempfile.TemporaryDirectory() as scratch:
        if side.startswith("datasets"):
            Dataset(table).save_to_disk(scratch)
            rows = load_from_disk(scratch).with_format("torch")
        else:  # in memory, one array a sample, as a dataset of one's own has it
            ids, labels = table.column("ids").combine_chunks(), table.column("label").to_numpy()
            offsets, values = ids.offsets.to_numpy(), torch.from_numpy(ids.values.to_numpy().copy())
            rows = [
                {"ids": values[start:stop], "label": label}
                for start, stop, label in zip(offsets[:-1], offsets[1:], labels, strict=True)
            ]
        if side == "datasets, lists":
            batches = (rows[order[start : start + microbatch].tolist()] for start in range(0, len(order), microbatch))
        else:
            batches = iter(DataLoader(rows, microbatch, sampler=order.tolist(), collate_fn=collate))
        for _ in range(100):
            next(batches)
        began, count = time.perf_counter(), 0
        for _ in batches:
            count += 1
            if time.perf_counter() - began > float(seconds):
                break
        print(json.dumps(count * microbatch / (time.perf_counter() - began)))


if __name__ == "__main__":
    main()
