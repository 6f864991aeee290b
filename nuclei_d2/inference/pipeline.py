"""From an image file of any size to its nuclei, and from a folder of them to a folder of results.

image source -> contrast range of the whole image -> scale -> tiles -> model -> nuclei -> writers
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from tqdm import tqdm

from nuclei_d2.data.datasets.statistics import equivalent_diameter
from nuclei_d2.data.image_measures import (
    count_pixels,
    image_measures,
    judge,
    measure_warnings,
)
from nuclei_d2.data.normalization import ContrastRange, ImageNormalizer
from nuclei_d2.inference.contrast import LEAST_CONTRAST, nuclear_contrast
from nuclei_d2.inference.image_source import ImageSource, open_image
from nuclei_d2.inference.network import TileNetwork
from nuclei_d2.inference.nuclei import Nuclei, nuclei_quality
from nuclei_d2.inference.scale import ScaleChoice, choose_scale, load_choice, make_finder
from nuclei_d2.inference.tiling import (
    ALIGNMENT,
    Grid,
    Seams,
    Tile,
    TileResult,
    judge_tile,
    load_result,
    make_grid,
    merge_tiles,
    resample_tile,
    save_result,
    source_window,
)
from nuclei_d2.inference.tta import UPRIGHT, VIEWS, vote
from nuclei_d2.utils.errors import NucleiError
from nuclei_d2.utils.files import write_json

_SEAM_AGREEMENT, _SEAM_NUCLEI = 0.8, 20  # below the first, among at least so many, is a warning
_SIZE_RATIO = 2.0  # between the nuclei's diameter and the model's; more is a warning
_SHOW_TILES = 8  # images of at least so many tiles get a progress bar of their own


@dataclass(frozen=True)
class PredictionOptions:
    """How images are read, scaled and cut, and which nuclei count.

    Attributes:
        confidence_threshold: least score, 0 to 1; None: the config's TEST.SCORE_THRESH_LABELS.
        channel, z, time, series: see :func:`~nuclei_d2.inference.image_source.open_image`.
        diameter: of the nuclei in pixels, or "auto" to estimate it from every image.
        pixel_size: of the images in micrometres. What sets the scale:
            :func:`~nuclei_d2.inference.scale.choose_scale`.
        tile: side of a tile in pixels as the network sees them; memory grows with its square.
        overlap: of neighbouring tiles, likewise; at least twice the largest nucleus.
        tta: whether each tile is looked at in all eight flips and rotations.
        least_contrast: nuclei below are left out, in standard deviations of the image's noise, see
            :func:`~nuclei_d2.inference.contrast.nuclear_contrast`; 0 keeps all.
    """

    confidence_threshold: float | None = None
    channel: int | str | None = None
    z: int | str | None = None
    time: int | str | None = None
    series: int | None = None
    diameter: float | str | None = None
    pixel_size: float | None = None
    tile: int = 1024
    overlap: int = 192
    tta: bool = False
    least_contrast: float = LEAST_CONTRAST


class Prediction(NamedTuple):
    """The nuclei of one image.

    Attributes:
        nuclei: best first. Measures: "quality" and "contrast"; "boundary_uncertainty" with a
            boundary head, "agreement" with test-time augmentation.
        record: what is known about the image and the prediction, JSON-able; docs/prediction.md
            explains it.
    """

    nuclei: Nuclei
    record: dict[str, Any]


class NucleiPipeline:
    """Find the nuclei of images of any size, with any model of this package.

    >>> pipeline = NucleiPipeline(load_config("config.yaml"))  # doctest: +SKIP
    >>> nuclei, record = pipeline("cells.tif")  # doctest: +SKIP
    """

    def __init__(self, cfg: CfgNode, options: PredictionOptions | None = None) -> None:
        """Build the model and load ``cfg.MODEL.WEIGHTS``.

        Raises:
            NucleiError: an option is out of range, or the model cannot be loaded.
        """
        self.options = options or PredictionOptions()
        make_grid((1, 1), 1.0, self.options.tile, self.options.overlap)  # are they possible?
        self.cfg = cfg.clone()
        threshold = self.options.confidence_threshold
        if threshold is None:
            threshold = cfg.TEST.SCORE_THRESH_LABELS
        if not 0 <= threshold <= 1:
            raise NucleiError(f"--confidence-threshold is {threshold}; it lies in 0 to 1")
        if not 0 <= self.options.least_contrast < np.inf:
            raise NucleiError(f"--least-contrast is {self.options.least_contrast}; give 0 or more")
        self.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = float(threshold)
        self._check_scale()
        self._network = TileNetwork(self.cfg)
        self._normalize = ImageNormalizer(self.cfg)

    def open(self, path: str | Path) -> ImageSource:
        """Open an image file as the options say; a context manager.

        Raises:
            NucleiError: see :func:`open_image`.
        """
        options = self.options
        return open_image(
            path, channel=options.channel, z=options.z, time=options.time, series=options.series
        )

    def __call__(self, path: str | Path) -> Prediction:
        """Find the nuclei of an image file; raises as :meth:`open` and :meth:`find`."""
        with self.open(path) as source:
            return self.find(source)

    def find(self, source: ImageSource, folder: Path | None = None) -> Prediction:
        """Find the nuclei of an opened image.

        Args:
            folder: where the scale and the results of the tiles are kept, so that another call
                after an interrupted one goes on; None: nowhere.

        Raises:
            NucleiError: the pixels cannot be read.
        """
        start = time.perf_counter()
        image = _Image(source, self._normalize, self._normalize.range_of(source))
        kept = folder and folder / "scale.json"
        choice = load_choice(kept) if kept and kept.is_file() else self._choose_scale(image)
        scale = self.cfg.INPUT.SCALE * choice.factor
        grid = make_grid(source.size, scale, self.options.tile, self.options.overlap)
        if kept and len(grid.tiles) > 1:  # an estimate differs a little from device to device
            write_json(kept, choice._asdict(), durable=True)
        results = self._find_in_tiles(image, grid, folder)
        nuclei, seams = merge_tiles(results, grid)
        diameter = float(np.median(equivalent_diameter(nuclei.areas))) if len(nuclei) else None
        nuclei.measures["quality"] = nuclei_quality(nuclei)
        counts = np.sum([result.counts for result in results], axis=0)
        values = image_measures(counts, diameter and diameter * scale)
        measures = judge(values, self.cfg.INPUT.TRAINING_RANGES)
        warnings = self._warnings(results, seams, grid) + measure_warnings(measures)
        if measures["diameter"]["inside"] is None:
            warnings += self._size_warnings(diameter, choice.factor)
        record = {
            "file": str(source.path),
            "description": source.description,
            "size": source.size,
            "channels": source.channels,
            "pixel_size_um": self.pixel_size_of(source),
            "scale": scale,
            "scale_explanation": choice.explanation,
            "contrast": {
                "low": image.contrast.low,
                "high": image.contrast.low + image.contrast.span,
            },
            "nuclei": len(nuclei),
            "invisible_nuclei": sum(result.invisible for result in results),
            "median_diameter_px": diameter,
            "quality": float(nuclei.measures["quality"].mean()) if len(nuclei) else None,
            "measures": measures,
            "tiles": {
                "count": len(grid.tiles),
                "capped": sum(result.capped for result in results),
                "cut_nuclei": sum(result.cut for result in results),
                "seam_nuclei": seams.nuclei,
                "seam_agreement": seams.agreed / seams.nuclei if seams.nuclei else None,
            },
            "warnings": warnings,
            "seconds": round(time.perf_counter() - start, 3),
        }
        return Prediction(nuclei, record)

    def _check_scale(self) -> None:
        """A mistake in the options would be one in every image."""
        diameter, pixel_size = self.options.diameter, self.options.pixel_size
        if pixel_size is not None or diameter not in (None, "auto"):  # the image does not matter
            choose_scale(None, self.cfg, None, diameter=diameter, pixel_size=pixel_size)

    def pixel_size_of(self, source: ImageSource) -> float | None:
        """Side of a pixel in micrometres: as given, or else as the file says."""
        return self.options.pixel_size or source.pixel_size

    def _choose_scale(self, image: "_Image") -> ScaleChoice:
        options = self.options
        find = make_finder(
            image.source, image.contrast, self.cfg, self._network.model, options.least_contrast
        )
        return choose_scale(
            image.source,
            self.cfg,
            find,
            diameter=options.diameter,
            pixel_size=options.pixel_size,
        )

    def _find_in_tiles(self, image: "_Image", grid: Grid, folder: Path | None) -> list[TileResult]:
        bar = {"unit": "tile", "leave": False, "disable": len(grid.tiles) < _SHOW_TILES}
        inputs, results = {}, []
        if len(grid.tiles) > 1 and self._network.needs_survey:
            tiles = tqdm(grid.tiles, "grey levels", **bar)
            inputs = self._network.survey((tile, image.read(grid, tile)) for tile in tiles)
        for tile in tqdm(grid.tiles, **bar):
            file = folder and folder / "tile_{}_{}.npz".format(*tile.index)
            result = load_result(file, tile, grid) if file else None
            if result is None:
                result = self._find_in_tile(image, grid, tile, inputs)
                if file and len(grid.tiles) > 1:
                    save_result(file, result)
            results.append(result)
        return results

    def _find_in_tile(
        self, image: "_Image", grid: Grid, tile: Tile, inputs: dict[str, np.ndarray]
    ) -> TileResult:
        window = image.read_window(grid, tile)
        pixels = resample_tile(window, grid, tile)
        views = VIEWS if self.options.tta else (UPRIGHT,)
        answers = [self._network(pixels, grid, tile, view, inputs) for view in views]
        found, capped = zip(*answers, strict=True)
        nuclei = vote(found) if self.options.tta else found[0]
        origin = tuple(span.start for span in source_window(grid, tile))
        noise = image.normalize.visible_noise(image.contrast)
        contrast = nuclear_contrast(nuclei.masks, window, noise, origin)
        nuclei.measures["contrast"] = contrast
        visible = ~(contrast < self.options.least_contrast)  # NaN is kept
        counts = count_pixels(pixels[tile.owned])
        return judge_tile(nuclei, visible, tile, grid, any(capped), counts)

    def _warnings(self, results: list[TileResult], seams: Seams, grid: Grid) -> list[str]:
        """What the user should know before trusting the result, each with the remedy."""
        warnings = []
        if not sum(result.counts[1:256].sum() for result in results):
            warnings.append("no pixel is brighter than the background: is the image empty?")
        capped = sum(result.capped for result in results)
        if capped:
            warnings.append(
                f"{capped} of {len(results)} tiles reached the most nuclei that the model returns, "
                f"{self._network.max_instances}; use a smaller --tile, or --opts "
                f"TEST.DETECTIONS_PER_IMAGE {2 * self._network.max_instances}"
            )
        largest = max(result.largest for result in results)
        cut = sum(result.cut for result in results)
        if cut:
            needed = -(-int(2 * largest) // ALIGNMENT) * ALIGNMENT
            warnings.append(
                f"the largest nucleus has {largest:.0f} network pixels, the tiles' overlap "
                f"{grid.overlap}: {cut} that a tile's edge cuts were left out; use "
                f"--overlap {needed}"
                + (f" --tile {2 * needed}" if 2 * needed > self.options.tile else "")
            )
        if seams.nuclei >= _SEAM_NUCLEI and seams.agreed < _SEAM_AGREEMENT * seams.nuclei:
            warnings.append(
                f"neighbouring tiles agree on {seams.agreed / seams.nuclei:.0%} of the nuclei that "
                "both see; use a larger --overlap"
            )
        return warnings

    def _size_warnings(self, diameter: float | None, factor: float) -> list[str]:
        model_diameter = self.cfg.INPUT.NUCLEUS_DIAMETER
        if not diameter or not model_diameter > 0:
            return []
        if 1 / _SIZE_RATIO <= diameter * factor / model_diameter <= _SIZE_RATIO:
            return []
        return [
            f"the nuclei, {diameter:.3g} px wide, are at factor {factor:.3g} far from the model's, "
            f"{model_diameter:.3g} px; give their --diameter"
        ]


class _Image(NamedTuple):
    """An opened image, and how its grey levels become those that the network sees."""

    source: ImageSource
    normalize: ImageNormalizer
    contrast: ContrastRange

    def read_window(self, grid: Grid, tile: Tile) -> np.ndarray:
        """The pixels of the file that a tile needs, normalised: (h, w, 3) float32, 0..255."""
        return self.normalize(self.source.read(*source_window(grid, tile)), self.contrast)

    def read(self, grid: Grid, tile: Tile) -> np.ndarray:
        """A tile as the network sees it, (*tile.shape, 3) float32, 0..255."""
        return resample_tile(self.read_window(grid, tile), grid, tile)
