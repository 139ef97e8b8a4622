"""The two languages of the world: English and Chinese, word by word, so that a text is translated by a rule.

Puzzles are written once, in neutral text: `{make}24{from}11,3,3` is `make 24 from 11,3,3` or `求24用11,3,3`. Numbers,
signs and the names A … F belong to no language.
"""

import re

LANGUAGES = ("en", "zh")

WORDS = {  # key -> English, Chinese; a line of thinking ends with one of the first five
    "yes": (" yes\n", "对\n"), "no": (" no\n", "错\n"), "then": (" then\n", "再\n"), "done": (" done\n", "完\n"),
    "wait": (" wait\n", "等\n"), "so": ("so ", "故"),
    "make": ("make ", "求"), "from": (" from ", "用"), "compute": ("compute ", "算"), "sort": ("sort ", "排"),
    "compare": ("compare ", "比"), "and": (" and ", "与"), "order": ("order ", "序"), "program": ("program ", "程"),
    "tell": ("tell ", "说"), "welcome": (" welcome", "请"),
    "cat": ("cat", "猫"), "dog": ("dog", "狗"), "bird": ("bird", "鸟"), "fish": ("fish", "鱼"),
    "horse": ("horse", "马"), "snake": ("snake", "蛇"), "sun": ("sun", "日"), "moon": ("moon", "月"),
    "star": ("star", "星"), "tree": ("tree", "树"), "flower": ("flower", "花"), "river": ("river", "河"),
    "rain": ("rain", "雨"), "snow": ("snow", "雪"), "stone": ("stone", "石"), "house": ("house", "屋"),
    "bread": ("bread", "饼"), "knife": ("knife", "刀"),
    "cow": ("cow", "牛"), "sheep": ("sheep", "羊"), "mouse": ("mouse", "鼠"), "bee": ("bee", "蜂"),
    "wolf": ("wolf", "狼"), "bear": ("bear", "熊"), "deer": ("deer", "鹿"), "duck": ("duck", "鸭"),
    "frog": ("frog", "蛙"), "tiger": ("tiger", "虎"), "ant": ("ant", "蚁"), "whale": ("whale", "鲸"),
    "cloud": ("cloud", "云"), "wind": ("wind", "风"), "fire": ("fire", "火"), "ice": ("ice", "冰"),
    "night": ("night", "夜"), "sea": ("sea", "海"), "hill": ("hill", "山"), "sand": ("sand", "沙"),
    "grass": ("grass", "草"), "tower": ("tower", "塔"), "bridge": ("bridge", "桥"), "road": ("road", "路"),
    "boat": ("boat", "船"), "lamp": ("lamp", "灯"), "bell": ("bell", "钟"), "drum": ("drum", "鼓"),
    "bed": ("bed", "床"), "tea": ("tea", "茶"), "salt": ("salt", "盐"), "needle": ("needle", "针"),
    "small": ("small", "小"), "big": ("big", "大"), "soft": ("soft", "软"), "hard": ("hard", "硬"),
    "quick": ("quick", "快"), "slow": ("slow", "慢"), "hot": ("hot", "热"), "cold": ("cold", "冷"),
    "bright": ("bright", "亮"), "dark": ("dark", "暗"), "wet": ("wet", "湿"), "dry": ("dry", "干"),
    "tall": ("tall", "高"), "long": ("long", "长"), "far": ("far", "远"), "loud": ("loud", "响"),
    "quiet": ("quiet", "静"), "sharp": ("sharp", "利"),
}  # fmt: skip
ENDINGS = ("yes", "no", "then", "done", "wait")  # words that end a line of thinking

KEY = re.compile(r"\{([a-z]+)\}")
SPOKEN = {}  # a word as a text shows it, without white space -> its key
for _key, _words in WORDS.items():
    SPOKEN |= {_word.strip(): _key for _word in _words}
# An ending is followed by a line break, or stands at the end of a text that was stripped.
WORD = re.compile(
    "|".join(
        [rf" ?(?<![A-Za-z])({'|'.join(WORDS[k][0].strip() for k in ENDINGS)})(?:\n|$)"]
        + [f"({'|'.join(WORDS[k][1].strip() for k in ENDINGS)})(?:\n|$)"]
        + [r" ?\b(" + "|".join(w[0].strip() for k, w in WORDS.items() if k not in ENDINGS) + r")\b ?"]
        + ["([" + "".join(w[1] for k, w in WORDS.items() if k not in ENDINGS) + "])"]
    )
)


def say(neutral: str, language: str) -> str:
    """Neutral text in one language: every `{key}` becomes its word; anything else stays. ValueError for another one."""
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r}: the world has {', '.join(LANGUAGES)}")
    column = LANGUAGES.index(language)
    return KEY.sub(lambda match: WORDS[match[1]][column] if match[1] in WORDS else match[0], neutral)


def neutral(text: str) -> str:
    """The inverse of `say`, for a text that may mix both languages: every known word becomes its `{key}`."""
    return WORD.sub(lambda match: f"{{{SPOKEN[match[match.lastindex]]}}}", text)
