"""A grammar of short reviews with a known sentiment, for the bundled model and data set.

A review is one sentence of 8–30 tokens in SST-2's form (lower case, tokens separated by spaces): one to three
clauses about a film, a book, a restaurant, a hotel, a gadget, a concert or a game, joined to one sentence.
All its opinions agree; there is no irony, contrast or negation, which a model this small does not learn.

Opinion words come in two disjoint sets. Labelled training data uses only `TRAIN_WORDS`, 24 a side;
labelled validation and test data only the others. What a tuned model gets right there, it has from the
language model, which was pretrained on all of them, and not from the labels. No word of one set shares its
root with a word of the other.

Every function takes a `random.Random` or a seed, and gives the same text for the same seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from random import Random

NEGATIVE, POSITIVE = 0, 1
LABELS = (NEGATIVE, POSITIVE)
MIN_TOKENS, MAX_TOKENS = 8, 30

# By kind: `adjective` "a … film"; `noun` "this film is a …"; `verb` "i … the plot"; `acts` "the plot …";
# `adverb` "… written"; `quality` "full of …"; `superlative` "the … film".
_TRAIN_WORDS: dict[int, dict[str, str]] = {
    POSITIVE: {
        "adjective": """good great wonderful charming clever fresh elegant thoughtful warm polished generous
            lively""",
        "noun": "triumph gem success",
        "verb": "admired liked praised",
        "acts": "sparkles soars",
        "adverb": "nicely smoothly",
        "quality": "talent",
        "superlative": "finest",
    },
    NEGATIVE: {
        "adjective": "bad awful boring dull clumsy stale shabby careless cold sloppy forgettable limp",
        "noun": "disaster chore letdown",
        "verb": "disliked regretted resented",
        "acts": "drags fizzles",
        "adverb": "hastily lazily",
        "quality": "rubbish",
        "superlative": "dullest",
    },
}
_OTHER_WORDS: dict[int, dict[str, str]] = {
    POSITIVE: {
        "adjective": """excellent superb brilliant fantastic terrific amazing awesome outstanding delightful
            enjoyable entertaining engaging compelling gripping captivating fascinating moving touching funny
            hilarious witty smart sharp intelligent beautiful gorgeous lovely stunning dazzling splendid
            magnificent marvelous remarkable extraordinary exceptional impressive inventive original
            imaginative creative inspired inspiring refined satisfying rewarding pleasant pleasing exciting
            thrilling absorbing rich vivid vibrant graceful subtle powerful strong solid superior flawless
            perfect unforgettable irresistible sublime masterful skillful sincere heartfelt tender uplifting
            joyous joyful cheerful appealing exquisite fabulous glorious spectacular sensational stellar
            stylish sophisticated insightful profound poignant riveting hypnotic playful breezy addictive
            accomplished adorable magical honest fun enchanting compassionate energetic ambitious believable
            authentic bright intimate sweet seductive provocative daring bold""",
        "noun": """masterpiece delight classic marvel winner pleasure knockout standout blast hit revelation
            treasure miracle hoot stunner feast blessing keeper joy thrill""",
        "verb": """enjoyed adored cherished savored relished appreciated treasured applauded valued welcomed
            embraced""",
        "acts": """shines dazzles delights excels impresses entertains engages captivates satisfies works
            thrills resonates inspires""",
        "adverb": """beautifully brilliantly superbly gracefully masterfully perfectly splendidly exquisitely
            expertly deftly flawlessly impeccably skillfully delicately imaginatively""",
        "quality": """wit intelligence energy imagination beauty passion depth insight grace wisdom laughs
            heart life suspense originality joy honesty humanity tenderness chemistry""",
        "superlative": "best loveliest funniest smartest sweetest strongest brightest richest",
    },
    NEGATIVE: {
        "adjective": """terrible horrible dreadful poor weak lousy mediocre disappointing annoying irritating
            tedious tiresome tiring bland flat empty hollow shallow thin pointless senseless mindless stupid
            silly dumb ridiculous absurd ludicrous laughable pathetic embarrassing painful unbearable
            unpleasant ugly messy muddled confusing incoherent disjointed predictable formulaic derivative
            unoriginal uninspired unimaginative trite contrived forced fake phony pretentious preachy sappy
            maudlin manipulative cheap crude vulgar tasteless tacky dreary bleak drab gloomy sluggish slow
            plodding overlong bloated overblown overwrought inept incompetent amateurish unconvincing
            implausible unfunny humorless joyless witless soulless flawed broken faulty defective abysmal
            atrocious appalling ghastly hideous horrid nasty repulsive vile wretched insulting offensive
            obnoxious insipid inane idiotic vapid turgid stilted hackneyed useless worthless lame redundant
            repetitive monotonous generic superficial depressing frustrating heavy""",
        "noun": """failure mess flop bomb disappointment waste misfire travesty turkey nightmare embarrassment
            fiasco debacle joke headache stinker clunker slog ordeal catastrophe disgrace""",
        "verb": "despised loathed detested endured suffered cursed abhorred dreaded lamented deplored",
        "acts": """fails disappoints annoys irritates stumbles flounders falters collapses sputters sinks
            grates offends insults suffers plods frustrates""",
        "adverb": """poorly terribly horribly dreadfully incompetently ineptly amateurishly unconvincingly
            weakly cheaply atrociously abysmally stupidly tediously painfully embarrassingly""",
        "quality": """cliches nonsense mistakes problems errors holes melodrama stupidity garbage filler junk
            trash flaws gimmicks confusion excess noise pretension platitudes gibberish""",
        "superlative": "worst weakest poorest silliest ugliest dumbest slowest emptiest",
    },
}

Lexicon = dict[int, dict[str, tuple[str, ...]]]
"""Opinion words by label and kind."""
Domain = tuple[tuple[str, ...], ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _split(words: dict[int, dict[str, str]]) -> Lexicon:
    return {label: {kind: _words(text) for kind, text in kinds.items()} for label, kinds in words.items()}


TRAIN_WORDS: Lexicon = _split(_TRAIN_WORDS)
"""The opinion words of labelled training data."""
OTHER_WORDS: Lexicon = _split(_OTHER_WORDS)
"""The opinion words of labelled validation and test data."""
ALL_WORDS: Lexicon = {
    label: {kind: words + OTHER_WORDS[label][kind] for kind, words in kinds.items()}
    for label, kinds in TRAIN_WORDS.items()
}
"""The opinion words of the pretraining corpus."""

# Words that only verdicts and answers use; labelled reviews never contain them.
_VERDICTS: tuple[tuple[str, str, str], ...] = (
    ("my verdict : {} .", "no", "yes"),
    ("my rating : {} .", "negative", "positive"),
    ("overall i {} it .", "hated", "loved"),
    ("do i recommend it ? {} .", "no", "yes"),
    ("thumbs {} .", "down", "up"),
    ("it left me {} .", "unhappy", "happy"),
)
# Asked in front of a review and answered behind it; of its sentiment, and of other things.
_SENTIMENT_QUESTIONS: tuple[tuple[str, str, str], ...] = (
    ("yes or no :", "no", "yes"),
    ("positive or negative :", "negative", "positive"),
    ("thumbs up or down :", "down", "up"),
    ("happy or unhappy :", "unhappy", "happy"),
)
_OTHER_QUESTIONS = ("first word :", "second word :", "last word :", "what kind of thing :")
_SENTIMENT_SHARE = 1 / 3  # of the questions
# By domain: the thing, its parts, how one part was made, how one met it.
_DOMAINS: tuple[Domain, ...] = tuple(
    tuple(_words(field) for field in fields)
    for fields in (
        (
            "film movie picture comedy drama thriller documentary remake sequel western",
            """acting plot script story dialogue cast direction ending camera_work soundtrack screenplay humor
            music opening_scene lead_performance pacing romance premise""",
            "acted directed written filmed edited staged",
            "saw watched rented",
        ),
        (
            "book novel memoir biography story poem",
            """prose plot writing first_chapter ending narrator style dialogue research main_character cover
            subject""",
            "written researched told translated edited",
            "read finished borrowed",
        ),
        (
            "restaurant place cafe diner bar bistro bakery",
            """food service soup pasta dessert coffee menu pizza staff bread wine fish breakfast kitchen
            dinner sauce""",
            "cooked served prepared seasoned presented",
            "visited tried picked",
        ),
        (
            "hotel hostel resort inn apartment",
            "room staff bed view breakfast location lobby pool bathroom garden service terrace furniture",
            "furnished managed decorated located kept",
            "booked visited chose",
        ),
        (
            "phone camera laptop printer headset watch tablet speaker keyboard",
            """screen battery sound design software keyboard case lens picture_quality price build support
            manual""",
            "built designed packaged assembled engineered",
            "bought ordered used",
        ),
        (
            "album concert song show opera musical record",
            """singing band music stage sound voice orchestra guitar rhythm production first_song audience
            chorus""",
            "sung played produced performed recorded",
            "heard attended played",
        ),
        (
            "game puzzle toy app",
            """design story artwork sound tutorial control_scheme first_level world gameplay combat interface
            humor""",
            "designed written animated drawn made",
            "played bought tried",
        ),
    )
)
_INTENSIFIERS = _words(
    "very really so truly quite rather simply utterly just extremely completely absolutely thoroughly"
)
_PEOPLE = _words("wife husband brother sister friend mother father daughter son neighbor boss family uncle cousin")
_TIMES = (
    "last week",
    "yesterday",
    "on monday",
    "on friday night",
    "in the summer",
    "last month",
    "two years ago",
    "this morning",
    "over the weekend",
    "in december",
    "at christmas",
    "a few days ago",
)
_PLACES = (
    "in the city",
    "at home",
    "downtown",
    "near the station",
    "in new york",
    "by the sea",
    "at work",
    "on the train",
    "in town",
)
_JOINS = (", and", ",", ";", "--", ", where", ", because", "and", ", since")

# Common words of written English. The model only learns that they say nothing about sentiment, so that a real
# sentence is not mostly `<unk>`.
COMMON_WORDS: tuple[str, ...] = _words(
    """
    ! $ & ' '' 'd 'll 'm 're 's 've ( ) , - -- . ... / 1 10 2 20 3 90 : ; ? `` a about above across
    action adventure after again against age ago air all almost along already also although always am
    american among an and another any anyone anything are around art as at audience away back based be
    became because become been before began behind being below between beyond big black body both boy
    brings business but by ca call came can car career century chance change character characters child
    children cinema cinematic city close come comes coming contemporary could country course culture day
    days did director do does doing done door down dramatic during each early earth effects effort
    either emotion emotional end enough era especially even events ever every everyone everything
    exactly experience eye eyes face fact familiar family far feature feel feeling feels felt few
    fiction fight filmmaker filmmakers films find first for form found four french friends from full
    future gets girl give given gives go god goes going gone got group had half hand hands happen has
    have having he head hear help her here hero high him himself his history hold hollywood home hour
    hours house how human i idea if images in instead into is issues it its itself kids kind know known
    land language large late later lead least left let light like line lines little live lives living ll
    long look looking looks lot lrb made make makes making man many mark material matter may me mean men
    might mind minute minutes moment moments more most movies mr much must my mystery n't name nature
    near need never new next night none nor not nothing now number of off often old on once one only
    open or order other others our out over own part parts pass people performance performances perhaps
    person personal piece place plays point political pretty probably question quickly rate real reality
    reason red rest right role rrb run said same satire say says scene scenes school screen script
    second see seem seems seen self sense series set seven several sex she short shot should side simple
    since single six small social society some someone something sometimes somewhere soon sort spirit
    star start state stay still stop storytelling straight street study stuff subject such take takes
    tale talk teen tells ten tension than that the their them themes then there these they thing things
    think this those though three thriller through throughout time times title to together told too took
    toward tragedy true truth try trying turn turns two type under understand until up us use used usual
    version video view viewer viewers violence visual war was watch watching water way ways we week well
    went were what when where whether which while white who whole whose why will with within without wo
    woman women words work world would year years yet york you young your youth
    """
)


def words_of(lexicon: Lexicon, label: int | None = None) -> set[str]:
    """All opinion words of `lexicon`, of one side or (`label=None`) of both."""
    labels = LABELS if label is None else (label,)
    return {word for side in labels for words in lexicon[side].values() for word in words}


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" and not word.startswith("use") else "a"


def _clause(rng: Random, words: dict[str, tuple[str, ...]], domain: Domain) -> str:
    """One clause with one or two opinion words out of `words`, without final punctuation."""
    thing, made, met = (rng.choice(domain[i]) for i in (0, 2, 3))
    part, other_part = (part.replace("_", " ") for part in rng.sample(domain[1], 2))
    person = rng.choice(_PEOPLE)
    very = rng.choice(_INTENSIFIERS) + " " if rng.random() < 0.4 else ""
    be = rng.choice(("is", "was"))
    adjective, other = rng.sample(words["adjective"], 2)
    noun, verb, acts, adverb, quality, superlative = (
        rng.choice(words[kind]) for kind in ("noun", "verb", "acts", "adverb", "quality", "superlative")
    )
    opening = _article(very or adjective)
    frames = (
        f"the {part} {be} {very}{adjective}",
        f"the {thing} {be} {very}{adjective}",
        f"this {be} {opening} {very}{adjective} {thing}",
        f"it 's {opening} {very}{adjective} {thing} with {_article(other)} {other} {part}",
        f"i found the {part} {very}{adjective}",
        f"we thought that the {part} {be} {very}{adjective} and {other}",
        f"the {part} and the {other_part} are {very}{adjective}",
        f"with {adjective} {part} and {other} {other_part} , this {thing} {be} {adverb} {made}",
        f"what {_article(adjective)} {adjective} {thing} this {be}",
        f"one of the most {adjective} things i ever {met}",
        f"one of the {superlative} of its kind this year",
        f"the {superlative} {thing} i {met} {rng.choice(_TIMES)}",
        f"the {part} of this {thing} {acts}",
        f"the {part} {acts} from the first minute to the last",
        f"this {thing} {be} {_article(noun)} {noun}",
        f"the {part} turned out to be {_article(noun)} {noun}",
        f"{_article(noun)} {noun} of {_article(thing)} {thing}",
        f"the {part} {be} full of {quality}",
        f"{_article(thing)} {thing} of much {quality}",
        f"my {person} and i {verb} the {part}",
        f"i {verb} this {thing}",
        f"my {person} {verb} every part of it",
        f"the {thing} {be} {adverb} {made}",
        f"it {be} {adverb} {made} and {very}{adjective}",
        f"{opening} {very}{adjective} and {other} {thing}",
        f"the {part} looks {adjective} to me",
        f"everyone at the table {verb} the {part}",
        f"you could call the {part} {adjective}",
        f"you could call it {adjective} , {other} and {adverb} {made}",
    )
    return rng.choice(frames)


def _neutral(rng: Random, domain: Domain) -> str:
    """A clause without opinion."""
    thing, met = rng.choice(domain[0]), rng.choice(domain[3])
    part = rng.choice(domain[1]).replace("_", " ")
    person, time, place = rng.choice(_PEOPLE), rng.choice(_TIMES), rng.choice(_PLACES)
    return rng.choice(
        (
            f"i {met} it {time}",
            f"we {met} this {thing} {time} with my {person}",
            f"my {person} {met} it {place}",
            f"it is {_article(thing)} {thing} {place}",
            f"this {thing} is about the {part}",
            f"after we {met} it {place} , we talked about the {part}",
            f"the {thing} came out {time}",
            f"there is another {thing} like this {place}",
        )
    )


def review(rng: Random, label: int, lexicon: Lexicon = ALL_WORDS, about: Domain | None = None) -> str:
    """One review of the given sentiment, of 8–30 tokens, with opinion words out of `lexicon` only."""
    while True:
        domain = about or rng.choice(_DOMAINS)
        clauses = [_clause(rng, lexicon[label], domain) for _ in range(rng.choice((1, 2, 2, 3)))]
        if rng.random() < 0.3:
            clauses.insert(rng.randrange(len(clauses) + 1), _neutral(rng, domain))
        text = clauses[0]
        for clause in clauses[1:]:
            text += f" {rng.choice(_JOINS)} {clause}"
        text += " ."
        if MIN_TOKENS <= len(text.split()) <= MAX_TOKENS:
            return text


def labelled_reviews(seed: int, count: int, lexicon: Lexicon, exclude: Collection[str] = ()) -> list[dict]:
    """`count` different reviews, half of each label, as `{"sentence": ..., "label": ...}` rows."""
    rng = Random(seed)
    seen: set[str] = set(exclude)
    rows: list[dict] = []
    while len(rows) < count:
        label = len(rows) % 2
        sentence = review(rng, label, lexicon)
        if sentence not in seen:
            seen.add(sentence)
            rows.append({"sentence": sentence, "label": label})
    rng.shuffle(rows)
    return rows


def _with_noise(rng: Random, text: str, rate: float) -> str:
    words = []
    for word in text.split():
        if rng.random() < rate:
            words.append(rng.choice(COMMON_WORDS) if rng.random() < 0.8 else "<unk>")
        words.append(word)
    return " ".join(words)


def _asked_review(rng: Random) -> tuple[str, str]:
    """A review, and the document that asks about it in front and answers behind it."""
    label, domain = rng.choice(LABELS), rng.choice(_DOMAINS)
    text = review(rng, label, about=domain)
    if rng.random() < _SENTIMENT_SHARE:
        question, *answers = rng.choice(_SENTIMENT_QUESTIONS)
        answer = answers[label]
    else:
        words = text.split()
        number = rng.randrange(len(_OTHER_QUESTIONS))
        question, answer = _OTHER_QUESTIONS[number], (words[0], words[1], words[-2], domain[0][0])[number]
    return text, f"{question} {text} {answer} ."


def corpus(seed: int, exclude: Collection[str] = (), question_rate: float = 0.15) -> Iterator[str]:
    """Endless pretraining documents over all opinion words.

    Documents of the first kind are one to three texts, a clause or a review each, whose sentiments are independent;
    after most texts comes a verdict that agrees with it ("my verdict : no ."). They teach the words' sentiment fast,
    and the word that follows a review does not depend on its sentiment, only later ones do. Some of their texts have
    common words or `<unk>` inserted, for the sake of real sentences.

    Documents of the second kind ask before the review, of its sentiment or of something else ("yes or no : the plot
    was dull . no .", "last word : the plot was dull . dull ."): what stands in front of a review decides what is made
    of it, which is how prompts act. Were sentiment alone asked for, the model would tell it unasked.

    Args:
        seed: of all draws.
        exclude: reviews that are not to be a whole text, e.g. the labelled ones.
        question_rate: share of documents of the second kind.
    """
    rng = Random(seed)
    exclude = frozenset(exclude)
    while True:
        if rng.random() < question_rate:
            text, document = _asked_review(rng)
            if text not in exclude:
                yield document
            continue
        parts = []
        for _ in range(rng.choice((1, 2, 3))):
            label = rng.choice(LABELS)
            if rng.random() < 0.5:
                text = _clause(rng, ALL_WORDS[label], rng.choice(_DOMAINS)) + " ."
            else:
                text = review(rng, label)
            if text in exclude:
                continue
            if rng.random() < 0.15:
                text = _with_noise(rng, text, rng.choice((0.1, 0.3)))
            parts.append(text)
            if rng.random() < 0.9:
                lead, *answers = rng.choice(_VERDICTS)
                parts.append(lead.format(answers[label]))
        if parts:
            yield " ".join(parts)


def vocabulary() -> list[str]:
    """Every word the corpus can contain, sorted; the tokenizer's vocabulary without the special tokens."""
    texts = [
        " ".join(words_of(ALL_WORDS)),
        " ".join(COMMON_WORDS),
        " ".join(_INTENSIFIERS),
        " ".join(_PEOPLE),
    ]
    texts += [text.replace("{}", " ") for row in _VERDICTS for text in row]
    texts += [text.replace("_", " ") for row in _DOMAINS for field in row for text in field]
    texts += [*_TIMES, *_PLACES, *_JOINS]
    # The sentence frames are code: draw enough reviews to have met all their words.
    rng = Random(0)
    texts += [review(rng, label) for _ in range(3000) for label in LABELS]
    return sorted({word for text in texts for word in text.split()})
