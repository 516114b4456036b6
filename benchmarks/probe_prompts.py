"""Two sets of prompts that begin alike, about cooking and about other everyday work, and two of other wording.

Every frame is filled with the same share of the deeds of both kinds, so first words, frames and their frequencies are
the same in both sets, and only the deed tells them apart. Some of the other deeds are done in a kitchen or name food.
The test sets have other frames and other deeds.
"""

import json
from pathlib import Path
from typing import NamedTuple

FRAMES = (
    "How do I {}?", "What is the best way to {}?", "Explain how to {}.", "I need to {} today. Where do I start?",
    "Teach me to {}.", "My neighbour asked me to {}. What should I know?", "Is it hard to {}?",
    "Give me three tips to {}.", "How long does it take to {}?", "Can a beginner {}?",
    "I want to {} with my children.", "What should I have ready before I {}?", "Tell me how my grandmother would {}.",
    "Help me {}, please.", "We could {} this evening. Is that a good idea?", "Why would anybody {}?",
    "Who first thought to {}?", "Yesterday I tried to {} and it went wrong. Why?", "Is there a faster way to {}?",
    "Where can I learn to {}?", "Should I {} alone or with a friend?", "I have never had to {}. Walk me through it.",
    "Could you show me how to {}?", "What does it cost to {}?", "Please describe how to {} in two sentences.",
    "When is the right time to {}?", "My class will {} next week, so I need a handout.",
    "Do I need special tools to {}?", "How often do people {}?", "I promised to {}. Remind me what matters.",
    "What is the hardest part if you {}?", "Let us {}. Begin.", "In my village they {} differently. Do you know why?",
    "Make a checklist for somebody who has to {}.", "Hello! I would like to {}, but my hands hurt.",
    "For a film, an actor must {}. What would look real?",
)  # fmt: skip
TEST_FRAMES = (
    "Write short instructions for a friend who wants to {}.", "Before the weekend I must {}; make me a plan.",
    "Which mistakes do people make when they {}?", "Two of us are going to {}, and neither has done it before.",
    "List the steps you would take to {}.", "Suppose you had one hour to {}. What comes first?",
    "Rather than pay somebody, I shall {} myself. Any warnings?", "Compare two methods to {}.", "Am I too old to {}?",
    "After work my sister likes to {}. What could I give her?", "Nobody here can {}. Advise us.",
    "Draft a message that asks a colleague to {}.",
)  # fmt: skip
FRAMES_PER_DEED = 12
TEST_FRAMES_PER_DEED = 6
COOKING = (
    "boil eggs so that they peel easily", "bake a loaf of rye bread", "roast a chicken with lemon",
    "make a thick tomato sauce", "fry onions until they are golden", "steam broccoli without losing its colour",
    "knead dough for a pizza", "whisk egg whites to stiff peaks", "simmer a lentil soup", "grill a piece of salmon",
    "caramelise sugar without burning it", "poach pears in red wine", "season a beef stew", "marinate tofu overnight",
    "stir-fry noodles with vegetables", "mash potatoes with butter", "bake blueberry muffins",
    "prepare a risotto with mushrooms", "blanch green beans", "make pancakes from buttermilk",
    "braise a shoulder of lamb", "toast cumin and coriander seeds", "cook rice that does not stick",
    "fold cream into a chocolate mousse", "reduce a sauce with white wine", "stuff peppers with minced meat",
    "make a vinaigrette with mustard", "bake a potato in its skin", "fry fish in beer batter",
    "make a curry with chickpeas", "prepare oatmeal with apples", "roll sushi with cucumber",
    "make dumplings with pork and cabbage", "sear a steak on both sides", "cook beans from dry",
    "make gravy from pan juices", "bake cinnamon rolls", "prepare a quiche with spinach", "melt cheese for a fondue",
    "make marmalade from oranges",
)  # fmt: skip
OTHER = (
    "patch a hole in a wool sweater", "change the oil of a car", "plant tulip bulbs in autumn",
    "paint a bedroom wall", "repair a leaking kitchen tap", "learn the chords of a song", "clean a camera lens",
    "write a letter of complaint", "fold a fitted sheet", "set up a home network", "train a puppy to sit",
    "build a shelf from pine boards", "sharpen a pencil with a knife", "remove a wine stain from a carpet",
    "prune an apple tree", "tune an old guitar", "fix a flat bicycle tyre", "knit a scarf with two colours",
    "store potatoes in a cellar", "draw a face in profile", "prepare for a job interview", "read a weather map",
    "pitch a tent in the rain", "iron a cotton shirt", "sort photographs by year", "install a ceiling lamp",
    "teach a parrot to speak", "organise a family reunion", "make a budget for the month",
    "grow tomatoes on a balcony", "wash a car by hand", "solve a crossword puzzle", "learn twenty words of Spanish",
    "polish silver spoons", "choose a pair of running shoes", "hang a heavy mirror",
    "write a short poem about spring", "pack a suitcase for a week", "calm a crying baby", "carve a flute from wood",
    "unclog the drain of a kitchen sink", "back up a laptop", "plan a walk through the hills",
    "sew a button on a coat", "feed a stray cat", "photograph a plate of food", "stretch before a long run",
    "settle a quarrel between friends", "label boxes before a move", "lay tiles on a bathroom floor",
    "open a savings account", "make a kite from paper", "learn to swim on my back", "record a podcast at home",
    "remember people's names", "clean an oven without chemicals", "wrap a present for a child", "sell an old bicycle",
    "keep bees in a garden", "count the calories of a meal", "throw a clay pot on a wheel",
    "write the menu of a small restaurant", "restore a wooden chair", "fill in a tax return",
    "meditate for ten minutes", "splice a rope", "replace the battery of a watch", "practise a speech",
    "mow a wet lawn", "catalogue a collection of stamps", "juggle three balls", "choose a name for a bakery",
    "translate a recipe into German", "dig a small pond", "tie a bow tie", "read a map without a compass",
    "wax a pair of skis", "learn to type with ten fingers", "draft a rental contract",
    "carry a crate of eggs up the stairs",
)  # fmt: skip
TEST_COOKING = (
    "turn leftover ham into a hearty broth", "get crisp skin on duck legs", "thicken a custard with yolks",
    "glaze carrots with honey", "temper chocolate for pralines", "smoke trout over beech chips",
    "pickle beetroot for the winter", "toss a salad of fennel and oranges", "deep-fry courgette flowers",
    "proof a sourdough overnight", "skewer prawns for the barbecue", "zest limes for a cheesecake",
    "rub spices into ribs", "crimp the edge of an apple pie", "strain a clear consomme", "scramble eggs on low heat",
    "soak salt cod", "layer a lasagne", "parboil sprouts", "flip a Spanish omelette", "brown mince evenly",
    "candy orange peel", "spice a pot of chai", "wilt spinach in butter", "drizzle a sponge with syrup",
    "char aubergines for a dip", "jug a hare", "ferment cabbage into kimchi", "griddle flatbreads",
    "set a fruit jelly",
)  # fmt: skip
TEST_OTHER = (
    "lubricate a squeaky door hinge", "apply for a passport", "teach a toddler to share", "varnish an oak table",
    "memorise a phone number", "bleed a radiator", "trim a beard evenly", "launder a down jacket",
    "compose a tune on the piano", "bid at an auction", "rake leaves off a roof", "solder two wires",
    "haggle at a flea market", "crop a portrait", "navigate by the stars", "defrost a freezer",
    "hem a pair of curtains", "interview a grandparent", "choose a mattress", "climb a rope", "assemble a bunk bed",
    "debug a small program", "water ferns during a holiday", "sand a window frame", "descale a kettle",
    "cancel a gym membership", "recite a sonnet by heart", "rescue a swarm of bees", "stack firewood",
    "whistle with two fingers", "groom a long-haired dog", "sketch a market stall of fruit", "invoice a client",
    "plaster a crack", "vote by post", "weigh parcels of flour for a shop", "dance a slow waltz",
    "mediate in a strike", "restring a tennis racket", "review a restaurant", "collect butter churns",
    "insulate a loft", "tune a radio", "breed guppies", "price a used car", "referee a match", "sew an apron",
    "decorate a dinner table", "transplant a rosebush", "proofread a thesis",
)  # fmt: skip


class PromptSets(NamedTuple):
    """The four sets, each a list of prompts."""

    target: list[str]
    baseline: list[str]
    test_target: list[str]
    test_baseline: list[str]

    @staticmethod
    def made() -> "PromptSets":
        """Each deed in so many of the frames, evenly; the next deed begins at the next frame."""

        def filled(frames: tuple[str, ...], deeds: tuple[str, ...], each: int) -> list[str]:
            step = len(frames) // each
            return [
                frames[(number + step * turn) % len(frames)].format(deed)
                for number, deed in enumerate(deeds)
                for turn in range(each)
            ]

        return PromptSets(
            filled(FRAMES, COOKING, FRAMES_PER_DEED),
            filled(FRAMES, OTHER, FRAMES_PER_DEED),
            filled(TEST_FRAMES, TEST_COOKING, TEST_FRAMES_PER_DEED),
            filled(TEST_FRAMES, TEST_OTHER, TEST_FRAMES_PER_DEED),
        )

    def write(self, folder: Path) -> dict[str, Path]:
        """Write each set as JSON Lines; name -> file."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: folder / f"{name}.jsonl" for name in self._fields}
        for name, path in files.items():
            rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in getattr(self, name)]
            path.write_text("".join(rows), encoding="utf-8")
        return files
