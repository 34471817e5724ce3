"""One job in, one evaluation out: training, latency, FLOPs, memory, causality and routing."""
