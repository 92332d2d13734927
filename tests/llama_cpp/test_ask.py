"""What llama.cpp says of its answer is put where it belongs."""

from vlm_sft.llama_cpp.ask import places


def test_tokens_that_end_within_a_character_are_passed_over():
    assert places([133, 117, 6, 75], [117, 6, 75]) == [1, 2, 3]
    assert places([5, 5, 6], [5, 6]) == [1, 2]
    assert places([5, 6], [5, 6]) == [0, 1]
    assert places([5], []) == []
