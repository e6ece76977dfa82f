"""Checkpoints on an S3 server: as the durable copy, and as the only place."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ringps
from ringps import probe
from ringps.checkpoint.inspection import verify
from tests.object_store import new_bucket, object_store, unfinished_uploads


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with object_store():
        yield


@pytest.fixture(autouse=True)
def ring() -> Iterator[None]:
    ringps.init()
    yield
    ringps.shutdown()


def train(directory: Path | str, until: int, durable: str | None = None) -> tuple[int | None, torch.Tensor]:
    """Train with a save every two steps; where it began, and a parameter at the end."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.3), torch.nn.Linear(64, 1))
    sampler = ringps.ElasticBatchSampler(40, 8, seed=3)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = ringps.DistributedOptimizer(inner, model, sampler=sampler)
    state = ringps.TrainState(model=model, optimizer=optimizer, sampler=sampler)
    inputs = torch.arange(160.0).view(40, 4) / 160
    loader = DataLoader(TensorDataset(inputs), batch_sampler=sampler)
    with ringps.Checkpointer(directory, state, every_steps=2, durable=durable) as ckpt:
        for _, (batch,) in ckpt.steps(loader, until=until):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        return ckpt.restored_step, model[0].weight.detach().clone()


def test_a_lost_disk_is_made_up_for_by_the_durable_copy(tmp_path: Path) -> None:
    bucket = new_bucket()
    _, whole = train(tmp_path / "whole", 16)
    assert train(tmp_path / "disk", 8, bucket)[0] is None
    listing = verify(bucket)
    assert listing.restored is not None and listing.restored.step == 8
    assert not listing.damage and not unfinished_uploads(bucket)
    shutil.rmtree(tmp_path / "disk")
    assert train(tmp_path / "disk", 12, bucket)[0] == 8
    assert verify(tmp_path / "disk").checkpoints[0].step == 12
    began, found = train(tmp_path / "another-disk", 16, bucket)
    assert began == 12
    assert torch.equal(found, whole)


def test_a_bucket_alone_will_do(tmp_path: Path) -> None:
    bucket = new_bucket()
    _, whole = train(tmp_path / "whole", 9)
    train(bucket, 5)
    began, found = train(bucket, 9)
    assert began == 5
    assert torch.equal(found, whole)
    listing = verify(bucket)
    assert listing.restored is not None and listing.restored.step == 9
    assert len(listing.checkpoints) == 3 and not listing.damage


def test_a_server_that_is_away_when_the_script_starts_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = new_bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    with pytest.raises(ringps.CheckpointError, match=f"rank 0 cannot use .* and {bucket}: "):
        train(tmp_path, 4, bucket)


def test_a_server_that_goes_away_later_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = new_bucket()

    def refused(point: str, passed: dict[str, Any]) -> None:
        if point == "save_write" and threading.current_thread().name == "ringps-upload":
            raise OSError("the connection was refused")

    monkeypatch.setattr(probe, "listener", refused)
    assert train(tmp_path, 6, bucket)[0] is None
    assert f"step 2 could not be saved in {bucket}: rank 0: the connection was refused" in caplog.text
    assert verify(tmp_path).checkpoints[0].step == 6
    monkeypatch.setattr(probe, "listener", None)
    assert train(tmp_path, 8, bucket)[0] == 6
    assert [one.step for one in verify(bucket).checkpoints] == [8]
