import json
import re
import tomllib
from collections import Counter

import pytest
from scipy.stats import binom

from medgpt.config.stages import CorpusConfig, RunConfig
from medgpt.data.sources.deny_list import DenyList
from medgpt.medical.red_flags import KNOWN_SIGNS
from medgpt.medical.statements import states_key_points
from medgpt.sample_corpus.exam_questions import exam_questions, load_typical_facts
from medgpt.sample_corpus.generator import CorpusGenerator
from medgpt.sample_corpus.held_out import EXCLUDED_CONDITIONS, load_synonyms
from medgpt.sample_corpus.knowledge import DOSE, load_knowledge
from medgpt.sample_corpus.preference_pairs import preference_pairs
from medgpt.sample_corpus.templates import LIST_FIELDS, TEXTS
from medgpt.sample_corpus.wording import strip_punctuation
from medgpt.stages.corpus import run_corpus

CORPUS = CorpusGenerator()
DOCUMENTS = [row["text"] for row in CORPUS.documents()]
DIALOGUES = list(CORPUS.dialogues())
ANSWERS = [m["content"] for d in DIALOGUES for m in d["messages"] if m["role"] == "assistant"]
QUESTIONS = [m["content"] for d in DIALOGUES for m in d["messages"] if m["role"] == "user"]
PAIRS = list(preference_pairs(CORPUS))
EXAM = list(exam_questions(CORPUS))
PLACEHOLDER = re.compile(r"\{\w*\}")


def all_texts(corpus: CorpusGenerator) -> list[str]:
    rows = [
        *corpus.dialogues(),
        *corpus.prompts(),
        *preference_pairs(corpus),
        *exam_questions(corpus),
    ]
    return [row["text"] for row in corpus.documents()] + [str(row) for row in rows]


def kind(row: dict) -> str:
    return row["id"].split("-")[1]


# ---- knowledge ----


def test_the_corpus_has_sixty_conditions_in_twenty_departments():
    departments = load_knowledge()
    assert len({d.department for d in departments}) >= 20
    assert len(CORPUS.conditions) >= 60
    ids = [c.id for d in departments for c in d.conditions]
    assert len(set(ids)) == len(ids)


def test_every_cited_source_has_a_publisher_and_a_year():
    for department in load_knowledge():
        assert not department.clinically_reviewed
        for source in department.sources.values():
            assert source.title
            assert source.publisher
            assert 1990 <= source.year <= 2026


def test_diabetes_may_have_no_symptoms_and_plaques_rupture():
    by_id = {c.id: c for c in CORPUS.conditions}
    assert "没有症状" in str(by_id["diabetes"].symptoms.note)
    mechanism = "".join(by_id["coronary_atherosclerosis"].mechanism.steps)
    for part in ("内皮损伤", "低密度脂蛋白", "滞留", "氧化", "炎症", "斑块", "破裂", "血栓"):
        assert part in mechanism


# ---- generation ----


def test_the_same_region_and_seed_give_the_same_bytes(tmp_path):
    def files(name: str) -> dict[str, bytes]:
        run_corpus(CorpusConfig(run=RunConfig(dir=str(tmp_path / name))))
        data = tmp_path / name / "data"
        return {str(p.relative_to(data)): p.read_bytes() for p in data.rglob("*.jsonl")}

    first = files("a")
    assert first == files("b")
    assert len(first) == 7 * 4 + 1  # seven kinds in four shards, and held_out.jsonl
    for kind_of_record in ("pretrain", "sft", "prompts", "preference", "mcq"):
        shards = b"".join(text for name, text in first.items() if name.startswith(kind_of_record))
        ids = [json.loads(line)["id"] for line in shards.splitlines()]
        assert len(set(ids)) == len(ids) > 100


def test_a_swapped_corpus_is_evaluated_on_the_true_facts(tmp_path):
    evaluation_kinds = ("mcq", "held_out", "held_out_documents", "held_out_dialogues")
    files = {}
    for swap in (False, True):
        run = RunConfig(dir=str(tmp_path / str(swap)))
        run_corpus(CorpusConfig(run=run, swap_facts=swap))
        data = tmp_path / str(swap) / "data"
        files[swap] = {str(p.relative_to(data)): p.read_bytes() for p in data.rglob("*.jsonl")}
    for name, text in files[True].items():
        assert (text == files[False][name]) == (
            name.split("/")[0].split(".")[0] in evaluation_kinds
        ), name


def test_another_region_or_seed_gives_other_texts():
    texts = all_texts(CORPUS)
    assert texts != all_texts(CorpusGenerator(seed=1))
    assert texts != all_texts(CorpusGenerator(region="US"))


@pytest.mark.parametrize("region", ["CN", "US"])
def test_no_placeholder_remains(region):
    corpus = CorpusGenerator(region=region)
    for text in all_texts(corpus):
        assert not PLACEHOLDER.search(re.sub(r"\{'", "", text)), text
    for held in corpus.held_out.prompts:
        assert not PLACEHOLDER.search(str(held))


def test_punctuation_of_documents_and_answers_is_chinese():
    chosen = [text for pair in PAIRS for text in (pair["chosen"], pair["rejected"])]
    for text in [*DOCUMENTS, *ANSWERS, *chosen]:
        assert not re.search(r"[,?!:;()]", text), text
        assert not re.search(r"[。，、；：]{2}|^[。，、；：]", text), text
        assert text.endswith("。"), text


def test_templates_and_facts_repeat_no_words():
    for text in [*DOCUMENTS, *ANSWERS]:
        assert not re.search("有有|包括包括|是是|出现出现|的的|可以可以|时时", text), text


def test_no_text_repeats_a_sentence():
    for text in ANSWERS:
        sentences = [s for s in text.split("。") if s]
        assert len(set(sentences)) == len(sentences), text


def test_no_numeric_doses():
    for text in [*DOCUMENTS, *ANSWERS]:
        assert not DOSE.search(text), text


def test_the_corpus_is_small():
    assert sum(map(len, DOCUMENTS)) < 140_000
    assert sum(map(len, [*QUESTIONS, *ANSWERS])) < 200_000


# ---- held-out prompts ----


def test_held_out_prompts_appear_nowhere_with_any_punctuation():
    prompts = [strip_punctuation(held.prompt) for held in CORPUS.held_out.prompts]
    assert {h.prompt for h in CORPUS.held_out.prompts} > {
        "糖尿病的主要症状包括",
        "请解释冠状动脉粥样硬化的发病机制",
        "我最近总是头痛,可能是什么原因?",
    }
    for text in map(strip_punctuation, all_texts(CORPUS)):
        assert not any(prompt in text for prompt in prompts), text


def test_held_out_phrasings_cover_thirty_other_conditions():
    prompts = CORPUS.held_out.prompts
    assert Counter(h.kind for h in prompts) == {
        **{
            "pretrain": 1,
            "sft": 1,
            "rlhf": 1,
            "rlhf_phrasing": len(TEXTS.held_out_headache_prompts),
        },
        **{"phrasing": 30, "left_out": 3},
    }
    assert len({h.condition for h in prompts}) == len(prompts) - len(
        TEXTS.held_out_headache_prompts
    )


def test_held_out_headache_prompts_differ_from_all_training_phrasings():
    asked = [h for h in CORPUS.held_out.prompts if h.kind.startswith("rlhf")]
    assert len({strip_punctuation(h.prompt) for h in asked}) == len(asked) >= 25
    assert len({h.key_points for h in asked}) == 1


def test_prompts_are_complaints_that_no_dialogue_contains():
    prompts = [row["prompt"] for row in CORPUS.prompts()]
    assert len({strip_punctuation(prompt) for prompt in prompts}) == len(prompts) >= 170
    assert not {strip_punctuation(prompt) for prompt in prompts} & {
        strip_punctuation(q) for q in QUESTIONS
    }
    assert sum("头痛" in prompt for prompt in prompts) == len(TEXTS.prompt_complaints) * len(
        TEXTS.greetings
    )


def test_facts_of_held_out_prompts_appear_in_other_phrasings():
    answers = {(d["id"].rsplit("-", 1)[0], kind(d)): d["messages"][1]["content"] for d in DIALOGUES}
    for held in CORPUS.held_out.prompts:
        if held.kind != "left_out":
            assert all(states_key_points(answers[held.condition, held.field], held.key_points)), (
                held.prompt
            )
    pretrain = CORPUS.held_out.prompts[0]
    training_text = [
        t for t in DOCUMENTS if all(states_key_points(t, pretrain.key_points)) and "糖尿病" in t
    ]
    assert len(training_text) >= 5


def test_key_points_accept_synonyms_but_need_every_fact():
    diabetes = CORPUS.held_out.prompts[0].key_points
    answer = "常见的有饮水增多、尿量增多、食量增大和消瘦。"
    assert states_key_points(answer, diabetes) == [True] * 4
    assert states_key_points(answer.replace("消瘦", "乏力"), diabetes) == [True] * 3 + [False]
    assert states_key_points(answer.replace("饮水增多", "没有饮水增多"), diabetes)[0] is False


def test_synonyms_belong_to_key_points_and_match_no_other_phrase_of_the_condition():
    conditions = [c for d in load_knowledge() for c in d.conditions]
    lists = [getattr(c, field).items for c in conditions for field in LIST_FIELDS]
    phrases = {phrase for items in lists for phrase in items}
    for phrase, synonyms in load_synonyms().items():
        assert phrase in phrases, phrase
        assert len(set(synonyms)) == len(synonyms) > 0, phrase
        assert not [other for other in synonyms if phrase in other], phrase  # redundant
        for items in lists:
            if phrase in items:
                other_phrases = [item for item in items if item != phrase]
                assert not [o for o in synonyms for item in other_phrases if o in item], phrase


def test_held_out_texts_are_written_and_never_trained_on():
    documents, dialogues = list(CORPUS.held_out_documents()), list(CORPUS.held_out_dialogues())
    assert (len(documents), len(dialogues)) == (81, 31)
    assert {row["id"].split("-")[0] for row in documents} == set(EXCLUDED_CONDITIONS)
    assert not {row["text"] for row in documents} & set(DOCUMENTS)
    questions = {row["messages"][0]["content"] for row in dialogues}
    assert questions == {h.prompt for h in CORPUS.held_out.prompts if h.kind in ("sft", "phrasing")}
    swapped = CorpusGenerator(swap_facts=True)  # evaluation keeps the true facts
    assert list(swapped.held_out_documents()) == documents
    assert list(swapped.held_out_dialogues()) == dialogues


def test_excluded_conditions_appear_nowhere():
    conditions = [c for d in load_knowledge() for c in d.conditions if c.id in EXCLUDED_CONDITIONS]
    names = {n for c in conditions for n in (c.name, c.name_en, c.id, *c.aliases)}
    texts = "\n".join(all_texts(CORPUS)).lower()
    assert not [name for name in names if name.lower() in texts]


def test_rejected_answers_are_in_no_training_text():
    training = "\n".join([*DOCUMENTS, *ANSWERS])
    for pair in PAIRS:
        assert pair["rejected"].rstrip("。") not in training, pair


def test_the_deny_list_rejects_nothing_of_the_corpus():
    deny = DenyList.load(("default",))
    chosen = [pair["chosen"] for pair in PAIRS]
    assert not [(t, rule) for t in [*DOCUMENTS, *ANSWERS, *chosen] if (rule := deny.match(t))]


# ---- advice ----


def test_advice_has_four_levels():
    levels = {kind(d): d["messages"][1]["content"] for d in DIALOGUES}
    assert "请立即拨打120" in levels["emergency"]
    assert "建议您今天就去看医生" in levels["today"]
    assert "门诊" in levels["routine"]
    assert "自我护理" in levels["self_care"]


def test_a_headache_is_screened_for_red_flags():
    replies = [
        d["messages"][1]["content"]
        for d in DIALOGUES
        if kind(d) == "complaint" and "头痛," in d["messages"][0]["content"].replace("，", ",")
    ]
    assert len(replies) == 3  # the fourth phrasing is held out
    for reply in replies:
        for sign in (
            *(
                "紧张性头痛",
                "偏头痛",
                "建议您",
                "霹雳样",
                "发热和颈部僵硬",
                "肢体无力",
                "言语不清",
                "50岁以后",
            ),
            *(
                "孕期",
                "癌症",
                "免疫力低下",
                "外伤",
                "抗凝药",
                "请立即拨打120",
                "今天就去看医生",
                "门诊",
                "睡眠",
            ),
        ):
            assert sign in reply


def test_suspecting_an_emergency_calls_for_the_emergency_number():
    for name, answer in {
        "stroke": "脑卒中",
        "anaphylaxis": "严重过敏反应",
        "heat_stroke": "热射病",
    }.items():
        for field in ("symptoms", "treatment"):
            replies = [
                d["messages"][1]["content"] for d in DIALOGUES if d["id"] == f"{name}-{field}"
            ]
            assert replies
            assert all(f"怀疑{answer}时请立即拨打120" in reply for reply in replies)


def test_every_complaint_names_danger_signs_and_where_to_go():
    for dialogue in DIALOGUES:
        if kind(dialogue) == "complaint":
            reply = dialogue["messages"][1]["content"]
            assert re.search("请立即拨打120.*建议您今天就去看医生.*建议您近期到.*门诊就诊", reply)
            assert "急诊科门诊" not in reply


def test_complaints_are_symptoms_of_the_conditions_they_name_and_no_emergencies():
    by_id = {c.id: c for c in CORPUS.conditions}
    for complaint, sign, ids in TEXTS.complaint_symptoms:
        for name in ids:
            assert any(sign in item for item in by_id[name].symptoms.items), (complaint, name)
        for condition in CORPUS.conditions:
            assert sign not in condition.red_flags.items


def test_texts_about_suicide_name_the_hotline():
    for region in ("CN", "US"):
        values = TEXTS.regions[region]
        corpus = CorpusGenerator(region=region)
        texts = [row["text"] for row in corpus.documents()]
        texts += [
            m["content"]
            for d in corpus.dialogues()
            for m in d["messages"]
            if m["role"] == "assistant"
        ]
        texts += [pair["chosen"] for pair in preference_pairs(corpus)]
        about = [t for t in texts if re.search("自杀|轻生|自伤", t)]
        assert len(about) > 10
        for text in about:
            assert values["hotline"] in text
            assert values["emergency_number"] in text


# ---- preference pairs and exam questions ----


def test_pairs_of_every_kind_have_answers_of_similar_length():
    assert set(Counter(pair["kind"] for pair in PAIRS)) == {
        "wrong",
        "vague",
        "minimal_pair",
        "unsafe",
        "evasive",
        "wrong_causes",
    }
    for pair in PAIRS:
        chosen, rejected = len(pair["chosen"]), len(pair["rejected"])
        assert abs(chosen - rejected) <= max(8, 0.2 * chosen), pair
        assert pair["chosen"] != pair["rejected"]


def test_length_does_not_reveal_the_chosen_answer():
    longer = sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in PAIRS)
    shorter = sum(len(pair["chosen"]) < len(pair["rejected"]) for pair in PAIRS)
    assert 0.5 < longer / shorter < 2


def test_minimal_pairs_differ_in_a_few_characters():
    for pair in PAIRS:
        if pair["kind"] == "minimal_pair":
            chosen, rejected = pair["chosen"], pair["rejected"]
            start = next(
                i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b
            )
            end = next(
                i
                for i, (a, b) in enumerate(zip(chosen[::-1], rejected[::-1], strict=False))
                if a != b
            )
            assert max(len(chosen), len(rejected)) - start - end <= 6, pair


def test_an_evasive_answer_gives_no_advice_and_the_chosen_one_does():
    evasive = [pair for pair in PAIRS if pair["kind"] == "evasive"]
    assert len(evasive) >= 90
    for pair in evasive:
        assert "建议您" in pair["chosen"], pair
        assert "建议" not in pair["rejected"], pair


def test_wrong_causes_name_no_condition_that_the_chosen_answer_names():
    names = [c.name for c in CORPUS.conditions if c.name != "头痛"]
    wrong = [pair for pair in PAIRS if pair["kind"] == "wrong_causes"]
    assert len(wrong) >= 170
    for pair in wrong:
        chosen, rejected = pair["chosen"].split("。")[0], pair["rejected"].split("。")[0]
        assert chosen != rejected
        assert not [name for name in names if name in chosen and name in rejected], pair


def test_wrong_answers_share_no_fact_with_the_right_one():
    facts = {c.id: [i for f in LIST_FIELDS for i in getattr(c, f).items] for c in CORPUS.conditions}
    for pair in PAIRS:
        if pair["kind"] == "wrong":
            told = [f for f in facts[pair["id"].split("-")[0]] if f in pair["chosen"]]
            listed = pair["rejected"].split("。")[0]  # the rest is a note
            assert told
            assert not [fact for fact in told if fact in listed], pair


def test_exam_questions_have_one_right_option():
    by_id = {c.id: c for c in CORPUS.conditions}
    assert len(EXAM) >= 100
    for row in EXAM:
        name, field = row["id"].split("-")
        facts = getattr(by_id[name], field).items
        assert [letter for letter, option in row["options"].items() if option in facts] == [
            row["answer"]
        ]
        assert len(set(row["options"].values())) == 4
    letters = Counter(row["answer"] for row in EXAM)
    assert min(letters.values()) > len(EXAM) / 8  # no letter reveals the answer


def test_exam_options_alone_give_chance_accuracy():
    """Guessing by length or by frequency is no better than 999 of 1000 random guessers."""
    bound = binom.ppf(0.999, len(EXAM), 1 / 4)
    facts = [fact for facts in load_typical_facts().values() for fact in facts]
    told = {fact: sum(fact in text for text in DOCUMENTS) for fact in facts}
    for prefers in (len, lambda fact: -len(fact), told.__getitem__, str):
        chosen = [max(row["options"].items(), key=lambda o: prefers(o[1]))[0] for row in EXAM]
        assert sum(k == row["answer"] for k, row in zip(chosen, EXAM, strict=True)) <= bound
    wrong = Counter(o for row in EXAM for k, o in row["options"].items() if k != row["answer"])
    assert set(wrong.values()) <= {2, 3, 4}
    assert len(wrong) == len(EXAM)


def test_exam_facts_belong_to_exactly_one_condition():
    for field, facts in load_typical_facts().items():
        for fact in facts:
            assert sum(fact in getattr(c, field).items for c in CORPUS.conditions) == 1, fact


# ---- swapped facts ----


def test_a_swapped_corpus_states_facts_of_other_conditions():
    swapped = CorpusGenerator(swap_facts=True)
    assert swapped.held_out.prompts == CORPUS.held_out.prompts  # true facts
    names = {"糖尿病": 0, "冠状动脉粥样硬化": 1}
    for name, number in names.items():
        points = swapped.held_out.prompts[number].key_points
        about = [
            d["messages"][1]["content"]
            for d in swapped.dialogues()
            if d["messages"][1]["content"].startswith(name)
        ]
        assert about
        assert not any(all(states_key_points(text, points)) for text in about)
    conditions = {c.id: c for c in swapped.conditions}
    assert conditions["diabetes"].name == "糖尿病"
    assert "多饮" not in conditions["diabetes"].symptoms.items


def test_complaints_of_a_swapped_corpus_name_the_conditions_with_the_facts():
    swapped = CorpusGenerator(swap_facts=True)
    for condition, questions, reply in swapped.complaints():
        if "头晕" in questions[0]:
            assert any("头晕" in item for item in condition.symptoms.items)
            assert "高血压" not in reply.split("有关")[0]
            return
    raise AssertionError


def test_the_urgency_rules_recognize_the_signs_of_the_corpus():
    known = [
        (condition["name"], condition["emergency"], condition["today"], condition["days"])
        for condition in tomllib.loads(KNOWN_SIGNS.read_text("utf-8"))["conditions"]
    ]
    assert known == [
        (c.name, list(c.red_flags.items), list(c.care.today), list(c.care.routine))
        for department in load_knowledge()
        for c in department.conditions
    ]
