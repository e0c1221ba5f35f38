"""Models of torchvision, segmentation_models_pytorch, MONAI, ultralytics and pytorchcv, one of each family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from tests.models.case import TIMED_SIDE, Case, Inputs
from tests.models.given import boxes, film, picture, values

SIDE = 64


def of(library: str, package: str) -> Callable[..., Case]:
    """A function that makes cases of a library from functions or classes of ``package``."""

    def model(
        family: str, name: str, inputs: Inputs | None = None, *arguments: Any, side: int = SIDE, batch: int = 4,
        whole: str = "", **options: Any,
    ) -> Case:  # fmt: skip
        def build() -> nn.Module:
            made: nn.Module = getattr(import_module(package), name)(*arguments, **copy.deepcopy(options))
            return made

        fits = inputs is None and side == SIDE
        return Case(
            library=library, family=family, model=name, build=build, inputs=inputs or picture(side), batch=batch,
            whole=whole, timed=picture(TIMED_SIDE) if fits else None,
        )  # fmt: skip

    return model


vision = of("torchvision", "torchvision.models")
segmentation = of("torchvision", "torchvision.models.segmentation")
detection = of("torchvision", "torchvision.models.detection")
video = of("torchvision", "torchvision.models.video")
PLAIN: dict[str, Any] = {"weights": None, "weights_backbone": None}
SAMPLES: dict[str, Any] = PLAIN | {"num_classes": 4, "whole": "its losses weigh what they find in the whole batch"}
FEW = {f"rpn_{when}_nms_top_n_{mode}": many for when, many in (("pre", 64), ("post", 32)) for mode in ("train", "test")}
FEW["box_batch_size_per_image"] = 16


def mask_rcnn() -> nn.Module:
    """With norms in the heads, as those of maskrcnn_resnet50_fpn_v2, which is large."""
    models, parts = import_module("torchvision.models"), import_module("torchvision.models.detection")
    faster, masks = parts.faster_rcnn, parts.mask_rcnn
    backbone = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    batch_norm = {"norm_layer": nn.BatchNorm2d}
    pool = import_module("torchvision.ops").MultiScaleRoIAlign(["0", "1", "2", "3"], 4, 2)
    made: nn.Module = masks.MaskRCNN(
        parts.backbone_utils._resnet_fpn_extractor(backbone, 5, **batch_norm),
        box_head=faster.FastRCNNConvFCHead((256, 4, 4), [16], [16], **batch_norm),
        box_roi_pool=pool,
        box_predictor=faster.FastRCNNPredictor(16, 4),
        mask_head=masks.MaskRCNNHeads(256, [16], 1, **batch_norm),
        mask_roi_pool=pool,
        mask_predictor=masks.MaskRCNNPredictor(16, 16, 4),
        **FEW | {"box_batch_size_per_image": 8, "box_detections_per_img": 4, "min_size": 64, "max_size": 64},
    )
    return made


TORCHVISION = [
    of("torchvision", "torchvision.models.vgg")(
        "vgg", "make_layers", None, [64, "M", 128, "M", 256, 256, "M", 512, 512, "M"], batch_norm=True),
    vision("resnet", "resnet18"),
    vision("densenet", "densenet121"),
    vision("googlenet", "googlenet", side=96, init_weights=False, aux_logits=False),
    vision("inception", "inception_v3", side=96, init_weights=False, aux_logits=False),
    vision("shufflenetv2", "shufflenet_v2_x0_5"),
    vision("mobilenetv2", "mobilenet_v2", width_mult=0.35),
    vision("mobilenetv3", "mobilenet_v3_small"),
    vision("mnasnet", "mnasnet0_5"),
    vision("efficientnet", "efficientnet_b0"),
    vision("regnet", "regnet_y_400mf"),
    vision("maxvit", "MaxVit", picture(64), input_size=(64, 64), stem_channels=8, partition_size=2,
           block_channels=[8, 16], block_layers=[1, 1], head_dim=4, stochastic_depth_prob=0.0,
           whole="the stock model's gradients of its position biases are exact to 1e-7 only"),
    segmentation("segmentation.fcn", "fcn_resnet50", batch=2, **PLAIN),
    segmentation("segmentation.deeplabv3", "deeplabv3_mobilenet_v3_large", **PLAIN),
    segmentation("segmentation.lraspp", "lraspp_mobilenet_v3_large", **PLAIN),
    video("video.resnet", "r3d_18", film(4, 32), batch=2),
    detection("detection.ssdlite", "ssdlite320_mobilenet_v3_large", boxes(320), batch=2, **SAMPLES),
    detection("detection.retinanet", "retinanet_resnet50_fpn", boxes(128), batch=2, min_size=128, max_size=128,
              **SAMPLES),
    detection("detection.fcos", "fcos_resnet50_fpn", boxes(128), batch=2, min_size=128, max_size=128, **SAMPLES),
    detection("detection.faster_rcnn", "fasterrcnn_mobilenet_v3_large_fpn", boxes(128), batch=2, min_size=128,
              max_size=128, **FEW, **SAMPLES),
    Case(library="torchvision", family="detection.mask_rcnn", model="MaskRCNN", build=mask_rcnn, inputs=boxes(64),
         batch=2, whole=SAMPLES["whole"]),
]  # fmt: skip

smp = of("segmentation_models_pytorch", "segmentation_models_pytorch")
ENCODER: dict[str, Any] = {"encoder_name": "resnet18", "encoder_weights": None}

SMP = [
    smp("unet", "Unet", **ENCODER),
    smp("unetplusplus", "UnetPlusPlus", **ENCODER),
    smp("manet", "MAnet", **ENCODER),
    smp("linknet", "Linknet", **ENCODER),
    smp("fpn", "FPN", **ENCODER),
    smp("pspnet", "PSPNet", **ENCODER),
    smp("pan", "PAN", side=128, **ENCODER),
    smp("deeplabv3", "DeepLabV3", **ENCODER),
    smp("deeplabv3plus", "DeepLabV3Plus", **ENCODER),
    smp("upernet", "UPerNet", **ENCODER),
    smp("segformer", "Segformer", **ENCODER),
    smp("dpt", "DPT", encoder_name="tu-vit_tiny_patch16_224", encoder_weights=None, decoder_fusion_channels=16,
        decoder_intermediate_channels=(8, 8, 8, 8), img_size=SIDE),
    *(
        smp(f"encoders.{family}", "Unet", encoder_name=name, encoder_weights=None)
        for family, name in {
            "densenet": "densenet121",
            "dpn": "dpn68",
            "efficientnet": "efficientnet-b0",
            "inceptionresnetv2": "inceptionresnetv2",
            "inceptionv4": "inceptionv4",
            "mobilenet": "mobilenet_v2",
            "mobileone": "mobileone_s0",
            "senet": "se_resnet50",
            "timm_efficientnet": "timm-efficientnet-b0",
            "timm_sknet": "timm-skresnet18",
            "timm_universal": "tu-resnet18",
            "xception": "xception",
        }.items()
    ),
]  # fmt: skip

monai = of("monai", "monai.networks.nets")
VOLUME = picture(32, 1, dims=3)
FLAT: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}


def dints() -> nn.Module:
    """All paths of a small search space."""
    nets = import_module("monai.networks.nets")
    space = nets.TopologyInstance(channel_mul=0.125, num_blocks=1, num_depths=2, spatial_dims=2, norm_name="batch")
    made: nn.Module = nets.DiNTS(space, 1, 2, norm_name="batch", spatial_dims=2)
    return made


MONAI = [
    monai("unet", "UNet", picture(32, 1), **FLAT, channels=(8, 16, 32), strides=(2, 2), num_res_units=2, norm="batch"),
    monai("basic_unet", "BasicUNet", picture(32, 1), **FLAT, features=(8, 8, 16, 16, 32, 8), norm="batch"),
    monai("basic_unetplusplus", "BasicUNetPlusPlus", picture(32, 1), **FLAT, features=(8, 8, 16, 16, 32, 8),
          norm="batch"),
    monai("attentionunet", "AttentionUnet", picture(32, 1), **FLAT, channels=(8, 16, 32), strides=(2, 2)),
    monai("dynunet", "DynUNet", picture(32, 1), **FLAT, kernel_size=[3, 3, 3], strides=[1, 2, 2],
          upsample_kernel_size=[2, 2], filters=[8, 16, 32], norm_name="batch", deep_supervision=False),
    monai("segresnet", "SegResNet", picture(32, 1), **FLAT, init_filters=8, norm="batch"),
    monai("segresnet_ds", "SegResNetDS", picture(32, 1), **FLAT, init_filters=8, norm="batch"),
    monai("highresnet", "HighResNet", picture(16, 1, dims=3), spatial_dims=3, in_channels=1, out_channels=2,
          layer_params=({"name": "conv_0", "n_features": 8, "kernel_size": 3},
                        {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 1},
                        {"name": "conv_1", "n_features": 8, "kernel_size": 1},
                        {"name": "conv_2", "kernel_size": 1})),
    monai("densenet", "DenseNet121", picture(64, 1), spatial_dims=2, in_channels=1, out_channels=2, init_features=16,
          growth_rate=8),
    monai("resnet", "resnet10", VOLUME, batch=2, spatial_dims=3, n_input_channels=1, num_classes=2),
    monai("senet", "SEResNet50", picture(64, 1), spatial_dims=2, in_channels=1, num_classes=2),
    monai("efficientnet", "EfficientNetBN", picture(64), model_name="efficientnet-b0", pretrained=False,
          spatial_dims=2),
    monai("flexible_unet", "FlexibleUNet", picture(64), in_channels=3, out_channels=2, backbone="resnet18",
          pretrained=False, spatial_dims=2),
    monai("regressor", "Regressor", picture(16, 1), in_shape=(1, 16, 16), out_shape=1, channels=(4, 8), strides=(2, 2),
          norm="batch"),
    monai("varautoencoder", "VarAutoEncoder", picture(16, 1), spatial_dims=2, in_shape=(1, 16, 16), out_channels=1,
          latent_size=4, channels=(4, 8), strides=(2, 2), norm="batch", use_sigmoid=True,
          whole="it draws other noise for other batches"),
    monai("localnet", "LocalNet", picture(32, 2), spatial_dims=2, in_channels=2, num_channel_initial=8,
          extract_levels=(0, 1, 2), out_activation=None, out_kernel_initializer="zeros", out_channels=2),
    monai("regunet", "RegUNet", picture(32, 2), spatial_dims=2, in_channels=2, num_channel_initial=8, depth=2,
          out_kernel_initializer="zeros"),
    monai("ahnet", "AHNet", picture(64, 1), batch=2, layers=(1, 1, 1, 1), **FLAT, psp_block_num=1),
    monai("autoencoder", "AutoEncoder", picture(32, 1), **FLAT, channels=(8, 16), strides=(2, 2), norm="batch",
          inter_channels=(16,), inter_dilations=(1,)),
    monai("classifier", "Discriminator", picture(16, 1), in_shape=(1, 16, 16), channels=(4, 8), strides=(2, 2),
          norm="batch", dropout=None),
    monai("generator", "Generator", values(4), latent_shape=(4,), start_shape=(8, 4, 4), channels=(8, 1),
          strides=(2, 2), norm="batch"),
    Case(library="monai", family="dints", model="DiNTS", build=dints, inputs=picture(32, 1)),
    monai("patchgan_discriminator", "MultiScalePatchDiscriminator", picture(64, 1), num_d=2, num_layers_d=2,
          spatial_dims=2, channels=8, in_channels=1, minimum_size_im=64),
    monai("spade_network", "SPADENet", picture(32, 2), spatial_dims=2, in_channels=1, out_channels=1, label_nc=2,
          input_shape=(32, 32), channels=[8, 8], is_vae=False, spade_intermediate_channels=8, norm="batch"),
    monai("voxelmorph", "VoxelMorphUNet", picture(32, 2), spatial_dims=2, in_channels=2, unet_out_channels=2,
          channels=(8, 8, 8, 8), final_conv_channels=(8,), norm="batch"),
    monai("milmodel", "MILModel", values(2, 3, 32, 32), num_classes=2, pretrained=False, mil_mode="mean"),
]  # fmt: skip

tasks = of("ultralytics", "ultralytics.nn.tasks")


def yolo(name: str, kind: str = "DetectionModel", side: int = SIDE, batch: int = 4) -> Case:
    """A model by the name of its YAML file."""
    return tasks(name, kind, None, f"{name}.yaml", side=side, batch=batch, verbose=False)


CLASSES: dict[str, Any] = {
    "nc": 10, "backbone": [[-1, 1, "TorchVision", [512, "resnet18", None, True, 2]]],
    "head": [[-1, 1, "Classify", ["nc"]]],
}  # fmt: skip
ULTRALYTICS = [
    yolo("yolov3-tiny"),
    yolo("yolov5n"),
    yolo("yolov6n"),
    yolo("yolov8n"),
    yolo("yolov8n-ghost"),
    yolo("yolov8n-cls", "ClassificationModel"),
    yolo("yolov8n-seg", "SegmentationModel"),
    yolo("yolov8n-pose", "PoseModel"),
    yolo("yolov8n-obb", "OBBModel"),
    yolo("yolov9t"),
    yolo("yolov10n"),
    yolo("yolo11n"),
    yolo("yolo12n"),
    yolo("yolo26n"),
    yolo("yolo26n-seg", "SegmentationModel"),
    yolo("yolo26n-pose", "PoseModel"),
    yolo("yolo26n-obb", "OBBModel"),
    yolo("yolo26n-sem", "SemanticSegmentationModel"),
    yolo("yolo26n-depth", "DepthModel"),
    yolo("yolov8n-world", "WorldModel"),
    yolo("yolov8n-worldv2", "WorldModel"),
    yolo("yoloe-11n", "YOLOEModel"),
    yolo("yoloe-26n-seg", "YOLOESegModel"),
    tasks("cls-resnet", "ClassificationModel", None, CLASSES, verbose=False),
]
