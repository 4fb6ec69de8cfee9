"""Speech Commands v0.02 (Warden 2018, arXiv 1804.03209): ten words or all 35, as recorded."""

import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from experiments.common.errors import UserError
from experiments.data.archives import read_files, read_wav
from experiments.data.preparation import ArrayRecordBuilder, SourceFile, check_count, find_source, show_progress

URL = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
SOURCES = (
    SourceFile("speech_commands_v0.02.tar.gz", URL, "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"),
    SourceFile("speech_commands_v0.02", URL),
)
RATE = 16_000  # Hz
SC10_LENGTH = 16_000  # samples
TEN_WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
# fmt: off
OTHER_WORDS = (
    "backward", "bed", "bird", "cat", "dog", "eight", "five", "follow", "forward", "four", "happy", "house",
    "learn", "marvin", "nine", "one", "seven", "sheila", "six", "three", "tree", "two", "visual", "wow", "zero",
)
# fmt: on
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}

# The split of every clip, by its name WORD/FILE.
Split = dict[str, str]


@dataclass(eq=False)
class SpeechCommandsConfig(tfds.core.BuilderConfig):
    """The words and their number of clips, so that an incomplete copy is rejected."""

    words: tuple[str, ...] = ()
    clips: int = 0


SC10 = SpeechCommandsConfig(
    name="sc10",
    description="Ten words, only clips of exactly 16,000 samples. Of every word 70 / 15 / 15 % for training, "
    "validation and test, by a hash of the clip's name: not the split by scikit-learn that published results use, "
    "which depends on the order in which a directory lists its files. Speakers are in several splits, as there.",
    words=TEN_WORDS,
    clips=34_975,
)
SC35 = SpeechCommandsConfig(
    name="sc35",
    description="All 35 words with the splits that come with the data; most clips have 16,000 samples, some fewer.",
    words=TEN_WORDS + OTHER_WORDS,
    clips=105_829,
)


class Builder(ArrayRecordBuilder):
    """Clips as recorded: 16-bit samples at 16 kHz. The background noise is left out.

    Built by one process, which reads the archive once to split it and once per split: minutes. An unpacked directory is
    faster.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [SC10, SC35]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Speech Commands v0.02. {self.builder_config.description}",
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
                    "label": tfds.features.ClassLabel(names=self.builder_config.words),
                    "filename": tfds.features.Text(),
                }
            ),
            homepage="https://arxiv.org/abs/1804.03209",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[str, dict]]]:
        _, path = find_source(self, SOURCES)
        print(f"{self.name}: reading {path}", file=sys.stderr, flush=True)
        splits = self._sc10(path) if self.builder_config.name == "sc10" else self._sc35(path)
        check_count(path, len(splits), self.builder_config.clips, f"clips for {self.builder_config.name}")
        return {split: self._generate_examples(path, split, splits) for split in ("train", "validation", "test")}

    def _generate_examples(self, path: Path, split: str, splits: Mapping[str, str]) -> Iterator[tuple[str, dict]]:
        clips = read_files(path, lambda name: splits.get(name) == split)
        total = list(splits.values()).count(split)
        for name, contents in show_progress(clips, total, f"{self.name} {split}"):
            audio = read_wav(f"{path}: {name}", contents, RATE)
            yield name, {"audio": audio, "label": name.partition("/")[0], "filename": name}

    def _sc10(self, path: Path) -> Split:
        kept, count = [], 0
        for name, contents in read_files(path, self._is_clip):
            count += 1
            if len(read_wav(f"{path}: {name}", contents, RATE)) == SC10_LENGTH:
                kept.append(name)
        print(f"left out {count - len(kept):,} of {count:,} clips that are not exactly 16,000 samples", file=sys.stderr)
        return stratified_split(kept)

    def _sc35(self, path: Path) -> Split:
        splits: Split = {}
        held_out: Split = {}
        lists = set(LISTS.values())
        for name, contents in read_files(path, lambda name: name in lists or self._is_clip(name)):
            if name in lists:
                split = next(split for split, file in LISTS.items() if file == name)
                held_out.update(dict.fromkeys(_names(f"{path}: {name}", contents), split))
                lists.remove(name)
            else:
                splits[name] = "train"
        if lists:
            raise UserError(
                f"{path} has no file {' and no '.join(sorted(lists))}: it is incomplete or a different archive"
            )
        if missing := held_out.keys() - splits.keys():
            raise UserError(f"{path} lacks {len(missing)} clips that its lists name, such as {min(missing)}")
        return splits | held_out

    def _is_clip(self, name: str) -> bool:
        match = re.fullmatch(r"([^/]+)/[^/]+\.wav", name)
        return match is not None and match[1] in self.builder_config.words


def _names(where: str, contents: bytes) -> list[str]:
    """The clips named in a list."""
    try:
        return contents.decode().split()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is damaged or not a list of clips: it is not UTF-8 ({error.reason})") from error


def stratified_split(names: Iterable[str], seed: int = 0) -> Split:
    """The split of every clip: of each word 15 % (rounded) for test, 15 % for validation and the rest for training.

    Depends only on the clips' names and the seed, not on their order, the machine or library versions.
    """

    def digest(name: str) -> bytes:
        return hashlib.blake2b(name.encode(), digest_size=16, key=seed.to_bytes(8, "little")).digest()

    words: dict[str, list[str]] = defaultdict(list)
    for name in names:
        words[name.partition("/")[0]].append(name)
    splits: Split = {}
    for members in words.values():
        held_out = round(0.15 * len(members))
        for number, name in enumerate(sorted(members, key=digest)):
            splits[name] = "test" if number < held_out else "validation" if number < 2 * held_out else "train"
    return splits
