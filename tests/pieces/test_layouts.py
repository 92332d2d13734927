"""Published checkpoint layouts against values of the upstream code (`goldens`), read through recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizerFast,
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
)

from support.golden import Golden, assert_close, save_pth, small_llama, strip
from support.tiny_pieces import make_tokenizer, save_checkpoint
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.load import load
from vlm_sft.bundle.manifest import Provenance
from vlm_sft.bundle.save import save_bundle
from vlm_sft.pieces.layouts import LAYOUTS, detect, join_qkv_bias
from vlm_sft.stack.build_stack import build_stack


def lavis_parts(config, tower, qformer, projector, kind="qformer"):
    """The heads are the only sizes that no tensor tells; the published models' are known."""
    return {
        "vision_tower": {**tower, "config": {"num_attention_heads": config["vit_heads"]}},
        "resampler": {"type": kind, "pretrained": qformer, "config": {"num_attention_heads": config["qf_heads"]}},
        "projector": {"type": "linear", "pretrained": projector},
    }


# -- LAVIS and MiniGPT-4 -----------------------------------------------------------------------------------------------


def test_blip2_of_lavis(golden_stack, save_llm, tmp_path):
    golden = Golden("blip2_lavis")
    path = save_pth(golden.tensors(), tmp_path / "blip2.pth")
    llm = save_llm(small_llama(golden.config["llm_dim"]))
    model = golden_stack(**lavis_parts(golden.config, {"pretrained": path}, path, path), language_model=llm).model.model
    tower = model.vision_tower
    assert tower.config.num_hidden_layers == golden.config["vit_depth"]
    image_embeds = tower(golden.inputs["pixel_values"]).last_hidden_state
    assert_close(image_embeds, golden.outputs["image_embeds"])
    assert_close(model.resampler(image_embeds), golden.outputs["query_output"])
    assert_close(model.get_image_features(golden.inputs["pixel_values"]), golden.outputs["projected"])


def test_the_norm_after_the_tower_has_an_epsilon_of_its_own(golden_stack, save_llm, tmp_path):
    """Also where the tower is made from the configuration that a bundle or a checkpoint keeps."""
    golden = Golden("blip2_lavis")
    path = save_pth(golden.tensors(), tmp_path / "blip2.pth")
    llm = save_llm(small_llama(golden.config["llm_dim"]))
    stack = lavis_parts(golden.config, {"pretrained": path}, path, path)
    built = golden_stack(empty=True, **stack, language_model=llm)
    built.model.config.save_pretrained(tmp_path / "saved")
    reread = type(built.model.config).from_pretrained(tmp_path / "saved")
    for model in (built.model, type(built.model)(reread)):
        tower = model.model.vision_tower
        assert tower.post_layernorm.eps == golden.config["ln_vision_eps"]
        assert tower.encoder.layers[0].layer_norm1.eps == golden.config["vit_eps"]


def minigpt4_stack(golden, tmp_path):
    """Three files, as MiniGPT-4 loads them: EVA's own, BLIP-2's of FlanT5, and its own with llama_proj alone."""
    files = {n: save_pth(golden.tensors(f"ckpt_{n}"), tmp_path / f"{n}.pth") for n in ("eva", "qformer", "minigpt4")}
    tower = {"pretrained": files["eva"], "more": [files["qformer"]]}
    return lavis_parts(golden.config, tower, files["qformer"], files["minigpt4"])


def minigpt4_llm(golden):
    c = golden.config
    sizes = {"vocab_size": c["llm_vocab"], "hidden_size": c["llm_dim"], "intermediate_size": c["llm_ffn"],
             "num_hidden_layers": c["llm_layers"], "num_attention_heads": c["llm_heads"],
             "rms_norm_eps": c["rms_norm_eps"]}  # fmt: skip
    return sizes, strip(golden.tensors(), "llama_model.")


def test_minigpt4_from_its_three_files(golden_stack, save_llm, tmp_path):
    golden = Golden("minigpt4")
    inputs, wanted = golden.inputs, golden.outputs
    built = golden_stack(**minigpt4_stack(golden, tmp_path), language_model=save_llm(*minigpt4_llm(golden)))
    model = built.model
    image_embeds = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    assert_close(image_embeds, wanted["image_embeds"])
    assert_close(model.model.resampler(image_embeds), wanted["query_output"])
    assert_close(model.get_image_features(inputs["pixel_values"]), wanted["inputs_llama"])

    image = torch.full((golden.config["num_query_tokens"],), model.config.image_token_id)
    rows, learned = [], []
    for i in range(len(inputs["pixel_values"])):
        answer = inputs[f"answer_ids_{i}"][: golden.config["max_txt_len"]]
        prompt = torch.cat([torch.tensor([1]), inputs[f"pre_ids_{i}"], image, inputs[f"post_ids_{i}"]])
        rows.append(torch.cat([prompt, answer]))
        learned.append(torch.cat([torch.full_like(prompt, -100), answer]))
    length = wanted["targets"].shape[1]  # upstream pads answers and prompts by themselves, so a little more than needed
    ids, labels, mask = (
        torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=fill) for row in column])
        for column, fill in ((rows, 0), (learned, -100), ([torch.ones_like(row) for row in rows], 0))
    )
    assert torch.equal(labels, wanted["targets"]) and torch.equal(mask, wanted["attention_mask"])
    assert_close(model.model.embed(ids, inputs["pixel_values"]), wanted["inputs_embeds"])
    output = model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=inputs["pixel_values"])
    assert_close(output.logits[mask.bool()], wanted["logits"][mask.bool()])
    assert_close(output.loss, wanted["loss"])


def test_the_norm_that_another_file_holds_is_asked_for(golden_stack, save_llm, tmp_path):
    golden = Golden("minigpt4")
    stack = minigpt4_stack(golden, tmp_path)
    stack["vision_tower"].pop("more")
    llm = save_llm(*minigpt4_llm(golden))
    with pytest.raises(UserError, match=r"does not hold this part: 2 of \d+ tensors are missing, .*'ln_vision"):
        golden_stack(**stack, language_model=llm)
    stack["vision_tower"]["more"] = ["nowhere.pth"]
    with pytest.raises(UserError, match=r"the weight file 'nowhere\.pth' \(named under `more`\) does not exist"):
        golden_stack(**stack, language_model=llm)


def test_heads_that_cannot_be_told_are_asked_for(golden_stack, save_llm, tmp_path):
    golden = Golden("blip2_lavis")
    path = save_pth(golden.tensors(), tmp_path / "blip2.pth")
    llm = save_llm(small_llama(golden.config["llm_dim"]))
    for part in ("vision_tower", "resampler"):
        stack = lavis_parts(golden.config, {"pretrained": path}, path, path)
        stack[part].pop("config")
        with pytest.raises(UserError, match=rf"state stack\.{part}\.config: \{{num_attention_heads: …\}}"):
            golden_stack(part, empty=True, **stack, language_model=llm)


def test_a_bundle_finds_all_files_again_from_another_folder(recipe_file, save_llm, tmp_path, monkeypatch):
    golden = Golden("minigpt4")
    monkeypatch.chdir(tmp_path)
    stack = minigpt4_stack(golden, Path())
    recipe = load_recipe(recipe_file(stack={**stack, "language_model": save_llm(*minigpt4_llm(golden))}))
    built = build_stack(recipe)
    save_bundle(tmp_path / "bundle", built.model, built.processor, built.plan, Provenance(recipe, built.pieces))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model, processor = load(tmp_path / "bundle", device="cpu")
    assert_close(model.get_image_features(golden.inputs["pixel_values"]), golden.outputs["inputs_llama"])
    side = golden.config["image_size"]
    assert processor.encode_images([Image.new("RGB", (50, 40))]).shape == (1, 3, side, side)


def test_published_sizes_need_no_statement():
    """EVA ViT-g's heads are 88 wide, BERT's 64; a file with EVA's 40th block is read without it."""
    eva = {"cls_token": (1, 1, 1408), "patch_embed.proj.weight": (1408, 3, 14, 14), "pos_embed": (1, 257, 1408)}
    eva |= {f"blocks.{i}.mlp.fc1.weight": (6144, 1408) for i in range(40)}
    config = LAYOUTS["lavis_vision"].configure(eva, {})
    assert (config.num_hidden_layers, config.num_attention_heads, config.image_size) == (39, 16, 224)
    qformer = {"embeddings.LayerNorm.weight": (768,)}
    qformer |= {f"encoder.layer.{i}.intermediate_query.dense.weight": (3072, 768) for i in range(12)}
    qformer |= {f"encoder.layer.{i}.crossattention.self.key.weight": (768, 1408) for i in range(0, 12, 2)}
    config = LAYOUTS["lavis_qformer"].configure(qformer, {})
    assert config.num_attention_heads == 12 and config.cross_attention_frequency == 2
    assert config.encoder_hidden_size == 1408


def test_layouts_are_told_apart_by_their_names():
    names = set(Golden("blip2_lavis").tensors())
    for part, prefix in (("vision_tower", "visual_encoder."), ("qformer", "Qformer.bert.")):
        layout, found = detect(part, names)
        assert layout.kind == part and found == prefix
    assert detect("vision_tower", set(Golden("ziya_blip2").tensors())) is None


def test_eva_has_no_bias_on_its_keys():
    joined = join_qkv_bias(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert joined.tolist() == [1, 2, 0, 0, 3, 4]


# -- InstructBLIP ------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path):
    """A BERT vocabulary, as InstructBLIP's Q-Former has one; smaller than any golden's."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "this", "?", "a", "cat", "many", "how", "猫"]
    BertTokenizerFast(vocab={name: i for i, name in enumerate(names)}).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_instructblip_of_lavis(golden_stack, save_llm, words, tmp_path):
    golden = Golden("instructblip_lavis")
    inputs, wanted = golden.inputs, golden.outputs
    path = save_pth(golden.tensors(), tmp_path / "instructblip.pth")
    stack = lavis_parts(golden.config, {"pretrained": path}, path, path, "instruct_qformer")
    stack["resampler"]["tokenizer"] = words
    model = golden_stack(**stack, language_model=save_llm(small_llama(golden.config["llm_dim"]))).model
    instruction = {name: inputs[name] for name in ("qformer_input_ids", "qformer_attention_mask")}
    image_embeds = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    assert_close(image_embeds, wanted["image_embeds"])
    assert_close(model.model.resampler(image_embeds, **instruction), wanted["query_output"])
    assert_close(model.get_image_features(inputs["pixel_values"], **instruction), wanted["projected"])


def test_an_instruct_qformer_without_a_tokenizer_says_which_to_name(golden_stack, save_llm, words, tmp_path):
    golden = Golden("instructblip_lavis")
    path = save_pth(golden.tensors(), tmp_path / "instructblip.pth")
    stack = lavis_parts(golden.config, {"pretrained": path}, path, path, "instruct_qformer")
    stack["language_model"] = save_llm(small_llama(golden.config["llm_dim"]))
    with pytest.raises(UserError, match=r"name one under stack\.resampler\.tokenizer \(published: google-bert/"):
        golden_stack(empty=True, **stack)
    stack["resampler"]["tokenizer"] = stack["language_model"]["pretrained"]
    with pytest.raises(UserError, match=r"it has \d+ tokens, but the Q-Former knows \d+"):
        golden_stack(empty=True, **stack)


# -- LLaVA -------------------------------------------------------------------------------------------------------------


def llava_stack(golden, tmp_path, form):
    """LLaVA's own checkpoint: a LLaMA with `mm_*` in its configuration; the CLIP tower is published by itself."""
    c, state = golden.config, golden.tensors()
    tower = CLIPVisionConfig(**c["vision"])
    save_checkpoint(tmp_path / "clip", tower, strip(state, "model.vision_tower.vision_tower."))
    side = c["vision"]["image_size"]
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        tmp_path / "clip"
    )
    folder, projector = tmp_path / "llava", tmp_path / "mm_projector.bin"
    rest = {n: t for n, t in state.items() if ".vision_tower." not in n or form == "whole"}
    text = {**c["text"], "mm_hidden_size": c["vision"]["hidden_size"], "mm_projector_type": c["mm_projector_type"]}
    save_checkpoint(folder, LlamaConfig(**text), rest)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llava_llama"}
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(folder)
    torch.save({n: t for n, t in state.items() if "mm_projector" in n}, projector)
    return {
        "vision_tower": {"pretrained": str(tmp_path / "clip"), "feature_layer": c["mm_vision_select_layer"],
                         "feature_select": c["mm_vision_select_feature"]},
        "projector": {"type": "mlp", "pretrained": str(folder if form == "whole" else projector)},
        "language_model": {"pretrained": str(folder)},
    }  # fmt: skip


def expand(ids, labels, image_index, tokens, image_id):
    """Each mark becomes as many ids as an image has tokens, none of them in the loss."""
    new_ids, new_labels = [], []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        new_ids += [image_id] * tokens if token == image_index else [token]
        new_labels += [-100] * tokens if token == image_index else [label]
    return new_ids, new_labels


@pytest.mark.parametrize("form", ["whole", "mm_projector.bin"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_llava_as_its_own_code_saves_it(form, side, golden_stack, tmp_path):
    golden = Golden("llava_original")
    c, inputs = golden.config, golden.inputs
    wanted = golden.outputs if side == "right" else strip(golden.outputs, "left_")
    model = golden_stack(**llava_stack(golden, tmp_path, form)).model
    images = inputs["images"]
    assert_close(model.get_image_features(images), golden.outputs["image_features"])
    rows, slots, slot = [], [], 0
    for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True):
        real = mask.bool()
        count = int((ids[real] == c["image_token_index"]).sum())
        slots += range(slot, slot + count)
        slot += max(count, 1)  # upstream gives a row without images a blank one, which goes nowhere
        tokens = golden.outputs["image_features"].shape[1]
        rows.append(expand(ids[real], labels[real], c["image_token_index"], tokens, model.config.image_token_id))
    length = wanted["labels"].shape[1]
    assert length == max(len(ids) for ids, _ in rows)

    def padded(values, fill):
        empty = [fill] * (length - len(values))
        return values + empty if side == "right" else empty + values

    ids = torch.tensor([padded(ids, 0) for ids, _ in rows])
    labels = torch.tensor([padded(labels, -100) for _, labels in rows])
    mask = torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows])
    assert torch.equal(labels, wanted["labels"]) and torch.equal(mask, wanted["attention_mask"].long())
    real = mask.bool()
    embeds = model.model.embed(ids, images[slots])
    assert_close(embeds[real], wanted["inputs_embeds"][real])
    output = model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=images[slots])
    assert_close(output.logits[real], wanted["logits"][real])
    assert_close(output.loss, wanted["loss"])


# -- Ziya-BLIP2 --------------------------------------------------------------------------------------------------------


def test_ziya_blip2_with_its_language_model_elsewhere(golden_stack, save_llm, tmp_path):
    golden = Golden("ziya_blip2")
    c, inputs, wanted = golden.config, golden.inputs, golden.outputs
    vision, qformer = Blip2VisionConfig(**c["vision"]), Blip2QFormerConfig(**c["qformer"])
    config = Blip2Config(vision_config=vision, qformer_config=qformer, num_query_tokens=c["num_query_tokens"])
    folder = tmp_path / "ziya"
    save_checkpoint(folder, config, golden.tensors())
    side = c["vision"]["image_size"]
    BlipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    pretrained = str(folder)
    model = golden_stack(
        vision_tower={"pretrained": pretrained},
        resampler={"type": "qformer", "pretrained": pretrained},
        projector={"type": "linear", "pretrained": pretrained},
        language_model=save_llm(c["llama"], golden.tensors("llama")),
    ).model
    image_embeds = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    assert_close(image_embeds, wanted["image_embeds"])
    assert_close(model.model.resampler(image_embeds), wanted["query_output"])
    assert_close(model.get_image_features(inputs["pixel_values"]), wanted["language_inputs"])
    image = torch.full((c["num_query_tokens"],), model.config.image_token_id)
    for i in range(len(inputs["pixel_values"])):
        pixels, human, rest = inputs["pixel_values"][i : i + 1], inputs[f"human_ids_{i}"], inputs[f"rest_ids_{i}"]
        ids = torch.cat([human, image, rest])[None]
        labels = torch.cat([torch.full((len(human) + len(image),), -100), inputs[f"rest_labels_{i}"]])[None]
        assert torch.equal(labels, wanted[f"labels_{i}"])
        assert_close(model.model.embed(ids, pixels), wanted[f"inputs_embeds_{i}"])
        output = model(input_ids=ids, labels=labels, pixel_values=pixels)
        assert_close(output.logits, wanted[f"logits_{i}"])
        assert_close(output.loss, wanted[f"loss_{i}"])
