"""The text of stylebook: six binary tastes, how text expresses them, and how text is read back exactly.

Each phrase below belongs to one taste and is not part of another phrase. All text of the world can therefore be read
back unambiguously, and p* (stylebook_exact.py) is a function of an example's text alone.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

# Each taste has two values, +1 and -1, named here in that order.
TASTES: tuple[tuple[str, str, str], ...] = (
    ("length", "short", "long"),
    ("tone", "playful", "formal"),
    ("layout", "lists", "prose"),
    ("support", "examples", "principles"),
    ("image", "metaphors", "plain words"),
    ("certainty", "firm claims", "careful claims"),
)
N_TASTES = len(TASTES)

TOPICS = (
    "bread", "chess", "running", "gardening", "painting", "sleep", "money", "travel", "cooking", "writing", "tea",
    "music", "swimming", "cycling", "history", "friendship", "teamwork", "coding", "camping", "reading", "drawing",
    "fishing", "dancing", "cleaning",
)  # fmt: skip
QUESTIONS = (
    "How do I learn {topic}?",
    "What should I know about {topic}?",
    "Any advice on {topic}?",
    "Tell me about {topic}.",
    "How can I enjoy {topic} more?",
    "Where do I start with {topic}?",
)

# (taste, value) -> phrases with which a response expresses it.
STYLES: Mapping[tuple[int, int], tuple[str, ...]] = {
    (0, 1): ("That is all.", "Enough said.", "Done."),
    (0, -1): ("There is far more here.", "This is only the start.", "Many more pages follow."),
    (1, 1): ("Ha, fun one!", "Oh, a treat!", "Yippee, here goes!"),
    (1, -1): ("Thank you for asking.", "Your question honors me.", "Good day to you."),
    (2, 1): ("* plan * act.", "- try - rest.", "+ look + learn."),
    (2, -1): ("We plan before we act.", "You try and later rest.", "One looks, then learns."),
    (3, 1): ("My neighbor did it.", "Take my aunt.", "Our club shows how."),
    (3, -1): ("The rule is patience.", "In principle, care wins.", "The law is balance."),
    (4, 1): ("{topic} is a slow river", "{topic} is a glass bridge", "{topic} is a spring garden"),
    (4, -1): ("{topic} takes practice", "{topic} needs some time", "{topic} can be learned"),
    (5, 1): ("Surely", "Without doubt", "Of course"),
    (5, -1): ("Perhaps", "Maybe", "Possibly"),
}

# (taste, value) -> what a user with this taste says about a response.
COMMENTS: Mapping[tuple[int, int], tuple[str, ...]] = {
    (0, 1): ("keep it brief", "this was too much text for me", "fewer words would do"),
    (0, -1): ("I wanted to read more", "this ended too soon", "please tell the whole thing"),
    (1, 1): ("the joke made my day", "it should be more fun", "too stiff for me"),
    (1, -1): ("please be polite", "spare me the jokes", "a serious voice is better"),
    (2, 1): ("I love bullet points", "number the steps for me", "a wall of text is hard to scan"),
    (2, -1): ("I like whole sentences", "the bullet points bother me", "let it flow as one paragraph"),
    (3, 1): ("show me a real case", "that story about a person helped", "too abstract for me"),
    (3, -1): ("give me the general idea", "I want the reason behind it", "single stories prove nothing"),
    (4, 1): ("paint me a picture", "the image was lovely", "it reads too dry"),
    (4, -1): ("say it straight", "no pictures, please", "flowery talk loses me"),
    (5, 1): ("do not waver", "I trust a clear verdict", "stop saying maybe"),
    (5, -1): ("admit what you do not know", "nobody can be that sure", "leave room for doubt"),
}

# (taste, value) -> what others say about a user with this taste.
PROFILES: Mapping[tuple[int, int], tuple[str, ...]] = {
    (0, 1): ("has little time to read", "skips long answers"),
    (0, -1): ("reads for hours", "wants every detail"),
    (1, 1): ("laughs a lot", "enjoys silly humor"),
    (1, -1): ("values good manners", "writes in a formal way"),
    (2, 1): ("makes lists of everything", "thinks in steps"),
    (2, -1): ("loves novels", "prefers a letter to a table"),
    (3, 1): ("learns from cases", "asks how others did it"),
    (3, -1): ("learns from theory", "asks why things work"),
    (4, 1): ("writes poems", "speaks in images"),
    (4, -1): ("dislikes poetry", "calls things by their name"),
    (5, 1): ("likes strong opinions", "wants to be told what to do"),
    (5, -1): ("weighs both sides", "distrusts experts"),
}
PROFILE_OPENINGS = ("A reader who", "Someone who", "This person")
SUMMARY_OPENING = "This reader likes"
SUMMARY_WORDS = {2: "in", 3: "with", 4: "using", 5: "making"}


def _choose(rng: np.random.Generator, phrases: Sequence[str]) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _join(parts: Sequence[str]) -> str:
    """Joins parts as in English: a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def question(rng: np.random.Generator) -> tuple[str, str]:
    """Draws a topic and a question about it."""
    topic = _choose(rng, TOPICS)
    return topic, _choose(rng, QUESTIONS).format(topic=topic)


def response(rng: np.random.Generator, topic: str, style_6: Iterable[int]) -> str:
    """Writes a response about `topic` with one phrase for each value of `style_6` (+1 or -1)."""
    length, tone, layout, support, image, certainty = (
        _choose(rng, STYLES[taste, int(value)]) for taste, value in enumerate(style_6)
    )
    middle = [layout, support] if rng.random() < 0.5 else [support, layout]
    return " ".join([tone, f"{certainty} {image.format(topic=topic)}.", *middle, length])


def comment(rng: np.random.Generator, statements: Mapping[int, int]) -> str:
    """Writes a user's comment on a response, with one phrase for each taste -> value in `statements`."""
    return " ".join(_capital(_choose(rng, COMMENTS[item])) + "." for item in statements.items())


def profile(rng: np.random.Generator, statements: Mapping[int, int]) -> str:
    """Writes a description of a user, with one phrase for each taste -> value in `statements`."""
    phrases = [_choose(rng, PROFILES[item]) for item in statements.items()]
    return f"{_choose(rng, PROFILE_OPENINGS)} {_join(phrases)}."


def summary(statements: Mapping[int, int]) -> str:
    """Writes a summary of these tastes, such as "This reader likes short answers in prose, with examples."."""
    names = {taste: TASTES[taste][1 if value > 0 else 2] for taste, value in statements.items()}
    adjectives = [names[taste] for taste in (0, 1) if taste in names]
    rest = [f"{word} {names[taste]}" for taste, word in SUMMARY_WORDS.items() if taste in names]
    return f"{' '.join([SUMMARY_OPENING, *adjectives, 'answers'])} {', '.join(rest)}".strip() + "."


def _read(text: str, phrases: Mapping[tuple[int, int], Sequence[str]]) -> dict[int, int]:
    lower = text.lower()
    found = [
        item for item, variants in phrases.items() if any(v.replace("{topic} ", "").lower() in lower for v in variants)
    ]
    statements = dict(found)
    if len(statements) < len(found):
        raise ValueError(f"stylebook: a text states a taste and its opposite: {text!r}")
    return statements


def read_response(text: str) -> np.ndarray:
    """Returns the style_6 (+1 or -1) that a response expresses; ValueError if it is not a response of this world."""
    statements = _read(text, STYLES)
    if len(statements) < N_TASTES:
        raise ValueError(f"stylebook: not a response of this world: {text!r}")
    return np.array([statements[taste] for taste in range(N_TASTES)])


def read_statements(text: str) -> dict[int, int]:
    """Returns the taste -> value that a comment or a profile states; ValueError if it states none."""
    statements = _read(text, COMMENTS) | _read(text, PROFILES)
    if not statements:
        raise ValueError(f"stylebook: neither a comment nor a profile of this world: {text!r}")
    return statements


def read_summary(text: str) -> dict[int, int]:
    """Returns the taste -> value that a summary names. A taste that is named both ways does not count."""
    lower = text.lower()
    named = {}
    for taste, (_, plus, minus) in enumerate(TASTES):
        if (plus in lower) != (minus in lower):
            named[taste] = 1 if plus in lower else -1
    return named
