"""--resize, --crop, --mean and --std: how a folder of images becomes inputs, where one says so."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orepa_compiler.errors import ReparamError
from orepa_compiler.model_source.preprocessing import Preprocessing


@dataclass(frozen=True)
class ImageOptions:
    """What was said of images on the command line; None where timm or torchvision say it."""

    resize: int | None = None
    crop: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def read(
        cls, resize: int | None, crop: int | None, mean: str | None, std: str | None
    ) -> ImageOptions:
        """The options as numbers. Raises ReparamError for a text that is none."""
        return cls(resize, crop, _numbers("--mean", mean), _numbers("--std", std))

    @property
    def given(self) -> bool:
        return self != ImageOptions()

    def over(self, known: Preprocessing) -> Preprocessing:
        """What is known of a model, with what was said in its place."""
        if self.crop is not None:
            known = known.at((known.shape[0], self.crop, self.crop))
        if self.resize is not None:
            known = replace(known, resize=self.resize)
        mean, std = self.mean or known.mean, self.std or known.std
        if not len(mean) == len(std) == known.shape[0]:
            raise ReparamError(
                f"--mean and --std: the images have {known.shape[0]} channels, but these "
                f"{len(mean)} and {len(std)} numbers"
            )
        return replace(known, mean=mean, std=std)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ReparamError(
            f"{option} {text}: write it as numbers with commas, as 0.5,0.5,0.5"
        ) from error
    if option == "--std" and not all(number > 0 for number in numbers):
        raise ReparamError(f"{option} {text}: every number has to be positive")
    return numbers
