"""Every test of several processes goes through `processes`, which ends, and tells what a process raised."""

import time
from pathlib import Path

import pytest
import torch
from processes import in_processes

HERE = Path(__file__).parent


def add(rank, world, folder, start):
    found = torch.tensor([start + rank])
    torch.distributed.all_reduce(found)
    torch.save(found, f"{folder}/{rank}")


def fail(rank, world, folder):
    if rank == 1:
        raise ValueError("no such rank")
    torch.distributed.barrier()  # waits for the one that failed


def hang(rank, world, folder):
    time.sleep(600)


def test_all_processes_meet(tmp_path):
    in_processes(add, tmp_path, 10, world=3)
    assert [torch.load(tmp_path / str(rank)).item() for rank in range(3)] == [33, 33, 33]


def test_what_a_process_raises_is_told(tmp_path):
    with pytest.raises(AssertionError, match="ValueError: no such rank"):
        in_processes(fail, tmp_path)


def test_a_process_that_hangs_is_ended(tmp_path):
    with pytest.raises(TimeoutError, match="hang: got no end in 5 s"):
        in_processes(hang, tmp_path, seconds=5)


def test_no_test_starts_or_ends_a_group_by_itself():
    own = {"processes.py", "conftest.py", Path(__file__).name}
    for path in HERE.rglob("*.py"):
        if path.name not in own and "benchmarks" not in path.parts:
            text = path.read_text(encoding="utf-8")
            for name in ("multiprocessing.spawn(", "init_process_group(", "destroy_process_group("):
                assert name not in text, f"{path.relative_to(HERE)}: got {name}), wanted processes.in_processes"
