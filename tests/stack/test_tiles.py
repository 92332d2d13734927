"""Images cut into tiles: a stack made of the parts of a LLaVA-1.6 is that LLaVA-1.6, and what does not go says so."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from support.bundles import trained
from support.conversations import make_row, turn
from support.gradients import assert_same, gradients
from support.pictures import photo
from support.tiny_families import processor_of, tiny
from vlm_sft import load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.batch.by_length import PACK
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.bundle.handover import hand_over
from vlm_sft.cache.prefix import find_prefix
from vlm_sft.evaluation.scoring import Question, ask, ask_blindly, without_image
from vlm_sft.machine.fit import Gpu, changed, fit
from vlm_sft.model.towers import TileLayout
from vlm_sft.preflight.dry_run import describe_image, weigh
from vlm_sft.preflight.launch import read_launch
from vlm_sft.rows.merging import merged
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.stack.kinds import compose
from vlm_sft.stack.tiles import AnyresProcessor

SIZES = [(28, 28), (40, 30), (100, 20), (20, 100), (57, 56), (1, 60), (300, 2), (333, 111), (29, 83), (150, 149)]
VISION = {"tiles": "anyres", "feature_layer": -2, "feature_select": "patch"}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what? 这是什么？"}]}]


def published(source, folder):
    """A LLaVA-1.6 whose tensors are named as llava-hf publishes them."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    assert {"image_newline", "language_model.model.embed_tokens.weight"} <= named.keys()
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture
def recipe(recipe_file, tmp_path):
    """A recipe of the parts of a tiny LLaVA-1.6; `of` says from which folder, `vision` what more of its tower."""

    def make(of=None, vision=VISION, name="recipe", **changes):
        of, projector = str(of or tiny("llava_next")), changes.pop("projector", None)
        stack = {
            "vision_tower": {"pretrained": of, **vision},
            "projector": projector or {"type": "mlp", "pretrained": of},
            "language_model": {"pretrained": of},
        }
        return load_recipe(recipe_file(name, **{"stack": stack, "chat_template": "mistral", **changes}))

    return make


@torch.no_grad()
def test_a_stack_of_its_published_parts_is_llava_next(recipe, tmp_path):
    """In a batch of rows whose images have other numbers of tiles; logits, and what is answered with a cache."""
    folder = published(tiny("llava_next"), tmp_path / "published")
    stack, native = build_stack(recipe(folder)), AutoModelForImageTextToText.from_pretrained(folder).eval()
    own = AutoProcessor.from_pretrained(folder, backend="pil")
    images = [photo(1, (57, 56)), photo(2, (100, 20)), photo(3, (28, 28))]
    text = [f"<s>[INST] <image>\n{word} [/INST]" for word in ("what? 这是什么？", "a cat", "红")]
    theirs = own(text=text, images=images, return_tensors="pt", padding=True, padding_side="left",
                 add_special_tokens=False)  # fmt: skip
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": word}]}]
        for word in ("what? 这是什么？", "a cat", "红")
    ]
    rows = [
        stack.processor.encode_chat(each, True, [image.size]) for each, image in zip(conversations, images, strict=True)
    ]
    ours = {**stack.processor.batch(rows, "left"), **stack.processor.image_inputs(images, [""] * 3)}
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert len({len(each) for each in theirs["pixel_values"]}) == 1 and len(ours["pixel_values"]) == 5 + 3 + 3
    model = stack.model.eval()
    labels = ours.pop("labels")
    assert (labels == -100).all()
    real = ours["attention_mask"].bool()
    wanted, got = native(**theirs).logits, model(**ours).logits
    torch.testing.assert_close(got[real], wanted[real], atol=1e-5, rtol=0)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": own.tokenizer.pad_token_id}
    said = native.generate(**theirs, **options)[:, theirs["input_ids"].shape[1] :]
    assert model.generate(**model.generation_inputs(ours, 1), **options).tolist() == said.tolist()
    beams = {**options, "num_beams": 2}
    alone = [
        native.generate(**own(text=one, images=[image], return_tensors="pt", add_special_tokens=False), **beams)
        for one, image in zip(text, images, strict=True)
    ]
    direct = model.generate(**ours, **beams)[:, ours["input_ids"].shape[1] :]
    for row, each in zip(direct, alone, strict=True):
        answer = each[0, -8:]
        assert row[: len(answer)].tolist() == answer.tolist(), "images of a row are repeated together for beams"


def test_tokens_are_counted_and_images_cut_as_llava_nexts_own_processor_does(recipe):
    ours, own = compose(recipe()).processor, AutoProcessor.from_pretrained(tiny("llava_next"), backend="pil")
    assert isinstance(ours, AnyresProcessor) and ours.reads_sizes
    for size in SIZES:
        image = photo(1, size)
        wanted = own(text="<image>", images=[image], return_tensors="pt", add_special_tokens=False)
        assert ours.count_image_tokens(size) == wanted["input_ids"].shape[1], size
        made = ours.image_inputs([image], [""])
        assert torch.equal(made["pixel_values"], wanted["pixel_values"][0]), size
        assert made["image_sizes"].tolist() == wanted["image_sizes"].tolist() == [[size[1], size[0]]]
        direct = ours(text="<image>", images=[image], return_tensors="pt", add_special_tokens=False)
        assert direct["input_ids"].tolist() == wanted["input_ids"].tolist(), "called as transformers' processors are"
    assert "depends on its size: 24 for" in describe_image(ours)
    with pytest.raises(UserError, match="places for 1 images, but the sizes of 0 are given"):
        ours.encode_chat(MESSAGES, True)


@pytest.fixture
def rows(tmp_path):
    """Rows with images of other shapes, with two and with none."""
    paths = []
    for number, size in enumerate([(57, 56), (100, 20), (28, 28), (20, 90)]):
        photo(number, size).save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    said = ["a cat", "两只狗", "so so", "红色"]
    return [
        make_row(turn("what?" if k % 2 else "这是什么？", said[k], images=k % 3), paths[k:] + paths[:k], k)
        for k in range(4)
    ]


@pytest.mark.parametrize("tiles", ["anyres", "dynamic"])
def test_rows_that_are_packed_or_share_a_picture_have_the_losses_and_gradients_of_rows_alone(make_trainer, rows, tiles):
    of = str(tiny("llava_next"))
    stack = {"vision_tower": {"pretrained": of, **VISION, "tiles": tiles}, "projector": {"type": "mlp"},
             "language_model": {"pretrained": of}}  # fmt: skip
    trainer = make_trainer(stack=stack, chat_template="mistral", lora={"r": 2}, train={"projector": 1e-2})
    assert not trainer.image_use, "images cannot be exchanged where each has its own number of tokens"
    collate = trainer.data_collator
    alone = gradients(trainer, collate(rows))
    assert alone and any(name.endswith("layout.newline") for name in alone) == (tiles == "anyres")
    assert_same(gradients(trainer, collate([{PACK: rows[:3]}, {PACK: rows[3:]}])), alone)
    wide = rows[1]["images"][0]  # of several tiles
    on_it = [{**row, "images": [wide]} for row in (rows[1], make_row(turn("and?", "two", images=1), [wide["path"]], 5))]
    apart, asked = gradients(trainer, collate([*on_it, rows[2]])), merged(on_it, True)
    assert len(collate([asked])["pixel_values"]) < len(collate(on_it)["pixel_values"]), "it is cut and looked at once"
    assert_same(gradients(trainer, collate([asked, rows[2]])), apart)
    assert_same(gradients(trainer, collate([{PACK: [rows[2], asked]}])), apart)


@pytest.mark.parametrize("tiles", ["anyres", "dynamic"])
def test_what_is_said_without_the_pictures_is_asked_about_grey_ones(recipe, rows, tiles):
    stack = build_stack(recipe(vision={**VISION, "tiles": tiles}, projector={"type": "mlp"}))
    questions = [Question(row["messages"][:1], row["images"], ["猫"], str(n)) for n, row in enumerate(rows)]
    tick, options = (lambda count: None), {"max_new_tokens": 4}
    said = ask(stack.model.eval(), stack.processor, questions, 4, options, tick)
    blind = ask_blindly(stack.model, stack.processor, questions, said, 4, options, tick)
    grey = [without_image(each) if each.images else each for each in questions]
    alone = [ask(stack.model, stack.processor, [each], 1, options, tick)[0] for each in grey]
    assert blind == alone and not any(each.refused for each in questions)


def test_a_run_with_rows_to_evaluate_on_says_that_the_use_of_images_is_not_measured(recipe, tmp_path):
    said: list[str] = []
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "messages"}
    for held_out in ([source], []):
        build_stack(recipe(data={"train": [source], "eval": held_out}, name=f"eval{len(held_out)}"), said.append)
    assert len([each for each in said if each.startswith("eval_image_use is not measured: how many tokens")]) == 1


def test_a_batch_of_text_alone_gives_the_newline_a_gradient_of_zero(recipe, monkeypatch):
    monkeypatch.setattr("vlm_sft.model.modeling.others_wait_for", lambda path, training: True)
    stack = build_stack(recipe())
    model, text = stack.model.train(), [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "yes"}]
    model(**stack.processor.batch([stack.processor.encode_chat(text)])).loss.backward()
    assert model.model.projector.layout.newline.grad.eq(0).all()


def test_a_bundle_keeps_the_newline_and_how_images_are_cut(recipe, tmp_path):
    trained(recipe(vision={**VISION, "tiles": "dynamic"}, projector={"type": "mlp"}), tmp_path / "dyn")
    second = recipe(projector={"type": "mlp"}, name="second")
    with pytest.raises(UserError, match=r"trained with stack\.vision_tower\.tiles: .*'dynamic'.*use the same"):
        hand_over(build_stack(second), tmp_path / "dyn")
    model = trained(second, tmp_path / "bundle")
    loaded, processor = load(tmp_path / "bundle")
    assert torch.equal(loaded.model.projector.layout.newline, model.model.projector.layout.newline)
    assert isinstance(processor, AnyresProcessor) and processor.count_image_tokens((57, 56)) > 4
    settings = tmp_path / "bundle" / "processor_config.json"
    settings.write_text(settings.read_text().replace("56", "84"))
    with pytest.raises(UserError, match="its processor cuts images otherwise than its recipe"):
        load(tmp_path / "bundle")


def test_a_first_stage_that_saw_whole_images_is_gone_on_from(stack_recipe, tmp_path):
    vision = {"feature_layer": -2, "feature_select": "patch"}
    first = trained(stack_recipe("clip", projector="mlp", vision=vision), tmp_path / "first")
    stack = build_stack(stack_recipe("clip", projector="mlp", vision={**vision, "tiles": "anyres"}))
    newline = stack.model.model.projector.layout.newline.clone()
    hand_over(stack, tmp_path / "first")
    ours, theirs = (dict(each.model.projector.named_parameters()) for each in (stack.model, first))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(ours["layout.newline"], newline), "it is new"
    assert stack.model.config.tiles["grids"] == [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def test_a_step_is_weighed_with_tiles_and_fit_makes_it_fit(recipe):
    sft = {"output_dir": "out", "bf16": False, "max_length": 200, "per_device_train_batch_size": 4}
    made = recipe(sft=sft, lora={"r": 2, "target_modules": ["q_proj"]})
    weighed = weigh(made, read_launch())
    assert weighed.estimate.activations > 0 and "larger images take more" in str(weighed.step)
    found = fit(made, Gpu(int(weighed.estimate.total * 0.8)))
    assert found.settings and all(each.batch * each.accumulation == 4 for each in found.settings)
    for each in found.settings:
        assert weigh(changed(made, each), read_launch()).estimate.total == each.memory <= weighed.estimate.total * 0.8


def test_the_cache_is_off_and_says_why(recipe):
    made = recipe(cache={"path": "cache"})
    composed = compose(made)
    parts, why = find_prefix(made, composed, MultimodalCollator(composed.processor))
    assert parts == () and "the cache is off: it keeps one picture of an image, and `tiles` makes several" in why


REFUSED = {
    "pad_to_square": ({**VISION, "pad_to_square": True}, "tiles keep the shape of an image"),
    "grids of dynamic": ({"tiles": "dynamic", "tile_grids": [[1, 2]]}, "`tile_grids` belongs to `tiles: anyres`"),
    "max of anyres": ({**VISION, "max_tiles": 3}, "`max_tiles` belongs to `tiles: dynamic`"),
    "grids without tiles": ({"tile_grids": [[1, 2]]}, "`tile_grids` belongs to `tiles: anyres`"),
    "no grid": ({**VISION, "tile_grids": []}, "it is empty"),
    "class token": ({"tiles": "anyres"}, "a tile has 5, which is no square; set .*feature_select: patch"),
    "far too many": ({**VISION, "tile_grids": [[1, 10**6]]}, r"`tile_grids` says image_grid_pinpoints"),
    "too many tiles": ({**VISION, "tiles": "dynamic", "max_tiles": 10**6}, r"`max_tiles` says max_patches"),
    "no tiles for one that cuts": ({"feature_select": "patch"}, r"or say stack\.vision_tower\.tiles"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_with_tiles_is_refused_in_one_sentence(case, recipe):
    vision, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence) as caught:
        compose(recipe(vision=vision))
    assert "\n" not in str(caught.value)


def test_queries_are_not_laid_out(stack_recipe):
    with pytest.raises(UserError, match="behind a qformer there are queries in place of patches; use `tiles: dynamic`"):
        compose(stack_recipe("blip2", resampler="blip2", vision={"tiles": "anyres"}))


def test_queries_of_dynamic_tiles_are_as_many_as_tiles(stack_recipe):
    stack = build_stack(stack_recipe("blip2", resampler="blip2", vision={"tiles": "dynamic", "max_tiles": 4}))
    image = Image.new("RGB", (80, 20), "red")
    ids = stack.processor.encode_chat(MESSAGES, True, [image.size]).input_ids
    made = stack.processor.image_inputs([image], ["what?"])
    assert made["pixel_values"].shape == (5, 3, 28, 28) and "image_sizes" not in made
    assert ids.count(stack.processor.image_token_id) == 5 * 4 == stack.processor.count_image_tokens(image.size)
    assert stack.model.eval()(torch.tensor([ids]), **made).logits.isfinite().all()


INTERNVL = """{%- for message in messages -%}
{{- '<|im_start|>' ~ message['role'] ~ '\n' -}}{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'][0]['text'] ~ '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}{%- else -%}
{%- for part in message['content'] -%}
{{- '<img>' ~ image_token ~ '</img>\n' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


@torch.no_grad()
def test_dynamic_tiles_behind_a_pixel_shuffle_are_internvl(recipe, tmp_path):
    """`<img>` and `</img>` are the template's; the placeholder between them is ours, and InternVL's has another id."""
    folder = tiny("internvl")
    (tmp_path / "internvl.jinja").write_text(INTERNVL, encoding="utf-8")
    projector = {"type": "pixel_shuffle_mlp", "scale_factor": 2, "pretrained": str(folder)}
    vision = {"feature_select": "patch", "tiles": "dynamic"}
    made = recipe(folder, vision, chat_template=str(tmp_path / "internvl.jinja"), projector=projector)
    stack, native = build_stack(made), AutoModelForImageTextToText.from_pretrained(folder).eval()
    own, ours = processor_of("internvl").native, stack.processor
    assert stack.model.config.tiles == {"type": "dynamic", "min": 1, "max": 4}, "as the checkpoint's own"
    images = [photo(1, (57, 56)), photo(2, (100, 20)), photo(3, (28, 28))]
    for size in SIZES:
        wanted = own(text=own.image_token, images=[photo(1, size)], return_tensors="pt")
        assert ours.count_image_tokens(size) == wanted["input_ids"].shape[1] - 2, size
        assert torch.equal(ours.encode_images([photo(1, size)]), wanted["pixel_values"]), size
    words = ("what? 这是什么？", "a cat", "红")
    text = [f"<|im_start|>user\n{own.image_token}\n{word}<|im_end|>\n<|im_start|>assistant\n" for word in words]
    theirs = own(text=text, images=images, return_tensors="pt", padding=True, padding_side="left")
    conversations = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": word}]}] for word in words
    ]
    rows = [ours.encode_chat(each, True, [image.size]) for each, image in zip(conversations, images, strict=True)]
    batch = {**ours.batch(rows, "left"), **ours.image_inputs(images, [""] * 3)}
    same = batch["input_ids"].masked_fill(batch["input_ids"] == ours.image_token_id, native.config.image_token_id)
    assert same.tolist() == theirs["input_ids"].tolist()
    del batch["labels"]
    real, model = batch["attention_mask"].bool(), stack.model.eval()
    wanted, got = native(**theirs).logits, model(**batch).logits
    torch.testing.assert_close(got[real], wanted[real], atol=1e-5, rtol=0)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": ours.tokenizer.pad_token_id}
    said = native.generate(**theirs, **options)[:, theirs["input_ids"].shape[1] :]
    assert model.generate(**model.generation_inputs(batch, 1), **options).tolist() == said.tolist()


def test_tiles_that_do_not_fit_their_sizes_are_said():
    layout = TileLayout(8, 28, [[28, 56]])
    with pytest.raises(ValueError, match="The batch has 2 tiles, but images of these sizes"):
        layout(torch.zeros(2, 4, 8), torch.tensor([[28, 56]]))
