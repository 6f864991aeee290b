import pickle
import shutil

import pytest
import torch
from torch import nn

from nuclei_d2.engine.checkpoint import NucleiCheckpointer
from nuclei_d2.utils.errors import NucleiError


def model(width=3):
    return nn.Linear(2, width)


def saved(folder, name="model_final", **kwargs):
    net = model()
    NucleiCheckpointer(net, str(folder)).save(name, **kwargs)
    return net, str(folder / f"{name}.pth")


def test_round_trip_gives_the_same_weights_and_the_extra_data(tmp_path):
    net, path = saved(tmp_path, iteration=7)
    other = model()
    rest = NucleiCheckpointer(other, str(tmp_path)).load(path)
    assert rest["iteration"] == 7
    assert torch.equal(other.weight, net.weight)
    assert NucleiCheckpointer(other, str(tmp_path)).get_checkpoint_file() == path
    NucleiCheckpointer(model(), "").load_exactly(path)


class Unwritable:
    """State that cannot be saved: stands for a process that dies half-way."""

    def state_dict(self):
        return {"stream": open("/dev/null")}

    def load_state_dict(self, state):
        raise AssertionError


def test_a_failed_save_leaves_the_last_good_checkpoint(tmp_path):
    net, _ = saved(tmp_path)
    broken = NucleiCheckpointer(model(), str(tmp_path), trainer=Unwritable())
    with pytest.raises(TypeError):
        broken.save("model_final")
    other = model()
    NucleiCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert torch.equal(other.weight, net.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_final.pth"]


def test_a_full_disk_is_one_line_that_names_the_checkpoint(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(NucleiError, match=r"cannot write .*model_final\.pth"):
        saved(tmp_path)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


@pytest.mark.parametrize("name", ["evil.pth", "evil.pkl"])
def test_a_checkpoint_cannot_run_code(tmp_path, name):
    marker = tmp_path / "ran"
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save({"model": Evil(str(marker))}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Evil(str(marker))}))
    with pytest.raises(NucleiError, match=name):
        NucleiCheckpointer(model(), "").load(str(path))
    assert not marker.exists()


def test_a_pickle_behind_another_address_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": Evil(str(tmp_path / "ran"))}))
    checkpointer = NucleiCheckpointer(model(), "")
    monkeypatch.setattr(checkpointer.path_manager, "get_local_path", lambda _: str(path))
    with pytest.raises(NucleiError, match=r"catalog://R-50 is a pickle"):
        checkpointer.load("catalog://R-50")
    assert not (tmp_path / "ran").exists()


def test_a_trusted_pickle_is_loaded(tmp_path):
    net = model()
    weights = {k: v.numpy() for k, v in net.state_dict().items()}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "test"}))
    other = model()
    NucleiCheckpointer(other, "", allow_pickle=True).load(str(path))
    assert torch.equal(other.weight, net.weight)


def test_truncated_text_and_missing_files_are_one_line(tmp_path):
    saved(tmp_path)
    whole = (tmp_path / "model_final.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("cut.pth", "text.pth", "empty.pth", "nowhere.pth"):
        with pytest.raises(NucleiError, match=name) as error:
            NucleiCheckpointer(model(), "").load(str(tmp_path / name))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        {"epoch": 3, "state_dict": {"weight": torch.zeros(3, 2)}},
        {"model": {"weight": torch.zeros(3, 2), "epoch": 3}},
        {"model": torch.zeros(3, 2)},
        [torch.zeros(3, 2)],
    ],
)
def test_a_checkpoint_of_another_program_is_one_line(tmp_path, content):
    path = str(tmp_path / "theirs.pth")
    torch.save(content, path)
    checkpointer = NucleiCheckpointer(model(), "")
    for load in (checkpointer.load, checkpointer.load_exactly):
        with pytest.raises(NucleiError, match=r"theirs\.pth: it is no state dict") as error:
            load(path)
        assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(tmp_path):
    _, path = saved(tmp_path)
    renamed = shutil.copy(path, tmp_path / "model.pt")
    for name in (path, str(renamed)):
        other = NucleiCheckpointer(nn.Sequential(nn.Conv2d(1, 1, 1)), "")
        with pytest.raises(NucleiError, match="no tensor of this model"):
            other.load(name)
        with pytest.raises(NucleiError, match="does not fit this config"):
            other.load_exactly(name)


def test_inference_needs_every_tensor_to_fit(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(NucleiError, match=r"does not fit this config.*\(3,\).*\(4,\)"):
        NucleiCheckpointer(model(width=4), "").load_exactly(path)
    with pytest.raises(NucleiError, match=r"MODEL\.WEIGHTS is empty"):
        NucleiCheckpointer(model(), "").load_exactly("")


def test_names_of_tensors_are_matched_by_heuristics_on_demand(tmp_path):
    net = model()
    torch.save({"model": net.state_dict()}, tmp_path / "other.pth")
    other, address = nn.ModuleDict({"stem": model()}), str(tmp_path / "other.pth")
    with pytest.raises(NucleiError, match="holds no tensor of this model"):
        NucleiCheckpointer(other, "").load(address)
    NucleiCheckpointer(other, "").load(f"{address}?matching_heuristics=True")
    with pytest.raises(NucleiError, match="for training only; leave out"):
        NucleiCheckpointer(other, "").load_exactly(f"{address}?matching_heuristics=True")
    assert torch.equal(other["stem"].weight, net.weight)
