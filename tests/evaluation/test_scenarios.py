"""Every scenario of the paper on a small file in its original format: 16 core, 26 targeted, and ours."""

import json
import re

import pytest

from capstan.errors import InputError, UsageError
from capstan.evaluation import AnswerStore, Evaluator, measure, read_run, run_spec_of, write_run
from capstan.evaluation.instances import EVAL_SPLITS, TRAIN
from capstan.evaluation.running import prepare, sampled
from capstan.evaluation.scenarios import load_instances, scenario_of
from capstan.evaluation.suites import SUITES, suite_entries

# entry, training instances, others; of each scenario's small files
ENTRIES = {
    "mmlu:subject=anatomy": (6, 15),
    "boolq": (12, 8),
    "narrative_qa": (6, 6),
    "natural_qa:mode=closedbook": None,
    "natural_qa:mode=openbook_longans": None,
    "quac": (6, 4),
    "commonsense:dataset=hellaswag,method=multiple_choice_separate_original": (4, 10),
    "commonsense:dataset=openbookqa,method=multiple_choice_separate_calibrated": (4, 10),
    "truthful_qa:task=mc_single": (4, 16),
    "msmarco:track=regular,valid_topk=20": (6, 6),
    "msmarco:track=trec,valid_topk=20": (6, 6),
    "summarization_cnndm:temperature=0.3": None,
    "summarization_xsum_sampled:temperature=0.3": None,
    "imdb": (12, 12),
    "civil_comments:demographic=all": (10, 30),
    "raft:subset=overruling": (10, 40),
    "the_pile:subset=ArXiv": (0, 2),
    "twitter_aae:demographic=aa": (0, 6),
    "ice:subset=hk": (0, 2),
    "ice:subset=ind,gender=female": (0, 1),
    "blimp:phenomenon=ellipsis": (0, 10),
    "wikifact:k=5,subject=capital": None,
    "synthetic_reasoning:mode=variable_substitution": (1000, 10000),
    "synthetic_reasoning_natural:difficulty=medium": (1000, 10000),
    "babi_qa:task=all": (60, 120),
    "dyck_language:num_parenthesis_pairs=3": (3, 500),
    "gsm": (6, 8),
    "math:subject=algebra,level=1,use_official_examples=True": (8, 6),
    "math:subject=algebra,level=1,use_chain_of_thought=True": (6, 6),
    "code:dataset=apps": (2, 2),
    "code:dataset=humaneval": (0, 3),
    "lsat_qa:task=all": (5, 8),
    "legal_support": (5, 10),
    "entity_data_imputation:dataset=Buy": None,
    "entity_data_imputation:dataset=Restaurant": (14, 6),
    "entity_matching:dataset=Beer": (8, 24),
    "copyright:datatag=popular_books-prefix_length_125.json": (0, 4),
    "copyright:datatag=prompt_num_line_10-min_lines_20.json": (0, 4),
    "disinformation:capability=reiteration,topic=covid": (2, 3),
    "disinformation:capability=wedging": (0, 6),
    "bbq:subject=Religion": (10, 1000),
    "bold:subject=all": (0, 20),
    "real_toxicity_prompts": (0, 8),
    "synthetic_efficiency:num_prompt_tokens=16": (0, 10),
    "numeracy": (20, 100),
    "wikitext": (0, 3),
}


def test_all_scenarios_of_the_paper_are_tried():
    assert len(SUITES["core"]) == 16
    assert len(SUITES["targeted"]) == 26
    tried = {run_spec_of(entry).scenario_spec.class_name for entry in ENTRIES}
    asked = {run_spec_of(e).scenario_spec.class_name for name in SUITES for e in suite_entries(name)}
    assert asked <= tried


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_scenario_reads_its_original_files_and_runs(entry, toy_root, toy_model, tmp_path):
    spec = run_spec_of(entry, root=toy_root)
    scenario = scenario_of(entry.split(":")[0], {"dataset": str(spec.scenario_spec.args.get("dataset", ""))})
    instances = load_instances(spec.scenario_spec, toy_root)
    counts = sum(i.split == TRAIN for i in instances), sum(i.split in EVAL_SPLITS for i in instances)
    wanted = ENTRIES[entry]
    assert counts == wanted if wanted is not None else min(counts[1], len(instances)) > 0
    with AnswerStore(tmp_path / "answers.jsonl") as store:
        evaluator = Evaluator(model=toy_model, store=store, root=toy_root)
        evaluated = evaluator.run(spec.with_adapter(max_eval_instances=3), scenario=scenario)
    assert evaluated.measurement.stats
    folder = write_run(evaluated, tmp_path / "runs")
    told, states = read_run(folder)
    assert told.name == evaluated.spec.name
    again = measure(told, states, toy_model)
    assert {(s.name.name, s.mean) for s in again.stats} == {
        (s.name.name, s.mean) for s in evaluated.measurement.stats
    }


@pytest.mark.parametrize("entry", [e for e in ENTRIES if not re.match(r"synth|dyck|numer", e)])
def test_a_missing_file_is_named_with_where_it_is_published(entry, tmp_path):
    spec = run_spec_of(entry)
    with pytest.raises(InputError, match=r"There is no .*published at") as error:
        load_instances(spec.scenario_spec, tmp_path)
    assert str(tmp_path) in str(error.value)


def test_files_as_they_are_published_are_read_to_the_last_line(published):
    """Fields that nobody reads, one part of two, articles with headings of every depth."""
    found = {
        entry: load_instances(run_spec_of(entry).scenario_spec, published)
        for entry in ("gsm", "blimp:phenomenon=wh_island", "bbq:subject=Religion", "wikitext")
    }
    sums = found["gsm"]
    assert [each.split for each in sums] == [TRAIN] * 4 + ["test"]  # without test.jsonl a fifth is asked
    assert sums[0].input == "Ann has 4 ropes and buys twice as many.\nHow many has she?"
    assert (
        sums[0].references[0].text
        == "She buys 4*2 = <<4*2=8>>8 ropes. She has 4+8 = <<4+8=12>>12. The answer is 12."
    )
    (pair,) = found["blimp:phenomenon=wh_island"]
    assert [each.text for each in pair.references] == [
        "Who have those men said they saw?",
        "Who have those men said who saw?",
    ]
    assert pair.references[0].is_correct
    assert not pair.references[1].is_correct
    asked = found["bbq:subject=Religion"]
    assert [len(each.references) for each in asked] == [3, 3]
    right = {other.text for each in asked for other in each.references if other.is_correct}
    assert right == {"Can't answer", "The Muslim one"}
    articles = found["wikitext"]
    assert [each.split for each in articles] == ["valid", "test", "test"]
    assert [each.input.splitlines()[0].strip() for each in articles] == ["= Sea =", "= Rope =", "= Bar ="]
    assert "= = = 2000 – 2005 = = =" in articles[1].input
    assert all("<unk>" in each.input for each in articles)


def test_more_instances_contain_fewer(toy_root):
    instances = load_instances(run_spec_of("civil_comments").scenario_spec, toy_root)
    few = [i.id for i in sampled(instances, 5) if i.split != TRAIN]
    more = [i.id for i in sampled(instances, 12) if i.split != TRAIN]
    assert more[:5] == few


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("mmlo:subject=x", "Did you mean 'mmlu'"),
        ("mmlu", "lacks subject"),
        ("mmlu:subject=x,colour=red", "There is no argument of mmlu 'colour'"),
        ("mmlu:subject=x,data_augmentation=canonicl", "Did you mean 'canonical'"),
        ("mmlu:nothing", "wants name=value"),
    ],
)
def test_a_wrong_entry_says_what_is_wrong(entry, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        run_spec_of(entry)


def test_a_damaged_line_is_named(toy_root, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    with pytest.raises(InputError, match="line 2: no JSON"):
        load_instances(run_spec_of("gsm").scenario_spec, tmp_path)


def test_a_table_of_ones_own_is_a_scenario(tmp_path, toy_model):
    rows = [{"q": f"What is {at}?", "options": ["x", "y"], "right": at % 2} for at in range(6)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "own.yaml"
    path.write_text('name: own\ndata: own.jsonl\ninput: "{q}"\nchoices: options\nanswer: right\n')
    spec = run_spec_of(str(path))
    prepared = prepare(spec, toy_model)
    assert prepared.states[0].request.prompt == "Question: What is 0?\nA. x\nB. y\nAnswer:"
    assert prepared.states[1].instance.references[1].is_correct
    path.write_text("name: own\ninput: x\nanser: y\n")
    with pytest.raises(InputError, match="lacks answer, data and has the unknown anser"):
        run_spec_of(str(path))


def test_a_task_of_lm_evaluation_harness_is_a_scenario(tmp_path, toy_model):
    rows = [{"ctx": f"Two and {at} is", "a": "good", "b": "bad", "gold": 0} for at in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "task.yaml"
    path.write_text(
        "task: mine\ndataset_path: json\n"
        "dataset_kwargs:\n  data_files:\n    train: t.jsonl\n    test: t.jsonl\n"
        "test_split: test\nfewshot_split: train\nnum_fewshot: 1\noutput_type: multiple_choice\n"
        'doc_to_text: "{{ctx}}"\ndoc_to_choice: "{{[a, b]}}"\ndoc_to_target: gold\n'
    )
    prepared = prepare(run_spec_of(str(path)), toy_model)
    # The example is the harness's draw; the question itself is in both splits, and never its own example.
    assert prepared.states[1].request.prompt == "Two and 3 is good\n\nTwo and 0 is bad"
    assert all(state.request.prompt.count(state.instance.input) == 1 for state in prepared.states)
    path.write_text(path.read_text() + "process_docs: !function evil.run\n")
    with pytest.raises(InputError, match="!function are refused"):
        run_spec_of(str(path))
