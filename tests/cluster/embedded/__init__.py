"""A real Kubernetes on a bare Linux machine, for tests and the demo.

Called through tests/cluster/cluster.py. Standard library only: it runs before any virtual environment exists.
Nothing here may import the product, and nothing may touch a cluster that it did not start.
"""
