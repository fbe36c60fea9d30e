from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.data.sources.deny_list import DenyList
from medgpt.data.sources.records import Conversation, Document, Message, Reject

DEFAULT = DenyList.load(("default",))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("宝宝发烧可以用安乃近。", "dipyrone-children"),
        ("小儿高热时给安乃近滴鼻。", "dipyrone-children"),
        ("Dipyrone works well for infants.", "dipyrone-children"),
        ("孩子退烧吃尼美舒利颗粒就行", "nimesulide-children"),
        ("建议口服酮康唑治疗", "ketoconazole-oral"),
        ("减肥可以服用西布曲明", "sibutramine"),
        ("Take sibutramine daily to lose weight.", "sibutramine"),
        ("便秘可以吃酚酞片", "withdrawn-drugs"),
        ("给孩子服用四环素片", "tetracycline-children"),
        ("小儿腹泻可服诺氟沙星", "quinolone-children"),
        ("孩子咳嗽可以喝含可待因的糖浆", "codeine-children"),
        ("儿童退烧可以吃阿司匹林", "aspirin-reye"),
        ("Aspirin is a good choice for children with fever.", "aspirin-reye"),
        ("方中加关木通10克", "aristolochic-acid"),
        ("可以用酒精擦浴给宝宝退热", "alcohol-rub-fever"),
        ("6个月大的宝宝可以喝蜂蜜水", "honey-infants"),
        ("喝党参可以彻底消除血液中的垃圾", "blood-waste"),
        ("这个药能根治糖尿病", "cure-of-chronic-disease"),
        ("高血压患者坚持服用可以彻底治愈", "cure-of-chronic-disease"),
        ("This tea can permanently cure diabetes.", "cure-of-chronic-disease"),
        ("我家的药包治百病", "guaranteed-cure"),
        ("两个疗程药到病除", "guaranteed-cure"),
        ("A miracle cure for you", "guaranteed-cure"),
        ("可以试试这个偏方", "folk-remedy"),
        ("我有祖传秘方", "folk-remedy"),
        ("中药没有副作用，放心吃", "no-side-effects"),
        ("停掉降压药，改喝这个茶", "abandon-treatment"),
        ("Drinking bleach heals autism", "toxic-products"),
    ],
)
def test_dangerous_claims_and_advice_match(text: str, rule: str) -> None:
    assert DEFAULT.match(text) == rule
    assert DEFAULT.match(f"您好。{text}\n祝您健康。") == rule


@pytest.mark.parametrize(
    "text",
    [
        "儿童禁用安乃近。",
        "安乃近有粒细胞缺乏的风险，不要给宝宝用",
        "安乃近曾用于退热",
        "12岁以下儿童禁止使用尼美舒利",
        "外用酮康唑乳膏即可",
        "西布曲明已于2010年停止销售",
        "四环素会使儿童牙齿着色",
        "左氧氟沙星用于成人尿路感染",
        "给宝宝滴左氧氟沙星滴眼液",
        "可待因不能给孩子用",
        "川崎病患儿需要口服阿司匹林",
        "阿司匹林用于冠心病二级预防",
        "Children with flu should not take aspirin because of Reye's syndrome.",
        "关木通因肾毒性已被取消药用标准",
        "不要用酒精擦浴给宝宝降温",
        "酒精擦拭伤口消毒",
        "一岁以内的婴儿不能吃蜂蜜",
        "高血压不能根治，需长期服药",
        "糖尿病目前无法根治",
        "乙肝很难彻底治愈",
        "能不能根治癫痫要看病因",
        "目前尚无根治银屑病的方法",
        "胃癌早期可行根治术",
        "根治幽门螺杆菌需要四联疗法",
        "不要相信偏方",
        "偏方不可信",
        "切勿轻信祖传秘方",
        "没有任何偏方能治好这种病",
        "包治百病的广告都是虚假的",
        "没有副作用的药物是不存在的",
        "中药并非没有副作用",
        "There is no miracle cure for diabetes.",
        "血液透析清除体内毒素",
        "高血压患者应低盐饮食，规律服药，定期复查。",
    ],
)
def test_warnings_and_ordinary_advice_do_not_match(text: str) -> None:
    assert DEFAULT.match(text) is None


def test_the_second_phrase_must_be_in_the_same_sentence() -> None:
    assert DEFAULT.match("成人可用安乃近。孩子请用布洛芬。") is None
    assert DEFAULT.match("不要着急。可以用这个偏方。") == "folk-remedy"


def test_latin_phrases_are_whole_words_in_any_case(tmp_path: Path) -> None:
    deny = load(tmp_path, 'any = ["Aspirin plus"]')
    assert deny.match("take ASPIRIN  plus") == "r"
    assert deny.match("服用aspirin plus片") == "r"
    assert deny.match("xaspirin plus") is None
    assert deny.match("aspirin plusx") is None


def test_a_gap_matches_inside_one_clause_only(tmp_path: Path) -> None:
    deny = load(tmp_path, 'any = ["血液…垃圾"]')
    assert deny.match("清除血液里的各种垃圾") == "r"
    assert deny.match("化验血液，垃圾要分类") is None
    assert deny.match("血液" + "的" * 9 + "垃圾") is None


def load(tmp_path: Path, body: str) -> DenyList:
    file = tmp_path / "deny.toml"
    file.write_text(f'[[rules]]\nid = "r"\nreason = "x"\nsource = "y 2020"\n{body}\n', "utf-8")
    return DenyList.load((str(file),))


def conversation(user: str, assistant: str, system: str = "系统") -> Conversation:
    messages = (
        Message("system", system),
        Message("user", user),
        Message("assistant", assistant),
    )
    return Conversation(source="s", file="f", row=3, messages=messages)


def test_rules_apply_to_assistants_and_not_to_users() -> None:
    question = conversation("我有祖传秘方，包治百病", "建议到医院就诊。", "偏方很好")
    assert DEFAULT.check(question) is question
    rejected = DEFAULT.check(conversation("怎么办", "试试这个偏方"))
    assert rejected == Reject(
        source="s", file="f", row=3, reason="deny-list: folk-remedy", malformed=False
    )


def test_documents_are_checked() -> None:
    harmless = Document(source="s", file="f", row=1, text="多喝水。")
    assert DEFAULT.check(harmless) is harmless
    dangerous = Document(source="s", file="f", row=1, text="多喝水。有个偏方很好。")
    assert isinstance(DEFAULT.check(dangerous), Reject)


def test_no_list_denies_nothing() -> None:
    assert DenyList.load(()).match("祖传秘方包治百病") is None


def test_several_lists_are_combined(tmp_path: Path) -> None:
    load(tmp_path, 'any = ["香灰"]')
    both = DenyList.load(("default", str(tmp_path / "deny.toml")))
    assert both.match("喝香灰水") == "r"
    assert both.match("这个偏方很好") == "folk-remedy"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("any = []", "any"),
        ('any = ["x"]\nwiht = ["y"]', "did you mean"),
        ('any = ["@nothing"]', "no set '@nothing'"),
        ('any = ["x"', "is not a TOML file"),
        ('any = ["x"]\n[[rules]]\nid="r"\nreason="x"\nsource="y"\nany=["z"]', "two rules"),
    ],
)
def test_a_wrong_list_is_a_config_error_that_names_it(
    tmp_path: Path, body: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match="deny=") as error:
        load(tmp_path, body)
    assert expected in str(error.value)


def test_a_missing_list_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        DenyList.load(("/nowhere/deny.toml",))
