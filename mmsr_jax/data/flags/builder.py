"""TFDS builder `flags`: the questions of the flags world with their pictures."""

import dataclasses
import io
from collections.abc import Iterator

import tensorflow_datasets as tfds

from mmsr_jax.data.flags.world import CATEGORIES, FlagsConfig, World

# Unfamiliar entities are in both splits, never-shown ones only in the test split.
TRAIN_CATEGORIES = tuple(name for name in CATEGORIES if name != "never_shown")


@dataclasses.dataclass(eq=False)
class FlagsBuilderConfig(tfds.core.BuilderConfig):
    """Names the prepared folder after a hash of every field, so that no two worlds mix."""

    flags: FlagsConfig = FlagsConfig()


class Flags(tfds.core.GeneratorBasedBuilder):
    """Real flags, augmented, and questions about their countries.

    `known` and `unknown` questions are in both splits with different pictures. A record's image
    is PNG bytes of exactly the configured size.
    """

    name = "flags"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    # Nothing is downloaded. Said outright, because TFDS 4.9.10 would look for checksum files with
    # importlib_resources, a package that it does not require.
    url_infos = {}
    BUILDER_CONFIGS = [FlagsBuilderConfig(name="default", description="FlagsConfig()")]

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "question": tfds.features.Text(),
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "answers": tfds.features.Sequence(tfds.features.Text()),
                "category": tfds.features.Text(),
                "entity": tfds.features.Text(),
                "source": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=features,
            homepage="https://github.com/hjnilsson/country-flags",
            license="flags: public domain; facts: ODbL 1.0, world-countries by Mohammed Le Doze",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # everything is in the package
        config = self.builder_config.flags
        world = World(config)
        return {
            "train": self._records(world, "train", config.train_pictures, TRAIN_CATEGORIES),
            "test": self._records(world, "test", config.test_pictures, CATEGORIES),
        }

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        raise NotImplementedError("the split generators hold the records themselves")

    @staticmethod
    def _records(
        world: World, split: str, pictures: int, categories: tuple[str, ...]
    ) -> Iterator[tuple[str, dict]]:
        for entity, attribute in world.pairs(*categories):
            for number in range(pictures):
                key = f"{entity}-{attribute}-{split}-{number:03d}"
                yield (
                    key,
                    {
                        "id": key,
                        "question": world.question(attribute),
                        # A file object is stored as it is; an array would be encoded again.
                        "image": io.BytesIO(world.picture(entity, attribute, split, number)),
                        "answers": list(world.answers(entity, attribute)),
                        "category": world.category(entity, attribute),
                        "entity": entity,
                        "source": "flags",
                    },
                )


def flags_builder(config: FlagsConfig, data_dir: str) -> Flags:
    """The builder of one world; its folder is `data_dir`/flags/HASH/VERSION."""
    for field in ("train_pictures", "test_pictures"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field} must be at least 1, not {getattr(config, field)}")
    builder_config = FlagsBuilderConfig(name=config.digest, flags=config)
    return Flags(data_dir=data_dir, config=builder_config, file_format="array_record")
