"""The models of ``zoo_fusing.py``: by family, names and how to make each, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[nn.Module], Any]
Make = Callable[[], tuple[nn.Module, Run]]
Models = Iterator[tuple[str, Make]]

TIMM = """
resnet18 resnet26d resnet50 resnext50_32x4d seresnet50 ecaresnet26t skresnet18 res2net50_26w_4s resnest14d gernet_s
regnetx_002 regnety_002 regnetz_005 efficientnet_b0 tf_efficientnet_b0 tf_efficientnetv2_b0 efficientnet_lite0
mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small mnasnet_100 fbnetc_100 spnasnet_100
hardcorenas_a tinynet_a mixnet_s lcnet_050 ghostnet_100 ghostnetv2_100 repghostnet_050 semnasnet_100 densenet121
dpn48b dla34 hrnet_w18_small vovnet39a ese_vovnet19b_dw selecsls42b cspresnet50 cspdarknet53 darknet53 rexnet_100
inception_v3:128 inception_v4:128 inception_resnet_v2:128 xception41 legacy_xception repvgg_a0 mobileone_s0 fastvit_t8
levit_128s:224 efficientformer_l1:224 efficientformerv2_s0:224 efficientvit_b0 efficientvit_m0:224 mobilevit_xs
mobilevitv2_050 coatnet_pico_rw_224:224 vgg11_bn starnet_s1 hgnet_tiny hgnetv2_b0 repvit_m0_9 tiny_vit_5m_224:224
visformer_tiny:224 gcresnet50t lambda_resnet26t tf_mobilenetv3_small_minimal_100 convmixer_768_32 tresnet_m
"""
TORCHVISION = """
resnet18 resnet50 resnext50_32x4d mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_v2_s
regnet_x_400mf regnet_y_400mf densenet121 googlenet mnasnet1_0 shufflenet_v2_x1_0 vgg11_bn
deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large r3d_18:64 mc3_18:64 r2plus1d_18:64 s3d:224 maxvit_t:224
"""
PYTORCHCV = """
resnet18 resnet50 preresnet18 seresnet50 mobilenet_w1 mobilenetv2_w1 mobilenetv3_large_w1 efficientnet_b0 densenet121
shufflenetv2_w1 resnext50_32x4d igcv3_w1 fbnet_cb proxylessnas_cpu darknet53 dla34 hrnet_w18_small_v1 ghostnet
hardnet39ds bagnet9:224 peleenet xception:299 inceptionv3:299 vovnet39 mnasnet_b1 resnet20_cifar10:32
wrn16_10_cifar10:32 sknet50 regnetx002
"""
SMP = (
    "Unet resnet18, FPN resnet34, DeepLabV3Plus resnet18, Linknet resnet18, PSPNet resnet18, MAnet resnet18, "
    "PAN resnet18, UnetPlusPlus resnet18, Unet efficientnet-b0, FPN mobilenet_v2, Unet se_resnet50, Unet densenet121, "
    "Unet vgg11_bn, Unet timm-efficientnet-b0, UPerNet resnet18, Segformer resnet18, Unet tu-regnetx_002"
)
MONAI: dict[str, tuple[str, dict[str, Any], int]] = {
    "UNet": ("UNet", dict(channels=(8, 16, 32), strides=(2, 2), num_res_units=2, norm="batch", out_channels=2), 3),
    "UNet ReLU": (
        "UNet",
        dict(channels=(8, 16, 32), strides=(2, 2), num_res_units=2, norm="batch", act="RELU", out_channels=2),
        3,
    ),
    "BasicUNet": ("BasicUNet", dict(features=(8, 8, 8, 8, 8, 8), norm="batch", out_channels=2), 3),
    "SegResNet": ("SegResNet", dict(init_filters=8, norm="batch", out_channels=2), 3),
    "DynUNet": (
        "DynUNet",
        dict(kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], norm_name="batch", out_channels=2),
        3,
    ),
    "VNet": ("VNet", dict(out_channels=2), 3),
    "DenseNet121": ("DenseNet121", dict(out_channels=2), 3),
    "SEResNet50": ("SEResNet50", dict(num_classes=2), 3),
    "AttentionUnet": ("AttentionUnet", dict(channels=(8, 16, 32), strides=(2, 2), out_channels=2), 3),
    "HighResNet": ("HighResNet", dict(out_channels=2, norm_type="batch"), 3),
}
ULTRALYTICS = "yolov3-tiny yolov5n yolov8n yolov8n-seg yolov9t yolov10n yolo11n yolo11n-pose yolo12n"
TRANSFORMERS = """
ResNet RegNet MobileNetV1 MobileNetV2 EfficientNet Levit MobileViT MobileViTV2 HGNetV2 SwiftFormer
"""


def _image(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape)


def _named(text: str, size: int) -> Iterator[tuple[str, int]]:
    for each in text.split():
        name, _, own = each.partition(":")
        yield name, int(own or size)


def _on(make: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Run]:
    return make(), lambda model: model(_image(shape))


def timm() -> Models:
    """Yield timm's."""
    create = import_module("timm").create_model
    for name, size in _named(TIMM, 96):
        yield name, partial(_on, partial(create, name, pretrained=False, num_classes=4), 2, 3, size, size)


def torchvision() -> Models:
    """Yield torchvision's, for images and videos."""
    get = import_module("torchvision.models").get_model
    for name, size in _named(TORCHVISION, 96):
        video = name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
        shape = (2, 3, 16, size, size) if video else (2, 3, size, size)
        options = {"weights_backbone": None} if "_resnet50" in name or "lraspp" in name else {}
        yield name, partial(_on, partial(get, name, weights=None, num_classes=4, **options), *shape)


def pytorchcv() -> Models:
    """Yield pytorchcv's."""
    get = import_module("pytorchcv.model_provider").get_model
    for name, size in _named(PYTORCHCV, 224):
        yield name, partial(_on, partial(get, name, pretrained=False, in_size=(size, size)), 2, 3, size, size)


def smp() -> Models:
    """Yield those of segmentation_models_pytorch."""
    package = import_module("segmentation_models_pytorch")
    for each in SMP.split(", "):
        kind, encoder = each.split()
        yield each, partial(_on, partial(getattr(package, kind), encoder, encoder_weights=None), 2, 3, 128, 128)


def monai() -> Models:
    """Yield MONAI's, in three dimensions."""
    nets = import_module("monai.networks.nets")
    for name, (kind, options, dims) in MONAI.items():
        given = {"spatial_dims": dims, "in_channels": 1, **options}
        yield name, partial(_on, partial(getattr(nets, kind), **given), 2, 1, *(32,) * dims)


def ultralytics() -> Models:
    """Yield those of ultralytics."""
    tasks = import_module("ultralytics.nn.tasks")
    kinds = {"seg": tasks.SegmentationModel, "pose": tasks.PoseModel}
    for name in ULTRALYTICS.split():
        kind = kinds.get(name.partition("-")[2], tasks.DetectionModel)
        yield name, partial(_on, partial(kind, f"{name}.yaml", verbose=False), 2, 3, 64, 64)


def transformers() -> Models:
    """Yield those of transformers, as they are configured by default."""
    package = import_module("transformers")
    for name in TRANSFORMERS.split():
        yield name, partial(_transformer, package, name)


def _transformer(package: Any, name: str) -> tuple[nn.Module, Run]:
    config = getattr(package, f"{name}Config")()
    kind = getattr(package, f"{name}Model", None) or getattr(package, f"{name}Backbone")
    size = 224 if name in ("Levit", "SwiftFormer", "MobileViT", "MobileViTV2") else 96
    return kind(config), lambda model: model(pixel_values=_image((2, 3, size, size)))


FAMILIES: dict[str, Callable[[], Models]] = {
    "timm": timm,
    "torchvision": torchvision,
    "pytorchcv": pytorchcv,
    "smp": smp,
    "MONAI": monai,
    "ultralytics": ultralytics,
    "transformers": transformers,
}
PACKAGES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "pytorchcv": "pytorchcv",
    "smp": "segmentation_models_pytorch",
    "MONAI": "monai",
    "ultralytics": "ultralytics",
    "transformers": "transformers",
}
