"""Models of transformers that have batch norms, as small as their configurations allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models.case import Case, Inputs
from tests.models.given import picture, together, values, words

PIXELS, LARGER = picture(32, name="pixel_values"), picture(64, name="pixel_values")
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip


def model(
    family: str, name: str, inputs: Inputs = PIXELS, *, batch: int = 4, whole: str = "", frozen: str = "",
    **options: Any,
) -> Case:  # fmt: skip
    """A model by the names of its module and class, and what its configuration is given."""

    def build() -> nn.Module:
        import transformers

        cls = getattr(transformers, name)
        made: nn.Module = cls(cls.config_class(**options))
        if frozen:
            made.get_submodule(frozen).requires_grad_(False)
        return made

    return Case(library="transformers", family=family, model=name, build=build, inputs=inputs, batch=batch, whole=whole)


def emu3() -> nn.Module:
    """The encoder of its pictures alone: what follows makes numbers of words, through which no gradients come."""
    import transformers
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAEEncoder

    made: nn.Module = Emu3VQVAEEncoder(transformers.Emu3VQVAEConfig(
        base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, attn_resolutions=[], hidden_size=32,
        temporal_downsample_factor=2,
    ))  # fmt: skip
    return made


TINY = [
    model("resnet", "ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2],
          layer_type="bottleneck"),
    model("regnet", "RegNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2],
          groups_width=4),
    model("mobilenet_v1", "MobileNetV1ForImageClassification", LARGER, depth_multiplier=0.25, min_depth=4,
          image_size=64, classifier_dropout_prob=0.0),
    model("mobilenet_v2", "MobileNetV2ForImageClassification", LARGER, depth_multiplier=0.25, min_depth=4,
          expand_ratio=2.0, depth_divisible_by=4, image_size=64, classifier_dropout_prob=0.0),
    model("efficientnet", "EfficientNetForImageClassification", image_size=32, width_coefficient=0.5,
          depth_coefficient=0.3, in_channels=[32, 16, 16], out_channels=[16, 16, 16], strides=[1, 2, 2],
          kernel_sizes=[3, 3, 5], num_block_repeats=[1, 2, 2], expand_ratios=[1, 2, 2], hidden_dim=640,
          drop_connect_rate=0.0, dropout_rate=0.0),
    model("levit", "LevitForImageClassification", image_size=64, hidden_sizes=[16, 24, 32],
          num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8], inputs=LARGER),
    model("mobilevit", "MobileViTForImageClassification", image_size=32, hidden_sizes=[16, 16, 16],
          neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16], num_attention_heads=2, hidden_dropout_prob=0.0,
          classifier_dropout_prob=0.0),
    model("hgnet_v2", "HGNetV2ForImageClassification", embedding_size=8, stem_channels=[3, 4, 8],
          stage_in_channels=[8, 8], stage_mid_channels=[4, 4], stage_out_channels=[8, 16], stage_num_blocks=[1, 1],
          stage_downsample=[False, True], stage_downsample_strides=[2, 2], stage_light_block=[False, True],
          stage_kernel_size=[3, 5], stage_numb_of_layers=[2, 2], depths=[1, 1], hidden_sizes=[8, 16]),
    model("swiftformer", "SwiftFormerForImageClassification", depths=[1, 1], embed_dims=[8, 16],
          downsamples=[True, True], mlp_ratio=2),
    model("segformer", "SegformerForSemanticSegmentation", depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16],
          num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8, drop_path_rate=0.0, classifier_dropout_prob=0.0,
          inputs=LARGER),
    model("dpt", "DPTForDepthEstimation", hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
          intermediate_size=16, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3],
          neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, use_batch_norm_in_fusion_residual=True,
          hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    model("patchtst", "PatchTSTForPrediction", values(16, 2, name="past_values"), num_input_channels=2,
          context_length=16, patch_length=4, patch_stride=4, prediction_length=4, num_hidden_layers=1, d_model=8,
          num_attention_heads=2, ffn_dim=8, norm_type="batchnorm", attention_dropout=0.0, ff_dropout=0.0,
          head_dropout=0.0),
]  # fmt: skip
"""A dozen that are quick enough for ``make test``."""

MORE = [
    model("wav2vec2_conformer", "Wav2Vec2ConformerModel", values(400, name="input_values"), hidden_size=16,
          num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8, 8], conv_stride=[4, 4],
          conv_kernel=[8, 8], num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
          hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0,
          conformer_conv_dropout=0.0, apply_spec_augment=False),
    model("mobilevitv2", "MobileViTV2ForImageClassification", LARGER, image_size=64,
          width_multiplier=0.25, n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[16, 24, 32]),
    model("cvt", "CvtForImageClassification", LARGER, embed_dim=[8, 16, 16],
          num_heads=[1, 2, 2], depth=[1, 2, 3]),
    model("textnet", "TextNetForImageClassification", stem_out_channels=8, hidden_sizes=[8, 8, 8, 16, 16],
          conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 3], [3, 1]], [[3, 3]]],
          conv_layer_strides=[[1], [2, 1], [2, 1], [2]], image_size=32),
    model("pp_lcnet", "PPLCNetForImageClassification", scale=0.25, class_expand=16),
    model("glpn", "GLPNForDepthEstimation", LARGER, depths=[1, 1, 1, 1],
          hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8),
    model("beit", "BeitForSemanticSegmentation", image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=4,
          num_attention_heads=2, intermediate_size=16, out_indices=[1, 2, 3, 4], semantic_loss_ignore_index=255),
    model("data2vec", "Data2VecVisionForSemanticSegmentation", image_size=32, patch_size=8, hidden_size=16,
          num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, out_indices=[1, 2, 3, 4]),
    model("zoedepth", "ZoeDepthForDepthEstimation", use_batch_norm_in_fusion_residual=True,
          backbone_config={"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 4,
                           "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "out_indices": [1, 2, 3, 4],
                           "reshape_hidden_states": False},
          neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, bottleneck_features=8, num_patch_transformer_layers=1,
          patch_transformer_hidden_size=16, patch_transformer_intermediate_size=16,
          patch_transformer_num_attention_heads=2, backbone_hidden_size=16,
          bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
          num_attractors=[4, 2, 2, 1]),
    model("vitmatte", "VitMatteForImageMatting", picture(64, 4, name="pixel_values"),
          backbone_config={"model_type": "vitdet", "hidden_size": 16, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "num_channels": 4,
                           "out_features": ["stage2"]},
          hidden_size=16, convstream_hidden_sizes=[8, 8, 16], fusion_hidden_sizes=[16, 8, 8, 8]),
    model("vitpose", "VitPoseForPoseEstimation", LARGER, use_simple_decoder=False,
          backbone_config={"model_type": "vitpose_backbone", "hidden_size": 16, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "intermediate_size": 16, "image_size": [64, 64],
                           "patch_size": [16, 16], "out_indices": [2]}),
    model("upernet", "UperNetForSemanticSegmentation", LARGER,
          backbone_config={**RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}, hidden_size=8,
          pool_scales=[1, 2], auxiliary_channels=8, auxiliary_in_channels=16),
    model("rt_detr", "RTDetrForObjectDetection", LARGER,
          whole="queries are the same for all samples", backbone_config={
              "model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16],
              "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]},
          freeze_backbone_batch_norms=False, encoder_hidden_dim=16, encoder_in_channels=[16, 16, 16],
          encoder_ffn_dim=16, encoder_attention_heads=2, decoder_ffn_dim=16, decoder_attention_heads=2,
          decoder_layers=1, d_model=16, num_queries=6, num_denoising=0, decoder_in_channels=[16, 16, 16], dropout=0.0),
    model("groupvit", "GroupViTModel", together(words(), picture(32, name="pixel_values")), projection_dim=8,
          projection_intermediate_dim=16,
          text_config={"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": 1},
          vision_config={"hidden_size": 16, "intermediate_size": 16, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0],
                         "num_output_groups": [8, 4, 4], "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
          whole="it compares all samples with all"),
    model("patchtsmixer", "PatchTSMixerForPrediction", values(16, 2, name="past_values"), context_length=16,
          patch_length=4, patch_stride=4, num_input_channels=2, prediction_length=4, d_model=8, num_layers=1,
          norm_mlp="BatchNorm", dropout=0.0, head_dropout=0.0),
    model("clap", "ClapAudioModelWithProjection", together(values(1, 64, 16, name="input_features")),
          num_mel_bins=16, spec_size=64, patch_size=4, window_size=4, depths=[1, 1], num_attention_heads=[2, 2],
          patch_embeds_hidden_size=8, hidden_size=16, projection_dim=8, enable_fusion=False),
    model("seamless_m4t", "SeamlessM4TForSpeechToText", together(
              values(16, 8, name="input_features"), words(6, 30, name="decoder_input_ids")), batch=2,
          vocab_size=32, t2u_vocab_size=32, hidden_size=16, feature_projection_input_dim=8, speech_encoder_layers=1,
          speech_encoder_attention_heads=2, speech_encoder_intermediate_size=16, encoder_layers=1, decoder_layers=1,
          encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
          max_position_embeddings=64, max_source_positions=64, adaptor_dropout=0.0, num_conv_pos_embeddings=4,
          num_conv_pos_embedding_groups=2, speech_encoder_dropout=0.0, pad_token_id=0),
    model("align", "AlignVisionModel", image_size=32, width_coefficient=0.5, depth_coefficient=0.3,
          in_channels=[32, 16, 16], out_channels=[16, 16, 16], strides=[1, 2, 2], kernel_sizes=[3, 3, 5],
          num_block_repeats=[1, 2, 2], expand_ratios=[1, 2, 2], hidden_dim=16, drop_connect_rate=0.0),
    model("informer", "InformerModel", together(
              values(20, name="past_values"), values(20, 1, name="past_time_features"),
              lambda batch: {"past_observed_mask": torch.ones(batch, 20)},
              values(4, name="future_values"), values(4, 1, name="future_time_features")),
          prediction_length=4, context_length=13, lags_sequence=[1, 7], num_time_features=1, d_model=8,
          encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
          encoder_ffn_dim=8, decoder_ffn_dim=8, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0),
    model("hubert", "HubertModel", values(400, name="input_values"), hidden_size=16, num_hidden_layers=1,
          num_attention_heads=2, intermediate_size=16, conv_dim=[8, 8], conv_stride=[4, 4], conv_kernel=[8, 8],
          num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
          conv_pos_batch_norm=True, hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0,
          feat_proj_layer_norm=True, layerdrop=0.0, apply_spec_augment=False),
    model("granite_speech", "GraniteSpeechCTCEncoder", values(20, 8), input_dim=8, num_layers=2, hidden_dim=16,
          feedforward_mult=2, num_heads=2, output_dim=6, context_size=8, max_pos_emb=16, dropout=0.0,
          conv_kernel_size=3),
    model("granite_speech5", "GraniteSpeech5Encoder", values(20, 32, name="input_features"), vocab_size=6,
          hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_mel_bins=8,
          context_size=8, max_position_embeddings=16, conv_kernel_size=3),
    model("lasr", "LasrEncoder", values(40, 8, name="input_features"), hidden_size=16, num_hidden_layers=2,
          num_attention_heads=2, intermediate_size=16, conv_kernel_size=4, subsampling_conv_channels=8,
          num_mel_bins=8, dropout=0.0, layerdrop=0.0, activation_dropout=0.0, attention_dropout=0.0),
    model("parakeet", "ParakeetEncoder", values(40, 16, name="input_features"), hidden_size=16, num_hidden_layers=2,
          num_attention_heads=2, intermediate_size=16, conv_kernel_size=3, subsampling_conv_channels=8,
          num_mel_bins=16, dropout=0.0, layerdrop=0.0, activation_dropout=0.0, attention_dropout=0.0),
    model("speecht5", "SpeechT5ForTextToSpeech", together(words(), values(8, 8, name="decoder_input_values")),
          vocab_size=32, hidden_size=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
          decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2, encoder_layerdrop=0.0,
          decoder_layerdrop=0.0, positional_dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0,
          activation_dropout=0.0, num_mel_bins=8, speech_decoder_prenet_units=8, speech_decoder_prenet_dropout=0.0,
          speech_decoder_postnet_layers=3, speech_decoder_postnet_units=8, speech_decoder_postnet_dropout=0.0,
          reduction_factor=2, max_speech_positions=32, max_text_positions=32, encoder_max_relative_position=8),
    model("perceiver", "PerceiverForImageClassificationConvProcessing", picture(32, name="inputs"), num_latents=4,
          d_latents=16, num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=1,
          attention_probs_dropout_prob=0.0),
    Case(library="transformers", family="emu3", model="Emu3VQVAEEncoder", build=emu3, inputs=values(4, 3, 8, 8)),
]  # fmt: skip
