import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from tiny import CONFIGS, TINY_OPTS, draw_nuclei

from nuclei_d2.config import load_config
from nuclei_d2.data.normalization import ImageNormalizer
from nuclei_d2.inference.network import TileNetwork, _place_boxes, _upright
from nuclei_d2.inference.nuclei import Nuclei
from nuclei_d2.inference.predictor import NucleiPredictor
from nuclei_d2.inference.tiling import make_grid, resample_tile
from nuclei_d2.inference.tta import VIEWS

MODELS = {
    "mask_boundary_rcnn": [*TINY_OPTS, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"],
    # A threshold that the probabilities of these random weights lie around.
    "unet": [
        *("MODEL.DEVICE", "cpu", "MODEL.UNET.WIDTH", "4"),
        *("MODEL.UNET.DECODER.MIN_AREA", "4", "MODEL.UNET.DECODER.THRESHOLD", "0.499"),
    ],
    "classical": ["MODEL.DEVICE", "cpu"],
}


@pytest.fixture(scope="module", params=MODELS)
def config(request, tmp_path_factory):
    """A config with random weights."""
    opts = [*MODELS[request.param], "INPUT.SCALE", "1.3", "TEST.DETECTIONS_PER_IMAGE", "15"]
    cfg = load_config(str(CONFIGS / f"{request.param}.yaml"), opts)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": build_model(cfg.clone()).state_dict()}, path)
    if request.param != "classical":
        cfg.MODEL.WEIGHTS = str(path)
    return cfg


def test_one_tile_is_what_the_predictor_does(config):
    image = draw_nuclei(np.random.default_rng(0), (90, 110), 12)[0][:, :, None].astype(np.float32)
    expected = Nuclei.from_instances(NucleiPredictor(config)(image))
    grid = make_grid((90, 110), config.INPUT.SCALE, 512, 128)
    pixels = resample_tile(ImageNormalizer(config)(image), grid, grid.tiles[0])
    nuclei, capped = TileNetwork(config)(pixels, grid, grid.tiles[0])
    assert len(expected) > 5
    assert capped == (len(expected) == 15)
    assert len(nuclei) == len(expected)
    np.testing.assert_allclose(nuclei.scores, expected.scores, atol=1e-4)
    differing = np.count_nonzero(nuclei.label_image() != expected.label_image())
    assert differing <= 3  # pixels; resampling rounds differently in the last digit


def test_the_classical_baseline_sees_the_same_in_every_view():
    config = load_config(str(CONFIGS / "classical.yaml"), ["MODEL.DEVICE", "cpu"])
    network = TileNetwork(config)
    image, labels = draw_nuclei(np.random.default_rng(1), (90, 130), 12)
    grid = make_grid((90, 130), 1.0, 512, 128)
    pixels = np.repeat(image[:, :, None].astype(np.float32), 3, axis=2)
    for view in VIEWS:
        nuclei, _ = network(pixels, grid, grid.tiles[0], view)
        found = nuclei.label_image() > 0
        assert (found & (labels > 0)).sum() / (found | (labels > 0)).sum() > 0.9


@pytest.mark.parametrize("view", VIEWS)
def test_a_detectors_boxes_and_maps_turn_back(view):
    # A tile at (64, 128) of a network image twice the size of the file.
    grid = make_grid((200, 300), 2.0, 256, 64)
    tile = next(tile for tile in grid.tiles if tile.index == (0, 1))
    height, width = tile.shape
    maps = torch.zeros(1, 1, 4, 4)
    maps[..., :2, :3] = 1.0  # upright: the upper left of the box
    box = torch.tensor([[40.0, 20, 80, 60]])
    upright = _place_boxes(raw(tile.shape, box, maps), grid, tile)

    transform = view.transform(height, width)
    turned_box = torch.from_numpy(transform.apply_box(box.numpy())).float()
    turned_map = view.transform(4, 4).apply_image(maps[0, 0].numpy()).copy()
    turned_size = (width, height) if view.turns % 2 else (height, width)
    turned = raw(turned_size, turned_box, torch.from_numpy(turned_map)[None, None])
    (a,), (b,) = upright.masks, _place_boxes(_upright(turned, view, tile), grid, tile).masks
    assert (a.top, a.left) == (b.top, b.left)
    np.testing.assert_array_equal(a.mask, b.mask)
    # 30 x 20 of 40 x 40 network pixels, at (20, 40 + the tile's left edge), half in the file.
    left = (tile.columns.start + 40) // 2
    assert (a.top, a.left) == pytest.approx((10, left), abs=1)
    assert a.mask.shape == pytest.approx((10, 15), abs=3)


def raw(size, boxes, maps):
    return Instances(
        size,
        pred_boxes=Boxes(boxes),
        scores=torch.ones(len(boxes)),
        pred_classes=torch.zeros(len(boxes), dtype=torch.int64),
        pred_masks=maps,
        pred_boundaries=maps,
    )


def test_boundary_uncertainty():
    grid = make_grid((64, 64), 1.0, 64, 0)
    maps = torch.ones(1, 1, 28, 28)
    instances = raw((64, 64), torch.tensor([[10.0, 10, 38, 38]]), maps)
    instances.pred_boundaries = 0.25 * maps
    nuclei = _place_boxes(instances, grid, grid.tiles[0])
    # Half of the outermost samples are cut off by the box's edge.
    assert nuclei.measures["boundary_uncertainty"] == pytest.approx([0.75], abs=0.02)
