"""The README.md of an export: what it is, how to ask it, and how far its logits are from the bundle's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bundle.card import bases_of, render_card, shown
from ..bundle.manifest import read_manifest
from .check import ADAPTER_FOLDER


def write_export_card(out: str | Path, bundle: str | Path, result: dict[str, Any]) -> Path:
    """Writes the card of an exported checkpoint by its bundle and what `export` found; gives the path."""
    out, bundle = Path(out), Path(bundle)
    manifest = read_manifest(bundle)
    head = {"pipeline_tag": "image-text-to-text", "library_name": "transformers", "tags": ["vlm_sft"]}
    kept = (out / ADAPTER_FOLDER).is_dir()
    return render_card(
        out,
        "export/card.md.jinja",
        head | bases_of(manifest["pieces"], "finetune"),
        name=shown(out.resolve()),
        bundle=shown(bundle.resolve()),
        lora="kept" if kept else "merged" if manifest["adapter"] else "none",
        found=result,
        pieces=manifest["pieces"],
    )
