"""Host numbers on a device without a copy from the host."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cacovid_kernels._numbers import filled, numbers_on


class Calls(TorchDispatchMode):
    """Names of the aten ops that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("numbers", [[0], [0, 5, 10], [3, 3, 3, 7, 7, 0], list(range(9))])
def test_numbers_are_filled_in_on_other_devices(numbers):
    with Calls() as calls:
        found = numbers_on(torch.device("meta"), numbers, torch.int32)
    assert found.shape == (len(numbers),)
    assert found.dtype == torch.int32
    assert set(calls.names) <= {"full", "cat"}  # fills and a copy on the device
    cpu = torch.device("cpu")
    assert numbers_on(cpu, numbers, torch.int64).tolist() == filled(cpu, numbers, torch.int64).tolist() == numbers
