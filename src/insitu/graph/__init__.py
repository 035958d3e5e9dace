"""The recorded experiment: nodes, proxies, the operation registry and shapes."""
