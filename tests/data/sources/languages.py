"""Medical texts of our own in many languages, and the encodings that users have them in."""

TEXTS = {
    "English, curly": (
        "What is the patient’s temperature? It rose to 38.5 °C on day 3.",
        "The dose is 5 µg/kg – not 50 µg – twice a day.",
        "“I can’t breathe at night,” she said; there’s no history of asthma.",
        "• Check the patient’s airway • Give oxygen • Call for help…",
        "Systolic pressure 140 ± 12 mmHg, body surface 1.73 m².",
        "He doesn’t smoke, but he’s had Sjögren’s syndrome since 1998.",
    ),
    "French": (
        "Le patient âgé de 67 ans présente une fièvre élevée depuis trois jours.",
        "Où avez-vous mal ? La douleur est située à droite, près de l’épaule.",
        "Le traitement a été arrêté à cause d’une réaction allergique sévère.",
        "Les résultats de l’échographie sont normaux, sans épanchement péricardique.",
        "Ça va mieux, mais il a encore très mal à la tête le matin.",
    ),
    "German": (
        "Der Patient klagt über Übelkeit, Schwindel und Schmerzen in der Brust.",
        "Die Größe der Läsion beträgt 2,5 cm; für die Prüfung genügt eine Sonografie.",
        "Bitte nehmen Sie täglich drei Tabletten, möglichst nüchtern und mit Flüssigkeit.",
        "Häufige Nebenwirkungen sind Müdigkeit, Mundtrockenheit und Hautausschläge.",
        "Die Ärztin hört ein Geräusch über dem Herzen, außerdem Ödeme an den Füßen.",
    ),
    "Spanish": (
        "¿Desde cuándo tiene fiebre el niño? ¿Le duele la cabeza?",
        "El paciente presenta tos crónica, pérdida de peso y sudoración nocturna.",
        "La presión arterial está alta; es necesario tomar el medicamento cada mañana.",
        "¡Atención! No se debe administrar a niños menores de dos años.",
        "El diagnóstico más probable es una infección pulmonar por neumococo.",
    ),
    "Portuguese": (
        "O paciente não tem febre, mas a tensão arterial está muito elevada.",
        "A medicação deve ser tomada após as refeições, três vezes por dia.",
        "A criança começou a ter convulsões há duas semanas, sem infecção.",
        "As lesões são dolorosas e têm evolução lenta na região do pulmão.",
    ),
    "Italian": (
        "Il paziente è caduto e non può più muovere la gamba; la frattura è evidente.",
        "La pressione è alta perché non ha preso i farmaci: è così da lunedì.",
        "C’è una lesione già nota al fegato, di entità moderata; più tardi l’ecografia.",
    ),
    "Simplified Chinese": (
        "患者，男，54岁，因反复胸闷、气短3年，加重1周入院。",
        "血压150/95mmHg，心率88次/分，双肺呼吸音清，未闻及干湿啰音。",
        "医生您好，我最近总是头晕，晚上睡不好，需要做什么检查吗？",
        "建议您低盐低脂饮食，按时服用降压药，定期复查肝肾功能。",
        "体温37.5℃，白细胞计数12.3×10⁹/L，考虑细菌感染。",
        "糖尿病患者应注意足部护理，避免烫伤。",
    ),
    "Traditional Chinese": (
        "患者男性，五十四歲，因反覆胸悶、氣促三年，加重一週入院。",
        "醫師您好，我最近總是頭暈，晚上睡不好，需要做什麼檢查嗎？",
        "建議您低鹽低脂飲食，按時服用降血壓藥，定期複查肝腎功能。",
        "若您是過敏體質或孕婦，請先告知醫護人員，再決定是否注射。",
        "糖尿病患者應注意足部護理，避免燙傷，並監測血糖。",
    ),
    "Cantonese": (
        "醫生，我琴晚瞓唔着，個頭好痛，食咗藥都冇用。",
        "你有冇發燒？係咪喺屋企量過體溫？",
        "佢哋話要照X光，但係我唔知點解咁耐都未排到期。",
    ),
    "Japanese": (
        "患者は三日前から発熱と咳があり、夜眠れないと訴えています。",
        "血圧が高いので、塩分を控えて、毎朝薬を飲んでください。",
        "アレルギーのある方は、注射の前に医師に相談してください。",
    ),
    "Korean": (
        "환자는 사흘 전부터 열이 나고 기침이 심하다고 합니다.",
        "혈압이 높으니 소금을 줄이고 매일 아침 약을 드십시오.",
        "알레르기가 있는 사람은 주사를 맞기 전에 의사와 상담해야 한다.",
    ),
    "Russian": (
        "Пациент жалуется на боль в груди и одышку в течение трёх дней.",
        "Давление повышено, необходимо принимать лекарство каждое утро.",
        "Врач назначил анализ крови и рентген лёгких.",
    ),
    "Greek": (
        "Ο ασθενής έχει πυρετό και βήχα εδώ και τρεις ημέρες.",
        "Η αρτηριακή πίεση είναι υψηλή και χρειάζεται φάρμακα.",
    ),
    "Polish": (
        "Pacjent skarży się na ból w klatce piersiowej i duszność od trzech dni.",
        "Proszę przyjmować lek codziennie rano, najlepiej na czczo, zgodnie z zaleceniem.",
        "Ciśnienie jest podwyższone, należy ograniczyć sól w diecie.",
    ),
    "Czech": (
        "Pacient si stěžuje na bolest na hrudi a dušnost, trvající tři dny.",
        "Užívejte prosím lék každé ráno nalačno a přijďte příští týden na vyšetření.",
        "Tlak je zvýšený, je třeba omezit sůl v jídle.",
    ),
    "Hungarian": (
        "A beteg három napja lázas, köhög, és nehezen kap levegőt.",
        "A vérnyomása magas, ezért csökkentse a sófogyasztást, és szedje a gyógyszert.",
        "Kérem, jöjjön vissza jövő héten, hogy megnézzük a vérképet és a tüdőt.",
    ),
    "Turkish": (
        "Hasta üç gündür ateş ve öksürükten şikâyet ediyor, geceleri uyuyamıyor.",
        "Tansiyonunuz yüksek, tuzu azaltın ve ilacınızı her sabah düzenli kullanın.",
        "Göğüs ağrısı için röntgen çekilmesi gerekiyor.",
    ),
}

ENCODINGS = {
    "English, curly": ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "mac_roman"),
    "French": ("utf-8", "cp1252", "mac_roman", "cp850", "utf-16-le"),
    "German": ("utf-8", "cp1252", "latin-1", "mac_roman", "cp850", "utf-16-le"),
    "Spanish": ("utf-8", "cp1252", "mac_roman", "cp850"),
    "Portuguese": ("utf-8", "cp1252", "mac_roman", "cp850"),
    "Italian": ("utf-8", "cp1252", "mac_roman", "cp850"),
    "Simplified Chinese": ("utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16", "utf-16-le"),
    "Traditional Chinese": ("utf-8", "big5", "gb18030", "utf-16", "utf-16-be"),
    "Cantonese": ("utf-8", "big5hkscs", "gb18030", "utf-16-le"),
    "Japanese": ("utf-8", "cp932", "euc_jp", "utf-16", "iso2022_jp"),
    "Korean": ("utf-8", "cp949", "utf-16", "johab"),
    "Russian": ("utf-8", "cp1251", "koi8_r", "cp866", "utf-16"),
    "Greek": ("utf-8", "cp1253", "utf-16"),
    "Polish": ("utf-8", "cp1250", "iso8859_2"),
    "Czech": ("utf-8", "cp1250", "iso8859_2"),
    "Hungarian": ("utf-8", "cp1250", "iso8859_2"),
    "Turkish": ("utf-8", "cp1254"),
}
