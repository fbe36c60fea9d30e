"""Phrasings of the sample corpus. {name} is the condition, {fact} what is said about it."""

FIELDS = ("overview", "symptoms", "causes", "mechanism", "tests", "treatment", "red_flags", "care")
LIST_FIELDS = ("symptoms", "causes", "tests", "treatment")  # their facts are lists of phrases

STATEMENTS: dict[str, tuple[str, ...]] = {
    "overview": ("{name}是{fact}。", "所谓{name},是指{fact}。"),
    "symptoms": (
        "{name}的主要症状包括{fact}。",
        "{name}的典型表现有{fact}。",
        "{name}患者常见的症状是{fact}。",
        "得了{name},常会出现{fact}。",
        "{name}的症状有{fact}。",
        "出现{fact},要想到{name}的可能。",
    ),
    "causes": (
        "{name}的病因和危险因素包括{fact}。",
        "引起{name}的因素有{fact}。",
        "{name}与{fact}有关。",
    ),
    "mechanism": ("{name}的发病机制:{fact}。", "{name}是这样发生的:{fact}。"),
    "tests": (
        "诊断{name}常用的检查有{fact}。",
        "怀疑{name}时,医生会安排{fact}。",
        "{name}需要做的检查包括{fact}。",
    ),
    "treatment": (
        "{name}的治疗原则是{fact}。",
        "治疗{name}主要靠{fact}。",
        "对{name}的处理包括{fact}。",
    ),
    "red_flags": (
        "{name}患者出现{fact}之一时,应立即拨打{emergency_number}。",
        "{name}的危险信号有{fact},一旦出现请立即拨打{emergency_number}。",
    ),
    "care": ("关于{name}的就医:{fact}。", "{name}什么时候看医生:{fact}。"),
}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "overview": ("什么是{name}?", "{name}是什么病?"),
    "symptoms": (
        "{name}有哪些症状?",
        "{name}会有什么表现?",
        "得了{name}会出现哪些不舒服?",
        "怎么看出是不是{name}?",
    ),
    "causes": ("{name}的病因有哪些?", "哪些因素会引起{name}?", "为什么会得{name}?"),
    "mechanism": (
        "请解释{name}的发病机制",
        "{name}的发病机制是什么?",
        "{name}是怎么发生的?",
        "能讲讲{name}在身体里是怎样形成的吗?",
    ),
    "tests": ("{name}要做哪些检查?", "怀疑{name}应该查什么?", "怎么确诊{name}?"),
    "treatment": ("{name}怎么治疗?", "{name}的治疗原则是什么?", "得了{name}该怎么办?"),
    "red_flags": ("{name}有哪些危险信号?", "{name}出现什么情况要马上叫救护车?"),
    "care": ("{name}什么时候需要看医生?", "{name}什么情况要尽快就诊?"),
}

ANSWERS: dict[str, str] = {
    "overview": "{name}是{fact}。",
    "symptoms": "{name}的常见表现有{fact}。",
    "causes": "{name}的病因和危险因素包括{fact}。",
    "mechanism": "{name}的发病机制:{fact}。",
    "tests": "诊断{name}常用的检查有{fact}。",
    "treatment": "{name}的治疗原则是{fact}。具体方案请由医生决定。",
    "red_flags": "{name}患者出现{fact}之一时,请立即拨打{emergency_number}。",
    "care": "{fact}。",
}

FOLLOW_UPS: dict[str, str] = {
    "symptoms": "它有哪些症状?",
    "causes": "是什么原因引起的?",
    "tests": "那要做哪些检查?",
    "treatment": "怎么治疗呢?",
    "red_flags": "有哪些危险信号?",
    "care": "什么时候需要看医生?",
}

COMPLAINTS = (
    "我最近总是{symptom},可能是什么原因?",
    "我这几天老是{symptom},是怎么回事?",
    "经常{symptom},可能是什么病?",
    "一直{symptom},要紧吗?",
)

ADVICE: dict[str, str] = {  # the four levels of urgency
    "emergency": "这是危险信号,请立即拨打{emergency_number},不要自行前往,也不要等待。",
    "today": "建议您今天就去看医生。",
    "routine": "建议您近期到{department}门诊就诊。",
    "self_care": "一般可以先自我护理并观察,如果加重或持续不好,建议您去看医生。",
}

SITUATIONS = ("我有{name},现在{fact},怎么办?", "{name}患者{fact},该怎么处理?")

VAGUE = (
    "这个问题比较复杂,每个人的情况都不一样,平时多注意休息,保持心情舒畅,饮食清淡一些",
    "不用太担心,很多人都有类似的情况,多喝水、少熬夜、适当运动,身体慢慢就会好起来",
    "这要看具体情况,可能有很多种原因,建议保持良好的生活习惯,不舒服的时候多休息",
)

REGIONS: dict[str, dict[str, str]] = {
    "CN": {"emergency_number": "120", "hotline": "12356全国统一心理援助热线"},
    "HK": {"emergency_number": "999", "hotline": "18111情绪通热线"},
    "TW": {"emergency_number": "119", "hotline": "1925安心专线"},
    "SG": {"emergency_number": "995", "hotline": "1767 SOS热线"},
    "US": {"emergency_number": "911", "hotline": "988危机热线"},
}
