"""Mixtures of experts: routers, selections, balancing, dispatch and the experts themselves."""
