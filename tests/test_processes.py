"""What a process that a launcher started does before its model is loaded."""

from __future__ import annotations

import torch
import torch.distributed as dist

from reltune.processes import Processes


def test_a_process_takes_its_own_gpu_before_it_meets_the_others(monkeypatch):
    """Libraries put weights in few bits on the current device while they load them."""
    done = []
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend: done.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    assert Processes.joined() == Processes(5, 8)
    assert done == [1, "cpu:gloo,cuda:nccl"]
