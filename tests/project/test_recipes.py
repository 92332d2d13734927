"""Every recipe that ships, found recursively, is built into the libraries' real configs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from support.paths import ROOT
from vlm_sft.base.assets import assets_root
from vlm_sft.recipe.libraries import build_lora_config, build_quantization_config, build_sft_config, validate_libraries
from vlm_sft.recipe.schema import Recipe, load_recipe
from vlm_sft.recipe.sections import Stack
from vlm_sft.recipe.yaml_file import YamlFile

FOLDER = assets_root() / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
ON_CPU = ["sft.bf16=false", "sft.tf32=null"]

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(FOLDER).as_posix())


def test_the_promised_recipes_ship() -> None:
    systems = ("quickstart", "quickstart_llava", "real", "ziya", "llava15", "minigpt4")
    promised = {f"{name}_stage{stage}" for name in systems for stage in (1, 2)}
    promised |= {
        "ziya_stage2_qlora",
        "llava15_stage2_qlora",
        "llava15_stage2_lora",
        "llava16_stage2",
        "blip2_flant5",
        "blip2_opt_stage2",
        "instructblip_flant5",
        "instructblip_vicuna",
        "llava_next_lora",
        "qwen25vl_lora",
        "smolvlm_lora",
        "visualglm_lora",
    }
    assert promised <= {path.stem for path in RECIPES}


@every_recipe
def test_builds_the_real_configs(path: Path) -> None:
    validate_libraries(load_recipe(path))
    recipe = load_recipe(path, ON_CPU)
    args, lora = build_sft_config(recipe), build_lora_config(recipe)
    assert args.output_dir == f"outputs/{path.stem}"
    assert (lora is None) == (recipe.lora is None)


@every_recipe
def test_schedule_can_be_made(path: Path) -> None:
    """Arguments of a schedule are only looked at when it is made, which is after the weights are loaded."""
    import torch
    from transformers import get_scheduler

    args = build_sft_config(load_recipe(path, ON_CPU))
    optimizer = torch.optim.AdamW(
        [{"params": [torch.zeros(1)], "lr": 1e-2}, {"params": [torch.zeros(1)], "lr": 1e-4}], lr=args.learning_rate
    )
    steps = args.max_steps if args.max_steps > 0 else 1000
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    assert len(scheduler.get_last_lr()) == 2


@every_recipe
def test_schema_accepts_it(path: Path) -> None:
    schema = json.loads((FOLDER / "recipe.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(YamlFile.read(path).data, schema)
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")


@every_recipe
def test_states_its_global_batch(path: Path) -> None:
    match = re.search(
        r"global batch: (\d+) x (\d+) accumulation x (\d+) process(?:es)? = (\d+)", path.read_text(encoding="utf-8")
    )
    assert match, "say how the global batch comes about"
    per_device, accumulation, processes, total = map(int, match.groups())
    args = build_sft_config(load_recipe(path, ON_CPU))
    assert (per_device, accumulation) == (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    assert per_device * accumulation * processes == total


@every_recipe
def test_second_stage_goes_on_from_the_first(path: Path) -> None:
    second = load_recipe(path)
    # BLIP-2's stage 1 has no language model; LAVIS publishes it.
    if "_stage2" not in path.stem or path.stem == "blip2_opt_stage2":
        assert second.init_from is None
        return
    name = re.sub("_stage2.*", "_stage1.yaml", path.name)
    first = load_recipe(path.with_name(name.replace("llava16", "llava15")))  # LLaVA-1.6 re-uses the projector of 1.5
    assert second.init_from == first.sft["output_dir"]
    for part in ("resampler", "language_model"):
        assert getattr(second.stack, part) == getattr(first.stack, part)
    assert second.stack.projector.type == first.stack.projector.type
    assert second.stack.projector.options == first.stack.projector.options
    tower = ("pretrained", "revision", "feature_layer", "feature_select")
    assert [getattr(second.stack.vision_tower, key) for key in tower] == [
        getattr(first.stack.vision_tower, key) for key in tower
    ]


def recipe(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize(
    ("name", "train", "weight_decay", "seen"),
    [
        ("llava15_stage1", {"projector": 1e-3}, 0.0, "256"),
        ("llava15_stage2", {"projector": 2e-5, "language_model": 2e-5}, 0.0, "128"),
        ("llava15_stage2_lora", {"projector": 2e-5}, 0.0, "128"),
        ("llava16_stage2", {"vision_tower": 2e-6, "projector": 1e-5, "language_model": 1e-5}, 0.0, "128"),
        ("blip2_opt_stage2", {"resampler": 1e-4, "projector": 1e-4}, 0.05, "1024"),
        ("blip2_flant5", {"vision_tower": 1e-5, "resampler": 1e-5, "projector": 1e-5}, 0.05, "256"),
        ("instructblip_vicuna", {"resampler": 1e-5, "projector": 1e-5}, 0.05, "128"),
        ("instructblip_flant5", {"resampler": 1e-5, "projector": 1e-5}, 0.05, "192"),
        ("minigpt4_stage1", {"projector": 1e-4}, 0.05, "256"),
        ("minigpt4_stage2", {"projector": 3e-5}, 0.05, "48"),
        ("llava15_stage2_qlora", {"projector": 2e-5}, 0.0, "128"),
        ("ziya_stage2_qlora", {"projector": 3e-5}, 0.05, "48"),
        ("ziya_stage1", {"projector": 1e-4}, 0.05, "256"),
        ("ziya_stage2", {"projector": 3e-5}, 0.05, "48"),
    ],
)
def test_published_values(name: str, train: dict[str, float], weight_decay: float, seen: str) -> None:
    stage = recipe(name)
    assert stage.train == train
    assert stage.sft["weight_decay"] == weight_decay
    assert f"= {seen}\n" in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "warmup", "steps", "lowest", "start"),
    [
        ("minigpt4_stage1", 5000, 20000, 8e-5, 1e-6),
        ("minigpt4_stage2", 200, 1000, 1e-5, 1e-6),
        ("blip2_opt_stage2", 2000, -1, 1e-5, 1e-6),
        ("instructblip_vicuna", 1000, 60000, 0, 1e-8),
        ("instructblip_flant5", 1000, 60000, 0, 1e-8),
    ],
)
def test_published_schedule(name: str, warmup: int, steps: int, lowest: float, start: float) -> None:
    stage = recipe(name)
    assert (stage.sft["warmup_steps"], stage.sft.get("max_steps", -1)) == (warmup, steps)
    shares = stage.sft["lr_scheduler_kwargs"]
    assert stage.train["projector"] * shares["min_lr_rate"] == pytest.approx(lowest, rel=1e-3)
    assert stage.train["projector"] * shares["warmup_lr_rate"] == pytest.approx(start, rel=1e-2)


def test_llava15_reads_patches_of_the_last_layer_but_one() -> None:
    for name in ("llava15_stage1", "llava15_stage2", "quickstart_llava_stage1"):
        tower = recipe(name).stack.vision_tower
        assert (tower.feature_layer, tower.feature_select) == (-2, "patch")


def test_ziya_says_what_is_ours() -> None:
    text = (FOLDER / "ziya_stage2.yaml").read_text(encoding="utf-8")
    assert re.search(r"^lora: .*# ours$", text, re.MULTILINE)
    assert recipe("ziya_stage2").generation == {
        "max_new_tokens": 128,
        "do_sample": True,
        "top_p": 0.1,
        "temperature": 0.7,
    }


@pytest.mark.parametrize("name", ["ziya_stage2_qlora", "llava15_stage2_qlora"])
def test_qlora_is_the_papers(name: str) -> None:
    config = build_quantization_config(recipe(name))
    assert config is not None and config.load_in_4bit and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_quant_type == "nf4" and str(config.bnb_4bit_compute_dtype) == "torch.bfloat16"
    plain = recipe(name.removesuffix("_qlora"))
    assert (recipe(name).stack, recipe(name).chat_template) == (plain.stack, plain.chat_template)


def test_quickstart_mixes_a_fifth_of_captions_into_stage_two() -> None:
    for name in ("quickstart_stage2", "quickstart_llava_stage2"):
        data = recipe(name).data
        share = {form: sum(s.weight for s in data.train if s.format == form) for form in ("caption", "vqa")}
        assert data.sampling == "weights"
        assert share["caption"] / sum(share.values()) == pytest.approx(0.2, abs=0.05)


def test_no_held_out_row_is_trained_on() -> None:
    for path in RECIPES:
        if path.stem.startswith(("quickstart", "real")):
            data = load_recipe(path).data
            assert all("_train" in source.path for source in data.train)
            assert all("_validation" in source.path for source in data.eval)
            assert all("_test" in source.path for source in data.test)


def test_the_page_on_recipes_is_true() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in (path.stem for path in RECIPES):
        assert f"`{name}`" in page
    for model in (Recipe, *(type(getattr(recipe("ziya_stage2").stack, part)) for part in Stack.model_fields)):
        for key in model.model_fields:
            assert re.search(rf"`{key}[:`]", page), f"docs/recipes.md does not speak of `{key}`"
    for program in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(program, "docs/recipes.md", "exec"), {})
