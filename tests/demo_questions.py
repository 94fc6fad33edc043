"""What tests ask the demo model that need real text."""

LONG = """Fill in the total column
lemon: 7 at 5 each
pen: 4 at 3 each
pear: 7 at 2 each
fork: 8 at 9 each
leaf: 7 at 8 each
bowl: 6 at 9 each
Answer:"""
"""Its answer has 49 tokens, so a test that asks for 48 sees three whole canvases."""
SHORT = "Ben has 74 of pan, then buys 22, wins 2, drops 25, wins 3. How many now?\nAnswer:"
"""Its answer has 35."""
OPEN = "The next morning they"
"""No question: the model goes on without being sure of anything, so that every sampling parameter acts. Its text may
end soon; send ``ignore_eos``."""
FIELDS = """guests: Quin Hana Ivan
phone: 18829432
bag: gold nail rope spoon
paint: white silver brown
Write as JSON: guests paint bag
Answer:"""
"""Its answer repeats words of the question, silver among them."""
