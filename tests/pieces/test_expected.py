"""Of a checkpoint the expected files are read, and whatever else lies in it is never opened."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from support.tiny_pieces import tiny_stack
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.pieces.checkpoints import Checkpoint
from vlm_sft.pieces.expected import IMAGES, MODEL, TOKENIZER, laid_out
from vlm_sft.pieces.part_configs import load_image_processor, load_tokenizer
from vlm_sft.pieces.piece import Piece
from vlm_sft.stack.build_stack import build_stack

OPENED: list[str] | None = None
IMPORTED: set[str] = set()


def watch(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], str | os.PathLike):
        OPENED.append(os.path.realpath(arguments[0]))
    if OPENED is not None and event == "import":
        IMPORTED.add(str(arguments[0]))


sys.addaudithook(watch)

# What libraries obey, or obeyed, beside the files that are expected; and what only lies there.
STRANGE = (
    *("additional_chat_templates/x.jinja", "chat_template.jinja", "chat_template.json", "tokenizer.4.0.0.json"),
    *("tekken.json", "qwen.tiktoken", "config.4.0.0.json", "modeling_llama.py", "custom_generate/generate.py"),
    *("audio_tokenizer_config.json", "video_preprocessor_config.json", "pytorch_model.bin", "model.fp16.safetensors"),
    *("model.safetensors.index.json", "adapter_model.safetensors", "quantize_config.json", "README.md", "tf_model.h5"),
    *("onnx/model.onnx", ".gitattributes", "training_args.bin", "二.json", "modelcard.json", "processor.py"),
)


@pytest.mark.parametrize("model", ["llama", "opt"])
def test_a_file_that_is_not_expected_is_never_opened(model, pieces, recipe_file, tmp_path):
    global OPENED
    bases = {}
    for name in ("clip", model):
        bases[name] = str(tmp_path / name)
        shutil.copytree(pieces[name], tmp_path / name)
    stack = tiny_stack({**pieces, **bases}, tower="clip", resampler=None, lm=model)
    recipe = load_recipe(recipe_file(stack=stack))
    plain = build_stack(recipe)
    for base in bases.values():
        for name in STRANGE:
            (Path(base) / name).parent.mkdir(exist_ok=True)
            (Path(base) / name).write_text('{"weight_map": {}, "chat_template": "evil", "a": "{{ evil }}"}')
    OPENED = []
    try:
        found = build_stack(recipe)
    finally:
        opened, OPENED = OPENED, None
    inside = {str(Path(path).relative_to(b)) for path in opened for b in bases.values() if path.startswith(b + os.sep)}
    assert {"config.json", "tokenizer.json"} <= inside <= {*MODEL, *IMAGES, *TOKENIZER, "model.safetensors"}, inside
    assert found.pieces == plain.pieces
    before, after = plain.model.state_dict(), found.model.state_dict()
    kept = [name for name in before if not name.startswith("model.projector.")]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert found.processor.tokenizer.chat_template is None
    said = json.dumps([found.model.config.to_dict(), found.processor.tokenizer.init_kwargs], default=str)
    assert "vlm-sft-expected" not in said.replace(found.processor.tokenizer.name_or_path, "")


def test_the_folder_holds_what_is_expected_and_nothing_else(pieces, tmp_path):
    base = shutil.copytree(pieces["llama"], tmp_path / "base")
    for name in STRANGE:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    names = (*MODEL, *IMAGES, *TOKENIZER)
    folder = Path(laid_out(str(base), None, "key", names, Checkpoint(str(base))))
    held = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= held <= {*names, "model.safetensors"}
    assert laid_out(str(base), None, "key", names, Checkpoint(str(base))) == str(folder)
    with pytest.raises(UserError, match=r"key: the folder .* has no config\.json"):
        laid_out(str(tmp_path), None, "key", names)


AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor",
        "AutoFeatureExtractor", "AutoVideoProcessor", "AutoModelForImageTextToText")  # fmt: skip


def keys_of_files() -> set[str]:
    """Every argument of a tokenizer of transformers that names a file."""
    found = {"tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "added_tokens_file", "spm_file"}
    for package in pkgutil.iter_modules(transformers.models.__path__):
        try:
            module = import_module(f"transformers.models.{package.name}.tokenization_{package.name}")
        except (ImportError, NameError):
            continue
        found |= set(getattr(module, "VOCAB_FILES_NAMES", {}))
    return found | {"chat_template_file", "tokenizer_config_file", "full_tokenizer_file", "sp_model", "vocab_path"}


def strange_names(secret: Path) -> dict[str, object]:
    """What a settings file of any kind may say to make a library read or import something else."""
    code = {name: ["strange.Evil", "strange.Evil"] if name == "AutoTokenizer" else "strange.Evil" for name in AUTO}
    names = dict.fromkeys(sorted(keys_of_files()), str(secret))
    names |= {"auto_map": code, "name_or_path": str(secret.parent), "_name_or_path": str(secret.parent)}
    names |= {"custom_generate": str(secret.parent), "custom_pipelines": {"a": {"impl": "strange.Evil"}}}
    names |= dict.fromkeys(("tokenizer_class", "processor_class", "slow_tokenizer_class"), "strange.Evil")
    names |= dict.fromkeys(("image_processor_type", "feature_extractor_type", "video_processor_type"), "strange.Evil")
    names |= {"trust_remote_code": True, "code_revision": "main", "subfolder": "..", "_commit_hash": "0" * 40}
    return names | {"chat_template": "{{ evil }}", "additional_chat_templates": [str(secret)], "kernel_config": "a/b"}


SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
            "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
            "chat_template.json")  # fmt: skip


@pytest.mark.parametrize("file", SETTINGS)
def test_no_name_in_a_settings_file_is_opened_or_imported(file, pieces, tmp_path, monkeypatch):
    global OPENED
    monkeypatch.chdir(tmp_path)  # which is on Python's path where a program is started with -m
    monkeypatch.syspath_prepend(str(tmp_path))
    secret = tmp_path / "elsewhere" / "secret.json"
    secret.parent.mkdir()
    secret.write_text('{"model": {"type": "WordLevel", "vocab": {"stolen": 0}}}')
    names = strange_names(secret)
    part, kind = ("tower", "clip") if "processor" in file else ("lm", "llama")
    refused: list[str] = []
    for number, (name, value) in enumerate(names.items()):
        base = Path(shutil.copytree(pieces[kind], tmp_path / f"base{number}"))
        for place in (base, tmp_path):
            (place / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
        settings = json.loads((base / file).read_text()) if (base / file).is_file() else {}
        (base / file).write_text(json.dumps(settings | {name: value}))
        spec = SimpleNamespace(pretrained=str(base), revision=None, trust_remote_code=False)
        piece = Piece("vision_tower" if part == "tower" else "language_model", spec)
        OPENED = []
        try:
            _ = piece.raw, piece.whole
            load_image_processor(piece) if part == "tower" else load_tokenizer(piece)
        except UserError as error:
            refused.append(str(error))
        finally:
            opened, OPENED = OPENED, None
        assert not [path for path in opened if path.startswith(str(secret.parent)) or path.endswith("strange.py")], name
        assert not (tmp_path / "ran").exists() and not {"strange"} & IMPORTED, name
    assert len(refused) < len(names) and not any("\n" in sentence for sentence in refused)


def test_no_class_of_a_tokenizer_opens_what_its_settings_name(pieces, tmp_path):
    global OPENED
    secret = tmp_path / "secret.json"
    secret.write_text('{"stolen": 0}')
    classes = {
        name
        for names in filter(None, TOKENIZER_MAPPING_NAMES.values())
        for name in ([names] if isinstance(names, str) else names)
    }
    base = Path(shutil.copytree(pieces["llama"], tmp_path / "base"))
    read, refused = 0, []
    for number, name in enumerate(sorted(filter(None, classes))):
        named = dict.fromkeys(("vocab_file", "merges_file", "tokenizer_file", "spm_file"), str(secret))
        (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "eos_token": "</s>"} | named))
        if number % 2:  # also where it has no vocabulary of its own
            (base / "tokenizer.json").unlink(missing_ok=True)
        else:
            shutil.copy(Path(pieces["llama"]) / "tokenizer.json", base)
        spec = SimpleNamespace(pretrained=str(base), revision=None, trust_remote_code=False)
        OPENED = []
        try:
            load_tokenizer(Piece("language_model", spec))
            read += 1
        except UserError as error:
            refused.append(str(error))
        finally:
            opened, OPENED = OPENED, None
        assert str(secret) not in opened, name
    assert read > 10 and not any("\n" in sentence for sentence in refused)


# Vocabularies of tokenizers that no language model here has: of speech, of two languages, of single words, slow ones.
OTHERS = {
    *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "source.spm", "target.spm", "dict.txt", "bpe.codes"),
    *("entity_vocab.json", "word_shape.json", "word_pronunciation.json", "normalizer.json", "emoji.json"),
    *("spm_char.model", "byte_maps.json", "merges.txt", "genres.json", "lyrics.json", "artists.json"),
    *("question_encoder_tokenizer", "prophetnet.tokenizer", "tekken.json", "vocab"),
}


def test_every_vocabulary_of_transformers_was_judged():
    named = set()
    for package in pkgutil.iter_modules(transformers.models.__path__):
        try:
            module = import_module(f"transformers.models.{package.name}.tokenization_{package.name}")
        except (ImportError, NameError):  # pop2piano names a package that is not there
            continue
        named |= {v for v in getattr(module, "VOCAB_FILES_NAMES", {}).values() if isinstance(v, str)}
    assert len(TOKENIZER_MAPPING_NAMES) > 50 and len(named) > 10
    assert named <= {*TOKENIZER, *OTHERS}, sorted(named - {*TOKENIZER, *OTHERS})
