"""What is chosen on a card, told on a machine without one."""

import importlib
import importlib.metadata

import pytest
import torch

import glm_finetune
from glm_finetune import dist
from glm_finetune.config import TrainConfig
from glm_finetune.flags import parse
from glm_finetune.run.ds_config import read_ds_file, resolve
from glm_finetune.run.flags import DEFAULT_DS_FILE
from tests.test_bad_input import NEEDED


@pytest.mark.parametrize("wanted", [False, True])
def test_attention_of_cudnn_is_taken_only_when_it_is_asked_for(wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(not wanted)
        assert dist.choose_device(None, wanted) == torch.device("cuda", 0)
        assert torch.backends.cuda.cudnn_sdp_enabled() is wanted
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("world_size, device, overlaps", [(1, "cuda", False), (2, "cuda", True), (2, "cpu", False)])
def test_a_single_card_waits_for_no_other(world_size, device, overlaps):
    config = resolve(read_ds_file(DEFAULT_DS_FILE), parse(TrainConfig, NEEDED), world_size, "bf16", device)
    assert config["zero_optimization"]["overlap_comm"] is overlaps


@pytest.mark.parametrize("name, oldest", glm_finetune.OLDEST.items())
def test_a_version_that_is_too_old_is_named(name, oldest, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: "2.0.1" if asked == name else real(asked))
    with pytest.raises(ImportError, match=f"{name} 2.0.1 is installed, {oldest} is the oldest"):
        importlib.reload(glm_finetune)
