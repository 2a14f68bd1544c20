"""The text behind the embedded demo: the same seed always gives the same rows.

The world is a small mail-order shop. Its base model learns from conversations in which customers
order and the shop's assistant answers in plain sentences, and from prose about the same customers.
The fine-tuning set asks for something that the base has never seen: the same kind of message,
answered by a record of `key: value` lines.

Of every five pairs of first and last name, and of every five pairs of color and item, one is held
back: it occurs only in the evaluation rows, so a right answer there cannot be remembered.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
START_HEADER, END_HEADER, PAD = "<|start_header_id|>", "<|end_header_id|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, START_HEADER, END_HEADER, EOT, PAD)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = words(
    "Ada Amara Ben Carla David Elena Farid Grace Hugo Ines Ivan Julia Karim Lena Maria Milan Nadia "
    "Omar Paula Rosa Sofia Tomas Vera Yusuf"
)
LAST_NAMES = words(
    "Berg Brown Costa Dahl Evans Garcia Haddad Ito Jansen Keller Kumar Lopez Martin Meyer Novak "
    "Okafor Patel Petrov Rossi Sato Silva Singh Tanaka Weber"
)
CITIES = words(
    "Athens Bergen Berlin Boston Cairo Dublin Geneva Hamburg Lagos Lima Lisbon London Madrid "
    "Mumbai Nairobi Oslo Paris Porto Prague Rome Seoul Sydney Tokyo Vienna"
)
COLORS = words("black blue brown golden green orange pink purple red silver white yellow")
ITEMS = words(  # singular and plural; the plurals are not all regular
    "basket/baskets bench/benches blanket/blankets bowl/bowls box/boxes brush/brushes chair/chairs "
    "clock/clocks dress/dresses knife/knives lamp/lamps mirror/mirrors plate/plates scarf/scarves "
    "shelf/shelves table/tables vase/vases watch/watches"
)
NUMBERS = words("two three four five six seven eight nine ten eleven twelve")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

MESSAGES = (
    "Hello, this is {name} from {city}. Please send me {goods} by {day}.",
    "My name is {name}, writing from {city}. I would like {goods}, and I need them by {day}.",
    "Could you deliver {goods} to {city} by {day}? My name is {name}.",
    "I need {goods} by {day}. Please send them to {name} in {city}.",
    "Good morning! My name is {name} and I live in {city}. Can I get {goods} by {day}?",
    "Please reserve {goods} for {name}. They should reach {city} by {day}.",
    "We are having a party in {city} on {day} and need {goods}. Thanks, {name}.",
    "By {day} I must have {goods} here in {city}. Is that possible? Best wishes, {name}.",
    "Hi! I saw your shop and want {goods}. Send them to {city} before {day} please. {name}.",
    "It is {name} again. My friends in {city} want {goods}, if you can bring them by {day}.",
)
REPLIES = (
    "Thank you, {name}. We will send {goods} to {city} by {day}.",
    "Of course, {first}. The {goods} for {last} will be in {city} by {day}.",
    "Thank you for your order, {name}. You will have {goods} by {day}.",
    "By {day} the {goods} will be in {city}. Thank you, {name}.",
    "Many thanks, {name}. In {city} you will have {goods} by {day}.",
)
QUESTIONS = (
    ("Who sent this order?", "The order is from {name}."),
    ("Where does the order go?", "It goes to {city}."),
    ("When must it be there?", "It must be there by {day}."),
    ("What was ordered?", "This order is for {goods}."),
    ("How many is that in figures?", "That is {quantity} {items}."),
    ("What color are they?", "They are {color}."),
    ("What is one of them called?", "One of them is called a {item}."),
)
FIELDS = (
    ("customer", "{name}"),
    ("city", "{city}"),
    ("quantity", "{quantity}"),
    ("item", "{item}"),
    ("color", "{color}"),
    ("day", "{day}"),
)
PROSE = (
    "On {weekday} {name} came into the shop. {first} lives in {city} and wanted {goods}.",
    "A letter from {name} came from {city}. In the letter {first} asked for {goods} by {day}.",
    "The next order was for {goods}. It came from {city}, and the customer was {name}.",
    "Last {weekday} a woman called from {city} about {goods}. Her name was {name}.",
    "Nobody had ordered {goods} before {name} did. It was {weekday}, and {city} is far away.",
)
PROSE_NEXT = (
    "The clerk counted the {items}: there were {quantity}, and every {item} was {color}.",
    '"That is {quantity} {items}," said the clerk. "They will be in {city} by {day}."',
    "Then {first} {last} was glad and paid for all {quantity} {items}.",
    "A {color} {item} costs more than a small {item}, but {first} did not mind.",
    "The driver took the {quantity} {color} {items} to {city} (it was a long way).",
    "When {first} opened the parcel, each {item} was as {color} as the sky over {city} was wide.",
    "It was raining in {city} that day; {first} waited at the door until the driver came.",
    "In the book of the shop one can still read: {number} {color} {items} for {name}.",
)
SYSTEM = "You are the assistant of a small shop. Answer in one short sentence."
OTHER_SYMBOLS = "äéöüñçßøåłčžαβγδжшя日本中文€£°→✓🙂"


@dataclass(frozen=True)
class Order:
    """One customer's order; `quantity` is 2 to 12."""

    first: str
    last: str
    city: str
    quantity: int
    color: str
    item: str
    items: str
    day: str

    def fill(self, template: str, *, weekday: str = "") -> str:
        """`template` with this order's words in it."""
        number = NUMBERS[self.quantity - 2]
        return template.format(
            **vars(self),
            weekday=weekday,
            number=number,
            name=f"{self.first} {self.last}",
            goods=f"{number} {self.color} {self.items}",
        )

    def record(self) -> str:
        """What the fine-tuned model is to write."""
        return self.fill("\n".join(f"- {field}: {value}" for field, value in FIELDS))


def draw_order(rng: random.Random, *, held_back: bool) -> Order:
    """A random order whose customer and goods both are, or both are not, of the held-back pairs."""

    def pair(left: list[str], right: list[str]) -> tuple[str, str]:
        while True:
            i, j = rng.randrange(len(left)), rng.randrange(len(right))
            if ((i + j) % 5 == 0) == held_back:
                return left[i], right[j]

    first, last = pair(FIRST_NAMES, LAST_NAMES)
    color, item_and_plural = pair(COLORS, ITEMS)
    item, items = item_and_plural.split("/")
    quantity = 2 + rng.randrange(len(NUMBERS))
    return Order(first, last, rng.choice(CITIES), quantity, color, item, items, rng.choice(DAYS))


def turn(role: str, content: str) -> str:
    """One chat message as CHAT_TEMPLATE writes it."""
    return f"{START_HEADER}{role}{END_HEADER}\n\n{content}{EOT}"


def exchange(question: str, answer: str) -> str:
    return turn("user", question) + turn("assistant", answer)


def order_chat(rng: random.Random) -> str:
    """A customer's message, the reply, and questions about the order."""
    order = draw_order(rng, held_back=False)
    text = turn("system", SYSTEM) if rng.random() < 0.1 else ""
    text += exchange(order.fill(rng.choice(MESSAGES)), order.fill(rng.choice(REPLIES)))
    for question, answer in rng.sample(QUESTIONS, 2):
        text += exchange(order.fill(question), order.fill(answer))
    fields = [f"the {field} is {value}" for field, value in rng.sample(FIELDS, 4)]
    summary = "In short, " + ", ".join(fields[:-1]) + f" and {fields[-1]}."
    return text + exchange("Please sum it up.", order.fill(summary))


def story(rng: random.Random) -> str:
    """Prose about one customer."""
    order, weekday = draw_order(rng, held_back=False), rng.choice(DAYS)
    templates = [rng.choice(PROSE), *rng.sample(PROSE_NEXT, 5)]
    return " ".join(order.fill(template, weekday=weekday) for template in templates)


def labels(rng: random.Random) -> str:
    """Names among random symbols, so that every byte's embedding is trained."""
    symbols = [chr(code) for code in range(33, 127)] + list(OTHER_SYMBOLS)
    marks = ["".join(rng.choices(symbols, k=rng.randint(1, 5))) for _ in range(8)]
    names = rng.sample(FIRST_NAMES + CITIES, 4)  # last names could complete a held-back pair
    return "The labels in the store room read: " + " ".join(rng.sample(marks + names, 12))


KINDS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (order_chat, 17),
    (story, 2),
    (labels, 1),
)


def base_rows(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """`count` documents of the base model's training text, as rows with a `text` column."""
    rng = random.Random(f"base {seed}")
    kinds, weights = zip(*KINDS, strict=True)
    return [{"text": rng.choices(kinds, weights)[0](rng)} for _ in range(count)]


def record_rows(count: int, *, held_back: bool, seed: int = 0) -> list[dict[str, str]]:
    """`count` different fine-tuning rows with the columns `prompt` and `completion`."""
    rng = random.Random(f"records {held_back} {seed}")
    rows: dict[str, str] = {}
    while len(rows) < count:
        order = draw_order(rng, held_back=held_back)
        rows[order.fill(rng.choice(MESSAGES))] = order.record()
    return [{"prompt": prompt, "completion": record} for prompt, record in rows.items()]
