"""Tests of several processes: a group of gloo, an end that cannot hang, and a limit in time.

The destructor of a process group can wait for gloo's thread while that thread waits for the interpreter's lock. So a
process that is done leaves without destructors, as soon as all are done.
"""

import os
import time
import traceback
from pathlib import Path

import torch


def in_processes(function, folder, *args, world=2, seconds=600):
    """Run function(rank, world, folder, *args) in new processes, each in the default group; tell what one raised."""
    started = torch.multiprocessing.spawn(_enter, (function, world, str(folder), *args), nprocs=world, join=False)
    end = time.monotonic() + seconds
    try:
        while not started.join(max(0, end - time.monotonic())):
            if time.monotonic() >= end:
                raise TimeoutError(f"{function.__qualname__}: got no end in {seconds} s")
    except torch.multiprocessing.ProcessExitedException as ended:
        raised = [path.read_text() for path in sorted(Path(folder).glob("raised *"))]
        raise AssertionError("\n".join(raised) or str(ended)) from None
    finally:
        for process in started.processes:
            process.kill()


def _enter(rank, function, world, folder, *args):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/meet", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        function(rank, world, folder, *args)
        store.set(f"done {rank}", "1")
        store.wait([f"done {other}" for other in range(world)])
    except BaseException:
        Path(folder, f"raised {rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)
