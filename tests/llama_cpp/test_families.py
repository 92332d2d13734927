"""Existing VLMs in llama.cpp: both files are written by its own converter, and it answers as the bundle does."""

from __future__ import annotations

import pytest

from support.tiny_families import TINY, write_tiny
from vlm_sft.base.errors import UserError
from vlm_sft.export.export import export
from vlm_sft.llama_cpp.families import FAMILIES


@pytest.fixture
def base(monkeypatch, tmp_path):
    """The folder of a tiny model whose pictures are as those of the published ones: patches of 14 pixels, windows."""

    def make(name, window=112):
        config, processor = TINY[name]()
        vision = config.vision_config
        vision.depth = 4  # the converter counts the projector's layers by the tower's
        vision.patch_size, processor.image_processor.patch_size = 14, 14
        if name == "qwen2_5_vl":
            vision.window_size, vision.fullatt_block_indexes = window, [1, 3]
        processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 401408}
        monkeypatch.setitem(TINY, name, lambda: (config, processor))
        return write_tiny(name, tmp_path / name)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_answers_as_the_bundle_of_an_existing_vlm_does(name, base, save_family, tmp_path):
    found = export(save_family(name, base(name)), tmp_path / "out", to="gguf")
    assert found["same_answer"] and found["max_difference"] < found["tolerance"] and found["kl"] < 1e-4
    files = {"model-f16.gguf", "mmproj-f16.gguf", "Modelfile", "export.json", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert "--image-min-tokens 4 --image-max-tokens 512" in found["differences"][1]


def test_windows_of_another_size_and_other_families_are_refused(base, save_family, tmp_path):
    with pytest.raises(UserError, match=r"its windows are 112 pixels wide, this bundle's 56"):
        export(save_family("qwen2_5_vl", base("qwen2_5_vl", window=56)), tmp_path / "out", to="gguf")
    with pytest.raises(UserError, match=r"answers for a Idefics3.* never seen .* use --to transformers, .* qwen2_vl"):
        export(save_family("idefics3"), tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()
