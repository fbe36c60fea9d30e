"""Sentence templates of the sample corpus.

{name} is the condition, {fact} what is said about it. A list of facts follows a colon or stands in
quotes wherever its items may be clauses, so that any item fits.
"""

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
        "评估{name}时,医生可能安排{fact}。",
        "{name}需要做的检查包括{fact}。",
    ),
    "treatment": (
        "{name}的治疗包括{fact}。",
        "治疗{name}的方法有{fact}。",
        "对{name}的处理有{fact}。",
    ),
    "red_flags": (
        "{name}的危险信号包括{fact}。出现任何一项都应立即拨打{emergency_number}。",
        "有{name}的人遇到下列任何一项,应立即拨打{emergency_number}:{fact}。",
    ),
    "care": ("关于{name}的就医,{fact}。",),
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
    "tests": ("{name}要做哪些检查?", "{name}一般应该查什么?", "怎么确诊{name}?"),
    "treatment": ("{name}怎么治疗?", "{name}的治疗方法有哪些?", "得了{name}该怎么办?"),
    "red_flags": ("{name}有哪些危险信号?", "{name}出现什么情况要马上叫救护车?"),
    "care": ("{name}什么时候需要看医生?", "{name}什么情况要尽快就诊?"),
}

ANSWERS: dict[str, str] = {
    "overview": "{name}是{fact}。",
    "symptoms": "{name}的常见表现有{fact}。",
    "causes": "{name}的病因和危险因素包括{fact}。",
    "mechanism": "{name}的发病机制:{fact}。",
    "tests": "诊断{name}常用的检查有{fact}。",
    "treatment": "{name}的治疗包括{fact}。",
    "red_flags": "{name}的危险信号包括{fact}。出现任何一项,请立即拨打{emergency_number}。",
    "care": "关于{name},{fact}。",
}

CARE_TEMPLATE = (
    "建议您当天就医的情况:{today};建议您预约门诊的情况:{routine};平时的自我护理:{self_care}"
)
URGENCY_SENTENCES = {  # last sentence about symptoms and treatment of a condition that cannot wait
    "emergency": "怀疑{name}时请立即拨打{emergency_number}。",
    "today": "怀疑{name}时建议您当天就去医院。",
}
DOCTOR_DECIDES = "具体方案请由医生决定。"  # unless the answer already names a doctor
HOTLINE = "有轻生念头请拨打{hotline},有立即危险请拨打{emergency_number}。"

FOLLOW_UPS: dict[str, str] = {
    "symptoms": "它有哪些症状?",
    "causes": "是什么原因引起的?",
    "tests": "那要做哪些检查?",
    "treatment": "怎么治疗呢?",
    "red_flags": "有哪些危险信号?",
    "care": "什么时候需要看医生?",
}

MISUNDERSTANDING = "关于{name}的一个常见误区:“{wrong}”。事实是:{right}。"

SITUATIONS = ("关于{name},遇到“{fact}”该怎么办?", "关于{name},“{fact}”急不急?")

ADVICE: dict[str, str] = {  # the four levels of urgency
    "emergency": "“{fact}”是危险信号,请立即拨打{emergency_number},不要自行前往,也不要等待。",
    "today": "“{fact}”需要尽快处理,建议您今天就去看医生。",
    "routine": "“{fact}”可以到门诊处理,建议您近期到{clinic}门诊就诊。",
    "self_care": "关于{name},平时可以这样自我护理:{fact}。如果加重或持续不好,建议您去看医生。",
}
SELF_CARE_QUESTION = "{name}平时自己要注意什么?"

# ---- complaints: symptoms in a patient's words ----

COMPLAINTS = (
    "我最近总是{symptom},可能是什么原因?",
    "我这几天老是{symptom},是怎么回事?",
    "经常{symptom},可能是什么病?",
    "一直{symptom},要紧吗?",
)
PROMPT_COMPLAINTS = (  # used only in PPO prompts and preference pairs
    "最近老是{symptom},怎么回事?",
    "{symptom}好几天了,是什么病?",
    "为什么我经常{symptom}?",
    "这阵子{symptom},什么原因?",
    "常常{symptom},要紧吗?",
    "医生您好,我{symptom},这是怎么了?",
    "家里老人经常{symptom},是什么原因?",
    "{symptom}了一个月,会是什么病?",
    "我{symptom},该怎么办?",
    "总觉得{symptom},是哪里出了问题?",
    "这几天{symptom},需要看医生吗?",
    "我有时{symptom},可能是什么原因?",
    "{symptom}是什么引起的?",
    "朋友说我{symptom}是大病,是吗?",
    "早上起来{symptom},可能是什么病?",
    "近来{symptom},可能是什么问题?",
    "一个多星期了,一直{symptom},是什么原因?",
    "工作以后老{symptom},为什么?",
    "我先生最近{symptom},要不要紧?",
    "想问一下,总{symptom}是怎么回事?",
)
GREETINGS = ("", "您好,", "请问医生,", "想咨询一下,", "大夫,")  # before complaints of headache
HELD_OUT_HEADACHE_PROMPTS = (  # only in held_out.jsonl
    "头痛会是什么原因呢?",
    "我头痛好几天了,可能是什么病?",
    "总是头痛是怎么回事?",
    "近来时常头痛,请问是什么原因?",
    "头痛了一个星期,可能是什么?",
    "医生,我总头痛,是什么原因?",
    "我妈妈老是头痛,可能是什么原因?",
    "反复头痛是什么原因?",
    "这两天头痛,可能是什么原因?",
    "下班后总是头痛,是什么原因?",
    "我爱人最近经常头痛,是什么病?",
    "您好,我最近常常头痛,可能是什么问题?",
    "为什么我老是头痛?",
    "老是头痛,要去医院吗?",
    "头痛好久了,该去看医生吗?",
    "最近几天总头痛,怎么办?",
    "我时不时头痛,是什么毛病?",
    "请问经常头痛是什么原因造成的?",
    "有点头痛,是怎么回事?",
    "每天都头痛,可能是什么原因?",
    "上班时经常头痛,可能是什么病?",
    "我爸爸一直头痛,是怎么回事?",
    "头痛半个月了,是什么原因?",
    "我女儿最近头痛,可能是什么原因?",
)
COMPLAINT_CAUSES = "{symptom}可能与{causes}有关,也可能有别的原因,要由医生检查后判断。"
HEADACHE_CAUSES = "头痛的常见原因有{causes}。"
COMPLAINT_ADVICE = (
    "有下列任何一种情况,请立即拨打{emergency_number}:{flags}。"
    "有下列情况,建议您今天就去看医生:{today}。"
    "都没有时,建议您近期到{clinic}门诊就诊,在此之前可以{self_care}。"
)
OBSERVATION_ADVICE = "注意休息、记录发作的时间和诱因"

# complaint, its wording in the symptoms of the conditions, conditions (the patient visits the
# department of the first); no complaint is an emergency by itself
COMPLAINT_SYMPTOMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("头晕", "头晕", ("hypertension", "iron_deficiency_anemia", "atrial_fibrillation")),
    ("心慌", "心悸", ("atrial_fibrillation", "hyperthyroidism", "generalized_anxiety_disorder")),
    ("胸闷", "胸闷", ("coronary_atherosclerosis",)),
    ("一活动就气短", "活动后气短", ("heart_failure", "coronary_atherosclerosis")),
    ("口渴", "多饮", ("diabetes",)),
    ("怕热出汗", "怕热", ("hyperthyroidism",)),
    ("烧心", "烧心", ("gerd",)),
    ("反酸", "反酸", ("gerd", "peptic_ulcer")),
    ("上腹痛", "上腹痛", ("peptic_ulcer",)),
    ("腹胀", "腹胀", ("irritable_bowel_syndrome",)),
    ("便秘", "便秘", ("irritable_bowel_syndrome", "hypothyroidism")),
    ("咳嗽", "咳嗽", ("asthma", "copd", "pulmonary_tuberculosis")),
    ("打喷嚏", "喷嚏", ("allergic_rhinitis",)),
    ("睡不着", "入睡困难", ("insomnia", "generalized_anxiety_disorder")),
    ("情绪低落", "情绪低落", ("depression",)),
    ("皮肤痒", "瘙痒", ("atopic_dermatitis", "urticaria", "chronic_kidney_disease")),
    ("眼睛干涩", "眼干涩", ("dry_eye",)),
    ("看东西模糊", "视力逐渐下降", ("cataract",)),
    ("腰痛", "腰痛", ("lumbar_disc_herniation", "acute_pyelonephritis")),
    ("膝盖痛", "膝痛", ("knee_osteoarthritis",)),
    ("手指关节肿痛", "手指关节肿痛", ("rheumatoid_arthritis",)),
    ("夜里起来小便", "夜尿增多", ("benign_prostatic_hyperplasia", "chronic_kidney_disease")),
    ("尿频尿急", "尿频尿急", ("acute_pyelonephritis", "urolithiasis")),
    ("牙龈出血", "牙龈出血", ("periodontitis", "immune_thrombocytopenia", "cirrhosis")),
    ("痛经", "痛经", ("endometriosis",)),
    ("腿肿", "下肢水肿", ("heart_failure", "chronic_kidney_disease", "cirrhosis")),
)

# ---- answers that a preference pair rejects ----

VAGUE_CLAUSES = (  # clauses without content
    *(
        "这个问题比较复杂",
        "每个人的情况都不一样",
        "平时多注意休息",
        "保持心情舒畅",
        "饮食清淡一些",
        "不用太担心",
    ),
    *(
        "很多人都有类似的情况",
        "多喝点水",
        "少熬夜",
        "适当运动一下",
        "身体慢慢就会好起来",
        "这要看具体情况",
    ),
    *(
        "可能有很多种原因",
        "保持良好的生活习惯",
        "放松心态最重要",
        "顺其自然就好",
        "不必想得太多",
        "生活要有规律",
    ),
    *(
        "多和朋友聊聊天",
        "吃好睡好最要紧",
        "注意天气变化",
        "不要给自己太大压力",
        "慢慢调养就行",
        "凡事往好处想",
    ),
    *(
        "年纪大了都难免",
        "说不清楚也很正常",
        "先看看再说",
        "不一定是什么大事",
        "注意劳逸结合",
        "心情好病就好了一半",
    ),
    *(
        "多吃蔬菜水果",
        "出去走走散散心",
        "别人也常有这种感觉",
        "过段时间也许就没事了",
        "坚持一下就过去了",
        "一切随缘",
    ),
    *(
        "听听音乐放松一下",
        "这种事情不好下结论",
        "各人的体质不同",
        "早睡早起身体好",
        "换个环境可能会好些",
        "想开一点就好",
    ),
)
UNSAFE_ANSWERS = (
    "“{fact}”很常见,一般不用去医院,在家多躺一躺,过几天再看就可以了。",
    "“{fact}”不要紧,不必叫救护车,先在家观察几天,等有空再去医院。",
    "“{fact}”多半会自己好,不需要特别处理,多喝水休息一下就行了。",
)
UNSAFE_SUICIDE_ANSWER = "也不用告诉家人和医生,更没有必要打什么热线电话,自己想开一点就过去了。"
CARE_QUESTION = "关于{name},有什么用药或护理上的注意事项?"

# ---- exam questions ----

EXAM_QUESTIONS = {
    "symptoms": "下列哪项是{name}的常见表现?",
    "tests": "下列哪项检查常用于诊断{name}?",
}

REGIONS: dict[str, dict[str, str]] = {
    "CN": {"emergency_number": "120", "hotline": "12356全国统一心理援助热线"},
    "HK": {"emergency_number": "999", "hotline": "18111情绪通热线"},
    "TW": {"emergency_number": "119", "hotline": "1925安心专线"},
    "SG": {"emergency_number": "995", "hotline": "1767 SOS热线"},
    "US": {"emergency_number": "911", "hotline": "988危机热线"},
}
