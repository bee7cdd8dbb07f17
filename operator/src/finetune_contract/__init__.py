"""What crosses the boundary between operator and pods: paths, settings, environment names and reports.

Standard library only, because both sides import it: the operator, which has no torch, and the trainer, which has no
Kubernetes client.
"""
