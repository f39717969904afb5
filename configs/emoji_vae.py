"""Emoji world, first stage: the VAE of the bundled model, with the frozen encoders and the tokenizer beside it.

python train.py configs/emoji_vae.py --output-dir runs/emoji_vae
"""

from magref_jax.config import (
    DiTConfig,
    ImageEncoderConfig,
    ModelConfig,
    SamplingConfig,
    TextEncoderConfig,
    VAEConfig,
)
from magref_jax.data.emoji_world import EmojiWorldConfig
from magref_jax.training.config import EmojiData, Events, OptimizerConfig, TrainConfig, VAEPhase, VAETask

model = ModelConfig(
    dit=DiTConfig(
        dim=192,
        ffn_dim=576,
        num_heads=6,
        num_layers=5,
        text_dim=128,
        text_len=48,
        image_dim=64,
        freq_dim=64,
        rope_theta=100.0,  # a clip is 9 tokens wide
        dtype="float32",
        remat="dots",
        attention="auto",
    ),
    vae=VAEConfig(
        base_dim=12,
        dim_multipliers=(1, 2, 4),
        num_res_blocks=1,
        temporal_downsample=(False, True),
        latent_mean=(0.0,) * 16,
        latent_std=(1.0,) * 16,
        convolution="taps",
    ),
    text_encoder=TextEncoderConfig(
        vocab_size=1,  # set by the tokenizer that training writes
        dim=128,
        ffn_dim=128,
        num_heads=8,
        head_dim=16,
        num_layers=2,
        # Frozen as initialised: a name's embedding holds what it does and where.
        relative_offsets=(-2, -1, 1, 2, 3, 4, 5, 6),
        dtype="float32",
    ),
    image_encoder=ImageEncoderConfig(
        dim=64, ffn_dim=128, num_heads=4, num_layers=2, image_size=48, patch_size=12, dtype="float32"
    ),
    sampling=SamplingConfig(
        height=56,
        width=72,
        num_frames=9,
        num_inference_steps=30,
        flow_shift=3.0,
        guidance_scale=3.0,
        reference_guidance_scale=None,  # as toward the prompt
        layout="v1",  # every reference in the size it has in the video
        negative_prompt="",
    ),
    subject_alpha=1.0,
    drop_frames=1,
    fps=8.0,
)

# Places lie on the 8-pixel grid of the DiT's tokens, sprites move by one token per latent frame, and their references lie on
# that grid too: to copy is to attend to a whole token.
world = EmojiWorldConfig(
    subject_counts=(0.5, 0.35, 0.15),
    background_reference=0.15,
)

config = TrainConfig(
    task=VAETask(
        model=model,
        data=EmojiData(world, num_clips=3000),
        phases=(
            VAEPhase(num_steps=2500, batch_size=16, num_frames=1, crop=32),
            VAEPhase(num_steps=2500, batch_size=8, num_frames=5, crop=24),
        ),
    ),
    optimizer=OptimizerConfig(
        learning_rate=3e-3, warmup_steps=200, cycle_steps=(4800,), final_fraction=0.05, b2=0.99, ema_decay=0.999
    ),
    num_steps=5000,
    events=Events(validation=500),
    save_dtype="bfloat16",
)
