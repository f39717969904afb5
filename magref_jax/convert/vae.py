"""What the parameters of the Wan VAE are called in `Wan2.1_VAE.pth` and in the files of diffusers."""

from collections.abc import Sequence

import numpy as np

from magref_jax.config import VAEConfig
from magref_jax.convert.rules import CONV2D, CONV3D, Layout, MakeRules, Row, Rule, Transform, array, rules_in, within

# [channels, 1, 1, 1] between convolutions, [channels, 1, 1] before attention <-> [channels]
_VIDEO_GAMMA = Transform(np.ravel, lambda scale: scale[:, None, None, None])
_IMAGE_GAMMA = Transform(np.ravel, lambda scale: scale[:, None, None])
# [out, in, 1, h, w] <-> [h, w, in, out]
_FRAME_CONV = Transform(lambda w: CONV2D.forward(w[:, :, 0]), lambda kernel: CONV2D.inverse(kernel)[:, :, None])
# [out, in, f, 1, 1] <-> [f, in, out]
_TIME_CONV = Transform(lambda w: w[..., 0, 0].transpose(2, 1, 0), lambda w: w.transpose(2, 1, 0)[..., None, None])


def _convolution(kernel: Transform) -> MakeRules:
    return lambda torch, flax: (
        Rule(f"{torch}.weight", f"{flax}/kernel", kernel),
        Rule(f"{torch}.bias", f"{flax}/bias"),
    )


_conv2d, _conv3d, _frame_conv = _convolution(CONV2D), _convolution(CONV3D), _convolution(_FRAME_CONV)
_video_gamma, _image_gamma = array(_VIDEO_GAMMA), array(_IMAGE_GAMMA)

_RESIDUAL_BLOCK: tuple[Row, ...] = (
    (_video_gamma, "norm_in/scale",  "residual.0.gamma", "norm1.gamma"),
    (_conv3d,      "conv_in",        "residual.2",       "conv1"),
    (_video_gamma, "norm_out/scale", "residual.3.gamma", "norm2.gamma"),
    (_conv3d,      "conv_out",       "residual.6",       "conv2"),
)  # fmt: skip
_SHORTCUT: tuple[Row, ...] = (
    (_frame_conv,  "shortcut",       "shortcut",         "conv_shortcut"),
)  # fmt: skip
_DOWN: tuple[Row, ...] = (
    (array(CONV2D), "kernel", "resample.1.weight", "resample.1.weight"),
    (array(),       "bias",   "resample.1.bias",   "resample.1.bias"),
)  # fmt: skip
_DOWN_TIME: tuple[Row, ...] = (
    (array(_TIME_CONV), "time_kernel", "time_conv.weight", "time_conv.weight"),
    (array(),           "time_bias",   "time_conv.bias",   "time_conv.bias"),
)  # fmt: skip
_UP: tuple[Row, ...] = (
    (_conv2d, "conv",      "resample.1", "resample.1"),
)  # fmt: skip
_UP_TIME: tuple[Row, ...] = (
    (_conv3d, "time_conv", "time_conv",  "time_conv"),
)  # fmt: skip
# Of the encoder and, but for the order, of the decoder.
_AROUND_THE_STAGES: tuple[Row, ...] = (
    (_conv3d,      "conv_in",                     "conv1",               "conv_in"),
    *within("middle/res_0/", "middle.0.", "mid_block.resnets.0.", _RESIDUAL_BLOCK),
    (_image_gamma, "middle/attention/norm/scale", "middle.1.norm.gamma", "mid_block.attentions.0.norm.gamma"),
    (_conv2d,      "middle/attention/qkv",        "middle.1.to_qkv",     "mid_block.attentions.0.to_qkv"),
    (_conv2d,      "middle/attention/out",        "middle.1.proj",       "mid_block.attentions.0.proj"),
    *within("middle/res_1/", "middle.2.", "mid_block.resnets.1.", _RESIDUAL_BLOCK),
    (_video_gamma, "norm_out/scale",              "head.0.gamma",        "norm_out.gamma"),
    (_conv3d,      "conv_out",                    "head.2",              "conv_out"),
)  # fmt: skip


def vae_rules(config: VAEConfig, layout: Layout = "wan") -> tuple[Rule, ...]:
    """One rule per tensor of a checkpoint."""
    widths = [config.base_dim * multiplier for multiplier in config.dim_multipliers]
    rows: tuple[Row, ...] = (
        *within("encoder/", "encoder.", "encoder.", (*_AROUND_THE_STAGES, *_encoder_stages(config, widths))),
        (_frame_conv, "quant",      "conv1", "quant_conv"),
        (_frame_conv, "post_quant", "conv2", "post_quant_conv"),
        *within("decoder/", "decoder.", "decoder.", (*_AROUND_THE_STAGES, *_decoder_stages(config, widths[::-1]))),
    )  # fmt: skip
    return rules_in(layout, rows)


# Wan numbers the layers of all stages in one row, the residual blocks of a stage before its resampling. So does diffusers
# in the encoder; its decoder has a list of stages, each with two lists.


def _encoder_stages(config: VAEConfig, widths: Sequence[int]) -> list[Row]:
    rows: list[Row] = []
    index, width_in = 0, config.base_dim
    for stage, width in enumerate(widths):
        for i in range(config.num_res_blocks):
            names = f"stage_{stage}_res_{i}/", f"downsamples.{index}.", f"down_blocks.{index}."
            rows += within(*names, _residual_block(width_in, width))
            index, width_in = index + 1, width
        if stage < len(config.temporal_downsample):
            names = f"stage_{stage}_down/", f"downsamples.{index}.", f"down_blocks.{index}."
            rows += within(*names, _DOWN + _DOWN_TIME if config.temporal_downsample[stage] else _DOWN)
            index += 1
    return rows


def _decoder_stages(config: VAEConfig, widths: Sequence[int]) -> list[Row]:
    rows: list[Row] = []
    index, width_in = 0, widths[0]
    for stage, width in enumerate(widths):
        for i in range(config.num_res_blocks + 1):
            names = f"stage_{stage}_res_{i}/", f"upsamples.{index}.", f"up_blocks.{stage}.resnets.{i}."
            rows += within(*names, _residual_block(width_in, width))
            index, width_in = index + 1, width
        if stage < len(config.temporal_downsample):
            names = f"stage_{stage}_up/", f"upsamples.{index}.", f"up_blocks.{stage}.upsamplers.0."
            rows += within(*names, _UP + _UP_TIME if config.temporal_downsample[::-1][stage] else _UP)
            index, width_in = index + 1, width // 2
    return rows


def _residual_block(width_in: int, width: int) -> tuple[Row, ...]:
    return _RESIDUAL_BLOCK if width_in == width else _RESIDUAL_BLOCK + _SHORTCUT
