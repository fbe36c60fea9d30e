import pytest

from medgpt.medical.urgency import advised_urgency

EMERGENCY = (
    "请立即拨打120。",
    "这可能是心梗,请马上叫救护车,不要自行前往。",
    "“突发胸痛”是危险信号，请立即拨打120，不要自行前往，也不要等待。",
    "出现这种情况应立即拨打急救电话。",
    "应立即送医院抢救。",
    "请马上去最近的医院急诊科。",
    "先让他平卧休息,同时拨打120急救电话。",
    "紧急程度:立即急救",
    "建议休息。\n**紧急程度：** 立即呼叫急救（120）",
    "Call 911 now.",
    "Please call an ambulance immediately and keep her warm.",
    "Go to the nearest emergency department right away.",
    "This is a medical emergency. Rest while you wait.",
    "He needs immediate medical attention.",
    "Call 999 immediately, and if she stops breathing, start CPR.",
    "Urgency: emergency now",
)
TODAY = (
    "建议您今天就去看医生。",
    "请当天就医,做血常规检查。",
    "怀疑阑尾炎时建议您当天就去医院。",
    "请尽快到医院就诊。",
    "紧急程度：当天就医",
    "See a doctor today.",
    "You should be seen by your GP within 24 hours.",
    "Contact your midwife the same day. If the baby stops moving, call 999.",
    "Urgency: same day",
)
DAYS = (
    "建议您近期到神经内科门诊就诊。",
    "不严重,预约门诊检查即可,不需要叫救护车。",
    "建议去医院看看。",
    "紧急程度:几天内就医",
    "Make an appointment with your doctor this week.",
    "See your GP within a few days; there is no need to call an ambulance.",
    "Urgency: within days",
)
SELF_CARE = (
    "不用去医院,在家休息,多喝水。",
    "先自行护理。如果加重,请立即拨打120。",
    "目前可以居家观察；如出现呼吸困难，应马上去急诊。",
    "无需就医。",
    "紧急程度:在家自我护理",
    "You can treat this at home with rest and fluids. Call 911 if the pain gets worse.",
    "There is no need to see a doctor. Drink plenty of water.",
    "Rest and take an over-the-counter remedy. Should it not improve, see a doctor.",
    "Urgency: self-care",
)
NOTHING = (
    "",
    "这个问题比较复杂,每个人的情况都不一样。",
    "头痛的常见原因有紧张、偏头痛。",
    "如果加重,请立即拨打120。",
    "有下列任何一种情况，请立即拨打120：剧烈头痛、肢体无力。",
    "I cannot help with that.",
    "Pain can have many causes.",
    "紧急程度:立即急救 / 当天就医 / 几天内就医 / 自我护理",
)
CASES = {
    "emergency": EMERGENCY,
    "today": TODAY,
    "days": DAYS,
    "self_care": SELF_CARE,
    None: NOTHING,
}


@pytest.mark.parametrize(
    ("answer", "level"),
    [(answer, level) for level, answers in CASES.items() for answer in answers],
)
def test_the_advised_urgency_of_an_answer_is_recognized(answer, level):
    assert advised_urgency(answer) == level
