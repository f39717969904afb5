"""Emoji world as a TensorFlow dataset: written once, read at random by any tool that knows such data sets.

    builder = EmojiDataset(data_dir="data", file_format="array_record")
    builder.download_and_prepare()
    source = DatasetSource(builder.as_data_source("train"))

TensorFlow itself is needed neither to write nor to read it: pictures are kept as PNG, not as `tfds.features.Image`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from magref_jax.data.emoji_records import EmojiSource
from magref_jax.data.emoji_world import EmojiWorldConfig
from magref_jax.data.records import Caption, ClipRecord, ReferenceRecord, Size, View


@dataclasses.dataclass(eq=False)
class EmojiDatasetConfig(tfds.core.BuilderConfig):
    """One world, with so many clips of each split."""

    world: EmojiWorldConfig = dataclasses.field(default_factory=EmojiWorldConfig)
    num_clips: int = 12_000  # of "train"
    num_held_out: int = 500  # of "held_out", which shows emoji that "train" does not have
    seed: int = 0


class EmojiDataset(tfds.core.GeneratorBasedBuilder):
    """Clips of moving emoji with captions, boxes and several views of every reference, in the order of `EmojiSource`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (EmojiDatasetConfig(name="default"),)  # pyrefly: ignore[unexpected-keyword]
    # Where checksums of downloads would lie; to find it tfds imports a package that it does not depend on.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        config = self._config
        features, world = tfds.features, config.world
        span = features.Tensor(shape=(2,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=features.FeaturesDict(
                {
                    "id": features.Text(),
                    "caption": features.Text(),
                    "fps": features.Scalar(np.float64),
                    "frames": features.Tensor(
                        shape=(world.num_frames, world.height, world.width, 3), dtype=np.uint8, encoding="zlib"
                    ),
                    "subject_boxes": features.Sequence(
                        features.Tensor(shape=(world.num_frames, 4), dtype=np.int32)
                    ),  # x0 y0 x1 y1, pixels
                    "references": features.Sequence(
                        {"label": features.Text(), "span": span, "role": features.Text(), "identity": features.Text()}
                    ),
                    # Flat, each with the number of its reference: lists of lists are read as TensorFlow's ragged tensors.
                    "views": features.Sequence(
                        {
                            "reference": features.Scalar(np.int32),
                            "image": features.Tensor(shape=(), dtype=np.object_),
                            "origin": features.Text(),
                        }
                    ),
                }
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(world=dataclasses.asdict(world), seed=config.seed),
        )

    @property
    def _config(self) -> EmojiDatasetConfig:
        assert isinstance(self.builder_config, EmojiDatasetConfig)
        return self.builder_config

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        config = self._config
        return {
            "train": self._generate_examples(EmojiSource(config.world, "train", config.seed, config.num_clips)),
            "held_out": self._generate_examples(
                EmojiSource(config.world, "held_out", config.seed, config.num_held_out)
            ),
        }

    def _generate_examples(self, source: EmojiSource) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(len(source)):
            record = source[index]
            (caption,) = record.captions
            assert record.subject_boxes is not None
            yield (
                index,
                {
                    "id": record.id,
                    "caption": caption.text,
                    "fps": record.fps,
                    "frames": record.frames,
                    "subject_boxes": list(record.subject_boxes),
                    "references": [
                        {"label": each.label, "span": span, "role": each.role, "identity": each.identity}
                        for each, span in zip(record.references, caption.label_spans, strict=True)
                    ],
                    "views": [
                        {"reference": number, "image": view.image, "origin": view.origin}
                        for number, reference in enumerate(record.references)
                        for view in reference.views
                    ],
                },
            )


class DatasetSource:
    """Records of a split of `EmojiDataset`, from what `tfds.data_source` or `as_data_source` returns."""

    num_references = None

    def __init__(self, data_source: Any) -> None:
        self._examples = data_source
        info = data_source.dataset_info
        split = info.splits[data_source.split]
        shape: Size = info.features["frames"].shape[:3]
        self.sizes: Sequence[Size] = [shape] * len(data_source)
        written = [info.full_name, data_source.split, split.shard_lengths, split.num_bytes, info.metadata]
        self.fingerprint = hashlib.sha256(json.dumps(written).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> ClipRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}.")
        example = self._examples[index]
        references, views = example["references"], example["views"]
        shown: list[list[View]] = [[] for _ in references["label"]]
        for reference, image, origin in zip(views["reference"], views["image"], views["origin"], strict=True):
            shown[reference].append(View(image, origin.decode()))
        frames = example["frames"]
        return ClipRecord(
            id=example["id"].decode(),
            num_frames=frames.shape[0],
            height=frames.shape[1],
            width=frames.shape[2],
            fps=float(example["fps"]),
            captions=(
                Caption(
                    example["caption"].decode(), tuple((int(start), int(stop)) for start, stop in references["span"])
                ),
            ),
            references=tuple(
                ReferenceRecord(label.decode(), tuple(own), role.decode(), identity.decode())
                for label, own, role, identity in zip(
                    references["label"], shown, references["role"], references["identity"], strict=True
                )
            ),
            source="emoji world",
            frames=frames,
            subject_boxes=np.stack(example["subject_boxes"]),
        )
