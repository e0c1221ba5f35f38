"""FSDP2: convert the model, then shard it. Parameters are sharded; running statistics are whole on every rank.

torchrun --standalone --nproc_per_node 2 examples/fsdp2.py [--recipe mabn] [--bf16]

Or leave the ``convert`` line out and start the script with the run module, which converts in ``fully_shard``:
torchrun --standalone --nproc_per_node 2 -m distnorm.run --recipe sync_bn script.py
"""

import argparse

import torch
import torch.distributed as dist
from task import LEARNING_RATE, build_model, report, train_loader
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional

import distnorm


def main() -> None:
    """Train, evaluate, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="sync_bn")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("dp",))

    model = distnorm.convert(build_model(), args.recipe, mesh=mesh)  # before sharding
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if args.bf16 else MixedPrecisionPolicy()
    for layer in model.children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    distnorm.attach(model, optimizer=optimizer)  # moving recipes count optimizer steps; exact ones need no call
    losses = []
    for images, labels in train_loader(dist.get_rank(), dist.get_world_size()):
        loss = functional.cross_entropy(model(images.to(device)).float(), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    report(model, losses)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
