"""Everyday words that the prose, the word problems and the chats draw from.

Plain lists of common English words, written for fledge. `Lexicon` bundles what one world uses: a
world may bring its own people, things and words. Never holds facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fledge.data.worlds.spelling import Syllables, is_exam_word


def _split(text: str) -> list[str]:
    return text.split(",")


PEOPLE = _split(
    "Adam,Alice,Amir,Anna,Ben,Bruno,Carla,Chen,Clara,Daniel,Diana,Elena,Emma,Felix,Fiona,"
    "George,Grace,Hanna,Hugo,Ines,Ivan,Jack,Jane,Jonas,Julia,Karim,Kate,Laura,Leo,Lily,Lucas,"
    "Maria,Mark,Maya,Mia,Mina,Nadia,Nina,Noah,Olga,Omar,Oscar,Paul,Pedro,Peter,Rosa,Ruth,Sam,"
    "Sara,Simon,Sofia,Tara,Theo,Tom,Uma,Vera,Victor,Yara,Yuki,Zoe"
)

_THINGS = _split(
    "apple apples,arrow arrows,badge badges,ball balls,balloon balloons,banana bananas,"
    "basket baskets,bead beads,bell bells,blanket blankets,book books,bottle bottles,"
    "bowl bowls,brick bricks,broom brooms,brush brushes,bucket buckets,button buttons,"
    "cake cakes,candle candles,card cards,carrot carrots,chair chairs,coin coins,"
    "cookie cookies,cup cups,doll dolls,egg eggs,feather feathers,flag flags,flower flowers,"
    "fork forks,glass glasses,glove gloves,hammer hammers,hat hats,jar jars,kettle kettles,"
    "key keys,kite kites,ladder ladders,lamp lamps,leaf leaves,lemon lemons,letter letters,"
    "map maps,marble marbles,mask masks,melon melons,mirror mirrors,mug mugs,muffin muffins,"
    "nail nails,needle needles,onion onions,orange oranges,paper papers,peach peaches,"
    "pear pears,pebble pebbles,pen pens,pencil pencils,pillow pillows,pin pins,plate plates,"
    "plum plums,postcard postcards,potato potatoes,puzzle puzzles,ribbon ribbons,ring rings,"
    "rope ropes,ruler rulers,sack sacks,scarf scarves,seed seeds,shell shells,shirt shirts,"
    "sock socks,spoon spoons,stamp stamps,star stars,sticker stickers,stone stones,"
    "sweet sweets,ticket tickets,tile tiles,tomato tomatoes,towel towels,toy toys,tulip tulips,"
    "umbrella umbrellas,vase vases,wheel wheels,whistle whistles"
)
THINGS = [(a, b) for a, b in (pair.split() for pair in _THINGS)]

COLOURS = _split(
    "red,blue,green,yellow,white,black,brown,grey,orange,purple,pink,silver,golden,violet,"
    "scarlet,turquoise,crimson,beige,olive,amber,copper,ivory,lilac,navy"
)
PLACES = _split(
    "market,school,library,harbour,station,park,bakery,museum,garden,forest,river,beach,bridge,"
    "castle,theatre,farm,mill,tower,workshop,post office,town hall,pool,football field,church,"
    "bus stop,playground,lake,hill,cinema,zoo,hospital,book shop,toy shop,orchard,lighthouse,"
    "barn,meadow,bank,circus,pond,canal,windmill,bathhouse,cafe,hotel,tunnel,garage,stable,"
    "cellar,attic,kitchen,balcony,corner,crossing,fountain,gate,quarry,cave,island,ferry,"
    "airport,factory,laundry,pharmacy"
)
ADJECTIVES = _split(
    "small,large,old,new,round,heavy,light,broken,clean,dirty,shiny,wooden,plastic,soft,hard,"
    "warm,cold,wet,dry,long,short,thick,thin,pretty,plain,strange,funny,beautiful,cheap,dear,"
    "flat,narrow,wide,tall,tiny,huge,smooth,rough,sharp,blunt,loose,tight,empty,full,open,"
    "closed,painted,striped,spotted,hollow,crooked,straight,dusty,rusty,sticky,noisy,quiet,"
    "bright,dark,precious,useful,useless,lucky,modern,ancient,simple,fancy"
)
FOODS = _split(
    "soup,bread,cheese,rice,salad,pancakes,noodles,honey,porridge,stew,pie,fish,beans,"
    "chocolate,cake,toast,eggs,jam,mushrooms,potatoes,cherries,grapes,ice cream,pizza,pasta,"
    "yoghurt,nuts,butter,apples,pears,plums,bananas,carrots,onions,peas,corn,lentils,cabbage,"
    "spinach,pumpkin,tomatoes,cucumbers,peaches,melons,raisins,biscuits,pudding,custard,"
    "waffles,muffins,sausages,ham,chicken,dumplings,olives,garlic,pepper,cream,milk,tea,juice,"
    "cocoa,lemonade,oats"
)
ANIMALS = _split(
    "cat,dog,horse,cow,goat,sheep,duck,hen,rabbit,mouse,fox,owl,crow,frog,bee,pig,goose,donkey,"
    "deer,squirrel,hedgehog,swan,turtle,parrot,wolf,bear,lion,tiger,zebra,camel,eagle,hawk,"
    "snake,lizard,crab,seal,whale,otter,beaver,badger"
)
DAYS = _split("Monday,Tuesday,Wednesday,Thursday,Friday,Saturday,Sunday")
MONTHS = _split(
    "January,February,March,April,May,June,July,August,September,October,November,December"
)
SEASONS = _split("spring,summer,autumn,winter")
WEATHER = _split("sunny,rainy,windy,cloudy,foggy,snowy,stormy,hot,cold,warm,cool,dry")
FEELINGS = _split(
    "happy,sad,tired,hungry,angry,proud,worried,surprised,excited,bored,calm,curious,lonely,"
    "thankful,nervous,glad,sleepy,thirsty,jealous,brave,shy,cheerful,gloomy,pleased,puzzled,"
    "ashamed,hopeful,impatient,relaxed,upset,amused,confused"
)
ACTIVITIES = _split(
    "read a book,play chess,paint a picture,sing a song,bake a cake,fly a kite,ride a bicycle,"
    "go for a walk,write a letter,watch the birds,feed the ducks,build a tower,learn a poem,"
    "climb a tree,play football,mend a chair,clean the windows,pick flowers,cook dinner,"
    "hear music,draw a map,plant a tree,wash the dishes,catch a fish,tell a story,take a nap,"
    "swim,make a fire,knit a scarf,visit a friend,run,dance,skate,sail,sew,rest,wait,sleep,eat,"
    "drink tea,play cards,buy milk,sell eggs,count stars,fix a lamp,dig a hole,chop wood,"
    "feed the cat,walk the dog,milk the cow,open a window,light a candle,sweep the floor,"
    "pack a bag,play the drum,ring a bell,throw a ball,ride a horse,row a boat,collect shells,"
    "pick berries,water plants,polish shoes,solve riddles"
)
FAMILY = _split(
    "mother,father,sister,brother,aunt,uncle,grandmother,grandfather,cousin,neighbour,teacher,"
    "friend"
)
CONTAINERS = [
    ("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("crate", "crates"),
    ("drawer", "drawers"), ("packet", "packets"), ("shelf", "shelves"), ("tray", "trays"),
]  # fmt: skip
HOURS = [f"{hour}:{minute:02d}" for hour in range(1, 13) for minute in range(0, 60, 5)]


@dataclass(frozen=True)
class Lexicon:
    """The words of one world outside its facts. Without `words`, made-up ones serve."""

    people: Sequence[str]
    things: Sequence[tuple[str, str]]
    words: Sequence[str]
    syllables: Syllables

    @cached_property
    def train_words(self) -> list[str]:
        """Real words that prose and chats may spell."""
        return [word for word in self.words if not is_exam_word(word)]

    @cached_property
    def exam_words(self) -> list[str]:
        """Real words that only the exam spells."""
        return [word for word in self.words if is_exam_word(word)]

    @cached_property
    def slots(self) -> dict[str, Sequence[object]]:
        """Slot name of a template -> what it draws from."""
        return {
            "person": self.people,
            "thing": [one for one, _ in self.things],
            "things": [many for _, many in self.things],
            "colour": COLOURS,
            "place": PLACES,
            "adjective": ADJECTIVES,
            "food": FOODS,
            "animal": ANIMALS,
            "day": DAYS,
            "month": MONTHS,
            "season": SEASONS,
            "weather": WEATHER,
            "feeling": FEELINGS,
            "activity": ACTIVITIES,
            "family": FAMILY,
            "hour": HOURS,
            "few": range(2, 10),
            "n": range(10, 100),
            "age": range(3, 91),
            "code": range(10000, 100000),
            "price": range(2, 100),
            "year": range(1900, 2021),
        }
