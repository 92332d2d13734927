"""What a trainer's model makes of a batch, and whether it is the same."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import create_mask

# fp32, losses of about 6 and gradients of about 1: sums of the same numbers in another order.
SAME = {"atol": 2e-6, "rtol": 2e-5}


def gradients(trainer, batch) -> dict[str, torch.Tensor]:
    """The loss of a batch in evaluation mode, and the gradient of each trained tensor."""
    trainer.model.eval()  # dropout would be drawn for other shapes
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(50))
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys() and any(g.abs().max() > 1e-3 for n, g in found.items() if n != "loss")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **SAME, msg=lambda said, name=name: f"{name}: {said}")


def math_of_flex(query, key, value, block_mask, scale, **options):
    """What flex attention computes: torch has no gradient of it on a CPU, and compiles for minutes."""
    shape = (len(query), None, query.shape[2], key.shape[2])
    mask = create_mask(block_mask.mask_mod, *shape, device="cpu")
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return (
        (found, found.new_zeros(found.shape[:3])) if options.get("return_aux") or options.get("return_lse") else found
    )
