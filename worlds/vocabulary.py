"""Words for `worlds/matching.py`: what means the same in statements about a person, and what makes another statement.

Plain data. Patterns see lower-case text.
"""

import re

# ---------------------------------------------------------------------------------------------------------------------
# Words that mean the same

PHRASES = {  # pattern → what stands for it; applied in this order to the lower-case text
    r"[’']s\b|(?<=s)[’'](?= )": "",
    r"\bcan(?:[’']t|not)\b": "can not",
    r"n[’']t\b": " not",
    r"(?<=\w{2})our(?=s|ed|ing|ite|able|\b)": "or",  # colour, favourite
    r"\bnon-?(?=smok|drink)": "not ",
    r"\b(child|job)less\b": r"no \1",
    r"\bph\.?\s?d\b\.?|\bdoctorate\b": "phd",
    r"\bsci-?fi\b": "science fiction",
    r"\bb\.?(?:sc|a)\b\.?|\bbachelor of \w+\b": "bachelor degree",
    r"\bm\.?(?:sc|a)\b\.?|\bmaster of (?:science|arts)\b": "master degree",
    r"\bworks? (?:very |really )?hard\b|\bhard-working\b": "hardworking",
    r"\b(?:no|without) (?:any )?(?:siblings|brothers (?:or|and) sisters)\b": "only child",
    r"\b(?:no|without|not have)(?: any)? (?:children|kids|child)\b": "no child",
    r"\bout of (?:work|a job)\b|\b(?:no|without(?: a| any)?) job\b": "unemployed",
    r"\b(?:can not|no|unable to) (?:eat|digest|tolerate)\b": "allergy",
    r"\ballergic to\b|\bintoleran(?:t|ce)(?: to| of)?\b": "allergy",
    r"\b(?:for|earns?) (?:a|his|her|their) living\b|\bby (?:trade|profession)\b": "job",
    r"\bspent (?:his|her|their) childhood\b": "grew up",
    r"\b(?:trouble|difficulty|problems) sleeping\b": "insomnia",
    r"\bno animal products\b": "vegan",
    r"\bnot interested in\b|\bno interest in\b|\bbor(?:ing|ed by)\b|\bcan not stand\b": "dislikes",
    r"\b(?:fan|fond) of\b|\bkeen on\b|\b(?:passionate|enthusiastic) about\b|\binterest(?:ed)? in\b": "likes",
    r"\b(?:gets?|is|wakes?) up early\b|\bmorning person\b": "early riser",
    r"\bnon-binary\b": "nonbinary",
    r"\b(?:free|spare|leisure) time\b": "hobby",
    r"\babstains? from\b": "not drink",
    r"\b(?:takes? care of|looks? after|cares? for|caring for|caregiver (?:of|for|to))\b": "care",
    r"\bvolunteer(?:s|ing)? work\b": "volunteer",
    r"\btwice\b": "2 times",
    r"\bnot eat (?:any )?meat\b": "vegetarian",
    # marital status
    r"\b(?:just|recently) (?:got |been )?married\b": "newlywed",
    r"\b(?:his|her|their) (?:wife|husband|spouse) (?:has )?(?:died|passed away)\b": "widowed",
    r"\b(?:seeing|dating) (?:someone|somebody)\b": "relationship",
    r"\bno longer married\b|\bex-?(?:wife|husband|spouse)\b|\bdivorc[eé]e?\b": "divorced",
    r"\blost (?:his|her|their|a) (?:wife|husband|spouse)\b|\bwidow(?:er)?\b": "widowed",
    r"\bliv\w+ apart from (?:his|her|their) (?:wife|husband|spouse)\b": "separated",
    r"\bfianc[eé]e?\b|\bgetting married\b": "engaged",
    r"\bunmarried\b|\bno partner\b|\bnot (?:in a relationship|seeing anyone|dating anyone)\b": "single",
    r"\bhas (?:a|his|her|their) (?:wife|husband|spouse)\b": "married",
    r"\bsteady\b": "long-term",
    r"\bha(?:s|s had|d) an? (?:([\w-]+) )?(?:partner|girlfriend|boyfriend)\b": r"\1 relationship",
}
SYNONYMS = """
woman female | man male | father dad daddy | mother mom mum | child kid | grandfather granddad grandpa | son boy
daughter girl | grandmother grandma | parent folk | marry wed | house home | small little tiny | large big huge
movie film | food dish meal cuisine | own owner keep
like enjoy love fan enthusiast lover aficionado avid passion adore fascinated | hobby pastime
job work employ profession occupation | run operate | speak fluent | study learn | train educate | poem poetry
math maths mathematics | raise grow bring upbringing | year yr | day daily | near outside
reside live settle locate base dwell stay | fear afraid scare phobia | car automobile | begin start | buy purchase
help assist | sick ill | rural countryside | tv television | talk chat | move relocate | travel tour | bicycle bike
photo photograph picture | pain ache | lawyer attorney | cook chef | doctor physician | firefighter fireman
police policeman cop | programmer developer coder | teacher instructor | journalist reporter | veterinarian vet
trucker truck | sociable outgoing extroverted gregarious | shy timid bashful | cheerful happy | stubborn headstrong
calm easygoing relaxed | funny humorous witty | smart intelligent clever | inquisitive curious | honest truthful
anxious nervous worried | ambitious driven | brave fearless courageous | organized tidy neat | date relationship
hard difficult | youth young | quiet silent | modest humble | talkative chatty | hardworking diligent industrious
compassionate empathetic | creative imaginative | lazy idle | reliable dependable | frugal thrifty
moody temperamental
"""  # the words of a group have one stem from here on: the commonest words of the ten slots
IRREGULAR = """
taught teach | wrote write | grew grow | grown grow | brought bring | broke break | broken break | drove drive
spoke speak | ran run | left leave | kept keep | made make | bought buy | sold sell | built build | children child
women woman | men man | wives wife | went go | gone go | learnt learn | swam swim | sang sing | slept sleep | does do
going go | became become | lost lose | got get | yrs year | knives knife
"""
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

# ---------------------------------------------------------------------------------------------------------------------
# What makes another statement of the same words

NEGATION = (
    r"\b(?:not?|never|nor|neither|without|nothing|hates?|dislikes?|unable|lacks?|avoids?|detests?|loathes?|despises?"
    r"|far (?:away )?from|waste|bored|boring|tired of|ashamed|issues|problems with|hard to|struggles? to|difficulty"
    r"|terrible|awful)\b"
)
ENDED = (
    r"\b(?:former(?:ly)?|ex|was an?|used to|no longer|once|retire(?:d|ment)|retiring|gave up|quit|stopped|sold|ended"
    r"|broke off|moved away|dropped out|left(?!.hand)|in the past|in (?:his|her|their) youth)\b"
)
WISHED = r"\b(?:wants?|would like to|dreams?|plan(?:s|ning) to|hopes?|wish(?:es)?|some ?day|will)\b"
PAST = r"\b(?:was|were|had|worked|lived|taught|grew up|(?:as|in) (?:a child|childhood))\b"
LESS = re.compile(
    r"\b(?:over|than|instead of|(?:prefer|rather)\w* .* to)\b(?! *\d)(.*)"
)  # what something is preferred to
FROM = re.compile(r"\bfrom (?:(?:the|an?|his|her|their) )?(\w+)")
OPPOSITES = """
introverted extroverted | shy outgoing | old young | older younger | oldest youngest | left right | early late
hard easy | landlord tenant | lend borrow | teach learn | teacher student | buy sell | employer employee
deaf hearing | proud ashamed | give receive | good bad | quiet loud | tall short | religious atheist | rich poor
strong weak | employed unemployed | urban rural | full part | liberal conservative | optimistic pessimistic
morning evening | daytime night | rural urban | vegan vegetarian | lazy hardworking | spring summer autumn winter
indoor outdoor | calm anxious | tidy messy | small big | married divorced single widowed separated engaged
full-time part-time | Monday Tuesday Wednesday Thursday Friday Saturday Sunday
"""  # what an encoder takes for the same
KIN = """brother sister father mother parent wife husband boyfriend girlfriend uncle aunt cousin grandfather
grandmother son daughter boss ancestor"""
LIGHT = """user person people someone individual currently now today very really quite often usually regularly
always also even still already just only ever up out off away self own like job yet say s t re ve d ll m one lot
much many more most such way while each every all any during before after because since though another both other
etc go do get become feel make take put use play try need start want dream hope plan wish prefer rather over than
instead degree consider identify describe him himself herself themselves themself myself name call able kind type
thing sort part regular else everybody everyone anybody anyone habit tend area order time former retired quit stop
no not never without"""  # words that need not be found, and add nothing
CUES = {  # slot → words that may stand around its value, and words that by themselves speak of that slot
    "Age": ("age year old turn birthday yr y o early late twenties thirties sixties", "birthday"),
    "Gender": ("gender identify pronoun", ""),
    "Interests": ("hobby interest weekend into game play spend watch listen read go practice", "like hobby"),
    "Educational Background": (
        "educational education background degree study graduate school university college major train hold earn "
        "complete diploma finish receive attend go level",
        "study degree university graduate school major train attend",
    ),
    "Personality Traits": ("personality trait describe see nature show value tend consider", ""),
    "Occupation": ("practice", "job retire teach sell"),
    "Marital Status": (
        "marital status relationship spouse husband wife last recent happy year month ago",
        "marry divorce",
    ),
    "Family Background": ("family background relative grow home sibling child come", ""),
    "Location": ("location reside home city country town current move", "reside"),
    "Others": ("suffer follow diet pet around condition use need", ""),
}
# slot → words of a line that are neither the value nor around it; 2 elsewhere
MOST_EXTRA = {"Personality Traits": 1, "Age": 0, "Gender": 0, "Marital Status": 1}
