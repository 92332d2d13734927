"""Tables of positions of another size: what is resized, and what stays."""

from __future__ import annotations

import torch

from vlm_sft.systems.position_tables import fit_positions


def test_a_table_that_is_no_square_stays_and_is_refused_later():
    table = torch.randn(1, 12, 4)
    assert fit_positions(table, torch.Size((1, 26, 4)), 25) is table
    half = torch.randn(1, 10, 4).half()
    resized = fit_positions(half, torch.Size((1, 26, 4)), 25)
    assert resized.dtype == torch.float16 and torch.equal(resized[:, :1], half[:, :1])
