"""The Wan VAE: names of `Wan2.1_VAE.pth` and the parameters of `VAE`."""

from collections.abc import Sequence

import numpy as np

from magref_jax.config import VAEConfig
from magref_jax.convert.rules import CONV2D, CONV3D, Rule, Transform

# [channels, 1, 1, 1] between convolutions, [channels, 1, 1] before attention <-> [channels]
_VIDEO_GAMMA = Transform(np.ravel, lambda scale: scale[:, None, None, None])
_IMAGE_GAMMA = Transform(np.ravel, lambda scale: scale[:, None, None])
# [out, in, 1, h, w] <-> [h, w, in, out]
_FRAME_CONV = Transform(lambda w: CONV2D.forward(w[:, :, 0]), lambda kernel: CONV2D.inverse(kernel)[:, :, None])
# [out, in, f, 1, 1] <-> [f, in, out]
_TIME_CONV = Transform(lambda w: w[..., 0, 0].transpose(2, 1, 0), lambda w: w.transpose(2, 1, 0)[..., None, None])


def vae_rules(config: VAEConfig) -> tuple[Rule, ...]:
    """The table. Wan numbers the layers of all stages in one row: the residual blocks of a stage, then its resampling."""
    widths = [config.base_dim * multiplier for multiplier in config.dim_multipliers]
    return (
        *_conv("encoder.conv1", "encoder/conv_in", CONV3D),
        *_encoder_stages(config, widths),
        *_tail("encoder"),
        *_conv("conv1", "quant", _FRAME_CONV),
        *_conv("conv2", "post_quant", _FRAME_CONV),
        *_conv("decoder.conv1", "decoder/conv_in", CONV3D),
        *_decoder_stages(config, widths[::-1]),
        *_tail("decoder"),
    )


def _encoder_stages(config: VAEConfig, widths: Sequence[int]) -> list[Rule]:
    rules: list[Rule] = []
    index, width_in = 0, widths[0]
    for stage, width in enumerate(widths):
        for i in range(config.num_res_blocks):
            names = f"encoder.downsamples.{index}", f"encoder/stage_{stage}_res_{i}"
            rules += _residual_block(*names, shortcut=width_in != width)
            index, width_in = index + 1, width
        if stage < len(config.temporal_downsample):
            torch, flax = f"encoder.downsamples.{index}", f"encoder/stage_{stage}_down"
            rules += _conv(f"{torch}.resample.1", flax, CONV2D)
            if config.temporal_downsample[stage]:
                rules.append(Rule(f"{torch}.time_conv.weight", f"{flax}/time_kernel", _TIME_CONV))
                rules.append(Rule(f"{torch}.time_conv.bias", f"{flax}/time_bias"))
            index += 1
    return rules


def _decoder_stages(config: VAEConfig, widths: Sequence[int]) -> list[Rule]:
    rules: list[Rule] = []
    index, width_in = 0, widths[0]
    for stage, width in enumerate(widths):
        for i in range(config.num_res_blocks + 1):
            names = f"decoder.upsamples.{index}", f"decoder/stage_{stage}_res_{i}"
            rules += _residual_block(*names, shortcut=width_in != width)
            index, width_in = index + 1, width
        if stage < len(config.temporal_downsample):
            torch, flax = f"decoder.upsamples.{index}", f"decoder/stage_{stage}_up"
            rules += _conv(f"{torch}.resample.1", f"{flax}/conv", CONV2D)
            if config.temporal_downsample[::-1][stage]:
                rules += _conv(f"{torch}.time_conv", f"{flax}/time_conv", CONV3D)
            index, width_in = index + 1, width // 2
    return rules


def _tail(side: str) -> tuple[Rule, ...]:
    """What follows the encoder's stages and, but for the order, surrounds the decoder's."""
    return (
        *_residual_block(f"{side}.middle.0", f"{side}/middle/res_0"),
        Rule(f"{side}.middle.1.norm.gamma", f"{side}/middle/attention/norm/scale", _IMAGE_GAMMA),
        *_conv(f"{side}.middle.1.to_qkv", f"{side}/middle/attention/qkv", CONV2D),
        *_conv(f"{side}.middle.1.proj", f"{side}/middle/attention/out", CONV2D),
        *_residual_block(f"{side}.middle.2", f"{side}/middle/res_1"),
        Rule(f"{side}.head.0.gamma", f"{side}/norm_out/scale", _VIDEO_GAMMA),
        *_conv(f"{side}.head.2", f"{side}/conv_out", CONV3D),
    )


def _residual_block(torch: str, flax: str, shortcut: bool = False) -> tuple[Rule, ...]:
    return (
        Rule(f"{torch}.residual.0.gamma", f"{flax}/norm_in/scale", _VIDEO_GAMMA),
        *_conv(f"{torch}.residual.2", f"{flax}/conv_in", CONV3D),
        Rule(f"{torch}.residual.3.gamma", f"{flax}/norm_out/scale", _VIDEO_GAMMA),
        *_conv(f"{torch}.residual.6", f"{flax}/conv_out", CONV3D),
        *(_conv(f"{torch}.shortcut", f"{flax}/shortcut", _FRAME_CONV) if shortcut else ()),
    )


def _conv(torch: str, flax: str, kernel: Transform) -> tuple[Rule, ...]:
    return Rule(f"{torch}.weight", f"{flax}/kernel", kernel), Rule(f"{torch}.bias", f"{flax}/bias")
