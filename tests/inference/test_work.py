import multiprocessing
import os
import threading
import time
from contextlib import ExitStack

import pytest

from nuclei_d2.inference import work
from nuclei_d2.inference.work import SharedWork, worker_place
from nuclei_d2.utils.errors import NucleiError

NAMES = [f"image {k}" for k in range(6)]


def work_and_log(folder, slow):
    """Do NAMES, note what was done, and hang in the item ``slow``."""
    shared = SharedWork(folder)
    for name in shared.todo(NAMES):
        with (folder / "log").open("a") as log:
            log.write(f"{name}\n")
        if name == slow:
            time.sleep(600)
        shared.record(name, {})


def start_worker(folder, slow=""):
    """Forked: importing torch once more would take seconds."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=work_and_log, args=(folder, slow), daemon=True)
    process.start()
    return process


def do_all(shared, first=0):
    done = []
    for name in shared.todo(NAMES, first):
        done.append(name)
        shared.record(name, {"name": name})
    return done


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_item_once_beginning_anywhere(tmp_path):
    shared = SharedWork(tmp_path)
    assert do_all(shared, first=4) == [*NAMES[4:], *NAMES[:4]]
    assert shared.finished() == set(NAMES)
    assert list((tmp_path / "claims").iterdir()) == []
    assert do_all(SharedWork(tmp_path)) == []


def test_only_what_is_missing(tmp_path):
    do_all(SharedWork(tmp_path))
    SharedWork(tmp_path).record_path("image 3").unlink()
    assert do_all(SharedWork(tmp_path)) == ["image 3"]


def test_a_failure_is_final_in_this_run_and_tried_again_in_the_next(tmp_path):
    shared = SharedWork(tmp_path)
    for name in shared.todo(NAMES[:2]):
        shared.fail(name, {"reason": "broken"})
    assert shared.finished() == set(NAMES[:2])
    os.utime(shared.failure_path("image 0"), (1, 1))
    again = SharedWork(tmp_path)
    tried = []
    for name in again.todo(NAMES[:1]):
        tried.append(name)
        again.record(name, {})
    assert tried == ["image 0"]
    assert not again.failure_path("image 0").exists()


def test_a_claimed_item_is_left_to_its_owner(tmp_path):
    first, second = SharedWork(tmp_path), SharedWork(tmp_path)
    with first.claim("a.b") as ours, second.claim("a.b") as theirs, second.claim("a") as other:
        assert (ours, theirs, other) == (True, False, True)
    with second.claim("a.b") as ours:
        assert ours


def test_threads_never_get_the_same_item(tmp_path):
    done = []
    workers = [
        threading.Thread(target=lambda k=k: done.extend(do_all(SharedWork(tmp_path), k)))
        for k in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(done) == NAMES


def test_waits_for_others_at_the_end(tmp_path):
    shared = SharedWork(tmp_path)
    with shared.claim("image 0"):
        other = []
        thread = threading.Thread(target=lambda: other.extend(do_all(SharedWork(tmp_path))))
        thread.start()
        wait_for(lambda: len(shared.finished()) == 5)
        assert thread.is_alive()
        shared.record("image 0", {})
        thread.join(60)
    assert sorted(other) == NAMES[1:]


def test_the_item_of_a_killed_process_is_done_again_by_another(tmp_path):
    process = start_worker(tmp_path, slow="image 2")
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and "image 2" in log.read_text())
    process.kill()
    process.join()
    assert SharedWork(tmp_path).finished() == {"image 0", "image 1"}
    assert do_all(SharedWork(tmp_path)) == NAMES[2:]
    assert list((tmp_path / "claims").iterdir()) == []


def test_processes_do_nothing_twice(tmp_path):
    workers = [start_worker(tmp_path) for _ in range(3)]
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted((tmp_path / "log").read_text().splitlines()) == NAMES


@pytest.mark.parametrize("content", ["elsewhere:1 1 token", "", "torn"])
def test_a_silent_claim_of_another_machine_is_lost(tmp_path, content):
    shared = SharedWork(tmp_path, lost_after=100)
    claim = tmp_path / "claims" / "image 0.0"
    claim.write_text(content)
    with shared.claim("image 0") as ours:
        assert not ours
    os.utime(claim, (time.time() - 200,) * 2)
    with shared.claim("image 0") as ours:
        assert ours
        with SharedWork(tmp_path, lost_after=100).claim("image 0") as theirs:
            assert not theirs
    assert list((tmp_path / "claims").iterdir()) == []


def test_what_lost_processes_left_goes_at_the_end(tmp_path):
    shared = SharedWork(tmp_path)
    shared.record("image 0", {})
    for name in ("image 0.0", "image 9.0"):  # the second item is not finished
        (tmp_path / "claims" / name).write_text("elsewhere 1 token")
    (tmp_path / "records" / ".image 1.77.tmp.json").write_text("{")
    do_all(shared)
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["image 9.0"]
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [
        f"{name}.json" for name in NAMES
    ]


def test_a_claim_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "HEARTBEAT", 0.05)
    shared = SharedWork(tmp_path)
    with shared.claim("a"):
        claim = tmp_path / "claims" / "a.0"
        os.utime(claim, (1, 1))
        wait_for(lambda: claim.stat().st_mtime > 1)


def test_the_place_among_the_processes(monkeypatch):
    assert worker_place() == (0, 1, 0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert worker_place() == (5, 8, 1)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NucleiError, match="cannot write"):
        SharedWork(tmp_path / "file")


def test_who_was_only_away_leaves_the_next_ones_claim_alone(tmp_path):
    shared = SharedWork(tmp_path, lost_after=100)
    claim = tmp_path / "claims" / "a.0"
    with ExitStack() as next_one:
        with shared.claim("a"):
            claim.unlink()  # another took it over, and was done
            assert next_one.enter_context(SharedWork(tmp_path).claim("a"))
        assert claim.is_file()
        with shared.claim("a") as again:
            assert not again
    assert not claim.exists()


def test_another_ones_claim_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "HEARTBEAT", 0.02)
    claim = tmp_path / "claims" / "a.0"
    with SharedWork(tmp_path).claim("a"):
        claim.write_text("elsewhere 1 token")
        os.utime(claim, (1, 1))
        time.sleep(0.3)
        assert claim.stat().st_mtime == 1
