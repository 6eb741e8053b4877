"""Encoding of images and captions by the base, once each where a cache can hold the result.

Images and captions are encoded one by one, not in batches: on most machines the last bits of a batch depend
on its size. So an encoding depends on its content only, and not on the run that computed it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from tqdm import tqdm

from diffadapt.common.images import CropGeometry, ImageSource, crop_geometry, to_pixels
from diffadapt.common.pipeline_components import PROCESSOR
from diffadapt.data.cache import DiskCache, Entry, MemoryCache, cache_key, fingerprint
from diffadapt.data.scaled_images import ScaledImages
from diffadapt.models.base import BaseModel

PROGRESS_FROM = 20  # number of encodings from which on a progress bar is shown
RECENT_CAPTIONS = 1000  # number of captions whose encodings are kept in memory while streaming


class UnreadableImage(ValueError):
    """An image that cannot be used; the message names it."""


@dataclass(frozen=True)
class Crop:
    """The part of an image that is encoded.

    Attributes:
        size: (height, width) in pixels.
        position: the position along (width, height), from 0 to 1; see `to_pixels`.
        flip: whether it is mirrored.
    """

    size: tuple[int, int]
    position: tuple[float, float] = (0.5, 0.5)
    flip: bool = False


class EncodedImages:
    """Encoded crops of images.

    Args:
        model: the base that encodes them.
        cache: the cache of encodings; None to encode an image whenever it is used.
        image_memory: the bytes of scaled images that are kept in memory if there is no cache.
    """

    def __init__(self, model: BaseModel, cache: MemoryCache | DiskCache | None, *, image_memory: int = 0):
        self.model = model
        self.cache = cache
        self.images = ScaledImages(image_memory if cache is None else 0)
        self._autoencoder = ""
        if isinstance(cache, DiskCache):  # runs with other autoencoders may share the folder
            self._autoencoder = _fingerprint_of_autoencoder(model)
        self._sha256: dict[ImageSource, str] = {}  # hashes of the files of `prepare`

    def prepare(self, crops: Sequence[tuple[ImageSource, Crop]]) -> None:
        """Encodes the crops that the cache does not hold yet.

        Raises:
            UnreadableImage: an image cannot be read.
            ValueError: an encoding is not finite.
        """
        for source in {source for source, _ in crops}:
            self._sha256[source] = _hash_file(source)
        for source, crop in tqdm(crops, desc="encoding images", disable=len(crops) < PROGRESS_FROM):
            encoded, _ = self.get(source, crop)
            if not encoded.isfinite().all():
                raise ValueError(
                    f"the autoencoder gives non-finite latents for {source}; remove this image, or name "
                    "another autoencoder with --pretrained_vae_model_name_or_path"
                )

    def get(self, source: ImageSource, crop: Crop) -> tuple[Tensor, CropGeometry]:
        """The encoding of one image by `BaseModel.encode_images`, without the batch axis, and its geometry.

        Raises:
            UnreadableImage: the image cannot be read.
        """
        key = None
        entry = None
        if self.cache is not None:
            key = self._cache_key(source, crop)
            entry = self.cache.get(key)
        if entry is None:
            entry = self._encode(source, crop)
            # Encodings that are not finite are not cached: the loss reports them, with step and image.
            if key is not None and entry["encoded"].isfinite().all():
                self.cache.put(key, entry)
        # The geometry follows from the sizes, so the entry holds the original size only.
        height, width = entry["original_size"].tolist()
        geometry = crop_geometry((width, height), crop.size, crop=crop.position, flip=crop.flip)
        return entry["encoded"], geometry

    def read_ahead(self, crops: Sequence[tuple[ImageSource, Crop]]) -> None:
        """Starts to read images in the background that `get` will encode."""
        if self.cache is None:
            self.images.read_ahead([(source, crop.size) for source, crop in crops])

    def _cache_key(self, source: ImageSource, crop: Crop) -> str:
        return cache_key(
            picture=self._sha256.get(source) or _hash_file(source),
            encoder=self._autoencoder,
            size=crop.size,
            crop=crop.position,
            flip=crop.flip,
        )

    def _encode(self, source: ImageSource, crop: Crop) -> Entry:
        try:
            scaled = self.images.get(source, crop.size)
        except Exception as error:  # damaged files make Pillow raise almost anything
            raise UnreadableImage(f"{source} cannot be read: {error or type(error).__name__}") from None
        pixels = to_pixels(scaled.image, crop.size, crop=crop.position, flip=crop.flip)  # (3, H, W)
        encoded = self.model.encode_images(pixels[None])[0].cpu()  # (2 C, h, w) moments or (C, h, w)
        width, height = scaled.original_size
        return {"encoded": encoded, "original_size": torch.tensor([height, width])}


class EncodedCaptions:
    """Encoded captions: one row of each condition of the base.

    Args:
        model: the base that encodes them.
        cache: the cache of encodings; only one on disk is used, and only if no text encoder is trained.
        recent: the number of captions whose encodings are kept in memory; None for all.
    """

    def __init__(self, model: BaseModel, cache: MemoryCache | DiskCache | None, *, recent: int | None):
        self.model = model
        is_usable = isinstance(cache, DiskCache) and not model.train_text_encoder
        self._cache = cache if is_usable else None
        self._text_encoders = _fingerprint_of_text_encoders(model) if self._cache is not None else ""
        # caption -> name of the condition -> its row, without the batch axis
        self.row = lru_cache(maxsize=recent)(self._row)

    def prepare(self, captions: Sequence[str | int]) -> None:
        """Encodes these captions, so that training does not wait for them."""
        distinct = list(dict.fromkeys(captions))
        for caption in tqdm(distinct, desc="encoding captions", disable=len(distinct) < PROGRESS_FROM):
            self.row(caption)

    def rows(self, captions: Sequence[str | int]) -> dict[str, Tensor]:
        """The conditions of these captions, each (len(captions), ...)."""
        rows = [self.row(caption) for caption in captions]
        return self.model.collate_conditions(rows)

    def _row(self, caption: str | int) -> Entry:
        if self._cache is None or isinstance(caption, int):  # the number of a class needs no encoder
            return self._encode(caption)
        key = cache_key(caption=caption, encoder=self._text_encoders)
        entry = self._cache.get(key)
        if entry is None:
            entry = self._encode(caption)
            self._cache.put(key, entry)
        return entry

    def _encode(self, caption: str | int) -> Entry:
        return {name: value[0].cpu() for name, value in self.model.encode_captions([caption]).items()}


def _fingerprint_of_autoencoder(model: BaseModel) -> str:
    components = [] if model.autoencoder is None else [model.autoencoder]
    return fingerprint(*components)


def _fingerprint_of_text_encoders(model: BaseModel) -> str:
    """A hash of everything that encoded captions depend on, besides the caption."""
    components = [*model.text_encoders.values(), *model.tokenizers.values()]
    processor = getattr(model.pipe, PROCESSOR, None)
    if processor is not None:
        components.append(processor)
    return cache_key(
        family=type(model).__name__, parts=fingerprint(*components), settings=model.caption_settings()
    )


def _hash_file(source: ImageSource) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()
