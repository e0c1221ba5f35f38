"""Some families of pytorchcv: those that build their blocks in ways that the other libraries do not."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.models.case import TIMED_SIDE, Case
from tests.models.given import picture


def model(family: str, name: str, side: int = 64, *, batch: int = 4, **options: Any) -> Case:
    """A model by its module and name."""

    def build() -> nn.Module:
        from pytorchcv.model_provider import get_model

        made: nn.Module = get_model(name, pretrained=False, **options)
        if hasattr(made, "features") and hasattr(made.features, "final_pool"):
            made.features.final_pool = nn.AdaptiveAvgPool2d(1)  # theirs is made for 224 pixels
        return made

    return Case(
        library="pytorchcv", family=family, model=name, build=build, inputs=picture(side), batch=batch,
        timed=picture(TIMED_SIDE) if side == 64 else None,
    )  # fmt: skip


TEN: dict[str, Any] = {"num_classes": 10}

PYTORCHCV = [
    model("resnet", "resnet10", **TEN),
    model("preresnet", "preresnet10", **TEN),
    model("seresnet", "seresnet10", **TEN),
    model("resnesta", "resnestabc14", **TEN),
    model("bamresnet", "bam_resnet18", **TEN),
    model("cbamresnet", "cbam_resnet18", **TEN),
    model("diaresnet", "diaresnet10", **TEN),
    model("sharesnet", "sharesnet18", **TEN),
    model("peleenet", "peleenet", **TEN),
    model("drn", "drnc26", **TEN),
    model("darknet", "darknet_tiny", 224, batch=2, **TEN),
    model("dla", "dla46c", **TEN),
    model("espnetv2", "espnetv2_wd2", **TEN),
    model("hardnet", "hardnet39ds", **TEN),
    model("squeezenext", "sqnxt23_w1", **TEN),
    model("shufflenet", "shufflenet_g1_w1", **TEN),
    model("shufflenetv2", "shufflenetv2_wd2", **TEN),
    model("menet", "menet108_8x1_g3", **TEN),
    model("mobilenet", "mobilenet_wd2", **TEN),
    model("mobilenetv3", "mobilenetv3_small_w7d20", **TEN),
    model("igcv3", "igcv3_wd2", **TEN),
    model("ghostnet", "ghostnet", **TEN),
    model("proxylessnas", "proxylessnas_cpu", **TEN),
    model("spnasnet", "spnasnet", **TEN),
    model("efficientnet", "efficientnet_b0", **TEN),
    model("mixnet", "mixnet_s", **TEN),
    model("octresnet", "octresnet10_ad2", **TEN),
    model("resnet_cifar", "resnet20_cifar10", 32),
    model("densenet_cifar", "densenet40_k12_cifar10", 32),
    model("rir_cifar", "rir_cifar10", 32),
    model("fastscnn", "fastscnn_cityscapes", 64, in_size=(64, 64)),
    model("cgnet", "cgnet_cityscapes", 64, in_size=(64, 64)),
    model("erfnet", "erfnet_cityscapes", 64, in_size=(64, 64)),
    model("lednet", "lednet_cityscapes", 64, in_size=(64, 64)),
    model("enet", "enet_cityscapes", 64, in_size=(64, 64)),
    model("segnet", "segnet_cityscapes", 64, in_size=(64, 64)),
    model("simplepose", "simplepose_resnet18_coco", 64, in_size=(64, 64)),
    model("centernet", "centernet_resnet18_voc", 64, in_size=(64, 64)),
]
