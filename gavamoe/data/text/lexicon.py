"""English word lists: what a feature is not and what stands around one; what judges an item, what tells a story."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words(
    """
    a an another any both each every her his its my no our s some such the their these this those whose your
    """
)
"""Come right before a noun, or before its adjectives; "s" is the possessive."""

VERB_CUES = _words(
    """
    also always can could d did do does he i it just ll m may might must never not please re she should t that
    they to ve we which who will would you
    """
)
"""Come right before a verb; "t", "ll", "ve", "d", "m" are what an apostrophe leaves."""

JOINING = _words(
    """
    and but nor or plus yet
    """
)
"""May stand between two adjectives."""

DESCRIBERS = _words(
    """
    amazing attentive authentic awesome awful bad beautiful best better big boring cheap clean cold comfortable
    cozy cute decent delicious different dirty easy entire excellent expensive fantastic fast favorite favourite
    few first free fresh friendly funny good gorgeous great high horrible hot huge impressive incredible
    interesting large last little lovely low many new next nice old only other outstanding overall perfect poor
    quick same second several slow small solid spacious superb tasty terrible unique variety warm whole wonderful
    worse worst
    """
)
"""Adjectives common enough before a noun to be evidence of one."""

OPINIONS = _words(
    """
    adorable affordable annoyed annoying appreciate appreciated attractive average bland bored brilliant broken
    charming cheaply complaint complaints convenient cool correct crappy crazy crowded dead delightful detailed
    disappointed disappointing disappointment disaster disgusting dislike diverse dry easier easiest efficient
    enjoyable exceptional exciting fabulous fail failed familiar fan fancy fans fine flavorful flawless fun gem
    generous genuine glad greasy happier happy hate hated helpful honest ideal impressed indoor inviting joke joy
    junk knowledgeable lame lighter longer lousy love loves luck magical mediocre memorable mess mistake nasty
    neat negative normal odd ok okay outdoor overpriced overrated perfection perfectly pleasant pleased pleasure
    polite positive pretty problem problems professional quiet reasonable recommend relaxing reliable ridiculous
    romantic rude sad satisfied satisfying scam shame sharp shocked shorter sick simple skilled sloppy smoky
    smooth sorry spectacular stunning stupid super sweet talented terrific thoughtful thrilled trouble ugly
    unacceptable unbelievable uncomfortable underwhelming unfamiliar unhappy useful useless vibrant waste wasted
    weak weird welcoming wow yummy
    """
)
"""Words of judgement that are not among DESCRIBERS."""

FUNCTION_WORDS = _words(
    """
    able about above absolutely across actually add added adds after again against ago ain alike all allowed
    almost along already although am among amongst amp and anyone anything anytime anyway anywhere apparently are
    aren around arrive arrived arriving as ask asked at ate attached available away back basically be became
    because become been before behind being below beneath beside besides between beyond big bit bless bought br
    bring brought but buy buying by call called came certain certainly choose chose chosen clearly closer com come
    comes coming compared completely couldn couple credited currently deep definitely delivers despite didn
    different doesn don done down drink drinking due during early easily eat eating eight either else enjoy
    enjoyed enjoying enjoys enough ensure ensures enthusiast enthusiasts entire entirely especially etc even ever
    everybody everyone everything exactly exceeded extra extremely fairly far feel feels felt few finally find
    first five for found four from full fully further gave generally get gets getting give given gives giving go
    goes going gone got had hadn half has hasn have haven having help helps hence here hers herself high highly
    him himself honestly how however http https if immediately in inc include included includes including indicate
    indicates inside instead intended into is isn itself joe john keep kept kind knew know known lack laid large
    last late lately later least leave led left less let lets like liked likely literally little live long look
    looked looking looks lot lots loved lover lovers low made main make makes making many maybe me mean means mine
    more most mostly mr mrs much multiple myself nbsp near nearly need needed needs neither new next nine nobody
    non none nor normally nothing now obviously of off offer offered offering offers often old on once one ones
    online only onto open or order ordered ordering other others otherwise ought ours ourselves out outside over
    own paid particular particularly past pay per perhaps picked played playing plus possible possibly pre
    previous probably provide provided provides providing purchase purchased purchasing put quick quickly quite
    quot rarely rather read reading ready real really receive received receiving recent recently recommend
    recommended redeem redeemed regular remind reminds reminiscent right said same saw say says second see seem
    seemed seems seen self send sending sent seriously serve served serves serving seven several short shouldn
    simply since single six slightly small so somebody someone something sometimes soon sort special started stay
    stayed still sure surely take taken takes taking tasted tell ten than thank thanks them themselves then there
    therefore thin think third though thought three through throughout thus together told too took top totally
    toward towards tried true truly try trying turned twice two under unfortunately unless until up upon us use
    used uses using usually various very via visit visited wait waited waiting want wanted wants was wasn watch
    watched well went were weren what when whenever where whereas wherever whether while whole whom why wish with
    within without won wont work worked working works worth worthwhile wouldn wrong www yes yet yours yourself
    """
)
"""Prepositions, auxiliaries, adverbs, numbers and the commonest verbs."""

VAGUE_NOUNS = _words(
    """
    afternoon amount answer anyone april august aunt baby beginning boy boyfriend boys brother business businesses
    case cents child children choice choices cousin customer customers dad daughter day days deal december dollar
    dollars end evening everyone example experience experiences fact family father february folks friday friend
    friends girl girlfriend girls grandchildren granddaughter grandkids grandma grandson guy guys hand hands head
    hour hours husband idea issue issues item items january july june kid kids level life line list man march
    matter max may men middle minute minutes mom moment monday month months morning mother name need needs nephew
    nephews niece nieces night nights november number october opinion option options parents part parts people
    percent person place places point product products question questions range rating ratings reason reasons rest
    review reviewer reviewers reviews saturday september side sister someone son spot spots star stars stuff
    sunday thing things thursday time times today tomorrow total tuesday type types uncle use user users way ways
    wednesday week weekend weeks while wife woman women word words world year years yesterday
    """
)
"""Nouns that are no aspect of an item: time, people, quantities, the review itself."""

STOP_WORDS = DETERMINERS | VERB_CUES | JOINING | FUNCTION_WORDS
NEVER_FEATURES = STOP_WORDS | DESCRIBERS | OPINIONS | VAGUE_NOUNS

POSITIVE = _words(
    """
    accurate adorable affordable amazing amazingly appreciate attentive attractive authentic awesome beautiful
    beautifully best better brilliant catchy charming clean clever comfortable comfy convenient convincing cool cozy
    crisp cute decent delicate delicious delight delightful durable earned ease easier easiest easily easy effective
    efficient elegant enjoy enjoyable enjoyed enjoys excellent exceptional exciting exquisite fabulous fantastic
    fast favorite favourite fine flavorful flawless flawlessly fresh friendly fun funny gem generous genuine glad
    good gorgeous great handy happier happy helpful ideal impressed impressive incredible intelligent interesting
    inviting knowledgeable likable liked love loved lovely loves luscious magical magnificent masterpiece memorable
    neat nice nicely outstanding perfect perfection perfectly phenomenal pleasant pleasantly pleased pleasing
    pleasure polite powerful quick quickly quiet reasonable recommend recommended refreshing reliable rich robust
    romantic satisfied satisfying sharp silky skilled smart smooth smoothly solid spacious spectacular spotless
    stellar stunning sturdy sublime super superb superior sweet talented tasty tender terrific thoughtful thrilled
    useful velvety versatile vibrant warm welcoming witty wonderful wonderfully worth worthwhile worthy wow yummy
    """
)
"""Words of praise, whatever the item; "dry", "long" and the like, which are praise of some items, are left out."""

NEGATIVE = _words(
    """
    annoyed annoying artificial average avoid awful bad bland boring breaks broke broken buzzing cheaply cheesy
    chemical cliched cloying clumsy complain complained complaint complaints confused confusing cracked crap crappy
    defective difficult dirty disappoint disappointed disappointing disappointingly disappointment disaster
    disgusting dislike distorted downside drawback dreadful dull fail failed fails failure flawed flimsy forgettable
    generic greasy harsh hate hated hopeless horrible impossible issue issues junk lack lacking lackluster lacks
    lame lifeless loose lousy lukewarm mediocre meh mess messy metallic mistake muddy muffled nasty negative
    negatives noisy overcooked overpriced overrated overwhelmed pathetic pointless poor poorly predictable problem
    problems refund regret ridiculous rough rubbish rude ruined sad scam scratched shallow shame shortcomings sloppy
    slow soapy soggy stale stiff strange stupid sucks tedious terrible thin tinny ugly unacceptable unbalanced
    uncomfortable underwhelming unfit unfortunate unfortunately unhappy unimpressive uninspired unpleasant
    unremarkable unusable upset useless waste wasted watery weak weird wooden worn worse worst wrong
    """
)
"""Words of blame, whatever the item."""

NEGATIONS = _words("barely cannot hardly neither never no nor not nothing scarcely t without")
"""Turn the judgement of the next words around; "t" is what "don't" leaves."""

FIRST_PERSON = _words("i me mine my myself our ours ourselves us we")

STORY_WORDS = _words(
    """
    ago amazon anniversary asked aunt bought boyfriend brother buddies buddy christmas cousin coworkers dad daughter
    decided drove ebay emailed family father flew friend friends gave girlfriend grandchildren granddaughter
    grandkids grandma grandmother grandson husband kid kids mom mother neighbor nephew niece ordered owned parents
    purchased rated received returned review reviewer reviewers reviews roommate roommates seller shipped shipping
    sister son stars thank thanks told traded uncle visited waited wanted went wife yesterday
    """
)
"""Around the item: whom it was for, how it was got, what was done with it."""

OPINION_VERBS = _words(
    """
    adore appreciate detect dislike enjoy enjoyed feel felt find found hate hated hear like liked love loved notice
    prefer recommend smell taste think
    """
)
"""After "I", what is said is about the item rather than the writer."""

CONNECTIVES = _words("after also although and because but however if or otherwise since so then therefore though when")
"""Begin sentences that lean on the one before, advice ("if you ...") and stories ("when we arrived")."""

ITEM_OPENINGS = _words("it its the these they this")
"""Begin sentences that are about the item more often than others."""

LINK_WORDS = _words("com http https www")
