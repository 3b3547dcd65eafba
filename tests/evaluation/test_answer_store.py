"""Answers survive: kills, torn lines, damage; and nothing is asked twice."""

import pytest

from capstan.errors import InputError
from capstan.evaluation import AnswerStore, Completion, Evaluator, Result, Token, run_spec_of

RESULT = Result(
    completions=(Completion(text="é", tokens=(Token("é", -0.1),), finish_reason="stop"),),
    seconds=0.25,
    batch_size=3,
)


def test_an_answer_comes_back_as_it_was(tmp_path):
    with AnswerStore(tmp_path / "a.jsonl") as store:
        store.add("k", RESULT)
    with AnswerStore(tmp_path / "a.jsonl") as store:
        assert store["k"] == RESULT
        assert store.num_damaged == 0


def test_a_torn_line_is_left_aside_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswerStore(path) as store:
        store.add("k", RESULT)
        store.add("l", RESULT)
    path.write_bytes(path.read_bytes()[:-20])
    with AnswerStore(path) as store:
        assert ("k" in store, "l" in store, store.num_damaged) == (True, False, 1)
        store.add("l", RESULT)
    with AnswerStore(path) as store:
        assert "l" in store


def test_a_damaged_answer_is_found_and_asked_again(tmp_path, toy_root, toy_model):
    path, spec = tmp_path / "a.jsonl", run_spec_of("boolq:max_eval_instances=5")
    with AnswerStore(path) as store:
        first = Evaluator(model=toy_model, store=store, root=toy_root).run(spec)
    assert toy_model.num_asked == 5
    data = bytearray(path.read_bytes())
    place = data.index(b'"text":"') + 9
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with AnswerStore(path) as store:
        assert store.num_damaged == 1
        second = Evaluator(model=toy_model, store=store, root=toy_root).run(spec)
    assert toy_model.num_asked == 6
    assert second.states == first.states


def test_a_run_that_is_cut_short_goes_on_where_it_was(tmp_path, toy_root, toy_model):
    spec = run_spec_of("boolq:max_eval_instances=6")

    class Killed(Exception):
        pass

    def kill(done: int, _: int) -> None:
        if done == 4:
            raise Killed

    path = tmp_path / "a.jsonl"
    with AnswerStore(path) as store, pytest.raises(Killed):
        Evaluator(model=toy_model, store=store, root=toy_root).run(spec, on_answered=kill)
    with AnswerStore(path) as store:
        resumed = Evaluator(model=toy_model, store=store, root=toy_root).run(spec)
    assert toy_model.num_asked == 6
    with AnswerStore(tmp_path / "b.jsonl") as store:
        whole = Evaluator(model=toy_model, store=store, root=toy_root).run(spec)
    assert [s.to_dict() for s in resumed.measurement.stats] == [s.to_dict() for s in whole.measurement.stats]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Answers cannot be kept: .*Not a directory.*--output"):
        AnswerStore(tmp_path / "file" / "a.jsonl")
