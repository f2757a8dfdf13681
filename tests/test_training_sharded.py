"""Parameters in shards, as Accelerate's FSDP 2 makes them on GPUs: same curve, same checkpoints, same way back."""

from __future__ import annotations

import shutil

import pytest
import torch
from accelerate import Accelerator
from training_process import finish, start
from training_toy import toy_config

from cacovid_kernels import CompressionPolicy
from cacovid_kernels.training.log import read_log


class Sharding(Accelerator):
    """Shards with torch's `fully_shard` what Accelerate, on a CPU, would replicate."""

    def prepare(self, policy, optimizer):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        names = {id(parameter): name for name, parameter in policy.named_parameters()}
        groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
        fully_shard(policy, mesh=init_device_mesh("cpu", (self.num_processes,)))
        sharded = dict(policy.named_parameters())
        groups = [{**group, "params": [sharded[name] for name in group["params"]]} for group in groups]
        return policy, torch.optim.AdamW(groups)


@pytest.mark.nightly
def test_shards_are_the_whole(tmp_path):
    shards, whole = tmp_path / "shards", tmp_path / "whole"
    settings = {"batch_size": 1, "learning_rate": 4e-3, "max_steps": 6}
    finish(start(toy_config(shards, **settings), 2, Sharding))
    shutil.rmtree(shards / "checkpoints" / "step-00000006")
    finish(start(toy_config(shards, **settings), 2, Sharding))  # from step 4, in shards
    finish(start(toy_config(whole, gradient_accumulation=2, **settings)))
    for a, b in zip(read_log(shards), read_log(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-9)
        assert a["reward"] == b["reward"]
    a, b = (CompressionPolicy.from_pretrained(output / "policy").state_dict() for output in (shards, whole))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)
