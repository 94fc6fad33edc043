"""What tests ask the demo model that need real text."""

LONG = """shelf: brown egg scarf pan brick stone needle wheel
phone: 82378163
guests: Ivan Rosa Gus Eva Sam Tara Ben June
paint: yellow green silver gold blue purple white
route: Tokyo London Cairo Madrid Delhi Rome Quito Lima
Write as JSON: phone paint shelf guests
Answer:"""
"""Its answer has 60 tokens, so a test that asks for 48 sees three whole canvases."""
SHORT = "Ben has 74 of pan, then buys 22, wins 2, drops 25, wins 3. How many now?\nAnswer:"
"""Its answer has 35."""
OPEN = "The next morning they"
"""No question: the model goes on without being sure of anything, so that every sampling parameter acts. Its text may
end soon; send ``ignore_eos``."""
