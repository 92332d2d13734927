"""mPLUG from a checkpoint of before its tuning to its answers: what annotators gave is learned, by how many gave it."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from support.mplug import GOLDENS, save_modelscope
from support.shrink import shrink
from vlm_sft import load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.run_folder import checkpoints
from vlm_sft.cli.main import app
from vlm_sft.encoders.encoder import piece_of
from vlm_sft.encoders.mplug import find_config, load_mplug, processor_of
from vlm_sft.train import train

COLOURS = {"red": "#e02010", "dog": "#10c020", "猫": "#1020e0"}  # words of its vocabulary, a token each


def asked(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Overrides of `mplug_vqa_base` on pictures of one colour, and the folder of a run that saved in its middle."""
    folder = tmp_path_factory.mktemp("mplug")
    rows = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
        rows.append({"id": number, "image": f"{number}.png", "question": "what ?", "answers": [name] * 9 + ["no"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = json.dumps({"path": str(folder / "rows.jsonl"), "format": "vqa"})
    rates = dict.fromkeys(("vision_tower", "text_encoder", "fusion", "head"), 1e-2)
    small = shrink("mplug_vqa_base", folder, {}, [str(folder / "0.png")] * 8)
    small = [each for each in small if not each.startswith(("data.", "sft.max_steps"))]
    overrides = [*small, f"data.train=[{source}]", f"data.eval=[{source}]", f"data.test=[{source}]",
                 f"train={json.dumps(rates)}", "sft.max_steps=40", "sft.per_device_train_batch_size=3",
                 "sft.gradient_accumulation_steps=1", "sft.save_strategy=steps", "sft.save_steps=20",
                 "sft.eval_strategy=no", "sft.logging_steps=5", "sft.activation_checkpointing=false",
                 "encoder.config.hidden_dropout_prob=0", "encoder.config.attention_probs_dropout_prob=0"]  # fmt: skip
    return folder, overrides, train(load_recipe("mplug_vqa_base", overrides))


def test_the_weights_of_annotators_are_those_of_upstream(tmp_path):
    """The golden's loss, with answers and weights made here of what annotators gave."""
    golden = GOLDENS["base"]
    counts, weights = golden.inputs["k"].tolist(), golden.inputs["weights"]
    piece = piece_of(str(save_modelscope(tmp_path / "it", "base")), None, "it")
    config = find_config(piece, {"vision_heads": 4})
    processor = processor_of(piece, config, None)
    given, start = [], 0
    for count in counts:
        shares = weights[start : start + count]
        names = ["red", "dog", "a", "b"][:count]
        given.append([name for name, share in zip(names, shares, strict=True) for _ in range(round(float(share) * 60))])
        start += count
    made = processor.targets(given)
    assert made["answers"].tolist() == counts
    totals = [Counter(each).total() for each in given]
    wanted = torch.cat([w * 60 / t for w, t in zip(weights.split(counts), totals, strict=True)])
    torch.testing.assert_close(made["weights"], wanted, rtol=0, atol=0.02)
    ends = [row.tolist().count(processor.tokenizer.sep_token_id) for row in made["answer_ids"]]
    assert set(ends) == {2}, "an answer has two ends, as upstream writes them"


def test_a_file_of_before_tuning_is_the_same_model(tmp_path):
    from support.shrink import write_mplug

    golden, inputs = GOLDENS["large"], GOLDENS["large"].inputs
    sizes = {"vision_heads": 4, "num_attention_heads": 4, "fusion_layers": 3, "stride_layer": 3}
    (tmp_path / "words").mkdir()
    from support.mplug import save_words

    made = load_mplug(piece_of(write_mplug("large", tmp_path), None, "it"), save_words(tmp_path / "words"), sizes=sizes)
    found = made.model(inputs["question_ids"], inputs["image"], inputs["answer_ids"], inputs["question_mask"],
                       inputs["answer_mask"], inputs["k"], inputs["weights"])  # fmt: skip
    torch.testing.assert_close(found.loss, golden.outputs["loss"], rtol=0, atol=1e-5)
    decoder = made.model.text_decoder
    assert decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight


@pytest.mark.slow
def test_it_learns_to_write(learned):
    folder, _, bundle = learned
    history = json.loads((bundle / "metrics.json").read_text(encoding="utf-8"))
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["parity"]["equal"]
    model, _ = load(bundle)
    decoder = model.text_decoder
    assert decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight
    said = asked("answer", bundle, "--questions", folder / "rows.jsonl", "-o", folder / "said.jsonl")
    assert said.exit_code == 0
    lines = [json.loads(line) for line in (folder / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["answer"] for line in lines] == list(COLOURS)
    assert asked("evaluate", bundle).exit_code == 0
    (folder / "few.txt").write_text("dog\n猫\n", encoding="utf-8")
    one = asked("answer", bundle, "what ?", "--image", folder / "2.png", "--candidates", folder / "few.txt")
    assert one.exit_code == 0 and one.stdout.splitlines()[0].endswith("\t猫")


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--likelihood"], ["--confidence"]])
def test_of_its_words_nobody_can_ask_how_likely_each_is(learned, tmp_path, more):
    folder, _, bundle = learned
    shutil.copy(folder / "0.png", tmp_path)
    row = {"id": 1, "image": "0.png", "question": "what ?", "answer": "A", "a": "red", "b": "猫"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    task = {"about": "colours 颜色", "sources": ["ours"], "path": "rows.jsonl", "id": "id", "metric": "choice",
            "choices": ["a", "b"], "answer_is": "letter"}  # fmt: skip
    (tmp_path / "task.yaml").write_text(json.dumps(task), encoding="utf-8")
    said = asked("evaluate", bundle, "--benchmark", tmp_path / "task.yaml", "-o", tmp_path / "out", *more)
    assert isinstance(said.exception, UserError) and "answer as a whole" in str(said.exception)


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_weights(learned, tmp_path):
    _, overrides, calm = learned
    again = train(load_recipe("mplug_vqa_base", [*overrides, f"sft.output_dir={tmp_path / 'again'}",
                                                 f"sft.resume_from_checkpoint={checkpoints(calm)[0]}"]))  # fmt: skip
    wanted, found = (load_file(each / "trained.safetensors") for each in (calm, again))
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_a_stream_is_learned_from_without_a_list_of_answers(learned, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sft.bundle.parity.check_parity", lambda *args: {"positions": 0, "max_difference": 0.0})
    folder, overrides, _ = learned
    source = json.dumps({"path": str(folder / "rows.jsonl"), "format": "vqa", "weight": 1})
    few = ["sft.max_steps=2", "sft.save_strategy=no", f"sft.output_dir={tmp_path / 'out'}"]
    streamed = ["data.streaming=true", "data.sampling=weights", f"data.train=[{source}]", "data.eval=[]"]
    bundle = train(load_recipe("mplug_vqa_base", [*overrides, *streamed, *few]))
    (read,) = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["ledger"]["train"]["sources"].values()
    assert read["streamed"] and read["used"] == 6


@pytest.mark.slow
def test_captions_are_learned_with_one_question(learned, tmp_path):
    """As its model card does: one question for all, the caption is the answer; `generation` says how long it is."""
    folder, overrides, _ = learned
    rows = [{"image": f"{n}.png", "caption": f"a {name}"} for n, name in enumerate(COLOURS)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"path": str(folder / "captions.jsonl"), "format": "caption", "prompts": ["what is this ?"]}
    more = [f"data.train=[{json.dumps(source)}]", "data.eval=[]", "data.test=[]", f"sft.output_dir={tmp_path / 'out'}",
            "generation.min_new_tokens=2", "generation.max_new_tokens=2"]  # fmt: skip
    bundle = train(load_recipe("mplug_caption", [*overrides, *more]))
    said = asked("answer", bundle, "what is this ?", "--image", folder / "1.png")
    assert said.stdout.splitlines()[0].endswith("\ta dog")
    (tmp_path / "coco_caption").mkdir()
    photos = []
    for n, name in enumerate(COLOURS):
        shutil.copy(folder / f"{n}.png", tmp_path / "coco_caption")
        photos.append(
            {"cocoid": n, "filepath": ".", "filename": f"{n}.png", "split": "test", "sentences": [{"raw": f"a {name}"}]}
        )
    (tmp_path / "coco_caption" / "dataset_coco.json").write_text(json.dumps({"images": photos}), encoding="utf-8")
    scored = asked("evaluate", bundle, "--benchmark", "coco_caption", "--benchmark-data", tmp_path, "--prompt",
                   "what is this ?", "--no-contamination", "--no-forgetting")  # fmt: skip
    assert scored.exit_code == 0, scored.output
    found = json.loads((bundle / "evaluation" / "coco_caption.json").read_text(encoding="utf-8"))
    assert found["scores"]["BLEU-1"]["value"] == pytest.approx(1)
    one = asked("evaluate", bundle, "--benchmark", "coco_caption", "--benchmark-data", tmp_path, "--prompt",
                "what is this ?", "--no-contamination", "--no-forgetting", "--no-blank", "--set", "min_new_tokens=1",
                "--set", "max_new_tokens=1", "--output", tmp_path / "short")  # fmt: skip
    assert one.exit_code == 0, one.output
    lines = (tmp_path / "short" / "coco_caption.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["a"] * 3
