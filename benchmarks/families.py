"""Which image-text-to-text models of transformers a recipe can start from (`model:`): every class is tried.

    python benchmarks/families.py [model type …]

A family of `vlm_sft/families/table.py` passes every test of families on a tiny random model of it: ids and pixels equal
to its own processor's, losses and logits equal to its own class's, three steps in full and in 4 bits, reloaded,
exported, a batch equal to its rows alone, two processes. Of every other class it is said why it is none. Nothing is
downloaded. What needs torchvision is tested in `.venv-torchvision` (`make .venv-torchvision/.setup-done`).
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from vlm_sft.families.table import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
BESIDE_TORCHVISION = ROOT / ".venv-torchvision" / "bin" / "python"
TESTS = ["tests/families", "tests/export/test_forms.py", "tests/batch/test_typed_text.py",
         "tests/end_to_end/test_distributed.py::test_fsdp2_makes_what_one_process_makes"]  # fmt: skip
# What the classes themselves do not say.
REASONS = {
    "blip": "its image enters by cross-attention, and it captions alone",
    "blip-2": "composed of its parts, under `stack`",
    "instructblip": "composed of its parts, under `stack`",
    "instructblipvideo": "it takes videos alone",
    "diffusion_gemma": "it fills in a whole block at once, and has no next token to learn",
    "evolla": "it reads proteins, not images",
    "glm4v_moe": "PEFT turns LoRA on its linear layers into LoRA on its experts, of which no bundle keeps one",
    "mistral4": "its class in this list has no image path",
    "pi0": "it writes a robot's motions, not words",
    "chameleon": "an image is words of its vocabulary, with no features and no projector",
    "emu3": "an image is words of its vocabulary, with no features and no projector",
    "glmga": "transformers names no model of it, but GLM-4.6V's class with an image processor of its own",
    "glm_ocr": "its prompt was found in vLLM's example alone, which disagrees with those of its relatives",
    "qwen2_5_omni_thinker": "published inside a whole that also speaks, which is none of these classes",
    "qwen3_omni_moe_thinker": "published inside a whole that also speaks, which is none of these classes",
    "pp_chart2table": "its own processor writes no places of an image into a text",
    "shieldgemma2": "it judges images by policies that its own processor writes; its weights are Gemma 3's",
    **dict.fromkeys(
        ("gemma4_unified", "inkling2", "inkling_mm_model", "minicpm_ocr", "minimax_m3_vl", "mistral_large4",
         "muse_glimmer", "muse_spark", "nemotron_h_omni", "step3p7", "unlimited_ocr"),
        "it was not tried beside torchvision, which its own processor needs",
    ),
}  # fmt: skip
NO_ROW = "its prompt was not found: neither in transformers nor in ms-swift or LLaMA-Factory"


def classes() -> list[str]:
    """Model types of every class, as transformers lists them."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def reason(model_type: str) -> str:
    """Why a class is none of the families."""
    if model_type in REASONS:
        return f"no: {REASONS[model_type]}"
    why = why_not(model_type)
    if why == NO_ROW and model_type not in PROCESSOR_MAPPING_NAMES:
        return "no: transformers names no processor for it"
    return f"no: {why}"


def why_not(model_type: str) -> str:
    """What of a model's class a family cannot do without, by its default configuration on the meta device."""
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[model_type]]
    parameters = inspect.signature(kind.forward).parameters
    if "decoder_input_ids" in parameters:
        return "it has an encoder for the prompt and a decoder for the answer"
    if "pixel_values" not in parameters:
        return "its forward takes no pixel values"
    try:
        with torch.device("meta"):
            model = kind._from_config(CONFIG_MAPPING[model_type]())
    except ImportError as error:
        return f"its tower needs {'timm' if 'timm' in str(error) else 'a library that is not here'}"
    except Exception:  # its default configuration makes no model
        return NO_ROW
    if not hasattr(model.base_model, "get_image_features"):
        return "its image enters by cross-attention, not at places of the prompt"
    return NO_ROW


def works(model_type: str, failed: list[str]) -> str:
    """What is said of a family, by the names of the tests that failed on it."""
    if failed:
        return f"no: {', '.join(sorted({name.removeprefix('test_').replace('_', ' ') for name in failed}))}"
    family = FAMILIES[model_type]
    said = [f"works: template {', '.join(f'`{name}`' for name in sorted(set(family.template.values())))}"]
    if family.no_packing:
        said.append(f"rows are neither packed nor do they share images ({family.no_packing})")
    if family.one_by_one:
        said.append("its weights are not split among processes (its projector is called for each image by itself)")
    if family.needs:
        said.append(f"beside {' and '.join(family.needs)}")
    if family.no_export:
        said.append(f"not exported ({family.no_export})")
    return "; ".join(said)


def check(names: list[str], python: str = sys.executable) -> dict[str, list[str]]:
    """Family → the names of the tests that fail on its tiny model, in the environment of a Python."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "VLM_SFT_FAMILIES": " ".join(names)}, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        failed = [case.get("name", "") for case in cases if {each.tag for each in case} & {"failure", "error"}]
    return {name: [case.partition("[")[0] for case in failed if _is_of(case, name)] for name in names}


def _is_of(case: str, name: str) -> bool:
    identity = case.partition("[")[2].rstrip("]")
    return identity == name or identity.startswith(f"{name}-") or not identity


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*", help="model types; default all")
    wanted = parser.parse_args().classes or classes()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    failed: dict[str, list[str]] = {}
    for beside, python in ((False, sys.executable), (True, str(BESIDE_TORCHVISION))):
        known = [name for name in wanted if name in FAMILIES and bool(FAMILIES[name].needs) == beside]
        failed |= check(known, python) if known else {}
    for name in wanted:
        print(f"| `{name}` | {works(name, failed[name]) if name in failed else reason(name)} |", flush=True)


if __name__ == "__main__":
    main()
