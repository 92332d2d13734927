"""The parity gate, with its fresh process: what is equal, what was changed since, what does not load."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from support.bundles import snapshot
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.manifest import Provenance
from vlm_sft.bundle.parity import MAX_POSITIONS, check_parity, has_own_memory, main, probe_logits, set_aside
from vlm_sft.bundle.save import save_bundle
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.stack.judge import measure
from vlm_sft.stack.lora import lora_config


def make_batch(processor, rows=2, answer=5):
    tokens = [processor.image_token_id] * processor.num_image_tokens
    ids = torch.tensor([[1, *tokens, 40 + i, *range(60, 60 + answer), 2] for i in range(rows)])
    labels = ids.clone()
    labels[:, : len(tokens) + 2] = -100
    pixels = torch.randn(rows, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


@pytest.fixture
def saved(recipe_file, tmp_path):
    """A model with LoRA, a batch, and the bundle that was saved of it."""
    recipe = load_recipe(recipe_file(lora={"r": 2}))
    stack = build_stack(recipe)
    model = get_peft_model(stack.model, lora_config(recipe, stack.model))
    stack.plan.apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path / "bundle"
    save_bundle(folder, model, stack.processor, stack.plan, Provenance(recipe, stack.pieces))
    return folder, model, make_batch(stack.processor)


def tamper(folder, file="trained.safetensors"):
    state = load_file(folder / file)
    name = sorted(state)[-1]
    state[name] = state[name] * 1.5
    save_file(state, folder / file, metadata={"format": "pt"})


def manifest(folder):
    return json.loads((folder / "bundle.json").read_text())


@pytest.mark.slow
def test_a_good_bundle_is_equal_in_a_fresh_process_and_its_manifest_says_so(saved, fresh_python, monkeypatch):
    folder, model, batch = saved
    model.train()
    run, processes = subprocess.run, []
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kw: processes.append(run(*args, **kw)) or processes[-1])
    result = check_parity(folder, model, batch)
    imported = {line.split("|")[-1].strip() for line in processes[0].stderr.splitlines()}
    assert "peft.helpers" in imported and "bitsandbytes.nn" not in imported
    assert result["equal"] and result["max_difference"] <= 1e-5 and result["positions"] == 12
    assert manifest(folder)["parity"] == result
    assert model.training, "the model is as it was"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("file", ["trained.safetensors", "adapter_model.safetensors"])
def test_a_bundle_that_is_not_the_model_is_refused(file, saved):
    folder, model, batch = saved
    tamper(folder, file)
    with pytest.raises(UserError, match=r"but its logits differ from the trainer's by .* \(allowed [\d.]+e-05 at"):
        check_parity(folder, model, batch)
    assert manifest(folder)["parity"]["equal"] is False


@pytest.mark.slow
def test_a_bundle_that_does_not_load_gives_its_last_line(saved):
    folder, model, batch = saved
    state = load_file(folder / "trained.safetensors")
    state.pop("model.projector.linear.bias")
    save_file(state, folder / "trained.safetensors")
    sentence = r"saved but does not load in a fresh process: '.*trained\.safetensors' lacks 1 trained tensors"
    with pytest.raises(UserError, match=sentence) as error:
        check_parity(folder, model, batch)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    assert "parity" not in manifest(folder)


def in_this_process(saved, tmp_path, capsys):
    folder, model, batch = saved
    probe = {**batch, "logits": probe_logits(model, batch).contiguous()}
    save_file(probe, tmp_path / "probe.safetensors")
    main([str(folder), str(tmp_path / "probe.safetensors"), "cpu"])
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])["max_difference"]


def test_the_fresh_process_measures_the_difference(saved, tmp_path, capsys):
    assert in_this_process(saved, tmp_path, capsys) <= 1e-6
    tamper(saved[0])
    assert in_this_process(saved, tmp_path, capsys) > 1e-2


def test_a_run_in_16_bits_is_asked_as_its_bundle_will_compute(saved):
    """Autocast rounds at other places: a model of 30 layers once differed by more than a wrong one may."""
    _, model, batch = saved
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    wanted = probe_logits(model, batch)
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's, as a run begins
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    mask = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        in_training = prepared(**batch).logits[:, :-1][mask]
    assert torch.equal(probe_logits(accelerator.unwrap_model(prepared), batch), wanted)
    assert not torch.equal(in_training, wanted), "or the test shows nothing"
    with torch.no_grad():
        assert torch.equal(prepared(**batch).logits[:, :-1][mask], in_training), "the run computes on as before"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_that_are_not_numbers_are_not_equal(saved, tmp_path, capsys):
    state = load_file(saved[0] / "trained.safetensors")
    state["model.projector.linear.bias"][0] = float("nan")
    save_file(state, saved[0] / "trained.safetensors")
    difference = in_this_process(saved, tmp_path, capsys)
    assert not difference <= 1e-4


def test_only_supervised_positions_are_compared_and_at_most_so_many(saved):
    _, model, batch = saved
    logits = probe_logits(model, batch)
    assert logits.shape == (12, 300) and logits.dtype == torch.float32
    whole = model.eval()(**{n: batch[n] for n in ("input_ids", "attention_mask", "pixel_values")}).logits
    mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
    mask[:, :-1] = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(logits, whole[mask], atol=1e-6, rtol=0)
    long = {name: torch.cat([tensor] * 30) for name, tensor in batch.items()}
    assert len(probe_logits(model, long)) == MAX_POSITIONS == 256


def test_a_batch_without_images_is_compared_too(saved):
    _, model, batch = saved
    text = {n: t[:, 5:] for n, t in batch.items() if n != "pixel_values"}
    assert len(probe_logits(model, text)) == 12


def held(model):
    """Bytes that the weights take."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for storage in storages.values())


def test_the_trainers_weights_are_off_its_device_while_the_fresh_process_has_it(saved, monkeypatch):
    """Here the CPU stands for the accelerator: the fresh process is told it, and finds it free."""
    folder, model, batch = saved
    for parameter in model.parameters():  # what lies in a mapped file cannot be freed; on an accelerator nothing does
        parameter.data = parameter.data.clone()
    before, full, seen = snapshot(model), held(model), []

    def fresh_process(command, **options):
        seen.append((command[-1], held(model)))
        return subprocess.CompletedProcess(command, 0, json.dumps(measure(torch.ones(1, 2), torch.ones(1, 2))), "")

    monkeypatch.setattr(subprocess, "run", fresh_process)
    check_parity(folder, model, batch)
    assert seen == [("cpu", full)], "what lies in the host's memory may stay"
    monkeypatch.setattr("vlm_sft.bundle.parity.has_own_memory", lambda device: device.type == "cpu")
    wanted = probe_logits(model, batch)
    check_parity(folder, model, batch)
    assert seen[1:] == [("cpu", 0)] and held(model) == full
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(probe_logits(model, batch), wanted)


def test_weights_come_back_also_when_the_fresh_process_cannot_be_started_and_tied_ones_stay_tied(monkeypatch):
    monkeypatch.setattr("vlm_sft.bundle.parity.has_own_memory", lambda device: True)
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["table"].weight
    model.register_buffer("part", model["table"].weight.detach()[1:3])
    wanted = model["table"].weight.detach().clone()
    try:
        with set_aside(model):
            assert held(model) == 0
            raise OSError("no process")
    except OSError:
        pass
    assert torch.equal(model["head"].weight, wanted) and torch.equal(model.part, wanted[1:3])
    with torch.no_grad():
        model["table"].weight.zero_()
    assert not model["head"].weight.any() and not model.part.any(), "one memory as before"


def test_devices_whose_memory_is_the_hosts_keep_it():
    assert [has_own_memory(torch.device(kind)) for kind in ("cuda", "xpu", "cpu", "mps")] == [True, True, False, False]
