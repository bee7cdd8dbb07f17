"""The program that runs in a job's pods: prepare, train, promote, evaluate, serve."""
