"""One part out of every layout it is published in: equal to what transformers' own class loads, nothing else read."""

from __future__ import annotations

import json
import os
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaForCausalLM,
    UMT5Config,
)

from support.published_checkpoints import (
    blip2,
    blip2_opt,
    clip,
    clip_tower,
    clip_tower_old,
    clip_unprefixed,
    copy,
    dinov2,
    instructblip,
    instructblip_tower,
    llava,
    llava_new,
    llava_old,
    llava_tower,
    rewrite,
    siglip,
    siglip_headless,
    siglip_tower,
    vit_classifier,
)
from vlm_sft.base.errors import UserError
from vlm_sft.model.connectors import build_projector
from vlm_sft.pieces.checkpoints import Checkpoint
from vlm_sft.pieces.load_parts import load_language_model, load_projector_weights, load_resampler, load_vision_tower
from vlm_sft.pieces.part_configs import find_language_model, find_resampler, find_vision_tower
from vlm_sft.recipe.sections import LanguageModel, Resampler, VisionTower

TOWER = "stack.vision_tower.pretrained"
LM = "stack.language_model.pretrained"


def tower_in(pretrained, **options):
    return find_vision_tower(VisionTower(pretrained=str(pretrained), **options))


def qformer_in(pretrained):
    return find_resampler(Resampler(type="qformer", pretrained=str(pretrained)))


def language_model_in(pretrained, **options):
    return find_language_model(LanguageModel(pretrained=str(pretrained), **options))


TOWERS = [blip2, clip, clip_tower, clip_tower_old, clip_unprefixed, llava_tower, llava_new, llava_old,
          instructblip_tower, siglip, siglip_headless, siglip_tower, dinov2, vit_classifier]  # fmt: skip


@pytest.mark.parametrize("make", TOWERS)
def test_a_tower_equals_what_its_own_class_loads(make, pieces, tmp_path, monkeypatch):
    folder, wanted = make(pieces, tmp_path)
    read = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, names: original(self, read.extend(n := list(names)) or n))
    tower = load_vision_tower(tower_in(folder), torch.float32)
    assert not any(t.is_meta for t in [*tower.parameters(), *tower.buffers()])
    assert not [n for n in read if any(o in n for o in ("text_model", "language_model", "qformer", "position_ids"))]
    state = tower.state_dict()
    for name, tensor in wanted.state_dict().items():
        if not name.startswith(("head.", "pooler.")):
            assert torch.equal(state[name], tensor), name
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, theirs = tower.eval()(pixels).last_hidden_state, wanted.eval()(pixels).last_hidden_state
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", [clip, clip_tower, siglip])
def test_buffers_that_no_checkpoint_stores_are_made(make, pieces, tmp_path):
    tower = load_vision_tower(tower_in(make(pieces, tmp_path)[0]), torch.float32)
    buffers = dict(tower.named_buffers())
    assert "embeddings.position_ids" in buffers
    length = tower.embeddings.position_embedding.num_embeddings
    assert torch.equal(buffers["embeddings.position_ids"], torch.arange(length)[None])


def test_a_tower_takes_the_dtype_it_is_asked_for(pieces, tmp_path):
    for folder in (pieces["clip"], dinov2(pieces, tmp_path)[0]):
        tower = load_vision_tower(tower_in(folder), torch.bfloat16)
        assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}


def test_a_qformer_is_picked_out_of_blip2_and_only_it_is_read(pieces, tmp_path, monkeypatch):
    folder, _ = blip2(pieces, tmp_path)
    native = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    read = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, names: original(self, read.extend(n := list(names)) or n))
    resampler = load_resampler(qformer_in(folder)).eval()
    assert read and all(n.startswith(("qformer.", "query_tokens")) for n in read)
    assert torch.equal(resampler.query_tokens, native.query_tokens)
    wanted = native.qformer.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in resampler.qformer.state_dict().items())
    features = torch.randn(2, 17, 24)
    with torch.no_grad():
        theirs = native.qformer(query_embeds=native.query_tokens.expand(2, -1, -1), encoder_hidden_states=features)
        assert torch.equal(resampler(features), theirs.last_hidden_state)


def test_a_qformer_stays_in_fp32_between_parts_of_half_precision(pieces):
    resampler = load_resampler(qformer_in(pieces["blip2"]))
    assert {p.dtype for p in resampler.parameters()} == {torch.float32}
    assert resampler(torch.randn(1, 17, 24).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["shards", "bin"])
def test_parts_come_out_of_shards_and_of_bin_files(kind, pieces, tmp_path):
    folder = copy(pieces["blip2"], tmp_path / "blip2")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        halves = {"a.safetensors": dict(list(state.items())[::2]), "b.safetensors": dict(list(state.items())[1::2])}
        for name, half in halves.items():
            save_file(half, folder / name)
        index = {"weight_map": {n: file for file, half in halves.items() for n in half}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tower, resampler = load_vision_tower(tower_in(folder), torch.float32), load_resampler(qformer_in(folder))
    assert all(torch.equal(t, state[f"vision_model.{n}"]) for n, t in tower.state_dict().items())
    assert torch.equal(resampler.query_tokens, state["query_tokens"])


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


@pytest.mark.parametrize("part", ["tower", "own_class", "language_model"])
def test_weights_that_would_run_code_are_refused(part, pieces, tmp_path, monkeypatch):
    """Also where transformers reads the file, and not this package."""
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    source = {"tower": pieces["blip2"], "language_model": pieces["llama"]}.get(part) or clip_tower(pieces, tmp_path)[0]
    folder = copy(source, tmp_path / "bad")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")
    load, find = (load_language_model, language_model_in) if part == "language_model" else (load_vision_tower, tower_in)
    with pytest.raises(
        UserError, match=r"could run code: (it is|they are) refused; use a checkpoint in safetensors\.$"
    ):
        load(find(folder), torch.float32)
    assert not (tmp_path / "ran").exists()


# -- projectors --------------------------------------------------------------------------------------------------------

LINEAR_NAMES = ("language_projection", "llama_proj", "model.mm_projector", "opt_proj", "model.projector.linear")
MLP_NAMES = (
    ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    ("mm_projector.0", "mm_projector.2"),
    ("model.mm_projector.0", "model.mm_projector.2"),
    ("model.projector.layers.0", "model.projector.layers.1"),
)


@pytest.mark.parametrize("name", LINEAR_NAMES)
def test_a_linear_projector_is_found_by_its_publishers_name(name, tmp_path):
    weight, bias = torch.randn(8, 6), torch.randn(8)
    other = {"model.language_model.norm.weight": torch.randn(8)}
    save_file({f"{name}.weight": weight, f"{name}.bias": bias, **other}, tmp_path / "model.safetensors")
    projector = build_projector("linear", 6, 8)
    load_projector_weights(projector, str(tmp_path))
    assert torch.equal(projector.linear.weight, weight) and torch.equal(projector.linear.bias, bias)
    assert projector.linear.weight.requires_grad


@pytest.mark.parametrize("names", MLP_NAMES)
def test_an_mlp_projector_is_found_by_its_publishers_names(names, tmp_path):
    state = {f"{names[0]}.weight": torch.randn(8, 6), f"{names[1]}.weight": torch.randn(8, 8)}
    state |= {f"{name}.bias": torch.randn(8) for name in names}
    torch.save(state, tmp_path / "mm_projector.bin")  # the name of LLaVA's own file
    for place in (tmp_path, tmp_path / "mm_projector.bin"):
        projector = build_projector("mlp", 6, 8)
        load_projector_weights(projector, str(place))
        for layer, name in zip(projector.layers, names, strict=True):
            assert torch.equal(layer.weight, state[f"{name}.weight"])
            assert torch.equal(layer.bias, state[f"{name}.bias"])


@pytest.mark.parametrize("depth", [2, 3])
def test_a_projector_with_norms_is_yi_vls(depth, tmp_path):
    widths = [6] + [8] * depth
    parts = [each for a, b in pairwise(widths) for each in (nn.GELU(), nn.Linear(a, b), nn.LayerNorm(b))]
    upstream = nn.Sequential(*parts[1:])  # VL/llava/model/multimodal_projector/builder.py, mlp2x_gelu_Norm
    for parameter in upstream.parameters():
        nn.init.normal_(parameter)
    state = {f"model.mm_projector.{name}": tensor for name, tensor in upstream.state_dict().items()}
    save_file({**state, "model.embed_tokens.weight": torch.randn(9, 8)}, tmp_path / "model.safetensors")
    projector = build_projector("mlp_norm", 6, 8, depth=depth)
    load_projector_weights(projector, str(tmp_path))
    features = torch.randn(2, 5, 6)
    torch.testing.assert_close(projector(features), upstream(features))
    ours = {f"model.projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    save_file(ours, tmp_path / "model.safetensors")  # as a bundle holds it
    again = build_projector("mlp_norm", 6, 8, depth=depth)
    load_projector_weights(again, str(tmp_path))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in projector.state_dict().items())
    torch.save({name: t for name, t in state.items() if ".1." not in name}, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match=r"holds no projector of this kind \(.*norms\.0\.bias"):
        load_projector_weights(build_projector("mlp_norm", 6, 8), str(tmp_path / "mm_projector.bin"))


def test_a_projector_of_another_kind_or_width_is_an_error_that_names_it(pieces):
    with pytest.raises(UserError, match=r"projector of this kind \(layers\.0\.bias, layers\.0\.weight, layers\.1"):
        load_projector_weights(build_projector("mlp", 16, 32), pieces["blip2"])
    wide = r"'linear\.weight' has the shape \(32, 16\), but \(40, 16\) is needed"
    with pytest.raises(UserError, match=rf"^stack\.projector\.pretrained: .*: tensor {wide}"):
        load_projector_weights(build_projector("linear", 16, 40), pieces["blip2"])


# -- what is wrong -----------------------------------------------------------------------------------------------------


def test_a_part_that_a_checkpoint_does_not_have_is_named(pieces):
    with pytest.raises(UserError, match=rf"^{TOWER}: a 'llama' checkpoint holds no vision tower"):
        load_vision_tower(tower_in(pieces["llama"]), torch.float32)
    with pytest.raises(
        UserError, match=r"^stack\.resampler\.pretrained: a 'clip' checkpoint holds no Q-Former; name a"
    ):
        load_resampler(qformer_in(pieces["clip"]))
    with pytest.raises(UserError, match=rf"^{LM}: .* lacks \d+ tensors of this model"):
        load_language_model(language_model_in(pieces["blip2"]), torch.float32)


def test_a_configuration_without_its_weights_is_named(pieces, tmp_path):
    """A config.json that speaks of parts whose tensors are not there (adapters, LLM-only files)."""
    folder = copy(pieces["blip2"], tmp_path / "blip2")
    rewrite(folder, lambda s: {n: t for n, t in s.items() if not n.startswith("qformer.encoder.layer.1.")})
    with pytest.raises(UserError, match=r"does not hold this part: \d+ of \d+ tensors are missing.*'qformer\.encoder"):
        load_resampler(qformer_in(folder))
    rewrite(folder, lambda s: {n: t for n, t in s.items() if not n.startswith("vision_model.")})
    with pytest.raises(UserError, match=r"does not hold this part: (\d+) of \1 tensors are missing"):
        load_vision_tower(tower_in(folder), torch.float32)


def test_a_missing_tensor_is_never_drawn_at_random(pieces, tmp_path):
    """`from_pretrained` only warns; then the model would train on noise."""
    tower, _ = clip_tower(pieces, tmp_path)
    name = "encoder.layers.1.mlp.fc1.weight"
    rewrite(tower, lambda s: {n: t for n, t in s.items() if n != name})
    with pytest.raises(UserError, match=rf"^{TOWER}: .* lacks 1 tensors of this model, for instance '{name}'"):
        load_vision_tower(tower_in(tower), torch.float32)
    llama = copy(pieces["llama"], tmp_path / "llama")
    rewrite(llama, lambda s: {n: t for n, t in s.items() if n != "lm_head.weight"})
    with pytest.raises(UserError, match=rf"^{LM}: .* lacks 1 tensors of this model, for instance 'lm_head\.weight'"):
        load_language_model(language_model_in(llama), torch.float32)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(pieces, tmp_path):
    folder = copy(pieces["blip2"], tmp_path / "blip2")
    rewrite(folder, lambda s: {**s, "query_tokens": torch.zeros(1, 5, 16)})
    with pytest.raises(
        UserError, match=r"tensor 'query_tokens' has the shape \(1, 5, 16\), but \(1, 4, 16\) is needed"
    ):
        load_resampler(qformer_in(folder))
    llama = copy(pieces["llama"], tmp_path / "llama")
    rewrite(llama, lambda s: {**s, "model.norm.weight": torch.ones(31)})
    with pytest.raises(UserError, match=r"tensor 'model\.norm\.weight' has the shape \(31,\), but \(32,\) is needed"):
        load_language_model(language_model_in(llama), torch.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_equals_what_transformers_loads(tied, pieces, tmp_path):
    model = LlamaForCausalLM.from_pretrained(pieces["llama"])
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path / "llama")
    loaded = load_language_model(language_model_in(tmp_path / "llama"), torch.float32).eval()
    wanted = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    ids = torch.tensor([[1, 5, 6]])
    assert torch.equal(loaded(ids).logits, wanted(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


LARGER = {
    "llava, old names": llava,
    "llava, new names": lambda pieces, path: llava(pieces, path, old=False),
    "blip-2 with opt": blip2_opt,
    "instructblip": instructblip,
}


@pytest.mark.parametrize("file", ["safetensors", "bin"])
@pytest.mark.parametrize("name", LARGER)
def test_a_language_model_is_picked_out_of_a_larger_checkpoint(name, file, pieces, tmp_path):
    folder, model = LARGER[name](pieces, tmp_path)
    if file == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    loaded = load_language_model(language_model_in(folder), torch.float32).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(
        loaded(ids).logits, model(input_ids=ids).logits if "llava" in name else model.language_model(ids).logits
    )
    assert not any("vision" in n for n, _ in loaded.named_parameters())


def test_a_language_model_that_is_not_causal_is_named(pieces, tmp_path):
    t5 = UMT5Config(d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16, vocab_size=50)
    folder, _ = instructblip(pieces, tmp_path, text=t5)
    with pytest.raises(UserError, match=rf"^{LM}: a 'umt5' checkpoint is no causal language model\.$"):
        load_language_model(language_model_in(folder), torch.float32)


def test_a_language_model_whose_logits_would_be_wrong_is_refused(tmp_path):
    config = HyperCLOVAXConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                               num_attention_heads=2, num_key_value_heads=2, logits_scaling=5.0)  # fmt: skip
    HyperCLOVAXForCausalLM(config).save_pretrained(tmp_path / "hyper")
    with pytest.raises(UserError, match=rf"^{LM}: hyperclovax models change their logits after the head in a way"):
        load_language_model(language_model_in(tmp_path / "hyper"), torch.float32)


def test_an_encoder_is_no_language_model(pieces, tmp_path):
    tower, _ = dinov2(pieces, tmp_path)
    with pytest.raises(UserError, match=rf"^{LM}: transformers cannot load .*Unrecognized configuration") as error:
        load_language_model(language_model_in(tower), torch.float32)
    assert "\n" not in str(error.value)


def test_options_reach_the_language_model(pieces):
    model = load_language_model(language_model_in(pieces["llama"], attn_implementation="eager"), torch.bfloat16)
    assert model.config._attn_implementation == "eager"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
