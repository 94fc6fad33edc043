"""Why was I refused? Everything that can refuse a user, in the order in which a user meets it.

- ``cli_flag.py``: ``--diffusion``, its JSON, and the flag on another model
- ``checkpoint_checks.py``: the checkpoint's ``config.json`` and shards, before anything is started
- ``startup_rules.py``: settings of vLLM's that cannot be combined with this model, a rule each
- ``request_checks.py``: a request's settings, parameters and prompt, each a 400

Which values an option or a setting takes is in ``config.py``. ``registration.py`` hands all of these to vLLM.
"""
