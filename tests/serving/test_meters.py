"""The counts, in Prometheus' form."""

from __future__ import annotations

from vlm_sft.serving.meters import Histogram, Meters


def test_a_histogram_counts_upwards() -> None:
    seconds = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        seconds.see(value)
    assert seconds.lines("x") == [
        'x_bucket{le="1.0"} 2', 'x_bucket{le="2.0"} 3', 'x_bucket{le="+Inf"} 4', "x_sum 12.000000", "x_count 4",
    ]  # fmt: skip


def test_every_count_has_its_kind_and_its_lines() -> None:
    meters = Meters()
    meters.answered('a"b', 200, 0.2)
    meters.answered("", 400, 0.0)
    meters.tokens("a", 30, 4)
    meters.first(0.1)
    meters.gone()
    meters.batch(3)
    text = meters.text(2, 5)
    for line in (
        'vlm_sft_requests_total{model="a\\"b",status="200"} 1', 'vlm_sft_requests_total{model="",status="400"} 1',
        'vlm_sft_tokens_total{model="a",kind="prompt"} 30', 'vlm_sft_tokens_total{model="a",kind="written"} 4',
        "vlm_sft_clients_gone_total 1", "vlm_sft_answers_written 2", "vlm_sft_questions_waiting 5",
        'vlm_sft_batch_size_bucket{le="4"} 1', "vlm_sft_first_piece_seconds_count 1",
        "# TYPE vlm_sft_request_seconds histogram",
    ):  # fmt: skip
        assert f"\n{line}\n" in f"\n{text}"
