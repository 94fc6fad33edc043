"""What the roofline and the policy benchmark add to ``vllm_twotower.planning``: published runs, rounds of drafts."""
