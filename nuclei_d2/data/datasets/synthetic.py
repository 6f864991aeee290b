"""Synthetic fluorescence microscopy: textured, touching and overlapping nuclei with exact masks.

A field is drawn the way a camera sees it: shapes are placed one by one, rendered with chromatin
texture, blurred by the optics, laid over an uneven background and exposed with shot and read
noise. The ground truth is the shape before blur and noise, so it is exact.

:func:`load_synthetic` writes such fields once, as the data sets ``synthetic_{train,val,test}``.
"""

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from iopath.common.file_io import file_lock
from PIL import Image
from scipy import ndimage

from nuclei_d2.data.datasets.coco import load_nuclei_json
from nuclei_d2.data.datasets.prepare import Listing, NamedMask, Record, datasets_root, prepare
from nuclei_d2.structures.cropped_mask import crop_mask
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import write_json

IMAGES = {"train": 160, "val": 24, "test": 40}  # by split
_ANGLES = 128  # directions in which an outline is tabulated
_MIN_AREA = 12  # pixels; a nucleus of which less is visible is taken away again
_TRIES = 24  # places tried for one nucleus before it is left out


@dataclass(frozen=True)
class SyntheticConfig:
    """What a field looks like. A pair is a range from which every image draws its own value."""

    height: int = 256  # pixels
    width: int = 256  # pixels
    bits: int = 8  # of the camera: 8 gives uint8 images, 9 to 16 uint16
    count: tuple[int, int] = (6, 70)  # nuclei; fewer where no more find room
    empty: float = 0.04  # share of images without any nucleus

    diameter: tuple[float, float] = (10.0, 40.0)  # pixels; of an image's typical nucleus
    diameter_spread: float = 0.18  # relative standard deviation between the nuclei of an image
    elongation: tuple[float, float] = (1.0, 1.8)  # long over short axis, drawn for each nucleus
    irregularity: float = 0.05  # standard deviation of the outline from an ellipse, in radii

    crowding: float = 0.4  # share of nuclei placed against another one: 0 none, 1 all
    overlapping: float = 0.2  # share of these that lie over the other, instead of pressed flat
    max_overlap: float = 0.2  # largest share of its area that a nucleus has with its neighbours
    gap: float = 3.0  # pixels; least distance of a nucleus that is not placed against another

    brightness: tuple[float, float] = (0.1, 0.6)  # of an image's typical nucleus; of full scale
    brightness_spread: float = 0.25  # log standard deviation between the nuclei of an image
    chromatin: tuple[float, float] = (0.05, 0.45)  # log standard deviation inside a nucleus
    mitotic: float = 0.03  # share of nuclei that are condensed: small, long, bright
    blur: tuple[float, float] = (0.5, 1.8)  # pixels; standard deviation of the optics' blur
    haze: tuple[float, float] = (0.0, 0.15)  # out-of-focus light, as a share of the nuclei's
    debris: tuple[int, int] = (0, 8)  # specks that are not annotated

    background: tuple[float, float] = (0.01, 0.06)  # of full scale
    unevenness: tuple[float, float] = (0.0, 0.35)  # of the illumination, relative amplitude
    photons: tuple[float, float] = (40.0, 2000.0)  # electrons collected from a typical nucleus
    read_noise: tuple[float, float] = (0.5, 3.0)  # electrons, standard deviation


def generate(
    seed: int | np.random.Generator, config: SyntheticConfig | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one field; the same seed and config give the same field.

    Returns:
        image: (H, W) uint8, or uint16 where ``config.bits`` exceeds 8.
        labels: (2, H, W) int32, layered: nucleus k of 1..N has the pixels where either layer
            equals k. The second layer holds what the upper nucleus of two has over the lower.
    """
    config = config or SyntheticConfig()
    rng = np.random.default_rng(seed)
    diameter = _log_uniform(rng, config.diameter)
    canvas = _Canvas(config)
    if rng.random() >= config.empty:
        low, high = config.count
        canvas.fill(rng, round(_log_uniform(rng, (max(low, 1), high))), diameter)
    canvas.keep_visible()
    light = _render(rng, config, canvas, diameter)
    return _expose(rng, config, light), canvas.labels


def layered_masks(labels: np.ndarray) -> np.ndarray:
    """Layered labels (L, H, W) int -> one full mask per nucleus, (N, H, W) bool, in order."""
    ids = np.arange(1, labels.max(initial=0) + 1)
    return (labels[None] == ids[:, None, None, None]).any(axis=1)


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))


# ---------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class _Nucleus:
    """A star-shaped outline around (y, x), tabulated in _ANGLES directions; all in pixels."""

    y: float
    x: float
    radii: np.ndarray  # (_ANGLES,)
    mitotic: bool

    @property
    def radius(self) -> float:
        """Radius of the disc with the same area."""
        return float(np.sqrt(np.mean(self.radii**2)))

    def radius_towards(self, angle: np.ndarray) -> np.ndarray:
        """Distance of the outline from the centre in the direction ``angle`` (radians)."""
        return self.radii[np.round(angle * (_ANGLES / (2 * np.pi))).astype(int) % _ANGLES]

    def box(self, shape: tuple[int, int]) -> tuple[slice, slice]:
        """The part of an image of ``shape`` that the outline can reach."""
        reach = self.radii.max() + 1
        return tuple(
            slice(max(0, int(centre - reach)), max(0, min(size, int(centre + reach) + 2)))
            for centre, size in zip((self.y, self.x), shape, strict=True)
        )

    def relative_radius(self, box: tuple[slice, slice]) -> np.ndarray:
        """(h, w): 0 in the centre, 1 on the outline, more outside."""
        dy = np.arange(box[0].start, box[0].stop)[:, None] - self.y
        dx = np.arange(box[1].start, box[1].stop)[None, :] - self.x
        return np.hypot(dy, dx) / self.radius_towards(np.arctan2(dy, dx))


def _draw_radii(
    rng: np.random.Generator, config: SyntheticConfig, diameter: float, mitotic: bool
) -> np.ndarray:
    """An ellipse of random size and direction, bent by a few smooth waves: (_ANGLES,) pixels."""
    angle = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    elongation = rng.uniform(*config.elongation) * (1.8 if mitotic else 1.0)
    scale = rng.lognormal(0, config.diameter_spread) * (0.7 if mitotic else 1.0)
    turned = angle - rng.uniform(0, np.pi)
    radii = 1 / np.hypot(np.cos(turned) / elongation, np.sin(turned))
    for waves in range(2, 6):
        amplitude = rng.normal(0, config.irregularity * 2 / waves)
        radii *= 1 + amplitude * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    return radii * (diameter / 2 * scale / np.sqrt(np.mean(radii**2)))


# ------------------------------------------------------------------------- placement


class _Canvas:
    """Places nuclei; every step works inside the new nucleus' box, so thousands are cheap."""

    def __init__(self, config: SyntheticConfig):
        self.config = config
        self.shape = (config.height, config.width)
        self.labels = np.zeros((2, *self.shape), np.int32)
        # Relative radius of the pixel in the nucleus of layer 0; decides who owns contested ones.
        self.depth = np.full(self.shape, np.inf, np.float32)
        self.nuclei: list[_Nucleus] = []
        self._circles = np.empty((0, 3))  # y, x, radius of every nucleus placed
        self._shared = np.empty(0)  # pixels that each has in common with others

    def fill(self, rng: np.random.Generator, count: int, diameter: float) -> None:
        """Place up to ``count`` nuclei."""
        self._circles, self._shared = np.empty((count, 3)), np.zeros(count)
        for _ in range(count):
            mitotic = rng.random() < self.config.mitotic
            radii = _draw_radii(rng, self.config, diameter, mitotic)
            shape = _Nucleus(0.0, 0.0, radii, mitotic)
            if self.nuclei and rng.random() < self.config.crowding:
                places, paint = self._places_beside(rng, shape), self._paint_beside
                overlap = rng.random() < self.config.overlapping
            else:
                places, paint, overlap = self._places_apart(rng, shape), self._paint_apart, False
            self._place(shape, places, paint, overlap)

    def _place(
        self,
        shape: _Nucleus,
        places: Iterator[tuple[float, float]],
        paint: Callable[[_Nucleus, bool], bool],
        overlap: bool,
    ) -> None:
        for y, x in places:
            nucleus = _Nucleus(y, x, shape.radii, shape.mitotic)
            if paint(nucleus, overlap):
                self._circles[len(self.nuclei)] = y, x, nucleus.radius
                self.nuclei.append(nucleus)
                return

    def _places_apart(self, rng, shape: _Nucleus) -> Iterator[tuple[float, float]]:
        """Random centres whose discs keep the gap."""
        centres = rng.uniform(0, self.shape, (_TRIES, 2))
        free = self._clearance(centres) > shape.radius + self.config.gap
        return map(tuple, centres[free])

    def _places_beside(self, rng, shape: _Nucleus) -> Iterator[tuple[float, float]]:
        """Centres that bring the outline into contact with that of a nucleus placed before."""
        directions = rng.uniform(0, 2 * np.pi, _TRIES)
        # Pressed a little into each other, or blurred rounding leaves a gap between them.
        squeeze = rng.uniform(0.86, 0.98, _TRIES)
        chosen = rng.integers(len(self.nuclei), size=_TRIES)
        for direction, factor, index in zip(directions, squeeze, chosen, strict=True):
            other = self.nuclei[index]
            distance = factor * (
                other.radius_towards(direction) + shape.radius_towards(direction + np.pi)
            )
            y = other.y + distance * np.sin(direction)
            x = other.x + distance * np.cos(direction)
            inside = 0 <= y < self.shape[0] and 0 <= x < self.shape[1]
            if inside and self._clearance(np.array([[y, x]]))[0] > 0.4 * shape.radius:
                yield y, x

    def _clearance(self, centres: np.ndarray) -> np.ndarray:
        """Distance of each of the (M, 2) centres from the nearest disc placed; (M,) pixels."""
        placed = self._circles[: len(self.nuclei)]
        distance = np.hypot(*(centres[:, None] - placed[None, :, :2]).transpose(2, 0, 1))
        return (distance - placed[:, 2]).min(axis=1, initial=np.inf)

    def _paint_apart(self, nucleus: _Nucleus, overlap: bool) -> bool:
        box = nucleus.box(self.shape)
        rho = nucleus.relative_radius(box)
        wide = rho < 1 + self.config.gap / nucleus.radius
        if (self.labels[0][box][wide] > 0).any():
            return False
        self._write(box, rho, rho < 1)
        return True

    def _paint_beside(self, nucleus: _Nucleus, overlap: bool) -> bool:
        box = nucleus.box(self.shape)
        rho = nucleus.relative_radius(box)
        inside = rho < 1
        contested = inside & (self.labels[0][box] > 0)
        if not self._share(nucleus, self.labels[0][box][contested]):
            return False
        if overlap:
            self._write(box, rho, inside & ~contested)
            upper = contested & (self.labels[1][box] == 0)
            self.labels[1][box][upper] = len(self.nuclei) + 1
        else:  # the two flatten against each other where both lie equally deep
            self._write(box, rho, inside & (rho < self.depth[box]))
        return True

    def _share(self, nucleus: _Nucleus, owners: np.ndarray) -> bool:
        """Book the pixels that ``owners`` would have in common with ``nucleus``, if few enough."""
        others, pixels = np.unique(owners - 1, return_counts=True)
        limit = self.config.max_overlap * np.pi
        if (self._shared[others] + pixels > limit * self._circles[others, 2] ** 2).any():
            return False
        if owners.size > limit * nucleus.radius**2:
            return False
        self._shared[others] += pixels
        self._shared[len(self.nuclei)] = owners.size
        return True

    def _write(self, box: tuple[slice, slice], rho: np.ndarray, mask: np.ndarray) -> None:
        self.labels[0][box][mask] = len(self.nuclei) + 1
        self.depth[box][mask] = rho[mask]

    def keep_visible(self) -> None:
        """Keep each nucleus' largest piece, drop what is too small to see, number 1..N."""
        labels = np.zeros_like(self.labels)
        kept: list[_Nucleus] = []
        for index, nucleus in enumerate(self.nuclei, start=1):
            box = nucleus.box(self.shape)
            layers = self.labels[:, box[0], box[1]] == index
            mask = _largest_component(layers.any(axis=0))
            if mask.sum() < _MIN_AREA:
                continue
            kept.append(nucleus)
            labels[:, box[0], box[1]][layers & mask] = len(kept)
        self.labels, self.nuclei = labels, kept


def _largest_component(mask: np.ndarray) -> np.ndarray:
    components, count = ndimage.label(mask)
    if count <= 1:
        return mask
    return components == 1 + np.argmax(np.bincount(components.ravel())[1:])


# ------------------------------------------------------------------------- rendering


def _render(
    rng: np.random.Generator, config: SyntheticConfig, canvas: _Canvas, diameter: float
) -> np.ndarray:
    """Light from nuclei and debris after the optics, (H, W) float32; a typical nucleus has 1."""
    light = np.zeros(canvas.shape, np.float32)
    chromatin = _log_uniform(rng, config.chromatin)
    side = 128 + round(2 * max((n.radii.max() for n in canvas.nuclei), default=0)) + 4
    grain = [_smooth_noise(rng, side, diameter * share) for share in (0.05, 0.14)]
    weights = rng.dirichlet((1, 1)) ** 0.5
    for index, nucleus in enumerate(canvas.nuclei, start=1):
        box = nucleus.box(canvas.shape)
        inside = (canvas.labels[:, box[0], box[1]] == index).any(axis=0)
        texture = sum(
            w * _random_window(rng, g, inside.shape) for w, g in zip(weights, grain, strict=True)
        )
        # A nucleus is thinner, hence darker, towards its rim and where it meets another.
        depth = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 3)
        profile = 1 - 0.35 * (1 - np.minimum(depth / nucleus.radius, 1)) ** 2
        level = rng.lognormal(0, config.brightness_spread) * (2.0 if nucleus.mitotic else 1.0)
        light[box] += inside * (level * profile * np.exp(chromatin * texture - chromatin**2 / 2))
    for _ in range(rng.integers(config.debris[0], config.debris[1] + 1)):
        _add_speck(rng, light)
    sharp = cv2.GaussianBlur(light, (0, 0), rng.uniform(*config.blur))
    return sharp + rng.uniform(*config.haze) * cv2.GaussianBlur(light, (0, 0), 0.6 * diameter)


def _smooth_noise(rng: np.random.Generator, size: int, sigma: float) -> np.ndarray:
    """(size, size) float32 Gaussian field with mean 0, standard deviation 1, and ``sigma`` px."""
    noise = rng.standard_normal((size, size), dtype=np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), max(sigma, 0.5))
    return (noise - noise.mean()) / noise.std()


def _random_window(rng, field: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    top, left = (rng.integers(f - n + 1) for f, n in zip(field.shape, shape, strict=True))
    return field[top : top + shape[0], left : left + shape[1]]


def _add_speck(rng: np.random.Generator, light: np.ndarray) -> None:
    """Add one bright spot of 1 to 3 pixels, in place."""
    y, x = rng.uniform(0, light.shape)
    top, left = max(0, int(y) - 4), max(0, int(x) - 4)
    rows = np.arange(top, min(light.shape[0], int(y) + 5))[:, None]
    columns = np.arange(left, min(light.shape[1], int(x) + 5))
    squared = (rows - y) ** 2 + (columns - x) ** 2
    spot = rng.uniform(0.2, 1.5) * np.exp(-squared / (2 * rng.uniform(0.4, 1.2) ** 2))
    light[top : top + spot.shape[0], left : left + spot.shape[1]] += spot


def _expose(rng: np.random.Generator, config: SyntheticConfig, light: np.ndarray) -> np.ndarray:
    """What the camera records of ``light``: uneven illumination, noise, grey levels."""
    brightness = _log_uniform(rng, config.brightness)
    photons = _log_uniform(rng, config.photons)
    uneven = cv2.resize(
        rng.standard_normal((4, 4), dtype=np.float32),
        light.shape[::-1],
        interpolation=cv2.INTER_CUBIC,
    )
    illumination = 1 + rng.uniform(*config.unevenness) * uneven / np.abs(uneven).max()
    background = _log_uniform(rng, config.background) / brightness
    electrons = rng.poisson(photons * illumination * (light + background)).astype(np.float32)
    electrons += rng.uniform(*config.read_noise) * rng.standard_normal(light.shape, np.float32)
    full_scale = 2**config.bits - 1
    grey = electrons * (brightness * full_scale / photons)
    return np.clip(np.round(grey), 0, full_scale).astype(
        np.uint8 if config.bits <= 8 else np.uint16
    )


# -------------------------------------------------------------------------- data set


def load_synthetic(split: str) -> list[dict[str, Any]]:
    """Dataset dicts of "train", "val" or "test"; the first call draws all three.

    They lie in ``$DETECTRON2_DATASETS/synthetic`` in the layout of every prepared set, and are
    drawn again when this module has changed. Several processes may call this at once.

    Raises:
        NucleiError: there is no such split, the folder cannot be written, or holds other data.
    """
    if split not in IMAGES:
        raise NucleiError(f"no synthetic split {split!r}; valid: {', '.join(IMAGES)}")
    root = datasets_root() / "synthetic"
    fingerprint = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    try:
        if _fingerprint(root) != fingerprint:
            root.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(str(root)):
                if _fingerprint(root) != fingerprint:  # another process may have been first
                    _write(root, fingerprint)
    except OSError as error:
        raise NucleiError(
            f"cannot write {root}: {error.strerror or error}; set DETECTRON2_DATASETS elsewhere"
        ) from error
    name = f"synthetic_{split}"
    return load_nuclei_json(root / "annotations" / f"{name}.json", root, name)


def _fingerprint(root: Path) -> str | None:
    try:
        return json.loads((root / "preparation.json").read_text())["generator"]
    except (OSError, ValueError, KeyError):
        return None


def _write(root: Path, fingerprint: str) -> None:
    """Fill a temporary folder, then put it in place: ``root`` is complete or not there."""
    if root.exists() and _fingerprint(root) is None:
        raise NucleiError(f"{root} holds data of another origin; rename or remove that folder")
    temporary = root.with_name(".synthetic.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by an interrupted call
    records = [
        Record(f"{split}_{index:03}", split, field, field.read_masks, "fluorescence")
        for split, images in IMAGES.items()
        for index, field in enumerate(_Field(split, index) for index in range(images))
    ]
    # In this process: it may hold a GPU and threads, which do not survive a fork.
    report = prepare(Listing(records), "synthetic", root=temporary, workers=1)
    new, old = temporary / "synthetic", temporary / "old"
    write_json(new / "preparation.json", {"generator": fingerprint, **report})
    if root.exists():
        root.rename(old)
    new.rename(root)
    shutil.rmtree(temporary)


@dataclass(frozen=True)
class _Field:
    """One image of the set, drawn when asked for; an ``ImageSource`` of the preparation."""

    split: str
    index: int

    @property
    def config(self) -> SyntheticConfig:
        """Fixed shares instead of chance, so that every split has some of each kind."""
        return SyntheticConfig(
            bits=16 if self.index % 8 == 3 else 8,
            empty=1.0 if self.index % 20 == 7 else 0.0,
            crowding=0.2 * (self.index % 5),
        )

    @property
    def suffix(self) -> str:
        """File suffix with its dot."""
        return ".tif" if self.config.bits > 8 else ".png"

    def read_bytes(self) -> bytes:
        """The encoded image."""
        image, _ = _draw(self)
        file = io.BytesIO()
        if self.suffix == ".tif":
            tifffile.imwrite(file, image)
        else:
            Image.fromarray(image).save(file, "PNG")
        return file.getvalue()

    def read(self, reader: Callable[[Path], Any]) -> Any:
        """Call ``reader`` on a path that holds the image."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"image{self.suffix}")
            path.write_bytes(self.read_bytes())
            return reader(path)

    def read_masks(self, height: int, width: int) -> list[NamedMask]:
        """The nuclei in the order of their labels."""
        masks = layered_masks(_draw(self)[1])
        return [NamedMask(str(k), crop_mask(mask)) for k, mask in enumerate(masks, start=1)]


@lru_cache(maxsize=1)
def _draw(field: _Field) -> tuple[np.ndarray, np.ndarray]:
    return generate(
        np.random.default_rng((list(IMAGES).index(field.split), field.index)), field.config
    )
