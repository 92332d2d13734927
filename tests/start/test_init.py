"""`vlm-sft init`, as somebody tries it who has a folder and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from support.folders import CAPTIONS, COUNT, SHAPES, pictures
from support.tiny_families import tiny
from vlm_sft.cli import main as cli
from vlm_sft.data.look_alikes import find_look_alikes
from vlm_sft.data.source import source_rows
from vlm_sft.machine.machine import Machine
from vlm_sft.recipe.schema import load_recipe


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs `vlm-sft` in a folder of its own; returns exit code, standard output and standard error."""
    monkeypatch.setattr("vlm_sft.data.looks.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLM_SFT_LANG", "en")
    monkeypatch.chdir(tmp_path)

    def run(*words: object, answers: tuple[str, ...] = ()) -> tuple[int, str, str]:
        said = iter(answers)
        monkeypatch.setattr("builtins.input", lambda: next(said, None) or _nobody())
        monkeypatch.setattr(sys, "argv", ["vlm-sft", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def _nobody() -> str:
    raise EOFError


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_of_any_shape_becomes_a_recipe_whose_sides_share_nothing(shape, command, tmp_path):
    make, learn, count = SHAPES[shape]
    make(folder := tmp_path / "我的 photos")
    before = contents(folder)
    code, out, said = command("init", folder, "--json", "--model", tiny("llava"))
    assert code == 0, said
    done = json.loads(out)
    assert contents(folder) == before
    assert done["learn"] == learn
    assert sum(done[side] for side in ("train", "validation", "test")) == count
    assert min(done[side] for side in ("train", "validation", "test")) >= 1
    assert done["alike"] >= 1, "the last picture is a copy of the first"
    recipe = load_recipe(done["recipe"])
    sides = {name: [row for each in getattr(recipe.data, name) for row in source_rows(each)]
             for name in ("train", "eval", "test")}  # fmt: skip
    assert not find_look_alikes(sides["train"], sides["eval"] + sides["test"]).pairs
    assert not {i["path"] for row in sides["train"] for i in row["images"]} & {
        i["path"] for name in ("eval", "test") for row in sides[name] for i in row["images"]
    }


@pytest.mark.slow
def test_every_one_of_them_passes_preflight(command, tmp_path):
    """One by one they do so too; here their data go into one recipe, for that takes seconds and not minutes."""
    whole: dict = {}
    for number, (make, _, _) in enumerate(SHAPES.values()):
        make(tmp_path / f"f{number}")
        assert command("init", f"f{number}", "--json", "--model", tiny("llava"))[0] == 0
        recipe = yaml.safe_load((tmp_path / f"f{number}.yaml").read_text(encoding="utf-8"))
        for side, sources in recipe["data"].items():
            named = [{**each, "name": f"{side}{number}-{k}"} for k, each in enumerate(sources)]
            whole.setdefault("data", {}).setdefault(side, []).extend(named)
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({**recipe, **whole}), encoding="utf-8")
    for path in ("f0.yaml", "all.yaml"):
        # The folders show the same pictures as each other, so only in the first one is looked for what looks alike.
        changes = ["sft.dataloader_num_workers=0", *(["data.look_images=0"] if path == "all.yaml" else [])]
        code, _, said = command("preflight", path, *changes)
        assert code == 0 and "Page: preflight.html" in said, said
        assert "look like" not in said


def test_pictures_alone_are_listed_to_be_described(command, tmp_path):
    pictures(folder := tmp_path / "相册", "IMG_{n}.jpg")
    code, _, said = command("init", "相册", "--yes")
    sheet = tmp_path / "相册_captions.csv"
    assert code == 2 and "holds 12 pictures and no text to learn; 相册_captions.csv now lists them" in said
    assert not (tmp_path / "相册.yaml").exists()
    lines = sheet.read_text(encoding="utf-8-sig").splitlines()
    assert lines[:2] == ["image,caption", "IMG_000.jpg,"]
    code, _, said = command("init", "相册", "--yes")
    assert code == 2 and "is there already" in said and sheet.read_text(encoding="utf-8-sig").splitlines() == lines
    filled = [line + text for line, text in zip(lines, ["", *CAPTIONS[:-1], ""], strict=True)]
    sheet.write_text("\n".join(filled) + "\n", encoding="utf-8-sig")
    code, out, said = command("init", sheet, "--images", folder, "--json", "--model", tiny("llava"))
    assert code == 0 and json.loads(out)["train"] == COUNT - 1 - 2
    assert "1 row left out, the first: " in said and "相册_captions.csv, line 13: " in said


def test_four_questions_are_asked_and_wrong_answers_asked_again(command, tmp_path):
    SHAPES["class folders"][0](tmp_path / "pets")
    answers = ("9", "clasify", "caption", "zh", str(tiny("llava")), "soon", "0.5")
    code, out, said = command("init", "pets", answers=answers)
    assert code == 0, said
    assert "'9' is none of these; type a number from 1 to 2." in out
    assert "'clasify' is none of these; type a number from 1 to 2, or classify." in out
    assert "'soon' is no number of hours above zero" in out
    assert out.count("Answer [") == len(answers)
    text = (tmp_path / "pets.yaml").read_text(encoding="utf-8")
    assert "描述这张图片。" in text and "用户的提问" in text and "outputs/pets" in text
    assert [line.split()[1] for line in out.splitlines()[-3:]] == ["preflight", "train", "chat"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere", "--yes"], "nowhere does not exist"),
        (["empty", "--yes"], "empty has nothing that can be learned from: it holds no pictures and no data files."),
        (["photos", "--yes", "--learn", "answer"], "--learn answer cannot be had here; choose one of: caption."),
        (["photos", "--yes", "--language", "fr"], "--language fr cannot be had here; choose one of: en, zh."),
        (["photos", "--yes", "--model", "photos"], "--model photos is a folder without config.json: give that of a"),
        (["photos", "--yes", "--model", "llama"], "--model llama is neither a folder nor a Hub id (owner/name)"),
        (["photos", "--yes", "--hours", "-1"], "--hours must be a number above zero, not -1."),
        (["photos"], "Nobody answered: give --yes"),
        (["photos", "--yes", "-o", "there.yaml"], "there.yaml exists already and is not overwritten"),
        (["photos", "--yes", "-o", "recipe.txt"], "--output recipe.txt must end in .yaml"),
        (["photos", "--yes", "--images", "photos"], "--images goes with a data file"),
        (["photos/000.txt", "--yes"], "photos/000.txt is no data file that can be read"),
        (["two", "--yes"], "There are 2 different pictures with a text that can be used"),
        (["", "--yes"], "FOLDER is empty; give a folder, a data file"),
        (["photos", "--yes", "--model", ""], "--model is empty; give a Hub id or a folder"),
        (["heads.csv", "--yes"], "heads.csv is left out: it has no rows."),
        (["gb.csv", "--yes"], "gb.csv, line 2: byte 0xba is not UTF-8"),
        (["gb.csv", "--yes", "--images", "pets"], "gb.csv, line 2: byte 0xba is not UTF-8"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(words, sentence, command, tmp_path):
    SHAPES["texts beside"][0](tmp_path / "photos")
    (tmp_path / "empty").mkdir()
    SHAPES["texts beside"][0](tmp_path / "two")
    for path in sorted((tmp_path / "two").glob("*.txt"))[2:]:
        path.unlink()
    (tmp_path / "there.yaml").write_text("mine")
    # A file that cannot be read teaches nothing, and neither do the folders that happen to lie beside it.
    SHAPES["class folders"][0](tmp_path / "pets")
    (tmp_path / "heads.csv").write_text("image,caption\n")
    (tmp_path / "gb.csv").write_text("image,caption\npets/a.png,红色\n", encoding="gb18030")
    before = contents(tmp_path)
    code, _, said = command("init", *words)
    assert code == 2 and said.splitlines()[-1].startswith("error: ") and sentence in said
    left = {name: digest for name, digest in contents(tmp_path).items() if not name.startswith("cache/")}
    assert left == before


def test_what_cannot_be_read_is_said_and_left_out(command, tmp_path):
    SHAPES["texts beside"][0](folder := tmp_path / "photos")
    (folder / "001.txt").write_bytes("照片".encode("gbk"))
    (folder / "002.txt").write_text("  \n")
    (folder / "003.jpg").write_bytes(b"\xff\xd8\xff broken")
    (folder / "004.txt").unlink()
    (folder / "list.xlsx").write_bytes(b"PK")
    (folder / "notes.json").write_text('{"name": "tool", "version": 3}')
    code, out, said = command("init", "photos", "--json", "--model", tiny("llava"))
    done = json.loads(out)
    assert code == 0 and done["train"] + done["validation"] + done["test"] == COUNT - 4
    for words in (
        "2 texts of photos left out, the first: photos/001.txt is not UTF-8: save it as UTF-8.",
        "1 .xlsx file is left out, the first photos/list.xlsx: save them as CSV (UTF-8).",
        "photos/notes.json is left out: no known format has rows like its first",
        "1 row left out because a picture cannot be read, the first: photos/003.txt: the image",
        "3 pictures left out without a text, the first: photos/001.jpg.",
    ):
        assert words in said, words


def test_names_of_pictures_with_their_texts_are_learned_from_json_and_asked_for_as_a_table(command, tmp_path):
    names = pictures(tmp_path / "d" / "pics")
    texts = {name: [text, f"again {text}"] for name, text in zip(names, CAPTIONS, strict=True)}
    (tmp_path / "d" / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    code, out, said = command("init", "d", "--json", "--model", tiny("llava"))
    done = json.loads(out)
    assert code == 0 and sum(done[side] for side in ("train", "validation", "test")) == 2 * COUNT, said
    (tmp_path / "d" / "texts.json").unlink()
    (tmp_path / "d" / "notes.txt").write_text("taken in May")
    (tmp_path / "d" / "captions.txt").write_text("".join(f"{name}#0\ta thing\n" for name in names))
    code, _, said = command("init", "d", "--yes", "-o", "other.yaml")
    assert code == 2 and "d/captions.txt is left out: it names pictures, but is no table: save it as .csv" in said
    assert "notes.txt" not in said
    shutil.copyfile(next((tmp_path / "d").rglob(Path(names[0]).name)), tmp_path / "d" / "IMG 01.png")
    (tmp_path / "d" / "captions.txt").write_text("IMG 01.png\ta thing\n")
    _, _, said = command("init", "d", "--yes", "-o", "other.yaml")
    assert "d/captions.txt is left out: it names pictures" in said, "a name may have spaces"
    (tmp_path / "d" / "rows.csv").write_text("image,caption\n" + "".join(f"{name},red, blue\n" for name in names))
    code, _, said = command("init", "d/rows.csv", "--yes", "-o", "other.yaml")
    assert code == 2 and "rows.csv, line 2: the row has more fields than the header" in said


def test_an_own_split_is_kept_and_what_leaks_is_left_out(command, tmp_path):
    names = pictures(tmp_path / "d")
    for side, chosen in (("train", names[:9]), ("test", [*names[9:], names[0]])):
        rows = [{"image": name, "caption": f"{side} {name}"} for name in chosen]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "d" / f"{side}.jsonl").write_text(text)
    code, out, said = command("init", "d", "--json", "--model", tiny("llava"))
    done = json.loads(out)
    assert code == 0 and (done["train"], done["validation"], done["test"]) == (7, 1, 4)
    assert "1 row left out because another side of your own split shows the same picture." in said
    tested = (tmp_path / "d_rows" / "test.jsonl").read_text().splitlines()
    assert all(json.loads(line)["caption"].startswith("test") for line in tested)


def test_the_same_seed_draws_the_same_and_another_another(command, tmp_path):
    SHAPES["texts beside"][0](tmp_path / "photos")
    drawn = []
    for number, seed in enumerate((0, 0, 1, 2)):
        command("init", "photos", "--json", "--model", tiny("llava"), "--seed", seed, "-o", f"r{number}.yaml")
        drawn.append((tmp_path / f"r{number}_rows" / "test.jsonl").read_text())
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_chinese_is_spoken_where_it_is_asked_for(command, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_SFT_LANG", "zh_CN.UTF-8")
    SHAPES["texts beside"][0](tmp_path / "photos")
    Image.new("RGB", (40, 40)).save(tmp_path / "photos" / "new.png")
    code, out, said = command("init", "photos", "--yes", "--model", tiny("llava"))
    assert code == 0 and "接下来：" in out and "这台机器：" in said and "相似" in said
    assert "由 `vlm-sft init` 写成" in (tmp_path / "photos.yaml").read_text(encoding="utf-8")


def test_boxes_and_a_missing_header_are_not_taken_for_words(command, tmp_path):
    for name in pictures(tmp_path / "yolo"):
        (tmp_path / "yolo" / name).with_suffix(".txt").write_text("0 0.5 0.5 0.2 0.2\n")
    code, _, said = command("init", "yolo", "--yes")
    assert code == 2 and "are left out: its texts hold numbers alone (boxes?)" in said
    names = pictures(tmp_path / "bare")
    (tmp_path / "bare" / "a.csv").write_text("".join(f"{name},a thing {name}\n" for name in names))
    code, _, said = command("init", "bare", "--yes")
    assert code == 2 and "bare/a.csv is left out: its first line looks like a row and not like a header" in said


def test_classes_that_are_numbers_are_called_by_their_names(command, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    names = pictures(tmp_path / "tmp")
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")},
                         "label": ClassLabel(names=["cat", "dog", "鸟"])})  # fmt: skip
    shown = [{"bytes": (tmp_path / "tmp" / name).read_bytes(), "path": name} for name in names]
    rows = Dataset.from_dict({"image": shown, "label": [n % 3 for n in range(COUNT)]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    code, out, said = command("init", "saved", "--json", "--model", tiny("llava"))
    assert code == 0 and json.loads(out)["learn"] == "classify", said
    text = (tmp_path / "saved.yaml").read_text(encoding="utf-8")
    assert "Answer with one of: cat, dog, 鸟." in text


def test_a_model_that_is_not_known_gets_the_batch_that_fits_the_gpu(command, tmp_path, monkeypatch):
    machine = Machine((("NVIDIA A100", 80 * 2**30),), 4, 64 * 2**30, 500 * 2**30)
    monkeypatch.setattr("vlm_sft.start.init.this_machine", lambda folder: machine)
    SHAPES["questions"][0](tmp_path / "q")
    code, _, said = command("init", "q", "--json", "--model", tiny("llava"))
    assert code == 0, said
    sft = load_recipe("q.yaml").sft
    assert (sft["per_device_train_batch_size"], sft["gradient_accumulation_steps"]) == (4, 1)
    assert sft["activation_checkpointing"] is False, "TRL would put it on"
    assert "global batch: 4 x 1 accumulation x 1 process = 4; about " in (tmp_path / "q.yaml").read_text()


@pytest.mark.parametrize("deep", ["[" * 700 + "]" * 700, '{"a":' * 700 + "1" + "}" * 700])
@pytest.mark.parametrize("where", ["rows", "beside"])
def test_rows_that_are_nested_without_end_are_left_out(deep, where, command, tmp_path):
    (folder := tmp_path / "photos").mkdir()
    pictures(folder)
    names = sorted(path.name for path in folder.iterdir())
    if where == "rows":
        lines = [f'{{"image": "{name}", "caption": "a thing {n}", "x": {deep}}}' for n, name in enumerate(names)]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    else:
        for name in names:
            (folder / name).with_suffix(".json").write_text(f'{{"caption": "a thing", "x": {deep}}}')
    code, _, err = command("init", folder, "--yes")
    assert code == 2 and "nested too deeply" in err and "Traceback" not in err
