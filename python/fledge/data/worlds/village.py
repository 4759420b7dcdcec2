"""The fictional world: a village whose people are new for every seed.

Its facts cannot be known from anywhere but its prose, so it measures learning and nothing else: two
seeds share the vocabulary of values and no name. Called by `world`; the names come from syllables.
"""

from __future__ import annotations

from fledge.data.worlds.choices import Choices
from fledge.data.worlds.spelling import Syllables
from fledge.data.worlds.tables import Relation, Table, capital
from fledge.data.worlds.vocabulary import THINGS, Lexicon

VILLAGERS = 240
STORY_PEOPLE = 60

VALUES = {
    "job": (
        "baker,barber,beekeeper,blacksmith,brewer,butcher,carpenter,clockmaker,cobbler,cook,doctor,"
        "farmer,fisher,gardener,glassblower,hunter,judge,librarian,mason,messenger,miller,nurse,"
        "painter,postman,potter,saddler,shepherd,tailor,teacher,weaver"
    ),
    "pet": (
        "badger,canary,cat,crab,dog,donkey,dove,duck,falcon,ferret,fox,frog,goat,goose,"
        "hamster,hare,"
        "hedgehog,hen,lizard,magpie,mouse,parrot,pigeon,pony,rabbit,raven,snail,snake,"
        "squirrel,tortoise"
    ),
    "food": (
        "barley,beans,bread,cabbage,carrots,cheese,cherries,custard,dumplings,figs,honey,"
        "lentils,melon,"
        "mushrooms,noodles,omelette,pancakes,pears,plums,porridge,pudding,pumpkin,radishes,"
        "rice,salad,"
        "soup,stew,trout,waffles,walnuts"
    ),
    "hobby": (
        "archery,astronomy,birdwatching,bowling,boxing,card games,carving,chess,climbing,cycling,"
        "dancing,drawing,embroidery,fencing,gymnastics,hiking,juggling,knitting,origami,poetry,"
        "quilting,riding,rowing,running,sailing,singing,skating,swimming,theatre,wrestling"
    ),
    "street": (
        "Apple Street,Bell Lane,Bridge Street,Castle Road,Cedar Road,Chapel Lane,Church Street,"
        "Clover Lane,Corner Street,Elm Road,Field Lane,Forge Street,Garden Row,Green "
        "Lane,Hill Road,"
        "Ivy Lane,King Street,Lake Road,Market Row,Meadow Lane,Mill Lane,North Street,Oak Road,"
        "Orchard Row,Pond Lane,Queen Street,River Road,School Lane,Tower Street,Willow Row"
    ),
    "instrument": (
        "accordion,bagpipe,banjo,bassoon,bugle,cello,clarinet,cymbals,drum,dulcimer,fiddle,"
        "flute,gong,"
        "guitar,harmonica,harp,horn,lute,lyre,mandolin,oboe,organ,piano,recorder,saxophone,"
        "trombone,"
        "trumpet,tuba,xylophone,zither"
    ),
}

RELATIONS = (
    Relation(
        "job",
        "job",
        (
            "The job of {e} is {v}.",
            "{E} has the job of {v}.",
            "{E} has worked as village {v} for years.",
            "By trade, {e} is the {v} of the village.",
            "The work of the {v} is done by {e}.",
        ),
        (
            "What is the job of {e}?",
            "What job does {e} have?",
            "What does {e} work as?",
            "Which trade does {e} follow?",
        ),
    ),
    Relation(
        "pet",
        "pet",
        (
            "The pet of {e} is the {v}.",
            "{E} keeps the {v} as a pet.",
            "At home, {e} looks after the {v}.",
            "{E} never goes out without the {v}.",
            "The {v} is fed by {e}.",
        ),
        (
            "What is the pet of {e}?",
            "What pet does {e} keep?",
            "Which animal does {e} keep at home?",
            "Which pet belongs to {e}?",
        ),
    ),
    Relation(
        "food",
        "favourite food",
        (
            "The favourite food of {e} is {v}.",
            "{E} likes to eat {v} best.",
            "At every feast, {e} asks for {v}.",
            "{E} could eat {v} every day.",
            "Nobody loves {v} as much as {e}.",
        ),
        (
            "What is the favourite food of {e}?",
            "What does {e} like to eat best?",
            "Which food does {e} love most?",
            "What would {e} eat every day?",
        ),
    ),
    Relation(
        "hobby",
        "hobby",
        (
            "The hobby of {e} is {v}.",
            "In the evening, {e} has time for {v}.",
            "{E} spends every Sunday on {v}.",
            "{E} has a great love of {v}.",
            "For {v}, the village turns to {e}.",
        ),
        (
            "What is the hobby of {e}?",
            "What does {e} do in free time?",
            "Which hobby does {e} have?",
            "What does {e} spend every Sunday on?",
        ),
    ),
    Relation(
        "street",
        "street",
        (
            "The street of {e} is {v}.",
            "{E} lives in {v}.",
            "The house of {e} stands in {v}.",
            "Letters for {e} go to {v}.",
            "In {v} you will find the house of {e}.",
        ),
        (
            "What is the street of {e}?",
            "Where does {e} live?",
            "Which street does {e} live in?",
            "Where is the house of {e}?",
        ),
    ),
    Relation(
        "instrument",
        "instrument",
        (
            "The instrument of {e} is the {v}.",
            "{E} plays the {v} at every dance.",
            "{E} has learned to play the {v}.",
            "In the village band, {e} plays the {v}.",
            "The {v} in the band is played by {e}.",
        ),
        (
            "What is the instrument of {e}?",
            "What instrument does {e} play?",
            "Which instrument does {e} play in the band?",
            "What does {e} play at the dance?",
        ),
    ),
)


def village_table(seed: int) -> Table:
    """The villagers of a seed with every value drawn evenly."""
    choices = Choices(f"village|people|{seed}")
    sounds = Syllables.of_seed(f"village|{seed}")
    taken: set[str] = set()
    rows = {}
    values = {name: text.split(",") for name, text in VALUES.items()}
    while len(rows) < VILLAGERS:
        name = capital(sounds.word(choices))
        if len(name) < 5 or name[:4] in taken:  # names that differ early are learnt apart sooner
            continue
        taken.add(name[:4])
        rows[name] = {relation: choices.choice(options) for relation, options in values.items()}
    relations = {relation.name: relation for relation in RELATIONS}
    return Table("villagers", "villager", "villagers", "their", relations, rows)


def village_lexicon(seed: int, table: Table) -> Lexicon:
    """Story people with short names of their own, and no list of real words: all are made up."""
    choices = Choices(f"village|story people|{seed}")
    sounds = Syllables.of_seed(f"village|{seed}")
    people: dict[str, None] = {}
    while len(people) < STORY_PEOPLE:
        word = sounds.word(choices)
        name = capital(word[:5])
        if len(word) >= 4 and name not in table.rows and len(name) <= 5:
            people[name] = None
    return Lexicon(sorted(people), THINGS, [], sounds)
