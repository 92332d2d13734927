"""Several processes: the first one's work reaches all, and so does its error."""

from __future__ import annotations

import pytest

from support.gloo import in_processes
from vlm_sft.base.errors import UserError
from vlm_sft.base.processes import cores_for_each, on_first_process, one_process_first, share_work


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


def test_every_process_does_a_share_and_has_them_all(tmp_path):
    def work(rank):
        shares = share_work(lambda number, of: f"{number} of {of} 份")
        assert cores_for_each() >= 1
        return rank, shares

    assert in_processes(work, tmp_path) == [(rank, ["0 of 2 份", "1 of 2 份"]) for rank in range(2)]


@pytest.mark.parametrize(("wrong", "said"), [((1,), "row 1 is bad."), ((0, 1), "row 0 is bad.")])
def test_an_error_of_any_share_ends_all_with_the_first_sentence(tmp_path, wrong, said):
    def refuse(number, of):
        if number in wrong:
            raise UserError(f"row {number} is bad.")

    assert in_processes(lambda rank: share_work(refuse), tmp_path) == [said, said]


def test_one_process_does_all():
    assert share_work(lambda number, of: (number, of)) == [(0, 1)]


@pytest.mark.parametrize(("cores", "local", "each"), [(16, 4, 4), (16, 1, 16), (2, 8, 1), (7, 2, 3)])
def test_processes_of_a_machine_share_its_cores(monkeypatch, cores, local, each):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert cores_for_each() == each
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert cores_for_each() == cores, "this test is one process"
