"""Whether a text states given facts; a mention that is negated or only asked does not count."""

import re
from collections.abc import Sequence

# a colon that introduces a list ends no clause
CLAUSE_END = re.compile(
    "[,.;!?\\n\uff0c\u3002\uff1b\uff01\uff1f]|(?<!包括)(?<!以下)(?<!下列)[:\uff1a]"
)
QUESTION = re.compile("[?\uff1f]|.*吗")
AFFIRMED_TWICE = re.compile(  # double negations: they affirm
    "(?:不能|无法|不可|难以|不)(?:完全)?(?:排除|除外)|(?:不是|并非|不会|不可能)没有|不得不|不能不"
    "|不可不|无不"
)
CONTRAST = re.compile("但|而是|却|只有|仅有|反而")  # a negation before it does not reach beyond it
NO_ZH = "(?:^|(?<=[、均也并亦且可常多者期有会]))无(?!论|痛|力|张力|保护|菌|创|效|法|意|形|害|需|须)"
NEGATES_LIST = re.compile(  # negates nouns: reaches over the enumeration that follows
    "(?:没有|没(?:出现|见|发现)|未(?:见|出现|发现|发生|有)|否认|排除|是否|"
    "不(?:包括|包含|含|伴|是|属于?|存在|具有|等于|指|出现|引起|导致|会|一定)|[并绝决而]非|"
    rf"{NO_ZH}|\b(?:no|not|without|never|denie[sd])\b)(?!.*(?:者|时|的人|的话))"
)
NEGATES_NEXT_WORDS = re.compile(  # modals and adverbs: reach over the next words only
    "(?:不(?:能|可|应|该|要|用|必|需|须|宜|得|再|太|常|建议|推荐|主张|支持|考虑)|无[需须法]|未必"
    "|难以|避免|"
    "禁[用止]|勿|(?<![特区级分性])别|很少|极少|少有|几乎不)[^、者时后]{0,6}$|[不没未非无]$"
)
ENUMERATION = "(?:、[^、]{1,12}?){0,7}(?:[和及与或][^、]{1,10}?)?"  # a mention may start one
DENIED_AFTER = re.compile(  # after the mention or the enumeration it is part of
    f"{ENUMERATION}"
    "(?:等|[这那](?:一|[个种些类])*|一[个种]|些|类|症状|表现|情况|的|说法|观点|看法|想法|都|均|也|并|其实|通常"
    "|一般|往往|很|较|极){0,6}"
    "(?:是?不(?:是|属于?|算|常见|多见|包括|存在|明显|成立|对|正确|准确|科学|需要|必)|并非|无关"
    "|(?:不会|没有|未)(?:出现|发生|见)|少见|罕见|是?错|阴性|除外"
    "|[是属](?:于|一[个种])?(?:很|最)?(?:常见的?)?(?:误区|误解|误传|谣言|谣传|假象|错觉)"
    "|[与和跟同][^、]{1,12}?(?:[毫并]?无(?:任何)?(?:关|相关|联系)|没有?(?:任何|什么)?(?:关|联)系"
    "|不相关))"
)
LACKS = re.compile("(?:缺乏|缺少)[^者时后]*$")
LACKED = re.compile(f"{ENUMERATION}等?的?(?:典型|明显|特异性?)?的?(?:症状|表现|体征|证据|依据)")


def states_fact(text: str, wordings: Sequence[str]) -> bool:
    """Return whether one of the wordings occurs in `text` in a clause that does not negate it."""
    return any(_is_affirmed(text, wording) for wording in wordings)


def states_key_points(text: str, key_points: Sequence[Sequence[str]]) -> list[bool]:
    """Return for each key point, given as its accepted wordings, whether `text` states it."""
    return [states_fact(text, wordings) for wordings in key_points]


def _is_affirmed(text: str, wording: str) -> bool:
    for match in re.finditer(re.escape(wording), text):
        before = CLAUSE_END.split(text[: match.start()])[-1]
        after = CLAUSE_END.split(text[match.end() :])[0]
        rest = text[match.end() + len(after) :]
        if not (_is_negated(before, after) or QUESTION.match(after + rest[:1])):
            return True
    return False


def _is_negated(before: str, after: str) -> bool:
    before = CONTRAST.split(AFFIRMED_TWICE.sub("有", before))[-1]
    item = before.rsplit("、", 1)[-1]
    if LACKS.search(before) and LACKED.match(after):  # unlike a cause such as 缺乏运动
        return True
    return bool(
        NEGATES_LIST.search(before) or NEGATES_NEXT_WORDS.search(item) or DENIED_AFTER.match(after)
    )
