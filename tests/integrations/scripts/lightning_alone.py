"""One process under Lightning: resumes what two saved, and meets what the plugin refuses: ``python ... CHECKPOINT``."""

import json
import logging
import sys
import warnings

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_jobs import Classifier, Probe
from lightning_task import adam

import distnorm
from distnorm.integrations.lightning import DistNormCallback, DistNormSync

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(plugins, *callbacks, strategy="ddp", ckpt_path=None, module=None, **options):
    options = {"max_epochs": 1, "limit_val_batches": 0, "plugins": plugins, "callbacks": list(callbacks)} | options
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(accelerator="cpu", devices=1, strategy=strategy, **options, **QUIET)
        trainer.fit(module or Classifier(adam, 10), ckpt_path=ckpt_path)
    texts = [str(each.message) for each in caught]
    return [text for text in texts if "distnorm" in text.lower()]


def refused(**options):
    try:
        Trainer(accelerator="cpu", devices=2, **options, **QUIET)
    except (MisconfigurationException, ValueError) as error:
        return str(error)
    return None


def main(checkpoint):
    log = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("distnorm").addHandler(handler)
    logging.getLogger("distnorm").setLevel(logging.INFO)
    seen = {}

    probe = Probe()
    plugin = DistNormSync("mabn", window=4, warmup=2)
    fit([plugin], probe, ckpt_path=checkpoint, max_epochs=2)
    seen["resumed at another world size"] = {"log": list(log), "step": probe.seen["state"][0]["step"]}

    log.clear()
    warned = fit([DistNormSync("lazy_bn")], ckpt_path=checkpoint, max_epochs=2)
    seen["resumed with another recipe"] = {"warned": warned, "log": list(log)}

    seen["a strategy without layer sync"] = fit([DistNormSync("mabn")], strategy="auto")
    seen["the callback alone"] = fit([], DistNormCallback(), strategy="auto")
    module = Classifier(adam, 10)
    distnorm.convert(module, "mabn", window=4, warmup=2)
    probe = Probe()
    warned = fit([], DistNormCallback(), probe, strategy="auto", module=module, accumulate_grad_batches=2)
    seen["converted by hand"] = {"warned": warned, "step": probe.seen["state"][0]["step"]}

    seen["with sync_batchnorm"] = refused(sync_batchnorm=True, strategy="ddp", plugins=[DistNormSync("sync_bn")])
    seen["fsdp"] = refused(strategy="fsdp", plugins=[DistNormSync("sync_bn")])
    for name, make in {"recipe": lambda: DistNormSync("synk_bn"), "kind": lambda: DistNormSync(3)}.items():
        try:
            make()
        except ValueError as error:
            seen[f"unknown {name}"] = str(error)
    print("RESULT", json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
