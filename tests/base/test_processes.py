"""Several processes: the first one's work reaches all, and so does its error."""

from __future__ import annotations

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.base.processes import on_first_process, one_process_first


class Processes:
    """Stands in for accelerate's state and its broadcast: what the first process sends, the second receives."""

    num_processes = 2

    def __init__(self, monkeypatch):
        self.sent = None
        monkeypatch.setattr("accelerate.PartialState", lambda: self)
        monkeypatch.setattr("accelerate.utils.broadcast_object_list", self.broadcast)

    def broadcast(self, outcome):
        if self.is_main_process:
            self.sent = list(outcome)
        else:
            outcome[:] = self.sent


def test_every_process_gets_what_the_first_found_and_its_error_too(monkeypatch):
    state = Processes(monkeypatch)

    def everywhere(work):
        got = []
        for state.is_main_process in (True, False):
            try:
                got.append(on_first_process(work if state.is_main_process else pytest.fail))
            except UserError as error:
                got.append(str(error))
        return got

    def refuse():
        raise UserError("row 7 is bad.")

    assert everywhere(lambda: {"rows": 3}) == [{"rows": 3}, {"rows": 3}]
    assert everywhere(refuse) == ["row 7 is bad.", "row 7 is bad."]


def test_one_process_of_a_machine_goes_first_also_where_it_fails(monkeypatch):
    state, order = Processes(monkeypatch), []
    state.wait_for_everyone = lambda: order.append("meet")

    def refuse():
        order.append("work")
        raise UserError("row 7 is bad.")

    for state.is_local_main_process in (True, False):
        order.append("process")
        assert one_process_first(lambda: order.append("work") or 3) == 3
        with pytest.raises(UserError, match="row 7"):
            one_process_first(refuse)
    assert order == ["process", "work", "meet", "work", "meet", "process", "meet", "work", "meet", "work"]
