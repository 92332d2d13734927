"""The composed model against transformers' own classes, built from the same tiny weights (fp32, atol 1e-5)."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlm_sft.model.configuration import VLMConfig
from vlm_sft.model.losses import CHUNK_BYTES, supervised_positions
from vlm_sft.model.modeling import VLMForConditionalGeneration

ATOL = 1e-5
IMAGE = 96
TEXT = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 7, "initializer_range": 0.1}  # fmt: skip
LLAVA_NAMES = {
    "model.multi_modal_projector.linear_1": "model.projector.layers.0",
    "model.multi_modal_projector.linear_2": "model.projector.layers.1",
}
BLIP2_NAMES = {
    "language_model.model": "model.language_model",
    "language_model.lm_head": "lm_head",
    "language_projection": "model.projector.linear",
    "qformer": "model.resampler.qformer",
    "query_tokens": "model.resampler.query_tokens",
    "vision_model": "model.vision_tower",
}


def rename(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        if name == theirs or name.startswith(theirs + "."):
            return ours + name[len(theirs) :]
    return name


def copy_weights(native, ours, table) -> None:
    ours.load_state_dict({rename(n, table): t for n, t in native.state_dict().items()}, strict=True)


def llava_pair():
    torch.manual_seed(0)
    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**TEXT, initializer_range=0.1)
    native = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16)
    )
    ours = VLMForConditionalGeneration(
        VLMConfig(
            vision_config=vision,
            text_config=text,
            projector_type="mlp",
            vision_feature_layer=-2,
            vision_feature_select="patch",
            image_token_id=IMAGE,
            num_image_tokens=16,
        )
    )
    copy_weights(native, ours, LLAVA_NAMES)
    return native.eval(), ours.eval(), 16


def blip2_pair():
    torch.manual_seed(0)
    vision, text = Blip2VisionConfig(**VISION), LlamaConfig(**TEXT, initializer_range=0.1)
    qformer = Blip2QFormerConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                 encoder_hidden_size=24, initializer_range=0.1)  # fmt: skip
    native = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=IMAGE
        )
    )
    torch.nn.init.normal_(native.query_tokens)
    ours = VLMForConditionalGeneration(
        VLMConfig(
            vision_config=vision,
            text_config=text,
            resampler_config=qformer,
            resampler_type="qformer",
            num_query_tokens=4,
            image_token_id=IMAGE,
            num_image_tokens=4,
        )
    )
    copy_weights(native, ours, BLIP2_NAMES)
    return native.eval(), ours.eval(), 4


def make_batch(tokens: int) -> dict[str, torch.Tensor]:
    """Two rows: one image in the middle, and two images of which one stands first; padded on the right."""
    torch.manual_seed(1)
    image = [IMAGE] * tokens
    rows = [[1, 5, *image, 6, 7, 8, 2], [*image, 9, 10, *image, 11, 2]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": torch.randn(3, 3, 28, 28)}


@pytest.mark.parametrize(("pair", "table"), [(llava_pair, LLAVA_NAMES), (blip2_pair, BLIP2_NAMES)])
def test_forward_loss_and_gradients_equal_the_native_class(pair, table):
    native, ours, tokens = pair()
    batch = make_batch(tokens)
    theirs, mine = native(**batch), ours(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(mine.logits[real], theirs.logits[real], atol=ATOL, rtol=0)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=ATOL, rtol=0)
    theirs.loss.backward()
    ours(**batch, supervised_only=True).loss.backward()
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    compared = 0
    for name, parameter in native.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[rename(name, table)], parameter.grad, atol=ATOL, rtol=0, msg=name)
            compared += 1
    assert compared > 30


@pytest.mark.parametrize("pair", [llava_pair, blip2_pair])
def test_the_loss_without_full_logits_is_the_loss(pair):
    _, ours, tokens = pair()
    batch = make_batch(tokens)
    whole, scored = ours(**batch), ours(**batch, supervised_only=True)
    assert scored.logits is None
    torch.testing.assert_close(scored.loss, whole.loss, atol=1e-6, rtol=0)
    assert scored.token_losses.shape == scored.token_hits.shape == (int((batch["labels"][:, 1:] != -100).sum()),)
    half = ours(**batch, supervised_only=True, num_items_in_batch=2 * len(scored.token_losses)).loss
    torch.testing.assert_close(half, whole.loss / 2, atol=1e-6, rtol=0)


def test_loss_chunks_do_not_change_loss_or_gradient(monkeypatch):
    _, ours, tokens = blip2_pair()
    batch, results = make_batch(tokens), []
    monkeypatch.setitem(CHUNK_BYTES, True, 0)
    for chunk in (1024, 3):
        monkeypatch.setattr("vlm_sft.model.losses.FEWEST", chunk)
        ours.zero_grad()
        loss = ours(**batch, supervised_only=True).loss
        loss.backward()
        results.append((loss, ours.model.projector.linear.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=0)


def test_loss_weights_multiply_the_loss_of_each_token():
    _, ours, tokens = blip2_pair()
    batch = make_batch(tokens)
    base = ours(**batch, supervised_only=True)
    weights = torch.zeros_like(batch["labels"], dtype=torch.float32)
    weights[0] = 2.0
    first_row = int((batch["labels"][0, 1:] != -100).sum())
    weighted = ours(**batch, supervised_only=True, loss_weights=weights).loss
    expected = 2 * base.token_losses[:first_row].sum() / len(base.token_losses)
    torch.testing.assert_close(weighted, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pair", [llava_pair, blip2_pair])
def test_generation_with_a_cache_equals_generation_without(pair):
    native, ours, tokens = pair()
    batch = make_batch(tokens)
    prompt = {"input_ids": batch["input_ids"][:1, :-1], "pixel_values": batch["pixel_values"][:1]}
    prompt["input_ids"] = prompt["input_ids"][:, : int(batch["attention_mask"][0].sum())]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = ours.generate(**prompt, **options)
    assert torch.equal(cached, ours.generate(**prompt, **options, use_cache=False))
    new = native.generate(**prompt, **options)[:, -6:]
    assert torch.equal(cached[:, -6:], new)


def test_beams_keep_the_images_of_a_row_together():
    _, ours, tokens = blip2_pair()
    row = [*[IMAGE] * tokens, 9, *[IMAGE] * tokens, 10]
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    single = ours.generate(input_ids=torch.tensor([row]), pixel_values=images, num_beams=1, **options)
    expanded, kwargs = ours._expand_inputs_for_generation(
        expand_size=3, input_ids=torch.tensor([row]), pixel_values=images
    )
    assert expanded.shape[0] == 3
    assert torch.equal(kwargs["pixel_values"], torch.cat([images] * 3))
    logits = ours(input_ids=expanded, pixel_values=kwargs["pixel_values"]).logits
    torch.testing.assert_close(logits[0], logits[2], atol=5e-6, rtol=0)
    assert (
        ours.generate(input_ids=torch.tensor([row]), pixel_values=images, num_beams=3, **options).shape == single.shape
    )


def test_a_batch_without_images_gives_every_trained_parameter_a_zero_gradient():
    _, ours, _ = blip2_pair()
    ours.train()
    ids = torch.tensor([[1, 5, 6, 2]])
    ours(input_ids=ids, labels=ids, supervised_only=True).loss.backward()
    image_path = {n: p for n, p in ours.named_parameters() if "language_model" not in n and "lm_head" not in n}
    assert all(p.grad is not None and not p.grad.any() for p in image_path.values())
    assert ours.lm_head.weight.grad.any()


def test_a_batch_without_images_is_finite_where_the_sum_of_features_is_not():
    _, ours, _ = blip2_pair()
    ours.train().model.projector.linear.bias.data.fill_(6e4)
    ours.model.language_model.embed_tokens.half()
    embeds = ours.model.embed(torch.tensor([[1, 5, 6, 2]]), None)
    assert embeds.dtype == torch.float16 and embeds.isfinite().all()


def test_a_batch_without_labels_to_learn_still_reaches_every_parameter():
    _, ours, tokens = blip2_pair()
    batch = make_batch(tokens)
    batch["labels"][:] = -100
    loss = ours.train()(**batch, supervised_only=True).loss
    loss.backward()
    assert loss == 0
    assert ours.model.projector.linear.weight.grad is not None


def test_too_few_and_too_many_image_tokens_are_errors():
    _, ours, tokens = blip2_pair()
    batch = make_batch(tokens)
    for images in (2, 4):
        batch["pixel_values"] = torch.randn(images, 3, 28, 28)
        with pytest.raises(ValueError, match=rf"12 image tokens but {images * 4} image features"):
            ours(**batch)
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="12 image tokens but 0 image features"):
        ours(**batch)


def test_what_a_batch_brings_of_itself_changes_nothing_and_is_compared_before_the_language_model_runs():
    _, ours, tokens = blip2_pair()
    batch = make_batch(tokens)
    brought = {"label_positions": supervised_positions(batch["labels"]), "image_token_count": 3 * tokens}
    plain = ours(**batch, supervised_only=True)
    known = ours(**batch, **brought, supervised_only=True)
    assert plain.loss.equal(known.loss) and plain.token_losses.equal(known.token_losses)
    ours.model.language_model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="8 image tokens but 12 image features"):
        ours(**batch, **{**brought, "image_token_count": 8})


def test_the_placeholder_may_lie_beyond_the_vocabulary():
    _, ours, tokens = blip2_pair()
    batch = make_batch(tokens)
    inside = ours(**batch).loss
    ours.config.image_token_id = ours.model.config.image_token_id = 5000
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 5000)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == IMAGE, -100)
    assert torch.equal(ours(**batch).loss, inside)


def test_a_frozen_image_path_stays_in_evaluation_mode():
    _, ours, _ = blip2_pair()
    ours.model.vision_tower.requires_grad_(False)
    ours.train()
    assert not ours.model.vision_tower.training
    assert ours.model.resampler.training and ours.model.language_model.training
    ours.model.resampler.requires_grad_(False)
    ours.train()
    assert not ours.model.resampler.qformer.dropout.training


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    _, ours, tokens = blip2_pair()
    ours.train()
    for part in (ours.model.vision_tower, ours.model.resampler, ours.model.language_model, ours.lm_head):
        part.requires_grad_(False)
    ours.train()
    batch, gradients = make_batch(tokens), []
    for on in (False, True):
        if on:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ours.zero_grad()
        ours(**batch, supervised_only=True, use_cache=False).loss.backward()
        gradients.append(ours.model.projector.linear.weight.grad.clone())
    assert any(getattr(m, "gradient_checkpointing", False) for m in ours.modules())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=0)


def test_peft_wraps_the_model_and_it_still_answers():
    _, ours, tokens = blip2_pair()
    batch = make_batch(tokens)
    before = ours(**batch).logits
    wrapped = get_peft_model(ours, LoraConfig(r=2, target_modules=r".*language_model\..*q_proj", task_type="CAUSAL_LM"))
    torch.testing.assert_close(wrapped(**batch).logits, before, atol=1e-6, rtol=0)
    prompt = {"input_ids": batch["input_ids"][1:], "pixel_values": batch["pixel_values"][1:]}
    assert wrapped.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[0] == 1


LANGUAGE_MODELS = {
    "opt": OPTConfig(vocab_size=97, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
                     num_attention_heads=4, max_position_embeddings=64),
    "qwen2": Qwen2Config(**TEXT, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_other_language_models_and_towers_train_save_and_load(name, tmp_path):
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**{k: v for k, v in VISION.items() if k != "initializer_range"})
    config = VLMConfig(
        vision_config=vision, text_config=LANGUAGE_MODELS[name], projector_type="pixel_shuffle",
        projector_options={"scale_factor": 2}, vision_feature_select="patch", image_token_id=IMAGE, num_image_tokens=4,
    )  # fmt: skip
    model = VLMForConditionalGeneration(config).eval()
    batch = make_batch(4)
    out = model(**batch, supervised_only=True)
    out.loss.backward()
    assert model.model.projector.linear.weight.grad.any()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, VLMForConditionalGeneration)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-6, rtol=0)


def test_inputs_embeds_are_taken_in_place_of_ids():
    _, ours, _ = blip2_pair()
    ids = torch.tensor([[1, 5, 6, 2]])
    embeds = ours.get_input_embeddings()(ids)
    torch.testing.assert_close(ours(inputs_embeds=embeds).logits, ours(input_ids=ids).logits, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="with input_ids"):
        ours(inputs_embeds=embeds, pixel_values=torch.randn(1, 3, 28, 28))
