"""Questions on one picture, merged: as turns of one conversation, or each as if it stood alone."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    Blip2QFormerConfig,
    BlipImageProcessorPil,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)
from transformers.integrations import flex_attention as flex

from support.conversations import make_processor, make_row, turn
from support.gloo import in_processes
from support.gradients import assert_same, gradients, math_of_flex
from support.source_files import write
from support.tiny_families import tiny
from support.tiny_pieces import make_tokenizer, tiny_stack
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.base.names import ROW_HEADS
from vlm_sft.base.words import language_of
from vlm_sft.batch.by_length import PACK
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.batch.counts import owners_of, rows_and_tokens
from vlm_sft.batch.processor import VLMProcessor
from vlm_sft.data.dataset import ROW_FEATURES, merged_rows
from vlm_sft.model import modeling
from vlm_sft.model.configuration import VLMConfig
from vlm_sft.model.modeling import VLMForConditionalGeneration
from vlm_sft.model.positions import kept_apart
from vlm_sft.recipe.libraries import build_sft_config
from vlm_sft.rows.merging import ids_of, merged
from vlm_sft.rows.messages import answers_of, unpacked
from vlm_sft.stack.kinds import compose
from vlm_sft.systems.mplug_owl import MPLUGOwlAbstractorConfig
from vlm_sft.systems.qwen_vl import QwenVLResamplerConfig
from vlm_sft.templates.template import load_template
from vlm_sft.train import train
from vlm_sft.training.run_rows import load_rows

QUESTIONS = ["what is it?", "这是什么颜色？", "how many", "\nis it red " * 3, "and?"]
ANSWERS = ["a cat", "红色", "so " * 9, "two dogs 在草地上", "7"]


@pytest.fixture
def rows(photos):
    """Three questions on one picture, two on another two, of which one goes on, text alone, and one more."""
    return questions(photos)


def questions(photos):
    asked = [turn(question, answer, images=1) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    two = [turn(question, answer, images=2) for question, answer in zip(QUESTIONS, ANSWERS[::-1], strict=True)]
    made = [make_row(each, photos, number) for number, each in enumerate(asked[:3])]
    made += [make_row(two[3] + turn("and", "b"), photos[2:], 3), make_row(two[4], photos[2:], 4)]
    return [*made, make_row(turn("hello there", "hi"), photos, 5), make_row(asked[4], photos[5:], 6)]


def shared(rows):
    """The same rows, those on one picture behind one prefix."""
    return [merged(rows[:3], True), merged(rows[3:5], True), *rows[5:]]


def packs(rows):
    first, second, text, last = shared(rows)
    return [{PACK: [text, first, second]}, {PACK: [last]}]


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "encoder_hidden_size": 24, "initializer_range": 0.1}  # fmt: skip
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 7, "initializer_range": 0.1}  # fmt: skip
TEXT = {"vocab_size": 400, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
PATCHES = {"vision_feature_select": "patch"}
STACKS = {
    "mlp": (16, {"projector_type": "mlp", "vision_feature_layer": -2, **PATCHES}),
    "pixel_shuffle": (4, {"projector_type": "pixel_shuffle", "projector_options": {"scale_factor": 2}, **PATCHES}),
    "qformer": (4, {"resampler_type": "qformer", "resampler_config": Blip2QFormerConfig(**SIZES)}),
    "cross_attention": (
        4,
        {
            "resampler_type": "cross_attention",
            "resampler_config": QwenVLResamplerConfig(hidden_size=16, num_attention_heads=2, encoder_hidden_size=24),
            **PATCHES,
        },
    ),
    "abstractor": (
        5,
        {
            "resampler_type": "abstractor",
            "resampler_config": MPLUGOwlAbstractorConfig(**{**SIZES, "hidden_size": 24}),
            "projector_type": "linear_end",
        },
    ),
}
LANGUAGES = {
    "llama": LlamaConfig(**TEXT, intermediate_size=48, initializer_range=0.1),
    "qwen2": Qwen2Config(**TEXT, intermediate_size=48, initializer_range=0.1, num_key_value_heads=2),
    "opt": OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32, init_std=0.1),
    "gpt2": GPT2Config(**TEXT, initializer_range=0.1),
    "mistral": MistralConfig(
        **TEXT, intermediate_size=48, initializer_range=0.1, num_key_value_heads=2, sliding_window=4096
    ),
}


def composed(stack="mlp", language="llama", attention="sdpa"):
    """(model, collator) of a stack of these parts, everything trained."""
    torch.manual_seed(0)
    tokens, options = STACKS[stack]
    template = load_template("vicuna_v1")
    processor = VLMProcessor(
        BlipImageProcessorPil(size={"height": 28, "width": 28}), make_tokenizer(), template, tokens
    )
    config = VLMConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LANGUAGES[language], num_query_tokens=4,
        image_token_id=processor.image_token_id, num_image_tokens=tokens, **options,
    )  # fmt: skip
    model = VLMForConditionalGeneration(config).eval()
    model.model.language_model.set_attn_implementation(attention)
    return model, MultimodalCollator(processor)


def loss_and_gradients(model, collator, items):
    model.zero_grad()
    batch = collator(items)
    loss = model(**batch, supervised_only=True, use_cache=False, num_items_in_batch=50).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    ("stack", "language", "attention"),
    [
        *[(stack, "llama", "sdpa") for stack in STACKS],
        *[("mlp", language, "sdpa") for language in LANGUAGES if language != "llama"],
        ("qformer", "opt", "eager"),
        ("mlp", "llama", "eager"),
    ],
)
def test_questions_behind_one_prefix_give_what_separate_rows_give(rows, stack, language, attention):
    """fp32: losses and gradients, with and without packing."""
    model, collator = composed(stack, language, attention)
    alone = loss_and_gradients(model, collator, rows)
    for items in (shared(rows), packs(rows)):
        assert_same(loss_and_gradients(model, collator, items), alone)
    plain, once = (collator(items)["pixel_values"] for items in (rows, shared(rows)))
    assert (len(plain), len(once)) == (8, 4), "each picture passes the tower once"


def test_flex_attention_sees_the_prefix_in_its_mask_of_blocks(rows, monkeypatch):
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", math_of_flex)
    model, collator = composed(attention="flex_attention")
    with torch._dynamo.config.patch(disable=True):
        found = [loss_and_gradients(model, collator, items) for items in (shared(rows), packs(rows))]
    model.model.language_model.set_attn_implementation("sdpa")
    for each in found:
        assert_same(each, loss_and_gradients(model, collator, rows))


def test_with_lora_and_through_the_trainer_the_loss_is_that_of_the_rows(make_trainer, pieces, rows):
    trainer = make_trainer(
        stack=tiny_stack(pieces), lora={"r": 4}, train={"projector": 1e-2, "resampler": 1e-3}, chat_template="vicuna_v1"
    )
    collate = trainer.data_collator
    alone = gradients(trainer, collate(rows))
    assert_same(gradients(trainer, collate(shared(rows))), alone)
    assert_same(gradients(trainer, collate(packs(rows))), alone)


def test_a_batch_says_how_many_rows_it_has_and_questions_on_a_picture_have_one_owner(rows):
    _, collator = composed()
    batch = collator(packs(rows))
    count, tokens = rows_and_tokens(batch)
    lengths = [len(collator.sample(row, with_images=False).chat.input_ids) for row in shared(rows)]
    assert int(count) == 7 and int(tokens) == sum(lengths) and ROW_HEADS in batch
    count, _ = rows_and_tokens(collator(shared(rows)))
    assert int(count) == 7
    owners, _ = owners_of(batch)
    owned = owners[0].unique_consecutive().tolist()
    assert len(owned) == 3 and len(set(owned)) == 3, "a sequence of text, of one picture's questions and of another's"


def test_what_no_mask_can_say_is_refused(rows):
    model, collator = composed(language="mistral")
    model.model.language_model.config.sliding_window = 16
    with pytest.raises(UserError, match=r"layers of this model look back 16 tokens.*set sft.max_length=16 or less"):
        loss_and_gradients(model, collator, shared(rows))
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"independent: flash_attention_2 takes no mask.*sdpa or flex_attention"):
        loss_and_gradients(model, collator, shared(rows))


def test_loss_weights_go_with_their_tokens(rows):
    class Weighs(MultimodalCollator):
        def encode(self, row, with_images=True):
            sample = super().encode(row, with_images)
            sample.loss_weights = [1.0 + k / 50 for k in range(len(sample.chat.labels))]
            return sample

    model, collator = composed()
    weighs = Weighs(collator.processor)
    alone = loss_and_gradients(model, weighs, rows)
    assert_same(loss_and_gradients(model, weighs, packs(rows)), alone)
    sample = weighs.sample(merged(rows[:3], True))
    assert [row.id for row in sample.rows] == ["s/0", "s/1", "s/2"] and len(sample.images) == 1


def test_a_picture_that_is_broken_rejects_each_of_its_questions(rows):
    _, collator = composed()
    with pytest.raises(UserError, match=r"s/0.*nowhere\.png"):
        collator([merged([{**row, "images": [{"path": "nowhere.png", "bytes": None}]} for row in rows[:3]], True)])
    collator.drop_rejected = True
    for independent in (True, False):
        broken = [{**row, "images": [{"path": "nowhere.png", "bytes": None}]} for row in rows[:3]]
        batch = collator([merged(broken, independent), rows[5]])
        assert [name for _, name, *_ in batch["rejected_rows"]] == ["s/0", "s/1", "s/2"]


def test_a_model_whose_questions_see_each_other_is_refused_before_the_first_step(make_trainer, rows, monkeypatch):
    def blind(lm, embeds, lengths, own, heads):
        mask, positions = kept_apart(lm, embeds, lengths, own, heads)
        return None if heads is None else torch.ones_like(mask).tril(), positions

    trainer = make_trainer(chat_template="vicuna_v1")
    stored = Dataset.from_list(rows[:3], features=ROW_FEATURES)
    trainer.train_dataset = merged_rows(stored, [[2, 0, 1]], True)
    trainer.check_packing()
    monkeypatch.setattr(modeling, "kept_apart", blind)
    with pytest.raises(UserError, match=r"independent: in this model \(llama\) a question sees the one before it.*s/2"):
        trainer.train()


# ---------------------------------------------------------------------------------------------------------- a source


def vqa(tmp_path, photos, more=()):
    """Five questions on each of two pictures, interleaved, one on a third, one wrong, and one of text alone."""
    asked = [
        {"messages": turn(QUESTIONS[k], ANSWERS[k], images=1), "images": [photos[p]], "id": f"{p}-{k}"}
        for k in range(5)
        for p in range(2)
    ]
    single = {"messages": turn("who?", "猫", images=1), "images": [photos[2]], "id": "single"}
    broken = {"messages": turn("who?", "猫", images=1), "images": ["gone.png"], "id": "broken"}
    text = {"messages": turn("hello", "hi"), "images": [], "id": "text"}
    return write(tmp_path / "vqa.jsonl", [*asked[:4], single, broken, text, *asked[4:], *more])


def loaded(recipe_file, source, name="recipe", sft=None, template="vicuna_v1", **data):
    """What `load_rows` gives, and what was said."""
    base = {"output_dir": "out", "max_length": 400, "bf16": False, "use_cpu": True}
    sft = {**base, **(sft or {})}
    path = recipe_file(name, sft=sft, data={"train": [source], "max_rejected": 0.2, **data})
    recipe = load_recipe(path)
    console = Console(file=io.StringIO(), width=140)
    collator = MultimodalCollator(make_processor(template), max_length=sft["max_length"])
    return load_rows(recipe, collator, build_sft_config(recipe), console), console.file.getvalue(), collator


@pytest.mark.parametrize("independent", [False, True])
def test_a_source_is_merged_and_the_ledger_counts_rows_and_merges(recipe_file, tmp_path, photos, independent):
    source = {"path": vqa(tmp_path, photos), "format": "messages", "merge_by_image": True, "independent": independent}
    sft = {"packing": True}
    (rows, _, notes, lengths, _), said, collator = loaded(recipe_file, source, sft=sft)
    assert len(rows) == 4 and "vqa: 10 rows merged by image into 2" in said
    entry = notes["ledger"]["train"]["sources"]["vqa"]
    assert (entry["read"], entry["used"], entry["merged"], entry["conversations"]) == (13, 12, 10, 2)
    assert entry["rejected"] == {"image missing": 1}
    assert sorted(each for row in rows for each in ids_of(unpacked(row))) == sorted(
        [*(f"vqa/{p}-{k}" for p in range(2) for k in range(5)), "vqa/single", "vqa/text"]
    )
    assert lengths == [len(collator.sample(row, with_images=False).chat.input_ids) for row in rows]
    orders = [[each[-1] for each in ids_of(unpacked(row))] for row in rows if len(row["messages"]) > 2]
    assert sorted("01234") not in orders and orders[0] != orders[1], "drawn, for each picture anew"
    again = loaded(recipe_file, source, sft=sft)[0]
    assert again.train[:] == rows[:] and again.lengths == lengths
    other = loaded(recipe_file, source, sft={**sft, "seed": 3})[0]
    assert other.train[:] != rows[:]
    batch = collator([rows[k] for k in range(4)])
    assert (batch["labels"] != -100).sum() == sum(
        sum(label != -100 for label in collator.sample(row).chat.labels) for row in rows
    )


def test_no_conversation_is_longer_than_max_length_and_no_turn_is_lost(recipe_file, tmp_path, photos):
    more = [
        {"messages": turn("so " * (k % 7), ANSWERS[k % 5] * 2, images=1), "images": [photos[3]], "id": f"3-{k}"}
        for k in range(1, 40)
        if k % 7
    ]
    for independent in (False, True):
        source = {"path": vqa(tmp_path, photos, more), "format": "messages", "merge_by_image": True}
        source["independent"] = independent
        (rows, _, notes, *_), _, collator = loaded(recipe_file, source, sft={"max_length": 300})
        samples = [collator.sample(row) for row in rows]
        assert all(len(sample.chat.input_ids) <= 300 and not sample.turns_lost for sample in samples)
        assert len({each for row in rows for each in ids_of(unpacked(row))}) == 12 + len(more)
        own = [row for row in rows if row["images"] and row["images"][0]["path"] == photos[3]]
        assert 1 < len(own) < len(more) / 2
        assert notes["train_rows"]["turns_lost"] == 0 and notes["train_rows"]["longest"] <= 300


def test_weights_and_languages_count_conversations_and_evaluation_stays_row_by_row(recipe_file, tmp_path, photos):
    path = vqa(tmp_path, photos)
    source = {"path": path, "format": "messages", "merge_by_image": True, "weight": 1.0}
    other = {"path": path, "format": "messages", "name": "other", "weight": 1.0}
    held = {**source, "merge_by_image": False}
    data = {"train": [source, other], "sampling": "weights", "eval": [held], "languages": {"zh": 1, "en": 1}}
    (rows, eval_rows, notes, *_), _, _ = loaded(recipe_file, source, **data)
    drawn = [row["source"] for row in rows]
    assert len(eval_rows) == 12 and abs(drawn.count("vqa") - drawn.count("other")) <= 2
    entry = notes["ledger"]["train"]["sources"]["vqa"]
    counts = [len(ids_of(unpacked(row))) for row in rows if row["source"] == "vqa"]
    assert entry["used"] + entry["repeated"] == sum(counts) and max(counts) > 1
    for row in rows:
        languages = {language_of(text) for text in answers_of(row)}
        assert len(languages) == 1, "a conversation is of one language"


def test_two_processes_merge_as_one_does(recipe_file, tmp_path, photos):
    source = {"path": vqa(tmp_path, photos), "format": "messages", "merge_by_image": True}

    def found(rank=0):
        (rows, _, notes, *_), said, _ = loaded(recipe_file, source, name=f"r{rank}")
        return rows[:], notes, said

    alone = found()
    (tmp_path / "launch").mkdir()
    assert in_processes(found, tmp_path / "launch") == [alone, alone]


def test_where_nothing_can_be_merged_the_sentence_says_why(recipe_file, tmp_path, photos):
    lines = [{"image": photos[k % 2], "caption": "猫"} for k in range(4)]
    source = {"path": write(tmp_path / "c.jsonl", lines), "format": "caption", "merge_by_image": True}
    (rows, *_), said, _ = loaded(recipe_file, source)
    assert len(rows) == 4 and "merged" not in said, "a picture without a question is no turn"
    with pytest.raises(
        UserError, match=r'no rows of the source "c" can be merged by image: row c/.* an answer follows'
    ):
        loaded(recipe_file, {**source, "independent": True}, template="plain")


SOURCE = {"path": "a.jsonl", "format": "messages"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"data": {"train": [{**SOURCE, "independent": True}]}},
            "`independent` says how rows on one picture are merged",
        ),
        (
            {"data": {"train": [{**SOURCE, "merge_by_image": True}], "streaming": True}},
            "`merge_by_image` needs all rows on a picture, which a stream does not know",
        ),
        (
            {"data": {"train": [SOURCE], "test": [{**SOURCE, "merge_by_image": True}]}},
            "rows of data.test are asked one by one",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(recipe_file, changes, sentence):
    with pytest.raises(UserError, match=rf"line \d+: {sentence}"):
        load_recipe(recipe_file(**changes))


def test_stacks_that_cannot_share_a_picture_are_refused(recipe_file, pieces):
    stack = tiny_stack(pieces)
    source = {**SOURCE, "merge_by_image": True}
    stack["resampler"]["type"] = "instruct_qformer"
    with pytest.raises(UserError, match="instruct_qformer sees a picture anew for each question"):
        load_recipe(recipe_file(stack=stack, data={"train": [source]}))
    stack = tiny_stack(pieces, language={"attn_implementation": "flash_attention_2"})
    with pytest.raises(UserError, match="flash_attention_2 takes no mask in which several questions"):
        load_recipe(recipe_file(stack=stack, data={"train": [{**source, "independent": True}]}))
    load_recipe(recipe_file(stack=stack, data={"train": [source]}))


@pytest.mark.parametrize("name", ["paligemma", "kosmos-2"])
def test_families_that_cannot_share_a_picture_are_refused_by_name(recipe_file, name):
    source = {**SOURCE, "merge_by_image": True, "independent": True}
    path = recipe_file(model={"pretrained": str(tiny(name))}, data={"train": [source]})
    text = yaml.safe_load(path.read_text())
    text.pop("stack"), text.pop("chat_template")
    path.write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match=rf"`independent` is not for a {name} model"):
        compose(load_recipe(path))


@pytest.mark.slow
@pytest.mark.parametrize("independent", [False, True])
def test_a_run_goes_on_exactly_packed_and_with_a_cache(recipe_file, tmp_path, photos, monkeypatch, independent):
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: {"positions": 0, "max_difference": 0.0})
    source = {"path": vqa(tmp_path, photos), "format": "messages", "merge_by_image": True, "independent": independent}

    def run(name: str, *, resume: str | None = None, cache: bool = False) -> Path:
        sft = {"output_dir": str(tmp_path / name), "packing": True, "max_length": 400, "max_steps": 4,
               "per_device_train_batch_size": 1, "learning_rate": 1e-3, "bf16": False, "report_to": "none",
               "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "use_cpu": True,
               "dataloader_num_workers": 0, "resume_from_checkpoint": resume}  # fmt: skip
        more = {"cache": {"path": str(tmp_path / "features")}} if cache else {}
        data = {"train": [source], "max_rejected": 0.2}
        return train(load_recipe(recipe_file(name, chat_template="vicuna_v1", sft=sft, data=data, **more)))

    whole, gone_on, cached = (
        run("whole"),
        run("on", resume=str(tmp_path / "whole" / "checkpoint-2")),
        run("c", cache=True),
    )
    trained, again = (load_file(folder / "trained.safetensors") for folder in (whole, gone_on))
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    steps = [
        [row["loss"] for row in json.loads((folder / "metrics.json").read_text()) if "loss" in row]
        for folder in (whole, gone_on, cached)
    ]
    assert steps[0] == steps[1] and steps[2] == pytest.approx(steps[0], rel=1e-5)
    ledger = json.loads((whole / "bundle.json").read_text())["ledger"]["train"]["sources"]["vqa"]
    assert (ledger["used"], ledger["merged"], ledger["conversations"]) == (12, 10, 2)
