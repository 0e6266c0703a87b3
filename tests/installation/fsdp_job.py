"""One process of a job under torchrun: a build's student sharded by block with FSDP2, one pass there and back.

`torchrun --nproc-per-node 2 tests/installation/fsdp_job.py BUILD OUT.pt llama` (the generated form), or `dit` (diffusers' class
with modules in place); process 0 saves the whole gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from graftc.emit.build import Build
from tests.installation.test_student import in_place, loss_of, loss_of_tokens


def main(build: str, out: str, kind: str) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = Build.open(Path(build))
    model = made.student() if kind == "llama" else in_place(made)
    if kind == "dit":  # the model calls it from outside its block: a unit of its own
        fully_shard(model.get_submodule("transformer_blocks.0.norm1.emb"), mesh=mesh)
    blocks = "model.layers" if kind == "llama" else "transformer_blocks"
    for block in model.get_submodule(blocks).children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    (loss_of_tokens if kind == "llama" else loss_of)(model).backward()
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
    if dist.get_rank() == 0:
        torch.save(grads, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
