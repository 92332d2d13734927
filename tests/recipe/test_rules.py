"""Rules between the keys of a recipe, each by the sentence that a user sees."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from support.recipe_texts import TEXT, problem, write
from vlm_sft.base.errors import UserError
from vlm_sft.recipe.schema import Recipe, load_recipe

WEIGHED = ["data.sampling=weights", "data.train.0.weight=1", "data.train.1.weight=1"]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write(tmp_path, TEXT)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train={}"], "nothing would be trained; name a part under `train` (part: learning rate) or add `lora`."),
        (["train.projecter=1e-3"], 'unknown part "projecter" under `train`; did you mean "projector"?'),
        (["train.xyz=1e-3"], "the parts are vision_tower, resampler, projector, language_model."),
        (["train.projector=0"], "the learning rate of projector must be above zero, not 0; left out, it is frozen."),
        (["train.projector=-1e-3"], "the learning rate of projector must be above zero, not -0.001;"),
        (["train.projector=.inf"], "the learning rate of projector must be above zero, not inf;"),
        (["train.resampler=1e-4"], "`train.resampler` is set but the stack has no resampler; remove it or add one."),
        (
            ["train.language_model=1e-5", "lora={r: 8}"],
            "the language model cannot be trained whole and by LoRA at once; remove `train.language_model` or `lora`.",
        ),
        (["lora.layer_replication=[[0, 1]]"], "`lora.layer_replication` cannot be used: it makes another language"),
        (["sft.train_sampling_strategy=batch_rebalance"], "use random, sequential or group_by_length."),
        (
            ["sft.train_sampling_strategy=group_by_length", "data.streaming=true", "sft.max_steps=9", *WEIGHED],
            "needs the length of every row, which a stream does not know; remove it, or set `data.streaming` to false.",
        ),
        (["lora.r=0"], "the rank `lora.r` must be above zero, not 0; to do without LoRA, remove `lora`."),
        (["lora.modules_to_save=[projector]"], "to train projector beside LoRA, write `train: {projector: <learning"),
        (["stack.resampler={type: qformer}"], "type qformer needs `pretrained`: the Hub id or folder of a checkpoint"),
        (["stack.projector.depth=3"], "`depth` belongs to a projector of type mlp, not linear."),
        (
            ["stack.projector.scale_factor=4"],
            "`scale_factor` belongs to a projector of type pixel_shuffle, not linear.",
        ),
        (
            ["stack.projector.init=match_embeddings", "stack.projector.pretrained=x"],
            "a pretrained projector is not initialised; remove `init` or `pretrained`.",
        ),
        (["chat_template=zia"], 'there is no chat template "zia"; the closest that ships is "ziya".'),
        (["chat_template=my/own.jinja"], 'the chat template file "my/own.jinja" does not exist'),
        (["data.train.1.name=a"], 'two sources of data.train are called "a"; give one of them another `name`.'),
        (["data.sampling=weights"], '`sampling: weights` needs a `weight` for source "a" too.'),
        (["data.sampling=weights", "data.train.0.weight=1"], 'needs a `weight` for source "b" too.'),
        (["collator=MyCollator"], '`collator` must look like my_package.my_module:MyCollator, not "MyCollator".'),
        (["sft.output_dir=null"], "`sft.output_dir` is missing: the folder that checkpoints and the bundle go to."),
        (["sft.packing=true", "sft.max_length=null"], "fills packs up to `sft.max_length`, so it cannot be null; say"),
        (["sft.packing=true", "sft.packing_strategy=wrapped"], "`sft.packing_strategy: wrapped` cuts rows in two, and"),
        (["sft.eval_packing=true", "sft.packing_strategy=bfd_split"], "leave it out: rows are packed whole, by best"),
        (
            ["sft.packing=true", "sft.train_sampling_strategy=group_by_length"],
            "`sft.packing` leaves no padding for `group_by_length` to save; remove one of them.",
        ),
        (["sft.padding_free=true"], "`sft.padding_free` cannot be used: rows that follow each other without padding"),
        (
            ["sft.assistant_only_loss=true"],
            "`sft.assistant_only_loss` cannot be used: the loss is already on the answers",
        ),
        (["sft.completion_only_loss=true"], "`sft.completion_only_loss` cannot be used"),
        (["sft.label_smoothing_factor=0.1"], "the loss is the plain cross entropy of the answers; remove it."),
        (["sft.loss_type=dft"], "the loss is the plain cross entropy of the answers"),
        (["sft.loss_type=nll", "sft.truncation_mode=keep_end"], "`sft.truncation_mode` cannot be used: a row that is"),
        (["sft.router_aux_loss_coef=0.001"], "the loss is the plain cross entropy of the answers"),
        (["sft.bf16_full_eval=true"], "would round the trained weights before they are saved"),
        (["sft.chat_template_path=x"], "the template is the recipe's own key `chat_template`"),
        (["sft.model_init_kwargs={a: 1}"], "how the parts are loaded is said in `stack`"),
        (["sft.dataset_kwargs={a: 1}"], "rows are read by the sources in `data`"),
        (["sft.remove_unused_columns=true"], "the collator needs the columns `messages` and `images`"),
        (["sft.learning_rate=0"], "`sft.learning_rate` must be a number above zero, not 0."),
        (["sft.learning_rate=fast"], "`sft.learning_rate` must be a number above zero, not 'fast'."),
        (["sft.bf16=true", "sft.fp16=true"], "`sft.bf16` and `sft.fp16` cannot both be true; keep one."),
        (
            ["sft.eval_strategy=steps"],
            "`data.eval` has no source; add one, or `evaluation.benchmarks`.",
        ),
    ],
)
def test_rules(recipe_file: Path, overrides: list[str], message: str) -> None:
    assert message in problem(recipe_file, *overrides)


def test_rule_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT + "  padding_free: true\n")
    assert problem(path).startswith(f"{path}, line 16: `sft.padding_free` cannot be used")


def test_reserved_keys_may_say_what_they_would_be_anyway(recipe_file: Path) -> None:
    load_recipe(recipe_file, ["sft.packing=false", "sft.chat_template_path=null", "sft.remove_unused_columns=false"])


def test_rules_hold_for_recipes_made_in_python(recipe_file: Path) -> None:
    data = load_recipe(recipe_file).resolved()
    assert Recipe.model_validate(data).where(("train",)) == "the recipe"
    with pytest.raises(ValidationError, match="nothing would be trained"):
        Recipe.model_validate({**data, "train": {}})


def test_a_token_in_a_recipe_is_refused_and_not_repeated(recipe_file: Path) -> None:
    token = "hf_" + "SecretThatNobodyMaySee"
    with pytest.raises(UserError, match="would hold what looks like a token or key; a recipe is saved") as caught:
        load_recipe(recipe_file, [f"sft.hub_token={token}"])
    assert token not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b/c", "me/x y", "../x", "", "me/" + "x" * 97, "https://hf.co/me/x"])
def test_a_repository_that_cannot_be_is_named_with_its_line(recipe_file: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be a repository of the Hub; write name/repository"):
        load_recipe(recipe_file, [f'hub={{repo_id: "{name}"}}'])


def test_an_unknown_key_of_hub_is_named(recipe_file: Path) -> None:
    with pytest.raises(UserError, match=r'unknown key "hub\.repo"; did you mean "repo_id"\?'):
        load_recipe(recipe_file, ["hub={repo: me/x}"])
    with pytest.raises(UserError, match=r"`sft\.push_to_hub` cannot be used: the bundle is pushed by the recipe's own"):
        load_recipe(recipe_file, ["sft.push_to_hub=true"])
