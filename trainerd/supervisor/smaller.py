"""After the system has ended a trainer for want of RAM: the next one takes half the micro-batch. Must not start or end one.

The same plan would most likely end the same way. The effective batch stays, and with it every step and sample; the last bits do not.
It is kept in run.json, so that the death of this supervisor does not forget it; the trainer does it, and tells since when.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from trainerd.contract import status
from trainerd.supervisor.death import Death
from trainerd.supervisor.trainer import TrainerProcess

if TYPE_CHECKING:
    from trainerd.supervisor.loop import Supervisor


def goes_on(supervisor: Supervisor, gone: TrainerProcess, why: Death) -> bool:
    """Have the next trainer take half; no death is counted for it, since that ends at one sample. False: there is nothing to halve, it
    was not training yet, or the last one could not do it: a death like any other."""
    record = supervisor.journal.record
    micro_batch = (record.plan or {}).get("micro_batch")
    before = record.too_large_micro_batch
    if not gone.has_trained or not isinstance(micro_batch, int):
        return False
    if micro_batch <= 1 or (before is not None and micro_batch >= before):
        kept = "is one sample already" if micro_batch <= 1 else f"of {micro_batch} cannot be halved"
        supervisor.journal.note("not smaller", micro_batch=micro_batch, why=why.words)
        supervisor.report.warn(f"The system ended the trainer because RAM was full, and its micro-batch {kept}: {why.words}.")
        return False
    half = -(-micro_batch // 2)
    supervisor.journal.save_record(too_large_micro_batch=micro_batch)
    how = {"why": why.words, "exit_code": gone.exit_code, "log": gone.log_path.name}
    supervisor.journal.note("smaller", micro_batch=half, before=micro_batch, **how)
    supervisor.report.status.trainer.restarts += 1
    supervisor.start_at = time.monotonic()
    batch = f"with a micro-batch of {half} in place of {micro_batch}; the batch stays as it is"
    supervisor.report.state(status.RECOVERING, f"The trainer died: {why.words.rstrip('.?!')}; starting again {batch}.")
    return True
