"""Classify a folder of pictures, as scripts around timm do: the average of the weights is made before the wrapper.

torchrun --nproc_per_node 2 timm_training.py FOLDER --model mobilenetv3_small_050
"""

import argparse
import json

import timm
import torch
import torch.distributed as dist
from timm.data import ImageDataset, create_transform
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, reduce_tensor
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

parser = argparse.ArgumentParser()
parser.add_argument("data_dir")
parser.add_argument("--model", default="mobilenetv3_small_050")
parser.add_argument("-b", "--batch-size", type=int, default=4)
parser.add_argument("--double", action="store_true", help="train in float64")
parser.add_argument("--lr", type=float, default=0.001)


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    outputs = ((model(images.to(torch.get_default_dtype())), labels) for images, labels in loader)
    found = [nn.functional.cross_entropy(logits, labels, reduction="sum") for logits, labels in outputs]
    return sum(found).item() / len(loader.dataset)


def main() -> None:
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64 if args.double else torch.float32)
    torch.manual_seed(42)
    data = ImageDataset(args.data_dir, transform=create_transform(32, is_training=False, crop_pct=1.0))
    model = timm.create_model(args.model, pretrained=False, num_classes=4)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=args.lr, weight_decay=1e-4)
    ema = ModelEmaV3(model, decay=0.5)
    bare, model = model, DistributedDataParallel(model)
    loader = DataLoader(data, args.batch_size, sampler=DistributedSampler(data, shuffle=True), drop_last=True)
    losses: list[float] = []
    for images, labels in loader:
        model.train()
        loss = nn.functional.cross_entropy(model(images.to(torch.get_default_dtype())), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(bare)
        losses.append(reduce_tensor(loss.detach(), dist.get_world_size()).item())
    ends = [validate(each, DataLoader(data, 16)) for each in (model, ema.module)]
    if dist.get_rank() == 0:
        print("RESULT", json.dumps({"world_size": dist.get_world_size(), "losses": losses + ends}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
