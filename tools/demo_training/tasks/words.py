"""The words that tasks are made of; the tokenizer is given each of them whole."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = "Ann Ben Cleo Dan Eva Finn Gus Hana Ivan June Kai Lena Max Nora Omar Pia Quin Rosa Sam Tara".split()
THINGS = (
    "apple bean book bowl brick button candle card chair coin cup door egg fig flag fork glove hammer hat jar kettle "
    "key knife lamp leaf lemon map mug nail needle nut orange pan pear pen pin plate plum pot ring rope scarf shell "
    "shoe spoon stamp stone table ticket towel tray wheel"
).split()
COLOURS = "black blue brown gold green grey pink purple red silver white yellow".split()
CITIES = "Berlin Cairo Delhi Lima London Madrid Oslo Paris Quito Rome Seoul Tokyo".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()

ALL = sorted({*NAMES, *THINGS, *COLOURS, *CITIES, *DAYS, *MONTHS})
