"""Trains under Lightning in several ways, in one job, and saves what each rank saw: ``torchrun ... OUT_FOLDER``."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning_task import LOCAL, STEPS, adam, joined_batches, momentum, network
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import distnorm
from distnorm.attach import conversions_of
from distnorm.integrations.lightning import DistNormCallback, DistNormSync
from distnorm.layers.module import DistNorm


class Classifier(LightningModule):
    def __init__(self, make=momentum, steps=STEPS):
        super().__init__()
        self.network, self.losses, self.make, self.steps = network(), [], make, steps

    def loader(self):
        images, labels = joined_batches(self.trainer.world_size, self.steps)
        rank = self.trainer.global_rank
        return DataLoader(TensorDataset(images[:, rank].flatten(0, 1), labels[:, rank].flatten()), batch_size=LOCAL)

    train_dataloader = val_dataloader = test_dataloader = loader

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.detach().float())
        return loss

    def validation_step(self, batch, index):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def test_step(self, batch, index):
        self.tested = self.network(batch[0])

    def configure_optimizers(self):
        return self.make(self.parameters())


class Sharded(Classifier):
    """FSDP2: its strategy has the module shard itself, and never calls a LayerSync."""

    def __init__(self, recipe, **options):
        super().__init__(options.pop("make", momentum), options.pop("steps", STEPS))
        self.recipe, self.options = recipe, options

    def configure_model(self):
        distnorm.convert(self, self.recipe, **self.options)
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


class Adversaries(LightningModule):
    """A generator and a discriminator, two optimizers, manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(self.trainer.global_rank)
        return DataLoader(torch.randn(24, 6, generator=generator), batch_size=4)

    def training_step(self, real, index):
        for_generator, for_discriminator = self.optimizers()
        fake = self.generator(real[:, :4])
        self.toggle_optimizer(for_discriminator)
        loss = self.discriminator(fake.detach()).mean() - self.discriminator(real).mean()
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        self.untoggle_optimizer(for_discriminator)
        self.toggle_optimizer(for_generator)
        for_generator.zero_grad()
        self.manual_backward(-self.discriminator(self.generator(real[:, :4])).mean())
        for_generator.step()
        self.untoggle_optimizer(for_generator)

    def configure_optimizers(self):
        return [torch.optim.Adam(each.parameters(), lr=1e-3) for each in (self.generator, self.discriminator)]


class Probe(Callback):
    """Notes what is gone after fit."""

    def __init__(self):
        self.seen = {"validated": []}

    def on_train_batch_end(self, trainer, pl_module, *_):
        layers = [each for each in pl_module.modules() if isinstance(each, DistNorm)]
        scale = conversions_of(pl_module)[0].loss_scale
        self.seen["converted"] = len(layers)
        self.seen["dtypes"] = {str(each.running_var.dtype) for each in layers}
        self.seen["scale"] = None if scale is None else float(scale())
        self.seen["trained"] = buffers(pl_module)

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen["validated"].append(buffers(pl_module))

    def on_train_end(self, trainer, pl_module):
        self.seen["state"] = distnorm.state_dict(pl_module)


def buffers(model):
    return {name: whole(buffer).clone() for name, buffer in model.named_buffers()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class NearlyFSDP(FSDPStrategy):
    """Lightning's strategy, but for the wrapper: torch's FullyShardedDataParallel refuses CPU."""

    def _setup_model(self, model):
        return DistributedDataParallel(model)


def fit(plugin, module, *, ckpt_path=None, strategy="ddp", callbacks=(), plugins=(), save=None, **options):
    probe = Probe()
    callbacks = [probe, *callbacks]
    if save is not None:
        callbacks.append(ModelCheckpoint(save, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        plugins=[each for each in (plugin, *plugins) if each is not None],
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=save is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **({"limit_val_batches": 0, "max_epochs": 1} | options),
    )
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    seen = {
        **probe.seen,
        "world": (trainer.world_size, dist.get_world_size()),
        "types": [type(each).__name__ for each in module.modules()],
        "losses": torch.stack(module.losses) if isinstance(module, Classifier) else None,
        "final": {name: whole(value).clone() for name, value in module.state_dict().items()},
        "hooks": [len(each._optimizer_step_post_hooks) for each in trainer.optimizers],
    }
    if save is not None and strategy == "ddp":
        trainer.save_checkpoint(save / "after.ckpt")
        seen["tested"] = []
        for path in (None, save / "epoch=1.ckpt"):
            trainer.test(module, ckpt_path=path, verbose=False)
            seen["tested"].append(module.tested.clone())
    return seen


def sharding():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def main(folder):
    mabn = {"window": 4, "warmup": 2}
    epochs = {"max_epochs": 2}
    done = {"sync_bn": fit(DistNormSync("sync_bn"), Classifier(), limit_val_batches=2, val_check_interval=5)}
    done["bf16"] = fit(DistNormSync("sync_bn"), Classifier(), precision="bf16-mixed")
    done["fsdp"] = fit(DistNormSync("sync_bn"), Classifier(), strategy=NearlyFSDP())
    done["fsdp2"] = fit(None, Sharded("sync_bn"), strategy=sharding(), callbacks=[DistNormCallback()])

    accumulate = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    done["accumulated"] = fit(DistNormSync("mabn", **mabn), Classifier(), **accumulate)
    unused = "ddp_find_unused_parameters_true"
    done["adversaries"] = fit(DistNormSync("mabn", **mabn), Adversaries(), strategy=unused)
    for scale in (16, 1024):
        half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        done[f"fp16 {scale}"] = fit(DistNormSync("mabn", **mabn), Classifier(adam), plugins=[half])

    often = {"limit_val_batches": 2, "val_check_interval": 5}
    for recipe, options, make in (("mabn", mabn, momentum), ("mabn", mabn, adam), ("lazy_bn", {"warmup": 2}, adam)):
        name = f"{recipe} {make.__name__}"
        plugin, saved = DistNormSync(recipe, **options), folder / name
        done[name] = fit(plugin, Classifier(make, 10), save=saved, **epochs)
        done[f"{name} resumed"] = fit(plugin, Classifier(make, 10), ckpt_path=saved / "epoch=0.ckpt", **epochs)
        done[f"{name} validated"] = fit(plugin, Classifier(make, 10), **epochs, **often)
    plain = {"make": adam, "steps": 10, "weights": "none", **mabn}
    first, resumed = {"save": folder / "fsdp2"}, {"ckpt_path": folder / "fsdp2" / "epoch=0.ckpt"}
    for name, start in (("fsdp2 mabn", first), ("fsdp2 mabn resumed", resumed)):
        callbacks = [DistNormCallback()]
        done[name] = fit(None, Sharded("mabn", **plain), strategy=sharding(), callbacks=callbacks, **start, **epochs)

    done["local_bn"] = fit(DistNormSync("local_bn"), Classifier())
    done["local_bn validated"] = fit(DistNormSync("local_bn"), Classifier(), **often)
    torch.save(done, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
