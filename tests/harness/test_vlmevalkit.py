"""VLMEvalKit itself, in its own environment, on data of our own: what it hears is what our command says."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from support.asking import running
from support.bundles import trained
from support.paths import ROOT
from vlm_sft.base.errors import UserError
from vlm_sft.harness import vlmevalkit
from vlm_sft.inference.answer_file import generate
from vlm_sft.serving.bundles import load_bundles
from vlm_sft.serving.prepare import Rules

PYTHON = ROOT / ".venv-vlmevalkit" / "bin" / "python"
QUESTIONS = ["What is it?", "这是什么？", "Is it a cat? Answer yes or no.", "图中有什么？请回答。"]
# Several runs in one process, because VLMEvalKit takes its time to be imported.
DRIVER = """
import json, ssl, sys
from vlm_sft.base.errors import exit_on_user_error
from vlm_sft.harness import vlmevalkit
checked = ssl._create_default_https_context
runs, files = map(json.loads, sys.argv[1:])
for arguments in runs:
    with exit_on_user_error():
        vlmevalkit.main(arguments)
from vlmeval.smp import load
said = {name: load(name).to_dict("records") for name in files}
print("SAID" + json.dumps([said, ssl._create_default_https_context is checked], default=str))
"""


@pytest.mark.slow
def test_by_itself_and_through_the_server_it_hears_what_our_own_command_says(bundle_recipe, tmp_path, photos) -> None:
    if not PYTHON.exists():
        pytest.fail("VLMEvalKit has no environment here: run `make .venv-vlmevalkit/.setup-done` (`make test` does).")
    bundle = tmp_path / "bundle"
    trained(bundle_recipe(chat_template="ziya", lora={"r": 2}, generation={"max_new_tokens": 6}), bundle)
    rows = [{"id": n, "image": photos[n], "question": question} for n, question in enumerate(QUESTIONS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    generate(str(bundle), str(tmp_path / "rows.jsonl"), str(tmp_path / "answers.jsonl"))
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ours = [json.loads(line)["answer"] for line in lines]
    assert len(set(ours)) > 2

    (data := tmp_path / "data").mkdir()
    table = ["index\tquestion\tanswer\timage_path"]
    table += [f"{row['id']}\t{row['question']}\tyes\t{row['image']}" for row in rows]
    (data / "own_vqa.tsv").write_text("\n".join(table), encoding="utf-8")
    table = ["index\tquestion\tA\tB\tanswer\timage_path"]
    table += [f"{row['id']}\t{row['question']}\ta cat\t一只狗\tA\t{row['image']}" for row in rows]
    (data / "own_mcq.tsv").write_text("\n".join(table), encoding="utf-8")

    with running(load_bundles([str(bundle)], {}), Rules(image_folders=(str(Path(photos[0]).parent),))) as caller:
        over_http = ["--base-url", caller.url, "--local-media", "--max-tokens", "6", "--model", "bundle"]
        runs = [
            [str(bundle), "--data", "own_vqa", "--mode", "infer", "--work-dir", str(tmp_path / "itself")],
            [str(bundle), "--data", "own_mcq", "--judge", "exact_matching", "--work-dir", str(tmp_path / "itself")],
            [*over_http, "--data", "own_vqa", "--mode", "infer", "--work-dir", str(tmp_path / "http")],
        ]
        files = [str(tmp_path / way / "bundle" / "bundle_own_vqa.tsv") for way in ("itself", "http")]
        environment = {**os.environ, "LMUData": str(data), "PRED_FORMAT": "tsv", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [PYTHON, "-c", DRIVER, json.dumps(runs), json.dumps(files)],
            capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert 'status="200"} 4' in caller(None, "/metrics", "GET").told, done.stderr[-3000:]
    said, checked = json.loads(done.stdout.rpartition("SAID")[2])
    for file in files:
        assert [row["prediction"] for row in said[file]] == ours, file
    assert checked, "certificates are checked"
    assert list((tmp_path / "itself").rglob("*own_mcq*acc*")), sorted(map(str, (tmp_path / "itself").rglob("*")))


def test_what_is_wrong_is_one_sentence(tmp_path, monkeypatch) -> None:
    for given, said in (
        ([], "Name a bundle and data"),
        (["b", "--model", "x"], "The bundle is the model"),
        ([str(tmp_path)], "is no bundle"),
        (["name/none", "--data", "x"], "VLMEvalKit is not installed here"),
    ):
        with pytest.raises(UserError, match=said):
            vlmevalkit.main(given)


def test_packages_that_are_spared_say_so_where_they_are_used(monkeypatch) -> None:
    monkeypatch.setattr(vlmevalkit, "SPARED", ("spared_package",))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, vlmevalkit.Spared()])
    import spared_package.transforms as spared  # type: ignore[import-not-found]
    from spared_package.video import Reader  # type: ignore[import-not-found]

    for use in (Reader, spared.Resize, spared.functional.crop):
        with pytest.raises(ImportError, match="spared_package is not installed: this benchmark needs it"):
            use("a.mp4")
    with pytest.raises(ImportError):
        __import__("another_package_that_is_not_there")
    for name in [name for name in sys.modules if name.startswith("spared_package")]:
        del sys.modules[name]


def test_certificates_stay_checked() -> None:
    before = ssl._create_default_https_context
    with vlmevalkit.certificates_checked():
        ssl._create_default_https_context = ssl._create_unverified_context
    assert ssl._create_default_https_context is before
