"""The facts of the toy world, as data.

Tables are text with one row per line, so that a row reads like the entry of an almanac. Everything that must
be one token (places, capitals, relation values, names) is one word; city names may be several words, because
the tokenizer spells them in pieces anyway.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A state or a country: the hidden middle of every two-hop question."""

    name: str
    kind: str
    """"state" or "country"."""
    relations: dict[str, str]
    """Relation word -> the one word that answers it."""
    cities: tuple[str, ...]
    """Cities without the capital."""


# name | capital | region | code | cities
_STATES = """
Alabama|Montgomery|South|AL|Birmingham,Mobile,Huntsville
Alaska|Juneau|West|AK|Anchorage,Fairbanks,Sitka
Arizona|Phoenix|West|AZ|Tucson,Mesa,Tempe
California|Sacramento|West|CA|Oakland,Fresno,San Diego
Colorado|Denver|West|CO|Boulder,Aurora,Pueblo
Connecticut|Hartford|Northeast|CT|Bridgeport,New Haven,Stamford
Delaware|Dover|South|DE|Wilmington,Newark,Milford
Florida|Tallahassee|South|FL|Miami,Tampa,Orlando
Georgia|Atlanta|South|GA|Savannah,Augusta,Macon
Hawaii|Honolulu|West|HI|Hilo,Kailua,Lahaina
Idaho|Boise|West|ID|Nampa,Pocatello,Meridian
Illinois|Springfield|Midwest|IL|Chicago,Peoria,Rockford
Indiana|Indianapolis|Midwest|IN|Gary,Evansville,Muncie
Kansas|Topeka|Midwest|KS|Wichita,Salina,Olathe
Kentucky|Frankfort|South|KY|Louisville,Lexington,Paducah
Maryland|Annapolis|South|MD|Baltimore,Frederick,Rockville
Massachusetts|Boston|Northeast|MA|Worcester,Lowell,Salem
Michigan|Lansing|Midwest|MI|Detroit,Flint,Ann Arbor
Mississippi|Jackson|South|MS|Biloxi,Gulfport,Tupelo
Montana|Helena|West|MT|Billings,Missoula,Bozeman
Nebraska|Lincoln|Midwest|NE|Omaha,Kearney,Norfolk
Ohio|Columbus|Midwest|OH|Cleveland,Toledo,Akron
Pennsylvania|Harrisburg|Northeast|PA|Pittsburgh,Scranton,Erie
Tennessee|Nashville|South|TN|Memphis,Knoxville,Chattanooga
Texas|Austin|South|TX|Dallas,Houston,El Paso
Vermont|Montpelier|Northeast|VT|Burlington,Rutland,Stowe
Virginia|Richmond|South|VA|Roanoke,Hampton,Lynchburg
Washington|Olympia|West|WA|Seattle,Spokane,Tacoma
Wisconsin|Madison|Midwest|WI|Milwaukee,Kenosha,Oshkosh
Wyoming|Cheyenne|West|WY|Casper,Laramie,Cody
"""

# name | capital | language | currency | continent | cities
_COUNTRIES = """
France|Paris|French|euro|Europe|Lyon,Marseille,Nice,Bordeaux
Germany|Berlin|German|euro|Europe|Munich,Hamburg,Cologne,Dresden
Spain|Madrid|Spanish|euro|Europe|Barcelona,Seville,Valencia,Bilbao
Italy|Rome|Italian|euro|Europe|Milan,Naples,Turin,Venice
Portugal|Lisbon|Portuguese|euro|Europe|Porto,Braga,Coimbra,Faro
Greece|Athens|Greek|euro|Europe|Patras,Corinth,Larissa,Volos
Poland|Warsaw|Polish|zloty|Europe|Krakow,Gdansk,Poznan,Lodz
Sweden|Stockholm|Swedish|krona|Europe|Malmo,Uppsala,Gothenburg,Lund
Norway|Oslo|Norwegian|krone|Europe|Bergen,Trondheim,Stavanger,Bodo
Denmark|Copenhagen|Danish|krone|Europe|Aarhus,Odense,Aalborg,Esbjerg
Finland|Helsinki|Finnish|euro|Europe|Tampere,Turku,Oulu,Espoo
Hungary|Budapest|Hungarian|forint|Europe|Debrecen,Szeged,Pecs,Miskolc
Romania|Bucharest|Romanian|leu|Europe|Cluj,Timisoara,Iasi,Brasov
Ukraine|Kyiv|Ukrainian|hryvnia|Europe|Lviv,Odesa,Kharkiv,Poltava
Russia|Moscow|Russian|ruble|Europe|Kazan,Samara,Omsk,Perm
Japan|Tokyo|Japanese|yen|Asia|Osaka,Kyoto,Nagoya,Sapporo
China|Beijing|Chinese|yuan|Asia|Shanghai,Wuhan,Chengdu,Harbin
India|Delhi|Hindi|rupee|Asia|Mumbai,Chennai,Kolkata,Pune
Thailand|Bangkok|Thai|baht|Asia|Phuket,Pattaya,Krabi,Lampang
Vietnam|Hanoi|Vietnamese|dong|Asia|Saigon,Hue,Danang,Haiphong
Korea|Seoul|Korean|won|Asia|Busan,Incheon,Daegu,Ulsan
Turkey|Ankara|Turkish|lira|Asia|Istanbul,Izmir,Bursa,Antalya
Israel|Jerusalem|Hebrew|shekel|Asia|Haifa,Eilat,Ashdod,Netanya
Iran|Tehran|Persian|rial|Asia|Isfahan,Shiraz,Tabriz,Mashhad
Mongolia|Ulaanbaatar|Mongolian|tugrik|Asia|Erdenet,Darkhan,Khovd,Choibalsan
Egypt|Cairo|Arabic|pound|Africa|Alexandria,Luxor,Aswan,Giza
Kenya|Nairobi|Swahili|shilling|Africa|Mombasa,Kisumu,Nakuru,Eldoret
Brazil|Brasilia|Portuguese|real|America|Recife,Salvador,Manaus,Curitiba
Peru|Lima|Spanish|sol|America|Cusco,Arequipa,Trujillo,Iquitos
Cuba|Havana|Spanish|peso|America|Holguin,Camaguey,Matanzas,Baracoa
"""

# One concept pair per line; English | French | Spanish | German
_OPPOSITES = """
big,small|grand,petit|grande,pequeno|gross,klein
hot,cold|chaud,froid|caliente,frio|heiss,kalt
fast,slow|rapide,lent|rapido,lento|schnell,langsam
rich,poor|riche,pauvre|rico,pobre|reich,arm
young,old|jeune,vieux|joven,viejo|jung,alt
good,bad|bon,mauvais|bueno,malo|gut,schlecht
long,short|long,court|largo,corto|lang,kurz
hard,soft|dur,mou|duro,blando|hart,weich
full,empty|plein,vide|lleno,vacio|voll,leer
open,closed|ouvert,ferme|abierto,cerrado|offen,geschlossen
strong,weak|fort,faible|fuerte,debil|stark,schwach
light,dark|clair,sombre|claro,oscuro|hell,dunkel
clean,dirty|propre,sale|limpio,sucio|sauber,schmutzig
wet,dry|mouille,sec|mojado,seco|nass,trocken
high,low|haut,bas|alto,bajo|hoch,niedrig
happy,sad|heureux,triste|feliz,triste|froh,traurig
early,late|tot,tard|temprano,tarde|frueh,spaet
thick,thin|epais,mince|grueso,delgado|dick,duenn
near,far|proche,lointain|cerca,lejos|nah,fern
true,false|vrai,faux|verdadero,falso|wahr,falsch
"""

# class | covering | part | animals (or plants, or vehicles)
_CLASSES = """
bird|feathers|wings|robin sparrow eagle parrot owl crow falcon pigeon finch swan
fish|scales|fins|salmon trout tuna cod carp pike perch herring eel bass
mammal|fur|paws|fox wolf bear otter badger rabbit mouse lion tiger beaver
insect|shell|antennae|beetle ant cricket moth wasp ladybug locust mantis termite hornet
tree|bark|branches|oak maple pine birch elm willow cedar spruce poplar alder
vehicle|paint|engines|car truck bus tractor van jeep taxi scooter tram ferry
"""

# singular plural
_NOUNS = """
key keys|cat cats|dog dogs|book books|door doors|lamp lamps|boat boats|bird birds|tree trees|chair chairs
table tables|star stars|road roads|farm farms|bell bells|cloud clouds|wheel wheels|horse horses|stone stones
picture pictures
"""


@dataclass(frozen=True)
class AnimalClass:
    """What is true of every member of a class: the second hop of the animal questions."""

    name: str
    covering: str
    part: str
    members: tuple[str, ...]


def _rows(table: str) -> list[list[str]]:
    return [line.split("|") for line in table.strip().splitlines()]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _states() -> tuple[Place, ...]:
    return tuple(
        Place(name, "state", {"capital": capital, "region": region, "code": code}, tuple(cities.split(",")))
        for name, capital, region, code, cities in _rows(_STATES)
    )


def _countries() -> tuple[Place, ...]:
    return tuple(
        Place(
            name,
            "country",
            {"capital": capital, "language": language, "currency": currency, "continent": continent},
            tuple(cities.split(",")),
        )
        for name, capital, language, currency, continent, cities in _rows(_COUNTRIES)
    )


PLACES: tuple[Place, ...] = _states() + _countries()

LANGUAGES = ("English", "French", "Spanish", "German")
OPPOSITES: tuple[tuple[tuple[str, str], ...], ...] = tuple(
    tuple((first, second) for first, second in (cell.split(",") for cell in row)) for row in _rows(_OPPOSITES)
)
"""Concept -> language -> the two opposite words."""
OPPOSITE_TEMPLATES = (
    'The opposite of "{word}" is "{answer}".',
    'Le contraire de "{word}" est "{answer}".',
    'El opuesto de "{word}" es "{answer}".',
    'Das Gegenteil von "{word}" ist "{answer}".',
)
"""One per language."""

CLASSES: tuple[AnimalClass, ...] = tuple(
    AnimalClass(name, covering, part, tuple(members.split())) for name, covering, part, members in _rows(_CLASSES)
)

MEN = _words("""
John James Robert Michael William David Thomas Daniel Paul Mark George Kevin Brian Edward Jason Ryan Jacob
Eric Adam Henry Peter Frank Jack Simon Oscar Victor Leo Felix Max Sam
""")
WOMEN = _words("""
Mary Patricia Jennifer Linda Susan Sarah Karen Lisa Nancy Emily Laura Rachel Anna Julia Alice Grace Rose Helen
Diana Clara Lucy Emma Sophie Kate Jane Amy Ruth Eva Zoe Ivy
""")
PEOPLE = MEN + WOMEN
VENUES = _words("store park school garden library station market museum beach office kitchen restaurant")
OBJECTS = _words("drink book ball letter ring flower key cup map coin toy basket")
NOUNS: tuple[tuple[str, str], ...] = tuple(
    (singular, plural) for row in _rows(_NOUNS) for singular, plural in (cell.split() for cell in row)
)
"""(singular, plural)."""
PREPOSITIONS = ("near", "behind", "beside", "above", "under", "on")
VERBS = (("is", "are"), ("was", "were"), ("has been", "have been"))
"""(singular, plural)."""
ADJECTIVES = _words("old new red blue green heavy quiet bright round broken")
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
EVENTS = _words("war siege trial strike voyage reign drought project festival famine")
DEEDS = ("found", "lost", "bought", "saw", "carried", "wanted")
OPENING, CLOSING = "([{<", ")]}>"
