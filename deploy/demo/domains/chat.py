"""Short chat: everyday questions with a friendly, regular answer.

Knows nothing of tokens or splits. Invariant: an answer speaks of what the request names.
"""

from random import Random

from deploy.demo.domains.sample import Sample

NAMES = "Mia Tom Ana Ben Lily Sam Eva Max Nora Leo Ruth Ivan Rosa Omar Jane Paul Emma Jack Zoe Adam".split()
HOBBIES = (
    "gardening painting cooking running chess photography sailing knitting hiking cycling drawing swimming "
    "baking fishing dancing singing climbing pottery"
).split()
PLACES = (
    "Paris Rome Oslo Lisbon Vienna Athens Dublin Prague Tokyo Cairo Lima Quebec Geneva Naples Seville Kyoto"
).split()
DISHES = ("soup salad pasta pizza curry stew bread omelette pancakes risotto lasagna dumplings").split()
WEATHER = ("sunny rainy windy snowy cloudy warm cold").split()
MOODS = ("tired happy nervous bored excited sad stressed").split()
DAYS = ("Monday Tuesday Wednesday Thursday Friday Saturday Sunday").split()
SPANS = ("ten minutes", "half an hour", "one hour", "two hours", "an afternoon", "a day")


def sample(rng: Random) -> Sample:
    """One short exchange."""
    request, answer = rng.choice(KINDS)(rng)
    return Sample(request, request, answer)


def _hobby(rng: Random) -> tuple[str, str]:
    name, hobby, span = rng.choice(NAMES), rng.choice(HOBBIES), rng.choice(SPANS)
    request = (
        f"Hello, my name is {name}. I would like to start {hobby} and I have {span} every "
        f"{rng.choice(DAYS)}. How should I begin?"
    )
    answer = (
        f"Hello {name}! It is a great idea to start {hobby}. With {span} to spend, begin with "
        "something simple, "
        "practise a little every week, and do not worry about mistakes. After a month you "
        "will see how much you "
        f"have learned about {hobby}. Good luck, {name}!"
    )
    return request, answer


def _travel(rng: Random) -> tuple[str, str]:
    place, weather, day = rng.choice(PLACES), rng.choice(WEATHER), rng.choice(DAYS)
    request = (
        f"I am going to {place} on {day} and the weather will be {weather}. I like "
        f"{rng.choice(HOBBIES)}. What should I do there?"
    )
    answer = (
        f"{place} is a wonderful place to visit. Since it will be {weather} on {day}, I would "
        "start with a walk "
        "through the old town, have lunch in a small restaurant, and visit a museum in the "
        "afternoon. In the "
        f"evening you can sit outside and enjoy the view. Have a good time in {place}!"
    )
    return request, answer


def _cooking(rng: Random) -> tuple[str, str]:
    dish, span, guests = rng.choice(DISHES), rng.choice(SPANS), rng.randint(2, 9)
    request = (
        f"Can you help me? I have {span} to cook {dish} for {guests} people on "
        f"{rng.choice(DAYS)}. What should I think of?"
    )
    answer = (
        f"Of course! For {dish} for {guests} people, write a list of what you need and buy it "
        "the day before. "
        f"You have {span}, so prepare the vegetables first, then cook the {dish} slowly and taste it often. "
        f"Serve the {dish} while it is hot. I am sure your {guests} guests will like it!"
    )
    return request, answer


def _mood(rng: Random) -> tuple[str, str]:
    name, mood = rng.choice(NAMES), rng.choice(MOODS)
    request = (
        f"Hi, this is {name}. I feel {mood} today, it is {rng.choice(DAYS)} and it is "
        f"{rng.choice(WEATHER)} outside. Do you have an idea for me?"
    )
    answer = (
        f"Hi {name}, thank you for telling me that you feel {mood}. Here is an idea: take a "
        "short break, drink a "
        "glass of water, and spend some time on something that you enjoy. Many people who "
        f"feel {mood} like to "
        f"talk to a friend or to go for a walk. I hope that helps, {name}!"
    )
    return request, answer


def _plan(rng: Random) -> tuple[str, str]:
    first, second = rng.sample(HOBBIES, 2)
    day, span = rng.choice(DAYS), rng.choice(SPANS)
    request = (
        f"Please make a plan for my {day}. I want to do some {first} in the morning and some "
        f"{second} later, for {span} each."
    )
    answer = (
        f"Here is a plan for your {day}:\n1. Have a good breakfast and get ready.\n2. Spend "
        f"{span} on {first}.\n"
        f"3. Have lunch and take a break.\n4. Spend {span} on {second}.\n5. Have dinner and "
        "go to bed early.\n"
        f"Enjoy your {day}!"
    )
    return request, answer


def _gift(rng: Random) -> tuple[str, str]:
    name, hobby, price = rng.choice(NAMES), rng.choice(HOBBIES), rng.choice((10, 20, 30, 40, 50, 80, 100))
    request = (
        f"My friend {name} likes {hobby} and has a birthday on {rng.choice(DAYS)}. What can I buy "
        f"for {price} dollars?"
    )
    answer = (
        f"A good present for {name} is something for {hobby}. For {price} dollars you can "
        "find a nice book about "
        f"{hobby}, a small set of tools, or a ticket for a course. Write a card with a few "
        f"kind words, and {name} "
        f"will be happy about it."
    )
    return request, answer


KINDS = (_hobby, _travel, _cooking, _mood, _plan, _gift)
