"""One model of each module of timm that has batch norms, the smallest or a usual one."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.models.case import TIMED_SIDE, Case
from tests.models.given import picture


def model(family: str, name: str, side: int = 64, *, batch: int = 4, whole: str = "", **options: Any) -> Case:
    """A model by its module and name; ``options`` make it smaller."""

    def build() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **options)
        return made

    fixed = "img_size" in options or side > 128
    return Case(
        library="timm", family=family, model=name, build=build, inputs=picture(side), batch=batch, whole=whole,
        timed=None if fixed else picture(TIMED_SIDE),
    )  # fmt: skip


TIMM = [
    model("byoanet", "lambda_resnet26t"),
    model("byobnet", "test_byobnet"),
    model("byobnet, mobileone", "mobileone_s1"),
    model("byobnet, repvgg", "repvgg_a0"),
    model("byobnet, resnext", "gcresnext26ts"),
    model("convmixer", "convmixer_768_32", 64, batch=2),
    model("cpubone", "cpubone_nano"),
    model("cspnet", "cs3darknet_focus_s"),
    model("cspnext", "cspnext_tiny"),
    model("densenet", "densenet121"),
    model("dla", "dla46_c"),
    model("dpn", "dpn48b"),
    model("efficientformer", "efficientformer_l1", 224, batch=2),
    model("efficientformer_v2", "efficientformerv2_s0", 224, batch=2),
    model("efficientnet", "efficientnet_b0"),
    model("efficientnet, mobilenetv2", "mobilenetv2_035"),
    model("efficientvim", "efficientvim_m1"),
    model("efficientvit_mit", "efficientvit_b0"),
    model("efficientvit_msra", "efficientvit_m0", 128, img_size=128),
    model("fasternet", "fasternet_t0"),
    model("fastvit", "fastvit_t8"),
    model("ghostnet", "ghostnet_050"),
    model("ghostnet, v3", "ghostnetv3_050"),
    model("hardcorenas", "hardcorenas_a"),
    model("hgnet", "hgnetv2_b0"),
    model("hrnet", "hrnet_w18_small"),
    model("iformer", "iformer_t"),
    model("inception_next", "inception_next_atto"),
    model("inception_resnet_v2", "inception_resnet_v2", 96, batch=2),
    model("inception_v3", "inception_v3", 96),
    model("inception_v4", "inception_v4", 96, batch=2),
    model("lcnetv2", "lcnetv2_small"),
    model("levit", "levit_128s", 224, batch=2),
    model("lowformer", "lowformer_b0"),
    model("maxxvit", "test_coatnet", 160, batch=2),
    model("maxxvit, maxvit", "test_maxvit", 160, batch=2),
    model("mobilenetv3", "mobilenetv3_small_050"),
    model("mobilenetv3, lcnet", "lcnet_035"),
    model("mobilevit", "mobilevit_xxs"),
    model("mobilevit, v2", "mobilevitv2_050"),
    model("nasnet", "nasnetalarge", 96, batch=2, num_features=192, stem_size=8),
    model("nextvit", "nextvit_small"),
    model("regnet", "regnety_002"),
    model("repghost", "repghostnet_050"),
    model("repvit", "repvit_m1"),
    model("res2net", "res2net50_14w_8s"),
    model("resnest", "resnest14d"),
    model("resnet", "resnet10t"),
    model("resnet, bottlenecks", "resnet26"),
    model("resnet, shuffled", "ecaresnet26t"),
    model("resnetv2", "resnetv2_18"),
    model("rexnet", "rexnet_100"),
    model("selecsls", "selecsls42"),
    model("senet", "legacy_seresnet18"),
    model("shvit", "shvit_s1"),
    model("sknet", "skresnet18"),
    model("starnet", "starnet_s050"),
    model("swiftformer", "swiftformer_xs", 224, batch=2),
    model("tiny_vit", "tiny_vit_5m_224", 224, batch=2),
    model("tresnet", "tresnet_m"),
    model("vgg", "vgg11_bn", mlp_ratio=0.02),
    model("visformer", "visformer_tiny", 224, batch=2),
    model("vision_transformer_hybrid", "vit_small_resnet26d_224", 224, batch=2, depth=2),
    model("volo", "volo_d1_224", img_size=64, whole="it mixes samples in training"),
    model("vovnet", "ese_vovnet19b_slim_dw"),
    model("xception", "legacy_xception", 96),
    model("xception_aligned", "xception41p", 96),
    model("xcit", "xcit_nano_12_p8_224", depth=2),
]
