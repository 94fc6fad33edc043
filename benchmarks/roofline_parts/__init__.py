"""What the roofline and the policy benchmark count: GPUs, forwards, passes per canvas, throughput."""
