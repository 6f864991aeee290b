import numpy as np
import pytest
import tifffile
from PIL import Image
from tiny import CONFIGS, draw_nuclei

from nuclei_d2.config import load_config
from nuclei_d2.inference import NucleiPipeline, PredictionOptions
from nuclei_d2.inference.duplicates import find_overlaps
from nuclei_d2.inference.image_source import ImageSource
from nuclei_d2.inference.pipeline import _Image
from nuclei_d2.inference.scale import ScaleChoice
from nuclei_d2.utils.errors import NucleiError


def pipeline(*opts, **options):
    cfg = load_config(str(CONFIGS / "classical.yaml"), ["MODEL.DEVICE", "cpu", *opts])
    return NucleiPipeline(cfg, PredictionOptions(**options))


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """An image file of 600 x 700 pixels with 300 nuclei, darker to the right."""
    image, _ = draw_nuclei(np.random.default_rng(0), (600, 700), 300)
    shaded = image * np.linspace(1, 0.6, 700)
    path = tmp_path_factory.mktemp("field") / "field.tif"
    tifffile.imwrite(path, shaded.astype(np.uint8))
    return path


@pytest.mark.parametrize("scale", ["1.0", "1.3", "0.7"])
def test_tiles_find_what_the_whole_image_shows(field, scale):
    whole, record = pipeline("INPUT.SCALE", scale, tile=4096)(field)
    tiled, tiled_record = pipeline("INPUT.SCALE", scale, tile=256, overlap=128)(field)
    assert record["tiles"]["count"] == 1
    assert tiled_record["tiles"]["count"] >= 9
    assert tiled_record["tiles"]["seam_agreement"] == 1
    assert tiled_record["tiles"]["seam_nuclei"] > 10
    matched = (find_overlaps(whole, tiled).iou >= 0.9).sum()
    assert matched == len(whole) == len(tiled) > 200
    np.testing.assert_allclose(tiled.scores, whole.scores, atol=1e-5)


def test_tiles_agree_in_eight_views_too(tmp_path):
    image, _ = draw_nuclei(np.random.default_rng(0), (200, 300), 50)
    Image.fromarray(image).save(tmp_path / "a.png")
    whole, _ = pipeline(tta=True)(tmp_path / "a.png")
    tiled, record = pipeline(tta=True, tile=128, overlap=64)(tmp_path / "a.png")
    assert record["tiles"]["count"] == 12
    matched = (find_overlaps(whole, tiled).iou >= 0.9).sum()
    assert matched >= 0.95 * max(len(whole), len(tiled)) > 30
    agreement = tiled.measures["agreement"]
    assert agreement.shape == (len(tiled),)
    assert set(agreement) <= {n / 8 for n in range(4, 9)}
    assert (agreement == 1).mean() > 0.9


def test_what_the_noise_hides_is_no_nucleus(tmp_path):
    image, labels = draw_nuclei(np.random.default_rng(0), (200, 300), 20)
    noise = np.random.default_rng(1).normal(0, 20, image.shape[:2])
    faint = 1000 + 50.0 * (labels > 0) + noise  # of 2.7 standard deviations, noise included
    tifffile.imwrite(tmp_path / "faint.tif", np.rint(faint).astype(np.uint16))
    found, record = pipeline("MODEL.CLASSICAL.MIN_LEVEL", "10", least_contrast=0)(
        tmp_path / "faint.tif"
    )
    assert len(found) > 10
    assert record["invisible_nuclei"] == 0
    assert 2 < np.nanmedian(found.measures["contrast"]) < 3
    kept, record = pipeline("MODEL.CLASSICAL.MIN_LEVEL", "10")(tmp_path / "faint.tif")
    assert record["invisible_nuclei"] == len(found) - len(kept) > 10


def test_of_what_the_noise_hides_nothing_is_warned_of(tmp_path):
    noise = np.random.default_rng(1).normal(0, 20, (200, 600))
    noise[50:150, 100:300] += 50
    tifffile.imwrite(tmp_path / "bar.tif", np.rint(1000 + noise).astype(np.uint16))
    keys = ("MODEL.CLASSICAL.MIN_LEVEL", "10", "MODEL.CLASSICAL.MIN_DISTANCE", "200")
    _, record = pipeline(*keys, tile=256, overlap=64, least_contrast=0)(tmp_path / "bar.tif")
    assert record["tiles"]["cut_nuclei"] > 0
    _, record = pipeline(*keys, tile=256, overlap=64)(tmp_path / "bar.tif")
    assert record["invisible_nuclei"] > 0
    assert record["nuclei"] == record["tiles"]["cut_nuclei"] == record["tiles"]["seam_nuclei"] == 0
    assert record["warnings"] == []


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((300, 400), np.uint8),
        np.full((300, 400), 1000, np.uint16),
        np.random.default_rng(0).poisson(100, (300, 400)).astype(np.uint16),
        np.random.default_rng(0).normal(0.5, 0.01, (300, 400)).astype(np.float32),
    ],
    ids=["black", "flat", "shot noise", "noise"],
)
def test_an_empty_field_has_no_nuclei(tmp_path, image):
    tifffile.imwrite(tmp_path / "empty.tif", image)
    for tile in (1024, 128):
        nuclei, record = pipeline(tile=tile, overlap=64)(tmp_path / "empty.tif")
        assert len(nuclei) == record["nuclei"] == 0
        assert record["median_diameter_px"] is None
        assert bool(record["warnings"]) == (np.ptp(image) == 0)


def test_one_normalisation_for_the_whole_image(tmp_path):
    """Tiles without nuclei are not stretched into false ones, dim nuclei are not lost to bright."""
    image, _ = draw_nuclei(np.random.default_rng(0), (200, 200), 30)
    noise = np.random.default_rng(1).normal(20, 5, (200, 1000)).clip(0, 255)
    noise[:, :200] = image
    Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "half.png")
    whole, _ = pipeline()(tmp_path / "half.png")
    tiled, _ = pipeline(tile=128, overlap=64)(tmp_path / "half.png")
    assert len(whole) == len(tiled) > 15
    assert tiled.boxes[:, 1].max() < 200


def test_an_interrupted_image_goes_on_where_it_was(field, tmp_path, monkeypatch):
    whole = pipeline(tile=256, overlap=128)
    expected, _ = whole(field)
    looked_at = []

    class Interrupted(Exception):
        pass

    def find(network, pixels, grid, tile, view, inputs):
        looked_at.append(tile.index)
        if len(looked_at) == 6:
            raise Interrupted
        return real(network, pixels, grid, tile, view, inputs)

    real = type(whole._network).__call__
    monkeypatch.setattr(type(whole._network), "__call__", find)
    with whole.open(field) as source, pytest.raises(Interrupted):
        whole.find(source, tmp_path)
    assert len(list(tmp_path.glob("tile_*.npz"))) == 5
    with whole.open(field) as source:
        nuclei, record = whole.find(source, tmp_path)
    assert len(looked_at) == record["tiles"]["count"] + 1  # one was looked at twice
    assert sorted(set(looked_at)) == sorted(looked_at[:5] + looked_at[6:])
    np.testing.assert_array_equal(nuclei.label_image(), expected.label_image())


def test_an_interrupted_image_keeps_its_scale(field, tmp_path, monkeypatch):
    """An estimate may differ a little where another machine goes on."""
    whole = pipeline(tile=256, overlap=128)
    with whole.open(field) as source:
        nuclei, record = whole.find(source, tmp_path)
        for tile in list(tmp_path.glob("tile_*.npz"))[::2]:
            tile.unlink()
        monkeypatch.setattr(whole, "_choose_scale", lambda _: ScaleChoice(1.41, "another"))
        again, continued = whole.find(source, tmp_path)
    assert continued["scale_explanation"] == record["scale_explanation"]
    np.testing.assert_array_equal(again.label_image(), nuclei.label_image())


def test_a_large_image_is_read_by_windows(field, monkeypatch):
    areas = []

    class Watched(ImageSource):
        def read(self, rows, cols):
            window = super().read(rows, cols)
            areas.append(window.shape[0] * window.shape[1])
            return window

    run = pipeline(tile=128, overlap=64)
    with run.open(field) as source:
        source.__class__ = Watched
        contrast = run._normalize.range_of(source)
        image = _Image(source, run._normalize, contrast)
        monkeypatch.setattr(run._normalize, "range_of", lambda _: image.contrast)
        areas.clear()
        run.find(source)
    assert len(areas) >= 2 * 9  # the survey for Otsu's threshold, and the tiles
    assert max(areas) == 128**2


def test_warnings_name_the_remedy(tmp_path):
    image = np.full((200, 600), 10, np.uint8)
    image[50:150, 100:300] = image[160:170, 160:170] = 200
    Image.fromarray(image).save(tmp_path / "bar.png")
    run = pipeline("MODEL.CLASSICAL.MIN_DISTANCE", "200", tile=256, overlap=64)
    _, record = run(tmp_path / "bar.png")
    (warning,) = record["warnings"]
    assert "--overlap 320 --tile 640" in warning or "--overlap 448 --tile 896" in warning
    assert record["tiles"]["cut_nuclei"] > 0
    _, record = pipeline("TEST.DETECTIONS_PER_IMAGE", "2")(tmp_path / "bar.png")
    (warning,) = record["warnings"]
    assert "1 of 1 tiles reached" in warning
    assert "TEST.DETECTIONS_PER_IMAGE 4" in warning
    assert record["tiles"]["capped"] == 1


def test_tiles_that_disagree_are_reported(tmp_path):
    """A local threshold with a window wider than the overlap sees every tile's edge."""
    image, _ = draw_nuclei(np.random.default_rng(0), (300, 600), 200)
    Image.fromarray(image).save(tmp_path / "a.png")
    keys = ("MODEL.CLASSICAL.THRESHOLD", "local", "MODEL.CLASSICAL.LOCAL_SIZE", "401")
    _, record = pipeline(*keys, tile=128, overlap=64)(tmp_path / "a.png")
    assert record["tiles"]["seam_agreement"] < 1


def test_the_record(field):
    nuclei, record = pipeline(tile=256, overlap=128)(field)
    assert record["file"] == str(field)
    assert record["size"] == (600, 700)
    assert record["nuclei"] == len(nuclei)
    assert record["scale"] == 1
    assert record["contrast"]["high"] > record["contrast"]["low"] + 50
    assert record["median_diameter_px"] == pytest.approx(12, abs=2)
    assert record["warnings"] == []
    assert "600x700 uint8" in record["description"]


def test_the_confidence_threshold(field):
    everything, _ = pipeline()(field)
    middle = float(np.median(everything.scores))
    best, _ = pipeline(confidence_threshold=middle)(field)
    assert len(best) == (everything.scores >= np.float32(middle)).sum()


def test_a_given_diameter_sets_the_scale(field):
    _, record = pipeline("INPUT.NUCLEUS_DIAMETER", "24", diameter=12.0)(field)
    assert record["scale"] == 2


def test_nuclei_of_another_size_than_the_models_are_reported(field):
    for model_diameter, far in (("12", False), ("40", True), ("4", True)):
        opts = ("INPUT.NUCLEUS_DIAMETER", model_diameter)
        _, record = pipeline(*opts, diameter=float(model_diameter))(field)
        assert record["scale"] == 1
        assert bool(record["warnings"]) == far
        assert all("--diameter" in warning for warning in record["warnings"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 128, "overlap": 128}, "--tile 128 is less than twice --overlap"),
        ({"confidence_threshold": 50}, "--confidence-threshold is 50"),
        ({"least_contrast": -1.0}, "--least-contrast is -1.0"),
        ({"least_contrast": float("nan")}, "--least-contrast is nan"),
        ({"diameter": 10, "pixel_size": 0.3}, "give one of them"),
        ({"diameter": 10}, "INPUT.NUCLEUS_DIAMETER"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(NucleiError, match=message):
        pipeline(**options)


def test_an_image_outside_the_training_ranges_is_reported(field):
    _, record = pipeline(tile=256, overlap=128)(field)
    assert {entry["inside"] for entry in record["measures"].values()} == {None}
    focus, diameter = (record["measures"][name]["value"] for name in ("focus", "diameter"))
    assert diameter == record["median_diameter_px"]
    _, whole = pipeline(tile=4096)(field)
    assert whole["measures"]["focus"]["value"] == pytest.approx(focus, rel=0.05)
    for low, reported in ((focus * 1.5, True), (focus / 1.5, False)):
        _, record = pipeline("INPUT.TRAINING_RANGES.FOCUS", f"[{low}, 1.0]")(field)
        assert record["measures"]["focus"]["inside"] != reported
        assert (
            any(warning.startswith("blurred: focus") for warning in record["warnings"]) == reported
        )


def test_quality_counts_the_views_that_miss_a_nucleus(tmp_path):
    image, _ = draw_nuclei(np.random.default_rng(0), (64, 80), 6)
    Image.fromarray(image).save(tmp_path / "a.png")
    nuclei, record = pipeline()(tmp_path / "a.png")
    np.testing.assert_array_equal(nuclei.measures["quality"], nuclei.scores)
    assert record["quality"] == nuclei.scores.mean()
    nuclei, _ = pipeline(tta=True)(tmp_path / "a.png")
    expected = nuclei.scores * nuclei.measures["agreement"]
    np.testing.assert_array_equal(nuclei.measures["quality"], expected)


def test_the_same_image_in_other_formats_has_the_same_nuclei(tmp_path):
    image, _ = draw_nuclei(np.random.default_rng(3), (200, 300), 40)
    grey = image if image.ndim == 2 else image[..., 0]
    Image.fromarray(grey).save(tmp_path / "eight.png")
    tifffile.imwrite(tmp_path / "sixteen.tif", grey.astype(np.uint16) * 257)
    tifffile.imwrite(tmp_path / "twelve.tif", grey.astype(np.uint16) * 16)
    tifffile.imwrite(tmp_path / "float.tif", grey.astype(np.float32) / 255)
    stack = np.stack([np.zeros_like(grey), grey]).astype(np.uint16) * 100
    axes = {"axes": "CYX", "Channel": {"Name": ["empty", "DAPI"]}}
    tifffile.imwrite(tmp_path / "two.ome.tif", stack, metadata=axes)
    run = pipeline()
    expected, _ = run(tmp_path / "eight.png")
    assert len(expected) > 20
    twins = {"sixteen.tif": run, "twelve.tif": run, "float.tif": run}
    twins["two.ome.tif"] = pipeline(channel="DAPI")
    for name, read in twins.items():
        found, _ = read(tmp_path / name)
        np.testing.assert_array_equal(found.label_image() > 0, expected.label_image() > 0)
        assert (find_overlaps(found, expected).iou == 1).sum() == len(found) == len(expected), name
