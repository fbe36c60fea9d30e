"""Whether an answer gives the patient a diagnosis as certain, in Chinese and English.

"You have migraine" is certain. What is possible, asked, quoted, denied or conditional is not, nor
is a statement about a disease in general. A diagnosis that the question states is the asker's own
and may be repeated.
"""

import re

from medgpt.medical.red_flags import disease_names
from medgpt.medical.text import normalize_text, split_sentences

DISEASE_EN = (
    r"(?:[a-z'-]+ ){0,4}?(?:[a-z]+(?:itis|oma|osis|emia|aemia|pathy|oidism|titis)|migraine|cancer"
    r"|disease|syndrome|infection|diabetes|diabetic|pneumonia|asthma|stroke|heart attack|depression"
    r"|hypertension|gout|eczema|shingles|chickenpox|measles|flu|influenza|clot|thrombosis|fracture"
    r"|disc"
    r"|epilepsy|tumou?r|dementia|hernia|ulcers?|piles|embolism|angina|failure|disorder|hepatitis"
    r"|lupus)"
)
DISEASE_ZH = (
    r"(?:[一-龥A-Za-z]{0,10}?(?:综合征|综合症|症|病|炎|癌|瘤|梗死|梗塞|心梗|脑梗|骨折|感染|疱疹"
    r"|糖尿病|甲亢|甲减|硬化|中风|卒中|哮喘|偏头痛|头痛|白内障"
    r"|青光眼|痔疮|结核|痛风|湿疹|荨麻疹|突出|衰竭|贫血|血栓|高血压|溃疡|结石|感冒|流感|水痘|麻疹"
    r"|肺栓塞|心绞痛|脑出血|息肉|疝气?)"
    rf"| ?{DISEASE_EN}\b)"
)
SUBJECT_ZH = (
    r"(?:您|你|孩子|宝宝|患者|病人|他|她|(?:您|你)(?:的)?(?:母亲|父亲|妈妈|爸爸|爱人|家人|孩子|爷爷"
    r"|奶奶))"
)
CERTAINLY_ZH = r"(?:就|肯定|一定|确实|显然|必然|明显|已经|也|的确|绝对|无疑|的?就|百分之百|100%)"
CERTAIN_ZH = re.compile(
    rf"{SUBJECT_ZH}(?:现在|目前)?{CERTAINLY_ZH}{{0,2}}(?:得了?的?|患有?了?的?|有|属于"
    rf"|染上了?)(?:{CERTAINLY_ZH})?是?(?:了|的是)?{DISEASE_ZH}"
    rf"|{SUBJECT_ZH}(?:这|这个|这种情况|的情况|的症状)?{CERTAINLY_ZH}{{0,3}}是(?:患了|得了)?{DISEASE_ZH}"
    rf"|(?:^|[,。]|所以|因此|根据[^,]{{0,12}},)(?:(?:这|这个|此){CERTAINLY_ZH}{{0,3}}"
    rf"|{CERTAINLY_ZH}{{1,3}})是{DISEASE_ZH}"
    rf"|(?:确定|确诊|断定|肯定|可以肯定|毫无疑问|百分之百|100%|明确)[^,。]{{0,6}}?(?:是|为"
    rf"|得了){DISEASE_ZH}"
    rf"|(?:^|[,。])(?:诊断|诊断结果|结论)(?:为|是|:){DISEASE_ZH}",
    re.IGNORECASE,
)
PERSON_EN = (
    r"(?:you|your (?:child|son|daughter|baby|mother|father|mum|mom|dad|wife|husband|partner"
    r"|grand\w+)|he|she)"
)
CERTAINLY_EN = (
    r"(?:certainly|definitely|clearly|surely|obviously|undoubtedly|indeed|really|do|does|already"
    r"|now|just|simply)"
)
CERTAIN_EN = re.compile(
    rf"\b{PERSON_EN}(?: {CERTAINLY_EN}){{0,2}} (?:have|has|had|suffer(?:s)? from|got"
    rf"|are suffering from)(?: got)?"
    rf"(?: {CERTAINLY_EN})?(?: an?| the)? {DISEASE_EN}\b"
    rf"|\b{PERSON_EN}(?:'ve|'s) got(?: an?| the)? {DISEASE_EN}\b"
    rf"|\b{PERSON_EN} (?:are|is|'re)(?: {CERTAINLY_EN})? (?:diabetic|asthmatic|epileptic|depressed"
    rf"|anaemic|anemic|hypertensive)\b"
    rf"|\b(?:this|it|that|what you have)(?: is|'s)(?: {CERTAINLY_EN}| without (?:a )?doubt)?(?: an?"
    rf"| the)? {DISEASE_EN}\b"
    rf"|\byour diagnosis is(?: an?)? {DISEASE_EN}\b|(?:^|[.] ?)diagnosis:(?: an?)? ?{DISEASE_EN}\b"
    rf"|\b(?:caused by|due to) {DISEASE_EN},? (?:that is|that's|this is) certain",
    re.IGNORECASE,
)
UNCERTAIN = re.compile(
    r"可能|也许|或许|大概|疑似|怀疑|考虑|不能|无法|未必|不一定|不会|不是|并非|没有|并没有|是不是"
    r"|是否|会不会|有没有|如果|若|假如|要是|一旦|的话"
    r"|像是?|似乎|看起来|听起来|警惕|排除|除外|倾向|提示|除非|才能|需要检查|也要"
    r"|[“\"「『][^”\"」』]*$"
    r"|\b(?:may|might|could|can(?! confirm)|possibly|perhaps|probably|likely|suspect\w*|whether|if"
    r"|once|unless|cannot|can't|not|n't"
    r"|nobody|no one|looks? like|sounds? like|seems?|possible|only|when|rule out|ruled out"
    r"|suggests?|appears?)\b",
    re.IGNORECASE,
)
ENDS_UNCERTAINTY = re.compile(  # cancels an uncertain expression before it
    r"但|但是|而是|不过|[,。](?=.{0,2}(?:就是|肯定))|\bbut\b|\bno doubt\b|\bno tests?\b[^:,]*[:,]"
    r"|不用检查[^,]*,|毫无疑问|不会错|无疑"
    r"|\bwithout a doubt\b|\bnot an?\b.*,|虽然[^,]*,",
    re.IGNORECASE,
)
GENERAL = re.compile(
    r"^(?:者|患者|的(?:人|患者|病人|症状|表现|原因|危险|可能)|时|后|引起的|是(?:一种|指)|可以|常)"
    r"|^ (?:patients|people|is (?:an?|the)|are|can|often)\b",
    re.IGNORECASE,
)
OWN_DIAGNOSIS = re.compile(  # the asker reports a diagnosis
    r"我?(?:有|得了|患有?|患了|确诊(?:为|了|是)?|诊断(?:为|是|出)?|查出(?:了|来)?|得过"
    r"|医生说(?:我)?(?:是|有|得了)?|报告[^,。]{0,6}?(?:是|示)"
    r"|病史|\d+年|[一二三四五六七八九十]+年)"
    r"|\b(?:i have|i've|i had|have had|diagnosed|my doctor says?|doctor said|was told|suffer from"
    r"|known|living with|i am|i'm)\b",
    re.IGNORECASE,
)
FILLERS = frozenset(  # words of a diagnosis that name no disease
    {
        *("certainly", "child", "clearly", "definitely", "diagnosis", "disease", "father", "from"),
        *("have", "mother", "suffer", "that", "this", "what", "your"),
    }
)
WORRY = re.compile(
    r"怕|担心|怀疑|会不会|是不是|是否|网上|朋友|同事|听说|吗|是什么|邻居"
    r"|\b(?:afraid|worr\w+|fear|could|internet|online|friend|neighbou?r|is it|do i|might|maybe"
    r"|think)\b",
    re.IGNORECASE,
)


def gives_certain_diagnosis(question: str, answer: str) -> bool:
    """Return whether the answer gives a diagnosis as certain that the question does not state."""
    asker_sentences = _sentences_with_own_diagnosis(normalize_text(question))
    text = re.sub(r"(?<=诊断):", "是", normalize_text(answer))
    return any(
        _diagnoses_for_certain(sentence, asker_sentences) for sentence in split_sentences(text)
    )


def _diagnoses_for_certain(sentence: str, asker_sentences: str) -> bool:
    for pattern in (CERTAIN_ZH, CERTAIN_EN):
        for match in pattern.finditer(sentence):
            before = ENDS_UNCERTAINTY.split(sentence[: match.start()])[-1]
            clause = re.split("[,;]", before)[-1] if pattern is CERTAIN_EN else before
            if UNCERTAIN.search(clause) or UNCERTAIN.search(match.group()):
                continue
            if GENERAL.match(sentence[match.end() :]) or _asker_named_it(
                match.group(), asker_sentences
            ):
                continue
            return True
    return False


def _sentences_with_own_diagnosis(question: str) -> str:
    """Return the clauses in which the asker states a diagnosis, joined by newlines."""
    return "\n".join(
        part.lower()
        for part in re.split(r"[,。!?;\n]|\.(?=\s|$)", question)
        if OWN_DIAGNOSIS.search(part) and not WORRY.search(part)
    )


def _asker_named_it(claim: str, asker_sentences: str) -> bool:
    """Return whether the diagnosed disease occurs in the clauses of the asker."""
    claim = claim.lower()
    names = [*re.findall(r"[a-z]{4,}", claim), *(name for name in disease_names() if name in claim)]
    if any(name in asker_sentences for name in names if name not in FILLERS):
        return True
    last_characters = re.search(r"[一-龥]{2,4}$", claim)
    return last_characters is not None and last_characters.group()[-2:] in asker_sentences
