"""Pictures and captions through the base's encoders, each once, through a cache.

Everything is encoded alone, not in batches: on most machines a batch changes the last bits, and so an entry
follows from its content only, whoever makes it and when.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from tqdm import tqdm

from diffadapt.common.images import CropGeometry, ImageSource, crop_geometry, to_pixels
from diffadapt.data.cache import DiskCache, Entry, MemoryCache, cache_key, fingerprint
from diffadapt.data.scaled_images import ScaledImages
from diffadapt.models.base import BaseModel

MANY = 20  # encodings from which on a progress bar is shown
RECENT = 1000  # captions whose states are kept while streaming


class UnreadableImage(ValueError):
    """A picture that cannot be used; the message names it."""


@dataclass(frozen=True)
class Crop:
    """What of a picture is encoded."""

    size: tuple[int, int]  # (height, width) in pixels
    crop: tuple[float, float] = (0.5, 0.5)  # as in `to_pixels`
    flip: bool = False


class EncodedImages:
    """Encoded cuts of pictures.

    Args:
        cache: where they are kept; None: encoded whenever they are asked for.
        image_memory: bytes of scaled images that are kept, where nothing is encoded beforehand.
    """

    def __init__(self, model: BaseModel, cache: MemoryCache | DiskCache | None, *, image_memory: int = 0):
        self.model, self.cache = model, cache
        self.images = ScaledImages(image_memory if cache is None else 0)
        self._encoder = _autoencoder_fingerprint(model) if isinstance(cache, DiskCache) else ""
        self._contents: dict[ImageSource, str] = {}  # SHA-256 of the files of `prepare`

    def prepare(self, wanted: Sequence[tuple[ImageSource, Crop]]) -> None:
        """Encodes what the cache does not hold yet.

        Raises: UnreadablePicture, or ValueError when an encoding is not finite.
        """
        for source in {source for source, _ in wanted}:
            self._contents[source] = _sha256(source)
        for source, cut in tqdm(wanted, desc="encoding pictures", disable=len(wanted) < MANY):
            encoded, _ = self.get(source, cut)
            if not encoded.isfinite().all():
                raise ValueError(
                    f"the autoencoder gives non-finite latents for {source}; remove this picture, or name "
                    "another autoencoder with --pretrained_vae_model_name_or_path"
                )

    def get(self, source: ImageSource, cut: Crop) -> tuple[Tensor, CropGeometry]:
        """What `Base.encode_images` gives for one picture (without the batch), and its view."""
        key = None if self.cache is None else self._key(source, cut)
        entry = self.cache.get(key) if key else None
        if entry is None:
            entry = self._encode(source, cut)
            if key and entry["encoded"].isfinite().all():  # the loss tells the others: step and picture
                self.cache.put(key, entry)
        height, width = entry["original_size"].tolist()
        return entry["encoded"], crop_geometry((width, height), cut.size, crop=cut.crop, flip=cut.flip)

    def read_ahead(self, cuts: Sequence[tuple[ImageSource, Crop]]) -> None:
        """Begins to read images that `get` will encode, while other work goes on."""
        if self.cache is None:
            self.images.read_ahead([(source, cut.size) for source, cut in cuts])

    def _key(self, source: ImageSource, cut: Crop) -> str:
        content = self._contents.get(source) or _sha256(source)
        return cache_key(picture=content, encoder=self._encoder, size=cut.size, crop=cut.crop, flip=cut.flip)

    def _encode(self, source: ImageSource, cut: Crop) -> Entry:
        try:
            scaled = self.images.get(source, cut.size)
        except Exception as error:  # damaged files make Pillow raise almost anything
            raise UnreadableImage(f"{source} cannot be read: {error or type(error).__name__}") from None
        pixels = to_pixels(scaled.image, cut.size, crop=cut.crop, flip=cut.flip)
        encoded = self.model.encode_images(pixels[None])[0].cpu()
        width, height = scaled.original_size
        return {"encoded": encoded, "original_size": torch.tensor([height, width])}


class EncodedCaptions:
    """What the base is told for a caption: one row of each of its conditions.

    Args:
        cache: where text states are kept from run to run, if it is on disk.
        recent: how many captions are held in memory; None: all.
    """

    def __init__(self, model: BaseModel, cache: MemoryCache | DiskCache | None, *, recent: int | None):
        self.model = model
        is_trained = model.train_text_encoder
        self._is_kept = isinstance(cache, DiskCache) and not is_trained
        self.cache = cache
        self._encoder = _text_encoding(model) if self._is_kept else ""
        self.row = lru_cache(maxsize=recent)(self._find)  # caption -> name -> (...) without the batch

    def prepare(self, captions: Sequence[str | int]) -> None:
        """Encodes these captions, so that training does not wait for them."""
        distinct = list(dict.fromkeys(captions))
        for caption in tqdm(distinct, desc="encoding captions", disable=len(distinct) < MANY):
            self.row(caption)

    def rows(self, captions: Sequence[str | int]) -> dict[str, Tensor]:
        """The conditions of these captions, each (len(captions), ...)."""
        rows = [self.row(caption) for caption in captions]
        return self.model.collate_conditions(rows)

    def _find(self, caption: str | int) -> Entry:
        if not self._is_kept or isinstance(caption, int):
            return self._encode(caption)
        key = cache_key(caption=caption, encoder=self._encoder)
        entry = self.cache.get(key)
        if entry is None:
            entry = self._encode(caption)
            self.cache.put(key, entry)
        return entry

    def _encode(self, caption: str | int) -> Entry:
        return {name: value[0].cpu() for name, value in self.model.encode_captions([caption]).items()}


def _text_encoding(model: BaseModel) -> str:
    """Everything besides a caption that its conditions follow from, as one hash."""
    components = [*model.text_encoders.values(), *model.tokenizers.values()]
    return cache_key(
        family=type(model).__name__, parts=fingerprint(*components), settings=model.caption_settings()
    )


def _autoencoder_fingerprint(model: BaseModel) -> str:
    components = [] if model.autoencoder is None else [model.autoencoder]
    return fingerprint(*components)


def _sha256(source: ImageSource) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()
