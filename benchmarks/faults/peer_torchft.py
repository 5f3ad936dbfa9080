"""Peer: torchft's fault-tolerant DistributedDataParallel, one process a replica group.

Owns that loop, as torchft's manual has it. What recovers is torchft: the survivor goes on alone with the next quorum,
a process that was started anew takes the survivor's state and joins. Nothing is read from disk.
"""

from __future__ import annotations

import os
from datetime import timedelta

from peer_work import Journal, Work, build, load, make_optimizer, settle, workload
from torch.distributed import TCPStore
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

GROUP, GROUPS = "REPLICA_GROUP_ID", "NUM_REPLICA_GROUPS"
TIMEOUT = timedelta(seconds=10)


def main() -> None:
    """Train until all steps are done."""
    work = Work.parse()
    settle()
    group, groups = int(os.environ[GROUP]), int(os.environ[GROUPS])
    task = workload(work.samples_per_step, work.tokens)
    module = build(task)

    def state_dict() -> dict[str, object]:
        return {"model": model.state_dict(), "optim": optimizer.state_dict()}

    def load_state_dict(state: dict[str, dict[str, object]]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optim"])

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun would provide one
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        replica_id=f"group_{group}",
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
        connect_timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        hostname="localhost",  # the host's own name may not resolve
        init_sync=False,  # its advice where every process builds the same weights
    )
    model = DistributedDataParallel(manager, module, gradient_as_bucket_view=True)
    optimizer = Optimizer(manager, make_optimizer(task, module))
    model.train()
    journal = Journal(work.journal, group)
    while (done := manager.current_step()) < work.steps:
        optimizer.zero_grad()  # asks for a quorum, meanwhile the forward pass runs
        loss, terms = task.task.loss(model, load(task, done, group, groups))
        (loss / terms).backward()
        optimizer.step()
        if manager.current_step() > done:
            # a step that was not committed is no finished step; the quorum's number has no public name
            journal.add(manager.current_step(), team=str(manager._quorum_id), workers=manager.num_participants())
    manager.shutdown(wait=False)


if __name__ == "__main__":
    main()
