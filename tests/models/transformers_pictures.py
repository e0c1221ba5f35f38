"""Models of transformers that find boxes, masks, points, depth or text in pictures, as small as they can be."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.case import Inputs
from tests.models.given import picture, together, words
from tests.models.transformers_models import LARGER, PIXELS, RESNET, model

STAGES = ["stage1", "stage2", "stage3", "stage4"]
HGNET: dict[str, Any] = {
    "model_type": "hgnet_v2", "embedding_size": 8, "stem_channels": [3, 4, 8], "stage_in_channels": [8, 8, 16, 16],
    "stage_mid_channels": [4, 4, 4, 4], "stage_out_channels": [8, 16, 16, 16], "stage_num_blocks": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True], "stage_downsample_strides": [2, 2, 2, 2],
    "stage_light_block": [False, False, True, True], "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [1, 1, 1, 1], "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16],
    "out_features": STAGES,
}  # fmt: skip
WIDE = picture(96, name="pixel_values")
LAYERS = "its outputs have layers before samples"
DETR: dict[str, Any] = {
    "backbone_config": HGNET | {"out_features": STAGES[1:]}, "freeze_backbone_batch_norms": False,
    "encoder_hidden_dim": 16, "encoder_in_channels": [16, 16, 16], "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "decoder_ffn_dim": 16, "decoder_attention_heads": 2, "decoder_layers": 2,
    "d_model": 16, "num_queries": 6, "num_denoising": 0, "decoder_in_channels": [16, 16, 16], "dropout": 0.0,
}  # fmt: skip
LCNET: dict[str, Any] = {
    "model_type": "pp_lcnet", "scale": 0.25, "out_features": ["stage2", "stage3", "stage4", "stage5"],
}  # fmt: skip
LCNET3: dict[str, Any] = {
    "model_type": "pp_lcnet_v3", "scale": 0.25, "stem_channels": 16, "divisor": 4, "conv_symmetric_num": 2,
    "out_features": ["stage2", "stage3", "stage4", "stage5"],
    "block_configs": [[[3, 16, 32, 1, False]], [[3, 32, 32, 2, False]], [[3, 32, 32, 2, False], [3, 32, 32, 1, False]],
                      [[5, 32, 64, 2, False]], [[5, 64, 64, 2, True]]],
}  # fmt: skip
LCNET4: dict[str, Any] = {
    "model_type": "pp_lcnet_v4", "stem_channels": [3, 8, 16],
    "block_configs": [[[3, 16, 16, 1, True]], [[3, 16, 16, 1, False]], [[3, 16, 32, [2, 1], False]],
                      [[3, 32, 32, [2, 1], False], [3, 32, 32, 1, True]]],
    "out_features": STAGES,
}  # fmt: skip
KERNELS: dict[str, Any] = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
for name, size in {"long": 7, "mid": 5, "short": 3}.items():
    KERNELS |= {
        f"vertical_long_to_small_conv_{name}ratio": [[size, 1], 1, [size // 2, 0]],
        f"horizontal_small_to_long_conv_{name}ratio": [[1, size], 1, [0, size // 2]],
        f"symmetric_conv_long_{name}ratio": [[size, size], 1, [size // 2, size // 2]],
    }
SERVER: dict[str, Any] = {
    "backbone_config": HGNET, "neck_out_channels": 16, "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2],
    "intraclass_block_config": KERNELS,
}  # fmt: skip
MOBILE: dict[str, Any] = {
    "backbone_config": LCNET3, "neck_out_channels": 16, "layer_list_out_channels": [8, 8, 16, 16],
}  # fmt: skip
READER: dict[str, Any] = {"hidden_size": 16, "depth": 1, "num_attention_heads": 2, "head_out_channels": 12}
SWIN: dict[str, Any] = {
    "model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1],
    "window_size": 2, "out_features": STAGES[1:],
}  # fmt: skip
DINO: dict[str, Any] = {
    "model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
MASKS: dict[str, Any] = {
    "backbone_config": RESNET | {"out_features": STAGES}, "hidden_dim": 32, "mask_feature_size": 32,
    "encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2,
    "dim_feedforward": 16, "num_queries": 6,
}  # fmt: skip


def pair(side: int, channels: int = 3) -> Inputs:
    """Two pictures whose points are to be matched."""
    return lambda batch: {"pixel_values": torch.rand(batch, 2, channels, side, side)}


PICTURES = [
    model("d_fine", "DFineForObjectDetection", LARGER, whole=LAYERS, **DETR),
    model("deimv2", "Deimv2ForObjectDetection", LARGER, whole=LAYERS, **DETR),
    model("rt_detr_v2", "RTDetrV2ForObjectDetection", LARGER, **DETR),
    model("lw_detr", "LwDetrForObjectDetection", LARGER, whole=LAYERS, d_model=16, num_queries=6, group_detr=2,
          decoder_layers=1, decoder_ffn_dim=16, decoder_self_attention_heads=2, decoder_cross_attention_heads=2,
          projector_scale_factors=[2.0, 0.5], c2f_num_blocks=1,
          backbone_config={"model_type": "lw_detr_vit", "hidden_size": 16, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "image_size": 64, "pretrain_image_size": 64, "patch_size": 16,
                           "num_windows": 4, "window_block_indices": [1], "out_indices": [1, 2]}),
    model("omdet_turbo", "OmDetTurboForObjectDetection", together(
              LARGER, words(4, name="classes_input_ids"), words(6, name="tasks_input_ids"),
              lambda batch: {"classes_attention_mask": torch.ones(batch, 4),
                             "tasks_attention_mask": torch.ones(batch, 6),
                             "classes_structure": torch.ones(batch, dtype=torch.long)}),
          frozen="language_backbone", whole="its anchors are the same for all samples", backbone_config=SWIN,
          image_size=64, apply_layernorm_after_vision_backbone=False, text_projection_in_dim=8,
          text_projection_out_dim=8,
          text_config={"model_type": "clip_text_model", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
                       "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
                       "projection_dim": 8, "bos_token_id": 0, "eos_token_id": 1},
          task_encoder_hidden_dim=16, class_embed_dim=8, num_queries=6, encoder_hidden_dim=16,
          vision_features_channels=[16, 16, 16], encoder_in_channels=[16, 32, 64], encoder_attention_heads=2,
          encoder_dim_feedforward=16, decoder_hidden_dim=16, decoder_num_heads=2, decoder_num_layers=1,
          decoder_dim_feedforward=16),
    model("pp_doclayout_v2", "PPDocLayoutV2ForObjectDetection", LARGER, **DETR,
          class_thresholds=[0.1, 0.1], class_order=[0, 1],
          reading_order_config={"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16,
                                "num_hidden_layers": 1, "coordinate_size": 3, "shape_size": 2,
                                "global_pointer_head_size": 8, "hidden_dropout_prob": 0.0,
                                "attention_probs_dropout_prob": 0.0}),
    model("pp_doclayout_v3", "PPDocLayoutV3ForObjectDetection", LARGER,
          **DETR | {"backbone_config": HGNET}, x4_feat_dim=8, mask_feature_channels=[8, 8], num_prototypes=4,
          global_pointer_head_size=8, gp_dropout_value=0.0),
    model("pp_doclayout_v4", "PPDocLayoutV4ForObjectDetection", LARGER, **DETR,
          global_pointer_head_size=8, gp_dropout_value=0.0),
    model("maskformer", "MaskFormerModel", LARGER,
          backbone_config=RESNET | {"out_features": STAGES}, fpn_feature_size=32, mask_feature_size=16,
          decoder_config={"model_type": "detr", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
                          "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2,
                          "decoder_attention_heads": 2, "num_queries": 6, "dropout": 0.0}),
    model("mask2former", "Mask2FormerModel", LARGER, **MASKS, feature_size=32),
    model("oneformer", "OneFormerModel", together(LARGER, words(8, name="task_inputs")),
          backbone_config=RESNET | {"out_features": STAGES}, hidden_dim=32, conv_dim=32, mask_dim=32,
          encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16,
          num_queries=6, dropout=0.0, task_seq_len=8),
    model("sam3_lite_text", "Sam3LiteTextTextModel", words(), vocab_size=32, hidden_size=16, intermediate_size=16,
          projection_dim=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16),
    model("depth_pro", "DepthProForDepthEstimation", picture(128, name="pixel_values"), batch=2,
          patch_size=32,
          fusion_hidden_size=8, intermediate_hook_ids=[1, 0], intermediate_feature_dims=[8, 8],
          scaled_images_feature_dims=[8, 8, 8], merge_padding_value=1, use_batch_norm_in_fusion_residual=True,
          image_model_config=DINO, patch_model_config=DINO, fov_model_config=DINO),
    model("efficientloftr", "EfficientLoFTRModel", pair(64), hidden_size=32, out_features=[8, 8, 16, 32],
          stage_num_blocks=[1, 1, 2, 2], num_attention_layers=1),
    model("superglue", "SuperGlueForKeypointMatching", pair(32), hidden_size=16, keypoint_encoder_sizes=[8, 16],
          gnn_layers_types=["self", "cross"], num_attention_heads=2, sinkhorn_iterations=5,
          keypoint_detector_config={"model_type": "superpoint", "encoder_hidden_sizes": [8, 8, 8, 8],
                                    "decoder_hidden_size": 16, "descriptor_decoder_dim": 16, "max_keypoints": 8}),
    model("uvdoc", "UVDocModel", LARGER, bridge_connector=[16, 16], out_point_positions2D=[[16, 8], [8, 2]],
          backbone_config={"model_type": "uvdoc_backbone", "resnet_head": [[3, 8], [8, 8]],
                           "resnet_configs": [[[8, 8, 1, False], [8, 8, 3, False]], [[8, 8, 1, True]],
                                              [[8, 16, 1, True], [16, 16, 3, False]]],
                           "stage_configs": [[[16, 1]], [[16, 3], [16, 2]]], "out_features": ["stage1", "stage2"]}),
    model("slanet", "SLANetBackbone", picture(64, name="hidden_states"), backbone_config=LCNET,
          post_conv_out_channels=16, csp_kernel_size=3),
    model("pp_lcnet_v3", "PPLCNetV3Backbone", PIXELS, **LCNET3),
    model("pp_lcnet_v4", "PPLCNetV4Backbone", PIXELS, **LCNET4),
    model("pp_ocrv5_mobile_det", "PPOCRV5MobileDetForObjectDetection", LARGER, **MOBILE),
    model("pp_ocrv5_mobile_rec", "PPOCRV5MobileRecForTextRecognition", WIDE, backbone_config=LCNET3, **READER),
    model("pp_ocrv5_server_det", "PPOCRV5ServerDetForObjectDetection", LARGER, **SERVER),
    model("pp_ocrv5_server_rec", "PPOCRV5ServerRecForTextRecognition", WIDE, backbone_config=HGNET, **READER),
    model("pp_ocrv6_medium_det", "PPOCRV6MediumDetForObjectDetection", LARGER, **SERVER),
    model("pp_ocrv6_small_det", "PPOCRV6SmallDetForObjectDetection", LARGER, **MOBILE),
    model("pp_ocrv6_small_rec", "PPOCRV6SmallRecForTextRecognition", LARGER, backbone_config=LCNET4, **READER),
    model("pp_ocrv6_tiny_rec", "PPOCRV6TinyRecForTextRecognition", LARGER, backbone_config=LCNET4, hidden_size=16,
          head_out_channels=12),
    model("timm_backbone", "TimmBackbone", LARGER, backbone="resnet10t"),
]  # fmt: skip
